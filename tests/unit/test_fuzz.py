"""Files with anything in them: readers raise their documented errors, and never take more than the file is worth."""

import hashlib
import json
import tarfile
import tracemalloc

import extract
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lra import readers
from made_up_runs import make_metrics
from preprocess_own import read_rows
from processed import write_processed
from test_extract import LEVEL, members, pack
from test_png import SIDE, of_kind

from sat import checkpoint, data, predict, seal

MIB = 2**20


@st.composite
def mutated(draw, whole: bytes) -> bytes:
    """The bytes with a few changed, cut, doubled or put in; now and then any bytes at all."""
    content = bytearray(draw(st.binary(max_size=200)) if draw(st.integers(0, 9)) == 9 else whole)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(content)))
        kind = draw(st.sampled_from(["bit", "byte", "insert", "cut", "double", "digit"]))
        if kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "cut":
            del content[place : place + draw(st.integers(1, max(len(content), 1)))]
        elif kind == "double":
            content[place:place] = content[place : place + draw(st.integers(1, 60))]
        elif place < len(content):
            old = content[place]
            new = {"bit": old ^ 1 << draw(st.integers(0, 7)), "byte": draw(st.integers(0, 255))}
            content[place] = new.get(kind, draw(st.sampled_from(b"0179")))
    return bytes(content)


def fuzz(whole: bytes, examples: int = 100):
    """A decorator: the test gets `content`, mutations of `whole`."""

    def decorate(test):
        checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
        return settings(max_examples=examples, suppress_health_check=checks)(
            given(content=mutated(whole))(test)
        )

    return decorate


LISTOPS = b"Source\tTarget\n" + b"".join(b"[MAX %d 2 [MIN 3 %d ] ]\t3\n" % (n, n) for n in range(9))


@fuzz(LISTOPS)
def test_listops_rows_are_read_or_refused(tmp_path, content):
    path = tmp_path / "basic_train.tsv"
    path.write_bytes(content)
    refused = readers.Refused()
    try:
        batches = list(readers.read_listops(path, 20, True, refused))
    except ValueError as error:
        assert str(error).startswith(f"{path}:1: expected the header")
        return
    lines = content.split(b"\n", 1)[1] if b"\n" in content else b""
    count = lines.count(b"\n") + (lines[-1:] not in (b"", b"\n"))
    assert sum(len(b) for b in batches) + refused.count == count
    for batch in batches:
        ids = batch["input_ids_0"]
        assert all(0 < len(row) <= 20 and set(row) <= set(range(1, 16)) for row in ids.to_pylist())


PAIRS = b"".join(b"%d.0\t%d\t8\tone text\tanother\r\n" % (n % 2, n) for n in range(9))


@fuzz(PAIRS)
def test_pairs_are_read_or_refused(tmp_path, content):
    path = tmp_path / "new_aan_pairs.train.tsv"
    path.write_bytes(content)
    refused = readers.Refused()
    batches = list(readers.read_retrieval(path, 20, refused))
    count = content.count(b"\n") + (content[-1:] not in (b"", b"\n"))
    assert sum(len(batch) for batch in batches) + refused.count == count
    for batch in batches:
        for name in ("input_ids_0", "input_ids_1"):
            assert all(len(row) <= 20 for row in batch[name].to_pylist())


def pathfinder_tar() -> bytes:
    parts = []
    for name, text in (
        ("imgs/1/sample_0.png", b"pixels" * 20),
        ("metadata/1.npy", b"imgs/1 sample_0.png 0 1\nimgs/1 sample_1.png 1 0\n"),
    ):
        header = tarfile.TarInfo(name)
        header.size = len(text)
        parts += [header.tobuf(tarfile.USTAR_FORMAT), text, bytes(-len(text) % tarfile.BLOCKSIZE)]
    return b"".join([*parts, bytes(2 * tarfile.BLOCKSIZE)])


@fuzz(pathfinder_tar(), 200)
def test_a_level_of_pathfinder_is_read_or_named(tmp_path, content):
    path = tmp_path / "level.tar"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        level = readers.PathfinderLevel(path, "level", "hard")
        with open(path, "rb") as file:
            for offset, size in zip(level.offsets.tolist(), level.sizes.tolist(), strict=True):
                assert size < 0 or len(file.read(0)) == 0 and offset + size <= len(content)
    except ValueError as error:
        assert str(path) in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * MIB


@pytest.mark.parametrize("name", ["a.tar", "a.gz"])
def test_archives_with_anything_in_them(tmp_path, name):
    whole = pack(tmp_path / name, members()).read_bytes()

    @fuzz(whole, 60)
    def test(content):
        archive, output = tmp_path / "archive", tmp_path / "raw"
        archive.write_bytes(content)
        try:
            extract.extract(archive, output, LEVEL)
        except ValueError as error:
            assert str(archive) in str(error)
        assert {path.name for path in tmp_path.iterdir()} <= {name, "archive", "raw"}
        assert not list(tmp_path.rglob(".*"))

    test()


