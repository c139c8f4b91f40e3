"""Readers of the five tasks' raw files: batches of encoded rows, in bounded memory.

A reader yields Arrow record batches with the columns input_ids_0 (retrieval: and input_ids_1) and label,
and notes what it refuses. TensorFlow is imported only where data sets of TFDS are read.

Caps. Images come in the order of TFDS, which md5 of their keys decides: a cap takes the first rows of each
label, the labels being known before any image is decoded, and reading stops at the last one taken. What a text
is chosen by is its content, so every row has to be seen: those caps are applied afterwards (preprocess.py).
"""

import itertools
import os
import re
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator
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
from .png import EMPTY, decode_pngs
from .tfds_folder import count_examples, read_examples

READ_BYTES = 1 << 20
ROWS_PER_READ = 1024
IMAGES_PER_READ = 512
MAX_NOTED = 20

# The splits of LRA's own TFDS form of Pathfinder; their names are the salt of the order.
PATHFINDER_SALTS = {
    "curv_baseline": "easy",
    "curv_contour_length_9": "intermediate",
    "curv_contour_length_14": "hard",
}


IMAGE = re.compile(r"imgs/(\d{1,9})/sample_(\d{1,9})\.png")
PACKED_IMAGE = re.compile(IMAGE.pattern.encode())
PACKED_METADATA = re.compile(rb"metadata/(\d{1,9})\.npy")
OCTAL = re.compile(rb"[0-7]{11}")
SAMPLE = re.compile(r"sample_(\d{1,9})\.png")


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

# A part of a TFDS split: its name, and the percentages of its records at which the part starts and ends.
Part = tuple[str, int, int]


def read_tfds_text(
    folder: Path, part: Part, feature: str, num_classes: int, max_length: int, refused: Refused
) -> Iterator[pa.RecordBatch]:
    """Texts (the bytes of a feature) of a TFDS data set with their labels."""
    examples = labelled_examples(folder, *edges_of(folder, part), feature, num_classes, refused)
    for _, labels, texts in examples:
        yield batch_of(labels, encode_text(texts.tolist(), max_length))


def read_tfds_images(
    folder: Path, part: Part, side: int, num_classes: int, cap: int | None, refused: Refused
) -> Iterator[pa.RecordBatch]:
    """Gray images (PNG, gray or RGB) of a TFDS data set with their labels, at most `cap` of them."""
    name, start, stop = edges_of(folder, part)
    taken = None
    if cap is not None:
        seen = labelled_examples(folder, name, start, stop, "image", num_classes, refused)
        numbers, labels = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for some_numbers, some_labels, images in seen:
            there = images.astype(bool)
            for number in some_numbers[~there].tolist():
                refused.add(f"{folder.parent.name} {name}", number, EMPTY)
            numbers.append(some_numbers[there])
            labels.append(some_labels[there])
        numbers, labels = np.concatenate(numbers), np.concatenate(labels)
        taken = numbers[choose_capped(labels, np.arange(len(labels)), cap)]
        stop = int(taken.max(initial=start))
    # What is refused was noted when the labels were counted.
    noted = refused if taken is None else Refused()
    examples = labelled_examples(folder, name, start, stop, "image", num_classes, noted)
    yield from decode_images(
        (
            (image, label, number)
            for numbers, labels, images in examples
            for image, label, number, chosen in zip(
                images.tolist(),
                labels.tolist(),
                numbers.tolist(),
                (np.full(len(numbers), True) if taken is None else np.isin(numbers, taken)),
                strict=True,
            )
            if chosen
        ),
        side,
        refused,
        lambda number: (f"{folder.parent.name} {name}", number),
    )


def edges_of(folder: Path, part: Part) -> tuple[str, int, int]:
    """The split of a part and the records at which the part starts and ends, rounded as TFDS does."""
    name, *percents = part
    count = count_examples(folder, name)
    start, stop = (round(count * percent / 100) for percent in percents)
    return name, start, stop


