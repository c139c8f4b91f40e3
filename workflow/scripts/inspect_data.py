"""Show what preprocessing made of a task: rows, labels, lengths and one example, decoded.

    python inspect_data.py data/lra/listops [--split train] [--row 0] [--png FILE]

--png writes the example's image, eight times enlarged; without it an image is printed in shades of characters.
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


def inspect(folder: Path, split: str, row: int, png: Path | None = None) -> str:
    """A report of some twenty lines; ValueError when there is no such row, or `png` but no image."""
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
        values = np.array(example[name][0].as_py(), np.uint8)
        if png:
            write_png(values, manifest, png)
            lines.append(f"{name}: {png}")
        else:
            lines.append(f"{name}: {decode(values, manifest)}")
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


def decode(values: np.ndarray, manifest: dict) -> str:
    """Text, symbols, or an image in shades of characters, from a row's values in the Arrow file."""
    if manifest["task"] == "listops":
        return decode_listops(values)
    if manifest["input_type"] == "text":
        return decode_text(values).decode(errors="replace")
    shades = np.array(list(SHADES))[values.astype(int) * len(SHADES) // 256]
    return "\n" + "\n".join("".join(np.repeat(line, 2)) for line in square(shades))


def write_png(values: np.ndarray, manifest: dict, path: Path) -> None:
    """The image of a row, each pixel eight by eight."""
    if manifest["input_type"] != "image":
        raise ValueError(f"--png: the task {manifest['task']} has no images")
    from PIL import Image

    pixels = square(values).repeat(8, 0).repeat(8, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="PNG")


def square(values: np.ndarray) -> np.ndarray:
    side = round(len(values) ** 0.5)
    return values.reshape(side, side)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="data/<run>/<task>")
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--row", type=int, default=0)
    parser.add_argument("--png", type=Path, help="file for the image of the example")
    args = parser.parse_args()
    print(inspect(args.folder, args.split, args.row, args.png))


if __name__ == "__main__":
    run_script(main)