@pytest.mark.parametrize(
    ("suffix", "whole"),
    [
        (".csv", b'text,label\n"a, b",x\nc,y\n"d\ne",x\n'),
        (".tsv", b"text\tlabel\na b\tx\nc\ty\n"),
        (".jsonl", b'{"text": "a b", "label": "x"}\n{"text": "c", "label": "y"}\n'),
    ],
)
def test_files_of_ones_own(tmp_path, suffix, whole):
    @fuzz(whole, 60)
    def test(content):
        path = tmp_path / f"own{suffix}"
        path.write_bytes(content)
        try:
            rows = read_rows(path, "text", "label")
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert all(isinstance(text, bytes) and isinstance(label, str) for text, label in rows)

    test()


def test_a_parquet_file_of_ones_own(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet

    path = tmp_path / "own.parquet"
    pa.parquet.write_table(pa.table({"text": ["a", "b"], "label": ["x", "y"]}), path)

    @fuzz(path.read_bytes(), 100)
    def test(content):
        path.write_bytes(content)
        try:
            read_rows(path, "text", "label")
        except ValueError as error:
            assert str(path) in str(error)

    test()


@fuzz(of_kind(np.random.default_rng(5), 8, 2), 150)
def test_a_png_is_an_image_of_its_size_or_refused(tmp_path, content):
    path = tmp_path / "one.png"
    path.write_bytes(content)
    try:
        image = predict.read_png(path, SIDE)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert image.shape[:2] == (SIDE, SIDE)


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "listops"
    rows = ([[1, 2, 3], [4], [5, 6]], [0, 1, 2])
    write_processed(folder, "listops", {split: rows for split in data.SPLITS})
    return folder, {path.name: path.read_bytes() for path in folder.iterdir()}


VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    *(st.lists(st.integers(), max_size=2), st.dictionaries(st.text(max_size=3), st.none())),
)


@given(draw=st.data())
def test_a_manifest_with_anything_in_it(processed, draw):
    """With a right checksum, so that the reader sees it."""
    folder, whole = processed
    manifest = json.loads(whole["manifest.json"])
    place = manifest
    while True:
        key = draw.draw(st.sampled_from(sorted(place)))
        if not (isinstance(place[key], dict) and place[key] and draw.draw(st.booleans())):
            break
        place = place[key]
    if draw.draw(st.booleans()):
        place[key] = draw.draw(VALUES)
    else:
        del place[key]
    (folder / "manifest.json").write_text(json.dumps(seal.add(manifest)))
    try:
        data.load(folder)
    except data.DataError as error:
        assert str(folder) in str(error)
    finally:
        (folder / "manifest.json").write_bytes(whole["manifest.json"])


def test_arrow_files_with_anything_in_them(processed):
    """Described by a manifest with right hashes, so that Arrow sees them."""
    folder, whole = processed

    @fuzz(whole["train.arrow"], 150)
    def test(content):
        manifest = json.loads(whole["manifest.json"])
        described = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        manifest["splits"]["train"] |= described
        (folder / "train.arrow").write_bytes(content)
        (folder / "manifest.json").write_text(json.dumps(seal.add(manifest)))
        try:
            data.load(folder)
        except data.DataError as error:
            assert str(folder) in str(error)

    try:
        test()
    finally:
        for name, content in whole.items():
            (folder / name).write_bytes(content)


def stored_checkpoint(folder) -> bytes:
    checkpoint.save(folder, {"a": torch.arange(4.0)}, {"identity": {"code": "c"}, "state": {}})
    content = (folder / "checkpoint").read_bytes()
    return content[: -checkpoint.DIGEST_BYTES]


def test_checkpoints_with_anything_in_them(tmp_path):
    """With and without a right checksum."""
    whole = stored_checkpoint(tmp_path)

    @fuzz(whole, 200)
    def test(content):
        said = []
        for end in (hashlib.sha256(content).digest(), b""):
            (tmp_path / "checkpoint").write_bytes(content + end)
            loaded = checkpoint.load(tmp_path, {"code": "c"}, said.append)
            assert loaded is not None or said
        with pytest.raises(checkpoint.CheckpointBroken):
            checkpoint.read(tmp_path / "checkpoint")

    test()


@fuzz(json.dumps(seal.add(make_metrics())).encode(), 100)
def test_metrics_with_anything_in_them(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    try:
        read = seal.read(path, "train again")
    except ValueError as error:
        assert str(path) in str(error) and "train again" in str(error)
    else:
        assert read == json.loads(json.dumps(seal.add(make_metrics())))