def labelled_examples(
    folder: Path,
    split: str,
    start: int,
    stop: int,
    feature: str,
    num_classes: int,
    refused: Refused,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Numbers, counted from 1, labels and a feature of the examples of a split whose label is one."""
    number = start + 1
    for examples in read_examples(folder, split, start, stop, ["label", feature]):
        labels = examples["label"]
        numbers = np.arange(number, number + len(labels))
        number += len(labels)
        good = (labels >= 0) & (labels < num_classes)
        for index in np.flatnonzero(~good).tolist():
            reason = f"label {labels[index]} is not one of 0 to {num_classes - 1}"
            refused.add(f"{folder.parent.name} {split}", int(numbers[index]), reason)
        yield numbers[good], labels[good], examples[feature][good]


def decode_images(
    images: Iterable[tuple[bytes, int, int]],
    side: int,
    refused: Refused,
    name_of: Callable[[int], tuple[str, int]],
) -> Iterator[pa.RecordBatch]:
    """Record batches of images: the bytes of a PNG, a label, and a number whose file and line `name_of` tells."""
    images = iter(images)
    while some := list(itertools.islice(images, IMAGES_PER_READ)):
        files, labels, numbers = zip(*some, strict=True)
        pixels, good, faults = decode_pngs(files, side)
        for position, reason in sorted(faults.items()):
            refused.add(*name_of(numbers[position]), reason)
        if len(good):
            yield batch_of(np.array(labels)[good], encode_images(pixels))


# ---------------------------------------------------------------- Pathfinder as it is in the release


class PathfinderLevel:
    """One level of Pathfinder in its tar: where its images lie, their labels and their splits.

    `splits[name]` are the examples (indices) of a split in TFDS order; `refused[name]` what the split
    lost. The memory needed is some 150 bytes an example, most of it for a short while.
    """

    def __init__(self, path: Path, level: str, salt: str) -> None:
        require(path, "extract.py")
        self.path, self.level = path, level
        metadata, images = index_tar(path)
        labels, keys = array("B"), []
        # Of each example: the image, the number of the metadata file and the line in it.
        named, files, lines = array("q"), array("q"), array("q")
        faults: dict[int, str] = {}
        for file, place in sorted(metadata.items()):
            rows = [
                (line.split(), number)
                for number, line in enumerate(self.read_lines(file, *place), 1)
            ]
            # The number in the key is that of the line in the release, where lines come by sample.
            rows.sort(key=lambda row: sample_of(row[0]))
            for number_in_key, (fields, line) in enumerate(rows, 1):
                image = None
                if len(fields) < 4:
                    faults[len(keys)] = f"expected at least 4 fields, found {len(fields)}"
                elif fields[3] not in ("0", "1"):
                    faults[len(keys)] = f"label {fields[3]!r} is not 0 or 1"
                else:
                    image = IMAGE.fullmatch(f"{fields[0]}/{fields[1]}")
                labels.append(int(fields[3]) if image else 0)
                keys.append("_".join([*fields[:2], str(number_in_key)]))
                named.append(image_number(*image.groups()) if image else -1)
                files.append(file)
                lines.append(line)
        self.file_of, self.line_of = np.array(files), np.array(lines)
        self.offsets, self.sizes = look_up(images, np.array(named))
        for row in np.flatnonzero(self.sizes <= 0).tolist():
            faults.setdefault(row, EMPTY if self.sizes[row] == 0 else "image is not in the archive")
        if not keys:
            raise ValueError(f"{path} lists no examples: its metadata files are empty")
        self.labels = np.array(labels, np.uint8)
        usable = np.ones(len(keys), bool)
        usable[list(faults)] = False
        order = tfds_order(keys, salt)
        # Shares of all rows: TFDS packs an empty image too, and LRA leaves it out when the splits are cut.
        edges = [round(len(keys) * percent / 100) for percent in (80, 90)]
        split_of = np.searchsorted(edges, np.arange(len(keys)), side="right")
        self.splits: dict[str, np.ndarray] = {}
        self.refused: dict[str, Refused] = {}
        for index, name in enumerate(("train", "dev", "test")):
            rows = order[split_of == index]
            self.splits[name] = rows[usable[rows]]
            self.refused[name] = Refused()
            for row in rows[~usable[rows]]:
                self.refused[name].add(*self.name(row), faults[int(row)])

    def name(self, row: int) -> tuple[str, int]:
        """The metadata file and the line of an example."""
        return f"{self.level}/metadata/{self.file_of[row]}.npy", int(self.line_of[row])

    def read_lines(self, number: int, offset: int, size: int) -> list[str]:
        """Lines of metadata/<number>.npy: text, whatever the suffix says."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
        if data.startswith(b"\x93NUMPY"):
            raise ValueError(
                f"{self.path}: metadata/{number}.npy is a binary NumPy file, expected lines of text"
            )
        return data.decode(errors="replace").splitlines()

    def read(self, split: str, side: int, cap: int | None) -> Iterator[pa.RecordBatch]:
        """Images of a split, in its order, at most `cap` of them."""
        rows = self.splits[split]
        if cap is not None:
            rows = rows[choose_capped(self.labels[rows], np.arange(len(rows)), cap)]
        with open(self.path, "rb") as file:
            descriptor = file.fileno()
            places = (self.offsets[rows], self.sizes[rows], self.labels[rows], rows)
            yield from decode_images(
                (
                    (os.pread(descriptor, size, offset), label, row)
                    for offset, size, label, row in zip(
                        *(part.tolist() for part in places), strict=True
                    )
                ),
                side,
                self.refused[split],
                self.name,
            )


def sample_of(fields: list[str]) -> tuple[float, str, str]:
    """What orders the lines of a metadata file: the sample's number; lines without one come last."""
    folder, name = [*fields, "", ""][:2]
    number = SAMPLE.fullmatch(name)
    return (int(number[1]) if number else float("inf"), folder, name)


def image_number(folder: str, sample: str) -> int:
    """One number for imgs/<folder>/sample_<sample>.png."""
    return int(folder) << 32 | int(sample)


def index_tar(path: Path) -> tuple[dict[int, tuple[int, int]], np.ndarray]:
    """Where the files are in a tar that extract.py wrote (plain ustar headers).

    Offset and size of each metadata file by its number, and of the images: int64 [n, 3], image_number, offset and
    size, sorted. ValueError when it is no such tar.
    """
    block = tarfile.BLOCKSIZE
    whole = path.stat().st_size
    metadata, images = {}, array("q")
    at = 0
    with open(path, "rb", buffering=READ_BYTES) as file:
        while (header := file.read(block)) != bytes(block):
            if len(header) < block:
                raise ValueError(f"{path} is cut: make it again with extract.py")
            name = header[:100].rstrip(b"\0")
            digits = header[124:135]
            size = int(digits, 8) if OCTAL.fullmatch(digits) else whole
            if at + block + size > whole:
                raise ValueError(f"{path} is cut or broken: make it again with extract.py")
            if match := PACKED_IMAGE.fullmatch(name):
                images.extend((image_number(*match.groups()), at + block, size))
            elif match := PACKED_METADATA.fullmatch(name):
                metadata[int(match[1])] = (at + block, size)
            else:
                raise ValueError(
                    f"{path}: unexpected member {name.decode(errors='replace')!r}: make it again with extract.py"
                )
            at += block + size + -size % block
            file.seek(at)
    table = np.array(images).reshape(-1, 3)
    return metadata, table[np.argsort(table[:, 0], kind="stable")]


def look_up(images: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and sizes of images by their image_number, int64 [n]; size -1 where there is none."""
    if not len(images):
        return np.zeros(len(wanted), np.int64), np.full(len(wanted), -1)
    places = np.minimum(np.searchsorted(images[:, 0], wanted), len(images) - 1)
    there = images[places, 0] == wanted
    return images[places, 1], np.where(there, images[places, 2], -1)
