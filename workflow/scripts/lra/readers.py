"""Readers of the five tasks' raw files: batches of encoded rows, in bounded memory.

A reader yields Arrow record batches with the columns input_ids_0 (retrieval: and input_ids_1) and label,
and notes what it refuses. None needs TensorFlow.

Caps. Images come in the order of TFDS, which md5 of their keys decides: a cap takes the first rows of each
label, the labels being known before any image is decoded, and reading stops at the last one taken. What a text
is chosen by is its content, so every row has to be seen: those caps are applied afterwards (preprocess.py).
"""

import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from .encode import (
    LISTOPS_FAULTS,
    encode_images,
    encode_listops,
    encode_text,
    to_lists,
)
from .files import require
from .order import choose_capped, tfds_order
from .png import decode_pngs
from .tfrecord import Example, count_examples, read_examples

READ_BYTES = 1 << 20
ROWS_PER_READ = 1024
IMAGES_PER_READ = 2048
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
    for number, (line, start, end) in enumerate(lines_of(require(path, "extract.py")), 1):
        tabs = [start - 1]
        while len(tabs) < 5 and (tab := line.find(b"\t", tabs[-1] + 1, end)) >= 0:
            tabs.append(tab)
        if len(tabs) < 5:
            refused.add(path.name, number, f"expected 5 fields, found {len(tabs)}")
            continue
        label = labels_of.get(bytes(line[start : tabs[1]]))
        if label is None:
            refused.add(path.name, number, "label is not 0 or 1")
            continue
        labels.append(label)
        for text, begin, stop in zip(
            texts, (tabs[3] + 1, tabs[4] + 1), (tabs[4], end), strict=True
        ):
            text.append(line[begin : min(stop, begin + max_length)])
        if len(labels) == ROWS_PER_READ:
            yield batch_of(labels, *(encode_text(text, max_length) for text in texts))
            labels, texts = [], ([], [])
    if labels:
        yield batch_of(labels, *(encode_text(text, max_length) for text in texts))


def lines_of(path: Path) -> Iterator[tuple[bytearray, int, int]]:
    """Each line of a file as a buffer and the line's start and end (LF or CR LF left out) in it.

    The buffer is used again. The pairs come to 10 GB, of which an eighth is needed: nothing is copied here.
    """
    buffer = bytearray(4 * READ_BYTES)
    held = 0
    with open(path, "rb", buffering=0) as file:
        while True:
            if held == len(buffer):
                buffer += bytes(len(buffer))
            with memoryview(buffer) as view, view[held:] as free:
                count = file.readinto(free)
            held += count
            start = 0
            while (end := buffer.find(b"\n", start, held)) >= 0 or (not count and start < held):
                end = end if end >= 0 else held
                yield buffer, start, end - (end > start and buffer[end - 1] == ord("\r"))
                start = end + 1
            if not count:
                return
            held = max(held - start, 0)
            buffer[:held] = buffer[start : start + held]


# ---------------------------------------------------------------- data sets of TFDS

# A part of a TFDS split: its name, and the shares of its records at which the part starts and ends.
Part = tuple[str, float, float]


def read_tfds_text(
    folder: Path, part: Part, feature: str, num_classes: int, max_length: int, refused: Refused
) -> Iterator[pa.RecordBatch]:
    """Texts (the bytes of a feature) of a TFDS data set with their labels."""
    labels, texts = [], []
    for _, example in labelled_examples(folder, *edges_of(folder, part), num_classes, refused):
        labels.append(example["label"])
        texts.append((example[feature] or b"")[:max_length])
        if len(labels) == ROWS_PER_READ:
            yield batch_of(labels, encode_text(texts, max_length))
            labels, texts = [], []
    if labels:
        yield batch_of(labels, encode_text(texts, max_length))


def read_tfds_images(
    folder: Path, part: Part, side: int, num_classes: int, cap: int | None, refused: Refused
) -> Iterator[pa.RecordBatch]:
    """Gray images (PNG, gray or RGB) of a TFDS data set with their labels, at most `cap` of them."""
    name, start, stop = edges_of(folder, part)
    taken = None
    if cap is not None:
        seen = labelled_examples(folder, name, start, stop, num_classes, Refused())
        numbers, labels = np.array([(n, e["label"]) for n, e in seen], np.int64).reshape(-1, 2).T
        taken = set(numbers[choose_capped(labels, np.arange(len(labels)), cap)].tolist())
        stop = max(taken, default=start)
    examples = labelled_examples(folder, name, start, stop, num_classes, refused)
    yield from decode_images(
        (
            (example["image"] or b"", example["label"], (f"{folder.parent.name} {name}", number))
            for number, example in examples
            if taken is None or number in taken
        ),
        side,
        refused,
    )


def edges_of(folder: Path, part: Part) -> tuple[str, int, int]:
    """The split of a part and the records at which the part starts and ends, rounded as TFDS does."""
    name, *shares = part
    count = count_examples(folder, name)
    start, stop = (round(count * share) for share in shares)
    return name, start, stop


def labelled_examples(
    folder: Path, split: str, start: int, stop: int, num_classes: int, refused: Refused
) -> Iterator[tuple[int, Example]]:
    """Examples of a split whose label is one, with their number, counted from 1."""
    number = start
    for examples in read_examples(folder, split, start, stop):
        for example in examples:
            number += 1
            label = example.get("label")
            if isinstance(label, int) and 0 <= label < num_classes:
                yield number, example
            else:
                name = f"{folder.parent.name} {split}"
                refused.add(name, number, f"label {label!r} is not one of 0 to {num_classes - 1}")


def decode_images(
    images: Iterable[tuple[bytes, int, tuple[str, int]]], side: int, refused: Refused
) -> Iterator[pa.RecordBatch]:
    """Record batches of images given as the bytes of a PNG, a label, and the file and line that name it."""
    images = iter(images)
    while some := list(itertools.islice(images, IMAGES_PER_READ)):
        pixels, good, faults = decode_pngs([data for data, _, _ in some], side)
        for position, reason in sorted(faults.items()):
            refused.add(*some[position][2], reason)
        if len(good):
            yield batch_of([some[index][1] for index in good], encode_images(pixels))


# ---------------------------------------------------------------- Pathfinder as it is in the release


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
            rows = [
                (line.split(), number)
                for number, line in enumerate(self.read_lines(name, *files[name]), 1)
            ]
            # The number in the key is that of the line in the release, where lines come by sample.
            rows.sort(key=lambda row: sample_of(row[0]))
            for place, (fields, number) in enumerate(rows, 1):
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
                keys.append("_".join([*fields[:2], str(place)]))
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

    def read(self, split: str, side: int, cap: int | None) -> Iterator[pa.RecordBatch]:
        """Images of a split, in its order, at most `cap` of them."""
        rows = self.splits[split]
        if cap is not None:
            rows = rows[choose_capped(self.labels[rows], np.arange(len(rows)), cap)]
        with open(self.path, "rb") as file:
            descriptor = file.fileno()
            yield from decode_images(
                (
                    (
                        os.pread(descriptor, size, offset),
                        self.labels[row],
                        self.names[row],
                    )
                    for row in rows.tolist()
                    for offset, size in [self.files[row]]
                ),
                side,
                self.refused[split],
            )


def sample_of(fields: list[str]) -> tuple[float, str, str]:
    """What orders the lines of a metadata file: the sample's number; lines without one come last."""
    folder, name = [*fields, "", ""][:2]
    number = re.fullmatch(r"sample_(\d+)\.png", name)
    return (int(number[1]) if number else float("inf"), folder, name)


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
