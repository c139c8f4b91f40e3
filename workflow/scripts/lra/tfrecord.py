"""Read the data sets that TFDS prepared, without TensorFlow: importing it costs 4 seconds and 500 MB.

A data set is a folder with dataset_info.json and, for each split, files of records
NAME-SPLIT.tfrecord-00000-of-00001. A record is its length (8 bytes, little endian), a checksum of that, its bytes
and a checksum of those; the bytes are a tf.train.Example, a map from names to lists.
Sources: tensorflow/core/lib/io/record_writer.h, tensorflow/core/example/{example,feature}.proto of TensorFlow 2.21;
the checksum is CRC-32C (RFC 3720, appendix B.4), rotated and shifted by a constant.
"""

import re
import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from .files import read_json, require, write_json

READ_BYTES = 1 << 20
LONGEST_RECORD = 1 << 26
LONGEST_IN_TABLE = 1 << 14

Example = dict[str, bytes | int | None]


def count_examples(folder: Path, split: str) -> int:
    """The number of examples of a split, as the data set's description says or, in an old one, as counted."""
    for about in read_json(folder / "dataset_info.json").get("splits", []):
        if about.get("name") == split and about.get("shardLengths"):
            return sum(map(int, about["shardLengths"]))
    return sum(len(spans) for path in shards(folder, split) for _, spans in read_spans(path))


def read_examples(
    folder: Path, split: str, start: int = 0, stop: int | None = None
) -> Iterator[list[Example]]:
    """Examples `start` to `stop` of a split in the order of its records, some 1 MB at a time.

    The bytes of a feature, its number (int64 features), or None when it is empty. ValueError when a file is
    missing, cut or corrupt, or the number of records is not the one described.
    """
    num_read = 0
    for path in shards(folder, split):
        for buffer, spans in read_spans(path):
            first = max(start - num_read, 0)
            last = len(spans) if stop is None else min(stop - num_read, len(spans))
            wanted = spans[first:last]
            num_read += len(spans)
            if len(wanted):
                check_records(path, buffer, wanted)
                try:
                    examples = [parse_example(buffer[a:b]) for a, b in wanted.tolist()]
                except (IndexError, ValueError):
                    raise ValueError(corrupt(path, "a record is no tf.train.Example")) from None
                yield examples
            if stop is not None and num_read >= stop:
                return
    expected = stop if stop is not None else count_examples(folder, split)
    if num_read < expected:
        raise ValueError(
            f"{folder}: the split {split} has {num_read} records, expected {expected}: "
            "delete the folder and make it again"
        )


def shards(folder: Path, split: str) -> list[Path]:
    """The record files of a split, in order; ValueError unless all of them are there."""
    require(folder / "dataset_info.json", "prepare_tfds.py or extract.py")
    paths = sorted(folder.glob(f"*-{split}.tfrecord-?????-of-?????"))
    names = [re.search(r"-(\d{5})-of-(\d{5})$", path.name) for path in paths]
    numbers = [tuple(map(int, name.groups())) for name in names if name]
    if not numbers or numbers != [(n, len(paths)) for n in range(len(paths))]:
        raise ValueError(
            f"{folder} lacks record files of the split {split}; there are "
            f"{[path.name for path in paths]}: delete the folder and make it again"
        )
    return paths


def read_spans(path: Path) -> Iterator[tuple[bytes, np.ndarray]]:
    """Pieces of a record file and where the bytes of each record start and end in them, int64 [n, 2]."""
    rest = b""
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(READ_BYTES):
            buffer = rest + chunk
            spans = []
            at = 0
            while at + 16 <= len(buffer):
                length = int.from_bytes(buffer[at : at + 8], "little")
                if length > LONGEST_RECORD:
                    raise ValueError(corrupt(path, f"a record of {length} bytes"))
                end = at + 12 + length
                if end + 4 > len(buffer):
                    break
                spans.append((at + 12, end))
                at = end + 4
            rest = buffer[at:]
            if spans:
                yield buffer, np.array(spans, np.int64)
    if rest:
        raise ValueError(corrupt(path, "it ends within a record"))


def corrupt(path: Path, what: str) -> str:
    return f"{path} is cut or corrupt ({what}): delete its folder and make it again"


# ---------------------------------------------------------------- checksums


def check_records(path: Path, buffer: bytes, spans: np.ndarray) -> None:
    """ValueError unless the checksum of every record is the one written behind it."""
    data = np.frombuffer(buffer, np.uint8)
    positions = spans[:, 1, None] + np.arange(4)
    written = data[positions].view("<u4").ravel()
    found = crc32c(data, spans)
    if (masked_sums(found) != written).any():
        raise ValueError(corrupt(path, "a checksum is wrong"))


def masked_sums(sums: np.ndarray) -> np.ndarray:
    """Checksums as record files hold them."""
    return ((sums >> np.uint32(15)) | (sums << np.uint32(17))) + np.uint32(0xA282EAD8)


