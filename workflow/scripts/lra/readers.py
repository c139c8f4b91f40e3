"""Readers of the five tasks' raw files: batches of encoded rows, in bounded memory.

A reader yields Arrow record batches with the columns input_ids_0 (retrieval: and input_ids_1) and label,
and notes what it refuses. Only the two tasks that TFDS packs (text, image) import TensorFlow.
"""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from .encode import (
    LISTOPS_FAULTS,
    encode_images,
    encode_listops,
    encode_text,
    to_gray,
    to_lists,
)
from .order import tfds_order
from .tfds_folder import import_tfds

READ_BYTES = 1 << 20
ROWS_PER_READ = 1024
MAX_NOTED = 20

# The splits of LRA's own TFDS form of Pathfinder; their names are the salt of the order.
PATHFINDER_SALTS = {
    "curv_baseline": "easy",
    "curv_contour_length_9": "intermediate",
    "curv_contour_length_14": "hard",
}


class Refused:
    """Rows that were left out: all are counted, the first MAX_NOTED are kept with their reason."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[dict] = []

    def add(self, file: str, line: int | None, reason: str) -> None:
        self.count += 1
        if len(self.first) < MAX_NOTED:
            self.first.append({"file": file, "line": line, "reason": reason})


def batch_of(labels: np.ndarray, *inputs: pa.Array) -> pa.RecordBatch:
    """A record batch of the inputs, input_ids_0 first, and their labels."""
    names = [f"input_ids_{index}" for index in range(len(inputs))] + ["label"]
    return pa.record_batch([*inputs, pa.array(np.asarray(labels, np.uint8))], names=names)


def require(path: Path, step: str) -> Path:
    """The path, if it exists; ValueError says which step makes it."""
    if not path.exists():
        raise ValueError(f"{path} is missing: {step} makes it")
    return path


def read_listops(
    path: Path, max_length: int, brackets: bool, refused: Refused
) -> Iterator[pa.RecordBatch]:
    """Rows of one basic_<split>.tsv."""
    with open(require(path, "extract.py"), "rb") as file:
        header = file.readline()
        if header.rstrip(b"\r\n") != b"Source\tTarget":
            raise ValueError(
                f"{path}:1: expected the header Source<TAB>Target, found {header[:60]!r}"
            )
        line = 2
        while lines := file.read(READ_BYTES):
            lines += file.readline()
            if not lines.endswith(b"\n"):
                lines += b"\n"
            ids, lengths, labels, faults = encode_listops(lines, max_length, brackets)
            for index in np.flatnonzero(faults):
                refused.add(path.name, line + int(index), LISTOPS_FAULTS[faults[index]])
            line += len(faults)
            good = faults == 0
            yield batch_of(labels[good], to_lists(ids, lengths[good]))


def read_retrieval(path: Path, max_length: int, refused: Refused) -> Iterator[pa.RecordBatch]:
    """Pairs of one new_aan_pairs.<split>.tsv: label, id1, id2, text1, text2, no header, no quoting."""
    labels_of = {b"0": 0, b"1": 1, b"0.0": 0, b"1.0": 1}
    labels: list[int] = []
    texts: tuple[list[bytes], list[bytes]] = ([], [])
    with open(require(path, "extract.py"), "rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.removesuffix(b"\n").removesuffix(b"\r").split(b"\t", 4)
            if len(fields) < 5:
                refused.add(path.name, number, f"expected 5 fields, found {len(fields)}")
                continue
            label = labels_of.get(fields[0])
            if label is None:
                refused.add(path.name, number, "label is not 0 or 1")
                continue
            labels.append(label)
            texts[0].append(fields[3][:max_length])
            texts[1].append(fields[4][:max_length])
            if len(labels) == ROWS_PER_READ:
                yield batch_of(labels, *(encode_text(text, max_length) for text in texts))
                labels, texts = [], ([], [])
    if labels:
        yield batch_of(labels, *(encode_text(text, max_length) for text in texts))


def tfds_batches(folder: Path, split: str, rows: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of a prepared TFDS data set in the order of its records."""
    require(folder / "dataset_info.json", "prepare_tfds.py")
    tfds = import_tfds()
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    builder = tfds.builder_from_directory(folder)
    dataset = builder.as_dataset(split=split, shuffle_files=False, read_config=config)
    yield from dataset.batch(rows).prefetch(2).as_numpy_iterator()


def read_text(
    folder: Path, split: str, max_length: int, refused: Refused
) -> Iterator[pa.RecordBatch]:
    """Reviews of a TFDS data set with the features text and label (0 or 1)."""
    line = 1
    for rows in tfds_batches(folder, split, ROWS_PER_READ):
        good = good_labels(rows["label"], 2, f"{folder.parent.name} {split}", line, refused)
        line += len(good)
        texts = [text for text, ok in zip(rows["text"].tolist(), good, strict=True) if ok]
        yield batch_of(rows["label"][good], encode_text(texts, max_length))


def read_image(folder: Path, split: str, refused: Refused) -> Iterator[pa.RecordBatch]:
    """Gray images of a TFDS data set with the features image (RGB) and label (0 to 9)."""
    line = 1
    for rows in tfds_batches(folder, split, ROWS_PER_READ):
        good = good_labels(rows["label"], 10, f"{folder.parent.name} {split}", line, refused)
        line += len(good)
        yield batch_of(rows["label"][good], encode_images(to_gray(rows["image"][good])))


