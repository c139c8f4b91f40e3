"""Small processed tasks for tests, in the layout that workflow/scripts/preprocess.py writes."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from sat import seal

KINDS = {
    "listops": {"num_classes": 10, "vocab_size": 16, "padding_id": 0, "ids": pa.uint8()},
    "text": {"num_classes": 2, "vocab_size": 257, "padding_id": 0, "ids": pa.uint8()},
    "retrieval": {"num_classes": 2, "vocab_size": 257, "padding_id": 0, "ids": pa.uint8()},
    "image": {"num_classes": 10, "vocab_size": 256, "padding_id": None, "ids": pa.uint8()},
    "pathfinder": {"num_classes": 2, "vocab_size": 256, "padding_id": None, "ids": pa.uint8()},
}


def write_processed(
    folder: Path, task: str, splits: dict, *, width: int = -1, chunk: int = 100
) -> None:
    """splits: name -> (rows, labels) or (rows, labels, rows of the second input); width: of fixed-size rows."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = KINDS[task]
    offset = int(kind["vocab_size"] == 257)
    manifest = {
        "schema_version": 1,
        "task": task,
        "data": "generated",
        "num_inputs": max(len(split) - 1 for split in splits.values()),
        "num_classes": kind["num_classes"],
        "vocab_size": kind["vocab_size"],
        "max_length": max(len(row) for split in splits.values() for row in split[0]),
        "padding_id": kind["padding_id"],
        "id_offset": offset,
        "options": {},
        "splits": {},
        "sources": [],
    }
    for name, (rows, labels, *others) in splits.items():
        ids = pa.list_(kind["ids"], width)
        columns = {
            f"input_ids_{index}": pa.array([[i - offset for i in row] for row in column], ids)
            for index, column in enumerate([rows, *others])
        }
        table = pa.table(columns | {"label": pa.array(labels, pa.uint8())})
        path = folder / f"{name}.arrow"
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=chunk)
        counts = {str(label): labels.count(label) for label in sorted(set(labels))}
        manifest["splits"][name] = {
            "file": path.name,
            "rows": len(rows),
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "label_counts": counts,
        }
    (folder / "manifest.json").write_text(json.dumps(seal.add(manifest)))


def repeated_symbol(task: str, sizes: dict[str, int], length: int, seed: int = 0) -> dict:
    """Splits of an easy task: the label is the class whose symbol fills the end of the row."""
    classes = KINDS[task]["num_classes"]
    rng = np.random.default_rng(seed)

    def rows_of(labels):
        noise = rng.integers(classes + 1, KINDS[task]["vocab_size"], (len(labels), length))
        noise[:, -6:] = np.asarray(labels)[:, None] + 1
        if KINDS[task]["padding_id"] is None:
            return noise.tolist()
        return [row[rng.integers(0, length - 8) :].tolist() for row in noise]

    splits = {}
    for name, count in sizes.items():
        labels = rng.integers(0, classes, count).tolist()
        splits[name] = (rows_of(labels), labels)
        if task == "retrieval":
            splits[name] += (rows_of(labels),)
    return splits