def crc32c(data: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """CRC-32C of data[begin:end] for each of the spans (int64 [n, 2]), uint32 [n].

    The sum is linear: each byte contributes by its value and its distance from the end alone.
    """
    table, rows, empty = distance_tables()
    sums = np.zeros(len(spans), np.uint32)
    for index, (begin, end) in enumerate(spans.tolist()):
        length = end - begin
        if length <= LONGEST_IN_TABLE:
            parts = table[rows[len(rows) - length :] + data[begin:end]]
            sums[index] = np.bitwise_xor.reduce(parts) ^ empty[length]
        else:
            value = 0xFFFFFFFF
            for byte in data[begin:end].tolist():
                value = (value >> 8) ^ int(table[(value ^ byte) & 255])
            sums[index] = value ^ 0xFFFFFFFF
    return sums


@cache
def distance_tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What a byte adds to the sum, uint32 [256 * distance from the end + value], 256 * distance from the farthest
    to 0, and the sums of n zero bytes [n]."""
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = (values >> 1) ^ np.where(values & 1, np.uint32(0x82F63B78), np.uint32(0))
    table = np.empty((LONGEST_IN_TABLE, 256), np.uint32)
    table[0] = values
    empty = np.empty(LONGEST_IN_TABLE + 1, np.uint32)
    state = 0xFFFFFFFF
    empty[0] = 0
    for distance in range(1, LONGEST_IN_TABLE):
        last = table[distance - 1]
        table[distance] = (last >> 8) ^ values[last & 255]
    for length in range(1, LONGEST_IN_TABLE + 1):
        state = (state >> 8) ^ int(values[state & 255])
        empty[length] = state ^ 0xFFFFFFFF
    rows = np.arange(LONGEST_IN_TABLE - 1, -1, -1) << 8
    return table.ravel(), rows, empty


# ---------------------------------------------------------------- tf.train.Example


def parse_example(record: bytes) -> Example:
    """The features of one tf.train.Example, of each its first value; ValueError when it is none."""
    example: Example = {}
    at, end = delimited(record, 0, 0x0A)
    while at < end:
        entry, at = delimited(record, at, 0x0A)
        begin, feature = delimited(record, entry, 0x0A)
        name = record[begin:feature].decode()
        example[name] = None
        if feature == at:
            continue
        kind, feature_end = delimited(record, feature, 0x12)
        if kind == feature_end:
            continue
        begin, end_of_list = delimited(record, kind, record[kind])
        if begin == end_of_list:
            continue
        if record[kind] == 0x0A:  # a list of bytes
            example[name] = record[slice(*delimited(record, begin, 0x0A))]
        elif record[kind] == 0x1A:  # a list of int64, packed or not
            if record[begin] == 0x0A:
                begin, end_of_list = delimited(record, begin, 0x0A)
            else:
                begin += 1
            if begin < end_of_list:
                value, _ = varint(record, begin)
                example[name] = value - (value >> 63 << 64)
    return example


def delimited(data: bytes, at: int, tag: int) -> tuple[int, int]:
    """Where the content of a length-delimited field with this tag starts and ends."""
    if data[at] != tag:
        raise ValueError(f"tag {data[at]}, expected {tag}")
    length, begin = data[at + 1], at + 2
    if length > 127:
        length, begin = varint(data, at + 1)
    if begin + length > len(data):
        raise ValueError("a field is longer than its record")
    return begin, begin + length


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at a place of a protocol buffer, and the place after it."""
    value = data[at] & 127
    shift = 7
    while data[at] > 127:
        at += 1
        value |= (data[at] & 127) << shift
        shift += 7
    return value, at + 1


# ---------------------------------------------------------------- writing, for tests and the benchmark


def write_dataset(folder: Path, splits: dict[str, list[dict[str, bytes | int]]]) -> None:
    """A data set in the layout of TFDS, one record file a split."""
    folder.mkdir(parents=True)
    name = folder.parts[-2] if "." in folder.name else folder.name
    for split, examples in splits.items():
        with open(folder / f"{name}-{split}.tfrecord-00000-of-00001", "wb") as file:
            for start in range(0, len(examples), 1000):
                records = [pack_example(example) for example in examples[start : start + 1000]]
                file.write(pack_records(records))
    about = [{"name": split, "shardLengths": [str(len(rows))]} for split, rows in splits.items()]
    write_json(folder / "dataset_info.json", {"name": name, "splits": about})


def pack_records(records: list[bytes]) -> bytes:
    """Records as they stand in a record file, with their checksums."""
    parts = [part for record in records for part in (struct.pack("<Q", len(record)), record)]
    lengths = np.array([len(part) for part in parts], np.int64)
    ends = np.cumsum(lengths)
    sums = crc32c(np.frombuffer(b"".join(parts), np.uint8), np.stack([ends - lengths, ends], 1))
    masked = masked_sums(sums).astype("<u4")
    return b"".join(part + sum.tobytes() for part, sum in zip(parts, masked, strict=True))


def pack_example(example: dict[str, bytes | int]) -> bytes:
    """A tf.train.Example of bytes and numbers."""
    entries = []
    for name, value in sorted(example.items()):
        if isinstance(value, bytes):
            feature = pack_field(0x0A, pack_field(0x0A, value))
        else:
            feature = pack_field(0x1A, pack_field(0x0A, pack_varint(value % (1 << 64))))
        entries.append(
            pack_field(0x0A, pack_field(0x0A, name.encode()) + pack_field(0x12, feature))
        )
    return pack_field(0x0A, b"".join(entries))


def pack_field(tag: int, content: bytes) -> bytes:
    return bytes([tag]) + pack_varint(len(content)) + content


def pack_varint(value: int) -> bytes:
    packed = bytearray()
    while value > 127:
        packed.append(value & 127 | 128)
        value >>= 7
    packed.append(value)
    return bytes(packed)