def good_labels(
    labels: np.ndarray, num_classes: int, name: str, line: int, refused: Refused
) -> np.ndarray:
    """bool [n]: where the label is one; the others are noted under their record number."""
    good = (labels >= 0) & (labels < num_classes)
    for index in np.flatnonzero(~good):
        refused.add(name, line + int(index), f"label {labels[index]} is not below {num_classes}")
    return good


class PathfinderLevel:
    """One level of Pathfinder in its tar: where its images lie, their labels and their splits.

    `splits[name]` are the examples (indices) of a split in TFDS order; `refused[name]` what the split
    lost. The memory needed is some 200 bytes an example.
    """

    def __init__(self, path: Path, level: str, salt: str) -> None:
        require(path, "extract.py")
        self.path = path
        files = index_tar(path)
        self.files: list[tuple[int, int]] = []
        self.names: list[tuple[str, int]] = []
        labels: list[int] = []
        keys: list[str] = []
        faults: dict[int, str] = {}
        metadata = [name for name in files if name.startswith("metadata/")]
        for name in sorted(metadata, key=lambda name: int(Path(name).stem)):
            for number, line in enumerate(self.read_lines(name, *files[name]), 1):
                fields = line.split()
                fault = None
                if len(fields) < 4:
                    fault = f"expected at least 4 fields, found {len(fields)}"
                elif fields[3] not in ("0", "1"):
                    fault = f"label {fields[3]!r} is not 0 or 1"
                elif (image := f"{fields[0]}/{fields[1]}") not in files:
                    fault = f"image {image} is not in the archive"
                elif files[image][1] == 0:
                    fault = f"image {image} is empty"
                if fault:
                    faults[len(keys)] = fault
                self.files.append((0, 0) if fault else files[image])
                labels.append(0 if fault else int(fields[3]))
                keys.append("_".join([*fields[:2], str(number)]))
                self.names.append((f"{level}/{name}", number))
        if not keys:
            raise ValueError(f"{path} lists no examples: its metadata files are empty")
        self.labels = np.array(labels, np.uint8)
        usable = np.ones(len(keys), bool)
        usable[list(faults)] = False
        order = tfds_order(keys, salt)
        # Shares of the usable rows, as TFDS never saw the others; a refused row belongs to the
        # split in which its turn comes.
        rank = np.cumsum(usable[order]) - usable[order]
        edges = [round(usable.sum() * share) for share in (0.8, 0.9)]
        split_of = np.searchsorted(edges, rank, side="right")
        self.splits: dict[str, np.ndarray] = {}
        self.refused: dict[str, Refused] = {}
        for index, name in enumerate(("train", "dev", "test")):
            rows = order[split_of == index]
            self.splits[name] = rows[usable[rows]]
            self.refused[name] = Refused()
            for row in rows[~usable[rows]]:
                self.refused[name].add(*self.names[row], faults[int(row)])

    def read_lines(self, name: str, offset: int, size: int) -> list[str]:
        """Lines of a metadata file: text, whatever the suffix .npy says."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if data.startswith(b"\x93NUMPY"):
            raise ValueError(f"{self.path}: {name} is a binary NumPy file, expected lines of text")
        return data.decode(errors="replace").splitlines()

    def read(self, split: str, side: int) -> Iterator[pa.RecordBatch]:
        """Images of a split, in its order."""
        rows = self.splits[split]
        with open(self.path, "rb") as file:
            for start in range(0, len(rows), ROWS_PER_READ):
                images, labels = [], []
                for row in rows[start : start + ROWS_PER_READ].tolist():
                    offset, size = self.files[row]
                    try:
                        images.append(decode_png(os.pread(file.fileno(), size, offset), side))
                    except ValueError as error:
                        self.refused[split].add(*self.names[row], str(error))
                        continue
                    labels.append(self.labels[row])
                if images:
                    yield batch_of(labels, encode_images(np.stack(images)))


def index_tar(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each file in a tar that extract.py wrote (plain ustar headers)."""
    block = tarfile.BLOCKSIZE
    files = {}
    with open(path, "rb", buffering=1 << 16) as file:
        while (header := file.read(block)) != bytes(block):
            if len(header) < block:
                raise ValueError(f"{path} is cut: make it again with extract.py")
            name = header[:100].rstrip(b"\0").decode(errors="replace")
            if not re.fullmatch(r"imgs/\d+/sample_\d+\.png|metadata/\d+\.npy", name):
                raise ValueError(
                    f"{path}: unexpected member {name!r}: make it again with extract.py"
                )
            size = int(header[124:135], 8)
            files[name] = (file.tell(), size)
            file.seek(size + -size % block, os.SEEK_CUR)
    return files


def decode_png(data: bytes, side: int) -> np.ndarray:
    """Gray pixels of a PNG, uint8 [side, side]; ValueError when it is broken or of another size."""
    from PIL import PngImagePlugin

    try:
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
            pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, zlib.error, ...
        raise ValueError(f"broken PNG: {error}") from None
    if pixels.shape[:2] != (side, side):
        raise ValueError(f"image of {pixels.shape[1]}x{pixels.shape[0]}, expected {side}x{side}")
    return pixels if pixels.ndim == 2 else to_gray(pixels)
