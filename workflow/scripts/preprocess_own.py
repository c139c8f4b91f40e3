"""Turn files of one's own, texts with labels, into a task: train, dev and test, with a manifest.

    python preprocess_own.py --task tickets --config JSON --output-dir data/lra/tickets

JSON: {"caps": {"train": int|null, ...}, "max_length": int, "options": {"files": {"train": "tickets.csv",
"test": "test.csv", "dev": "dev.csv"}, "text_column": "text", "label_column": "label"}}. Files are .csv, .tsv (both with
a header), .jsonl or .parquet; without dev, a tenth of train is dev, the same one as for the task text.

Labels are numbers or words; their classes are those of train, in order, and stand in the manifest. Encoding, caps and
files are those of the task text. A whole file is held in memory.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from lra.encode import encode_text
from lra.files import parse_json, require, run_script, sha256_file
from lra.readers import ROWS_PER_READ, Refused, batch_of
from preprocess import BYTES, SPLITS, Batches, say, write_task

MOST_CLASSES = 256  # labels are stored as bytes
DELIMITERS = {".csv": ",", ".tsv": "\t"}


def preprocess_own(task: str, config: dict, output_dir: Path) -> dict:
    """Write {train,dev,test}.arrow and manifest.json; returns the manifest. ValueError names file, column or row."""
    options, max_length = config["options"], config["max_length"]
    files = {
        split: require(
            Path(options["files"][split]), f"you: it is the {split} file of task {task}, and"
        )
        for split in SPLITS
        if options["files"].get(split)
    }
    rows = {
        split: read_rows(path, options["text_column"], options["label_column"])
        for split, path in files.items()
    }
    classes = sorted(
        {label for _, label in rows["train"] if label},
        key=lambda label: (
            not label.lstrip("-").isdigit(),
            int(label) if label.lstrip("-").isdigit() else 0,
            label,
        ),
    )
    if not 2 <= len(classes) <= MOST_CLASSES:
        raise ValueError(
            f"{files['train']}: column {options['label_column']!r} has {len(classes)} different labels, expected "
            f"2 to {MOST_CLASSES}"
        )
    described = {
        "data": "own",
        "input_type": "text",
        "num_classes": len(classes),
        "vocab_size": 257,
        "max_length": max_length,
        "options": options,
        "classes": classes,
        "sources": [
            {
                "name": path.name,
                "sha256": sha256_file(path),
                "bytes": path.stat().st_size,
                "data": "own",
            }
            for path in files.values()
        ],
    }

    def open_splits() -> tuple[Batches, dict[str, Refused]]:
        refused = {split: Refused() for split in SPLITS}
        return {
            split: encoded(rows[split], classes, max_length, path.name, refused[split])
            for split, path in files.items()
        }, refused

    schema = pa.schema([("input_ids_0", BYTES), ("label", pa.uint8())])
    caps = {split: (config.get("caps") or {}).get(split) for split in SPLITS}
    return write_task(task, schema, open_splits, caps, described, output_dir)


def read_rows(path: Path, text_column: str, label_column: str) -> list[tuple[bytes, str]]:
    """(text, label) of every row, empty where it has none. ValueError names the file and what is wrong with it."""
    suffix = path.suffix.lower()
    try:
        if suffix in DELIMITERS:
            table = pa.csv.read_csv(
                path,
                parse_options=pa.csv.ParseOptions(
                    delimiter=DELIMITERS[suffix], newlines_in_values=suffix == ".csv"
                ),
                convert_options=pa.csv.ConvertOptions(
                    column_types={text_column: pa.binary(), label_column: pa.string()},
                ),
            )
        elif suffix == ".jsonl":
            table = pa.json.read_json(path)
        elif suffix == ".parquet":
            table = pa.parquet.read_table(path)
        else:
            raise ValueError(
                f"expected .csv, .tsv, .jsonl or .parquet, found {suffix or 'no ending'}"
            )
        columns = table.column_names
        texts, labels = (
            table[column].to_pylist() if column in columns else None
            for column in (text_column, label_column)
        )
    except FileNotFoundError:
        raise
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None
    for column, values in ((text_column, texts), (label_column, labels)):
        if values is None:
            raise ValueError(f"{path}: no column {column!r}; it has {', '.join(columns)}")
    for row, text in enumerate(texts, 1):
        if not isinstance(text, str | bytes | None):
            raise ValueError(f"{path}: row {row}: {text_column} is {text!r:.40}, expected a text")
    return [
        (
            text.encode() if isinstance(text, str) else text or b"",
            "" if label is None else str(label).strip(),
        )
        for text, label in zip(texts, labels, strict=True)
    ]


def encoded(
    rows: list[tuple[bytes, str]], classes: list[str], max_length: int, name: str, refused: Refused
) -> Iterator[pa.RecordBatch]:
    """Batches of the rows that can be used; the others are noted by their number, from 1."""
    numbers = {label: index for index, label in enumerate(classes)}
    texts, labels = [], []
    for row, (text, label) in enumerate(rows, 1):
        if not text:
            refused.add(name, row, "no text")
        elif label not in numbers:
            refused.add(name, row, f"label {label!r} is none of train's" if label else "no label")
        else:
            texts.append(text)
            labels.append(numbers[label])
    for start in range(0, len(texts), ROWS_PER_READ):
        part = slice(start, start + ROWS_PER_READ)
        yield batch_of(np.array(labels[part]), encode_text(texts[part], max_length))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True)
    parser.add_argument("--config", required=True, help="caps, max_length and options, JSON")
    parser.add_argument("--output-dir", required=True, type=Path, help="data/<run>/<task>")
    args = parser.parse_args()
    say(preprocess_own(args.task, parse_json(args.config, "--config"), args.output_dir))


if __name__ == "__main__":
    run_script(main)
