"""Show what preprocessing made of a task: rows, labels, lengths and one example, decoded.

python inspect_data.py data/lra/listops [--split train] [--row 0]
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
from lra.arrow import input_columns, read_arrow, values_and_offsets
from lra.encode import decode_listops, decode_text
from lra.files import read_json, run_script

SPLITS = ("train", "dev", "test")
SHADES = " .:-=+*#%@"


def inspect(folder: Path, split: str, row: int) -> str:
    """A report of some twenty lines; ValueError when there is no such row."""
    manifest = read_json(folder / "manifest.json")
    facts = manifest["splits"]
    lines = [f"{manifest['task']} ({manifest['data']}), options {manifest['options']}"]
    for name in SPLITS:
        about = facts[name]
        counts = about["label_counts"]
        balance = "  ".join(f"{label}: {n / about['rows']:.1%}" for label, n in counts.items())
        lengths = input_lengths(folder / about["file"])
        percentiles = np.percentile(lengths, [0, 25, 50, 75, 100]).astype(int).tolist()
        lines += [
            f"{name}: {about['rows']:,} rows, {about['num_refused']:,} refused",
            f"  labels {balance}",
            f"  length, percentiles 0 25 50 75 100: {percentiles}",
        ]
    if not 0 <= row < facts[split]["rows"]:
        raise ValueError(
            f"{folder}: {split} has the rows 0 to {facts[split]['rows'] - 1}, not {row}"
        )
    example = find_row(folder / facts[split]["file"], row)
    lines.append(f"{split}, row {row}, label {example['label'][0].as_py()}:")
    for name in input_columns(example.schema):
        ids = np.array(example[name][0].as_py())
        lines.append(f"{name}: {decode(ids, manifest)}")
    return "\n".join(lines)


def input_lengths(path: Path) -> np.ndarray:
    """The number of ids of every input of a file."""
    lengths = [
        np.diff(values_and_offsets(batch[name])[1])
        for batch in read_arrow(path)
        for name in input_columns(batch.schema)
    ]
    return np.concatenate(lengths)


def find_row(path: Path, row: int) -> pa.RecordBatch:
    """One row as a record batch."""
    for batch in read_arrow(path):
        if row < batch.num_rows:
            return batch.slice(row, 1)
        row -= batch.num_rows
    raise ValueError(f"{path} has fewer rows than its manifest says: make it again")


def decode(ids: np.ndarray, manifest: dict) -> str:
    """Text, symbols, or an image in shades of characters."""
    if manifest["task"] == "listops":
        return decode_listops(ids)
    if manifest["input_type"] == "text":
        return decode_text(ids).decode(errors="replace")
    side = round(len(ids) ** 0.5)
    shades = np.array(list(SHADES))[ids * len(SHADES) // 256]
    return "\n" + "\n".join("".join(np.repeat(line, 2)) for line in shades.reshape(side, side))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="data/<run>/<task>")
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--row", type=int, default=0)
    args = parser.parse_args()
    print(inspect(args.folder, args.split, args.row))


if __name__ == "__main__":
    run_script(main)
