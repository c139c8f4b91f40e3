"""Write a processed task in the layout of other programs. Nothing in this project reads these files.

    python export.py data/lra/image --format skyformer --output exports/skyformer
    python export.py data/lra/image --format huggingface --output exports/image

skyformer: lra-<task>.{train,dev,test}.pickle in the output folder, as the programs of Skyformer and SAT load them: a
list of dictionaries with `input_ids_0` (retrieval: and `input_ids_1`), int32 of the model's length, 0 behind the end
of a text, and `label`. Any NumPy from 1.16 on reads them. They are several times as large as the Arrow files.

huggingface: a new folder for datasets.load_from_disk, a DatasetDict with the splits train, dev and test; rows have
their own length.

The original programs number the symbols of ListOps in an order that changes with every process; here it is the
manifest's (`symbols`), so their model sizes fit but not their trained weights.
"""

import argparse
import io
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from lra.arrow import input_columns, read_arrow, values_and_offsets
from lra.files import progress, read_json, run_script, scratch_folder, write_json

SPLITS = ("train", "dev", "test")
MARK, APPENDS, STOP = b"(", b"e", b"."
PICKLE_OF_EMPTY_LIST = b"\x80\x03]"  # protocol 3: the first for Python 3, and without frames


def export(folder: Path, kind: str, output: Path) -> None:
    """Write the task in `folder` (data/<run>/<task>) to `output`; ValueError, and nothing new, on failure."""
    manifest = read_json(folder / "manifest.json")
    if kind == "huggingface" and output.exists():
        raise ValueError(f"{output} exists: remove it, or export to another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(output.parent / f".{output.name}.tmp") as scratch:
        write = {"skyformer": write_skyformer, "huggingface": write_huggingface}[kind]
        write(folder, manifest, scratch)
        if kind == "huggingface":
            os.rename(scratch, output)
            return
        output.mkdir(exist_ok=True)
        for path in sorted(scratch.iterdir()):
            os.replace(path, output / path.name)


# ---------------------------------------------------------------- Skyformer


def write_skyformer(folder: Path, manifest: dict, output: Path) -> None:
    """One pickle a split, a row at a time: a whole list of them would need many gigabytes of memory."""
    # The length that the models pad to: the next power of two.
    length = 1 << (manifest["max_length"] - 1).bit_length()
    for split in SPLITS:
        name = f"lra-{manifest['task']}.{split}.pickle"
        with open(output / name, "wb") as file, progress(name, "rows") as add:
            file.write(PICKLE_OF_EMPTY_LIST)
            for batch in read_arrow(folder / manifest["splits"][split]["file"]):
                file.write(MARK)
                for row in padded_rows(batch, length, manifest["id_offset"]):
                    file.write(pickled_row(row))
                file.write(APPENDS)
                add(batch.num_rows)
            file.write(STOP)


def padded_rows(batch: pa.RecordBatch, length: int, id_offset: int) -> Iterator[dict]:
    """The rows of a batch with ids as int32 [length]."""
    columns = {name: values_and_offsets(batch[name]) for name in input_columns(batch.schema)}
    for index, label in enumerate(batch["label"].to_pylist()):
        row = {}
        for name, (values, offsets) in columns.items():
            ids = values[offsets[index] : offsets[index + 1]]
            row[name] = np.zeros(length, np.int32)
            row[name][: len(ids)] = ids
            row[name][: len(ids)] += id_offset
        yield row | {"label": label}


def pickled_row(row: dict) -> bytes:
    """The row as it stands within the pickle of a list."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=3)
    pickler.fast = True  # no memo: its numbers would run through the whole list
    pickler.dump(row)
    # Without the header and the STOP; and by the name that NumPy 1 and 2 know.
    body = buffer.getvalue()[2:-1]
    return body.replace(b"cnumpy._core.", b"cnumpy.core.", len(row) - 1)


# ---------------------------------------------------------------- Hugging Face


def write_huggingface(folder: Path, manifest: dict, output: Path) -> None:
    """A folder a split: an Arrow stream, its features, and which file it is."""
    for split in SPLITS:
        target = output / split
        target.mkdir()
        source = folder / manifest["splits"][split]["file"]
        file = "data-00000-of-00001.arrow"
        with pa.OSFile(str(source)) as opened:
            schema = pa.ipc.open_file(opened).schema
        if manifest["id_offset"]:
            for name in input_columns(schema):
                field = pa.field(name, pa.list_(pa.uint16()))
                schema = schema.set(schema.get_field_index(name), field)
        with pa.ipc.new_stream(target / file, schema) as writer:
            for batch in read_arrow(source):
                columns = [
                    shifted(batch[name], manifest["id_offset"])
                    if name != "label" and manifest["id_offset"]
                    else batch[name]
                    for name in schema.names
                ]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        features = {field.name: feature_of(field.type) for field in schema}
        write_json(target / "dataset_info.json", {"features": features})
        state = {
            "_data_files": [{"filename": file}],
            "_fingerprint": manifest["splits"][split]["sha256"][:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        write_json(target / "state.json", state)
    write_json(output / "manifest.json", manifest)
    # Not sorted: the order of the splits is theirs.
    (output / "dataset_dict.json").write_text(json.dumps({"splits": list(SPLITS)}))


def shifted(column: pa.Array, id_offset: int) -> pa.ListArray:
    """The ids of a column of texts, list<uint16>."""
    values, offsets = values_and_offsets(column)
    ids = np.add(values, id_offset, dtype=np.uint16)
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(ids))


def feature_of(kind: pa.DataType) -> dict:
    """What `datasets` calls a column of this type."""
    if not pa.types.is_nested(kind):
        return {"dtype": str(kind), "_type": "Value"}
    length = kind.list_size if pa.types.is_fixed_size_list(kind) else -1
    return {"feature": feature_of(kind.value_type), "length": length, "_type": "Sequence"}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="data/<run>/<task>")
    parser.add_argument("--format", required=True, choices=["skyformer", "huggingface"])
    parser.add_argument("--output", required=True, type=Path, help="folder to write to")
    args = parser.parse_args()
    export(args.folder, args.format, args.output)


if __name__ == "__main__":
    run_script(main)
