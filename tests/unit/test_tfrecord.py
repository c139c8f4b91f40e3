"""Record files of TFDS, read without TensorFlow: what it wrote, what is broken."""

import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lra import tfrecord

any_time = settings(deadline=None, database=None)
values = st.one_of(st.binary(max_size=300), st.integers(-(2**63), 2**63 - 1))


@any_time
@given(st.dictionaries(st.text(max_size=200), values, max_size=5))
def test_example_is_read_as_it_was_packed(example):
    read = tfrecord.parse_example(tfrecord.pack_example(example))
    assert {name: value if value is not None else b"" for name, value in read.items()} == example


@any_time
@given(st.binary(max_size=60))
def test_other_bytes_are_no_example_or_one(record):
    try:
        tfrecord.parse_example(record)
    except (ValueError, IndexError):
        pass


@any_time
@given(st.lists(st.binary(max_size=40), max_size=9), st.integers(1, 20))
def test_checksum_is_crc32c(records, longest):
    def plainly(data: bytes) -> int:
        value = 0xFFFFFFFF
        for byte in data:
            value ^= byte
            for _ in range(8):
                value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        return value ^ 0xFFFFFFFF

    assert plainly(b"123456789") == 0xE3069283  # the check value of the algorithm
    ends = np.cumsum([len(record) for record in records], dtype=np.int64)
    starts = np.append(np.int64(0), ends[:-1])[: len(records)]
    before = tfrecord.LONGEST_IN_TABLE
    tfrecord.LONGEST_IN_TABLE = longest
    tfrecord.distance_tables.cache_clear()
    try:
        data = np.frombuffer(b"".join(records), np.uint8)
        found = tfrecord.crc32c(data, np.stack([starts, ends], 1))
    finally:
        tfrecord.LONGEST_IN_TABLE = before
        tfrecord.distance_tables.cache_clear()
    assert found.tolist() == [plainly(record) for record in records]


def dataset(folder, count=50, size=3000):
    rows = [{"text": bytes([n]) * (n * size // 50), "label": n} for n in range(count)]
    tfrecord.write_dataset(folder, {"train": rows, "test": rows[:3]})
    return rows


def read_all(folder, split="train", *edges):
    return [row for rows in tfrecord.read_examples(folder, split, *edges) for row in rows]


@pytest.mark.parametrize("size", [100, 1 << 12, 1 << 20])
def test_part_of_a_split_in_pieces_of_any_size(tmp_path, monkeypatch, size):
    rows = dataset(tmp_path / "set")
    rows[0] = {"text": b"", "label": 0}
    monkeypatch.setattr(tfrecord, "READ_BYTES", size)
    assert tfrecord.count_examples(tmp_path / "set", "train") == 50
    for start, stop in ((0, 50), (0, 1), (7, 31), (49, 50), (5, 5)):
        found = read_all(tmp_path / "set", "train", start, stop)
        assert [row["label"] for row in found] == list(range(start, stop))
        assert [row["text"] or b"" for row in found] == [row["text"] for row in rows[start:stop]]


def test_old_description_without_numbers(tmp_path):
    dataset(tmp_path / "set")
    (tmp_path / "set" / "dataset_info.json").write_text('{"splits": [{"name": "train"}]}')
    assert tfrecord.count_examples(tmp_path / "set", "train") == 50
    assert len(read_all(tmp_path / "set")) == 50


def test_what_is_broken_is_said(tmp_path):
    folder = tmp_path / "set"
    dataset(folder)
    path = folder / "set-train.tfrecord-00000-of-00001"
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:20_000], whole[:20_000] + b"x" + whole[20_001:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="cut or corrupt"):
            read_all(folder)
    path.write_bytes(tfrecord.pack_records([b"no example"] * 50))
    with pytest.raises(ValueError, match="no tf.train.Example"):
        read_all(folder)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="cut or corrupt"):
        read_all(folder)
    path.write_bytes(tfrecord.pack_records([tfrecord.pack_example({"label": 1})] * 49))
    with pytest.raises(ValueError, match="has 49 records, expected 50"):
        read_all(folder)
    path.rename(folder / "set-train.tfrecord-00000-of-00002")
    with pytest.raises(ValueError, match="lacks record files of the split train"):
        read_all(folder)
    with pytest.raises(ValueError, match="prepare_tfds.py"):
        read_all(tmp_path)


PROGRAM = """
import os, sys
os.environ.update(CUDA_VISIBLE_DEVICES="", TF_CPP_MIN_LOG_LEVEL="3")
import tensorflow as tf
from lra import tfrecord

feature = lambda **kind: tf.train.Feature(**kind)
rows = [
    {
        "text": feature(bytes_list=tf.train.BytesList(value=[bytes([n]) * (n * 500)])),
        "label": feature(int64_list=tf.train.Int64List(value=[n - 20])),
        "share": feature(float_list=tf.train.FloatList(value=[0.5])),
        "nothing": feature(bytes_list=tf.train.BytesList()),
    }
    for n in range(60)
]
with tf.io.TFRecordWriter(sys.argv[1]) as writer:
    for row in rows:
        writer.write(tf.train.Example(features=tf.train.Features(feature=row)).SerializeToString())
with tf.io.TFRecordWriter(sys.argv[1] + ".other") as writer:
    writer.write(tfrecord.pack_example({"text": b"abc", "label": -5}))
record, = tf.data.TFRecordDataset(sys.argv[1] + ".other").as_numpy_iterator()
example = tf.train.Example.FromString(record).features.feature
assert example["text"].bytes_list.value == [b"abc"] and example["label"].int64_list.value == [-5]
"""


def test_agrees_with_tensorflow(tmp_path, tf_python):
    folder = tmp_path / "set"
    dataset(folder)
    path = folder / "set-train.tfrecord-00000-of-00001"
    scripts = str(tfrecord.__file__).rsplit("/", 2)[0]
    subprocess.run([tf_python, "-c", PROGRAM, path], check=True, env={"PYTHONPATH": scripts})
    (folder / "dataset_info.json").write_text("{}")
    found = read_all(folder)
    assert [row["text"] or b"" for row in found] == [bytes([n]) * (n * 500) for n in range(60)]
    assert [row["label"] for row in found] == list(range(-20, 40))
    assert {row["nothing"] for row in found} == {row["share"] for row in found} - {None} | {None}
