"""Reading Arrow splits: gathering, order, and files that are not what the manifest says."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processed import write_processed

from sat import data, seal


@settings(max_examples=25)
@given(
    rows=st.lists(st.lists(st.integers(1, 15), min_size=1, max_size=20), min_size=1, max_size=30),
    chunk=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_gather_equals_plain_python(tmp_path_factory, rows, chunk, seed):
    folder = tmp_path_factory.mktemp("data")
    labels = [len(row) % 10 for row in rows]
    write_processed(folder, "listops", {s: (rows, labels) for s in data.SPLITS}, chunk=chunk)
    _, splits = data.load(folder)
    order = np.random.default_rng(seed).integers(0, len(rows), 11)
    batch = splits["train"].batch(order, 20)
    for position, row in enumerate(order):
        length = len(rows[row])
        assert batch.lengths[0][position] == length
        assert batch.ids[0][position, :length].tolist() == rows[row]
        assert (batch.ids[0][position, length:] == 0).all()
        assert batch.labels[position] == labels[row]


def test_images_have_no_padding(tmp_path):
    rows = [[0] * 256, list(range(256))]
    write_processed(tmp_path, "image", {s: (rows, [0, 9]) for s in data.SPLITS}, width=256)
    _, splits = data.load(tmp_path)
    assert splits["test"].batch(np.array([1, 0]), 256).lengths == [None]
    padded = splits["test"].batch(np.array([1, 0]), 512)
    assert padded.lengths[0].tolist() == [256, 256]
    assert torch.equal(padded.ids[0][0, :256], torch.arange(256))


def test_two_texts(tmp_path):
    rows, others = [[1, 2], [3]], [[4], [5, 6, 7]]
    write_processed(tmp_path, "retrieval", {s: (rows, [0, 1], others) for s in data.SPLITS})
    _, splits = data.load(tmp_path)
    batch = splits["dev"].batch(np.array([1]), 4)
    assert [ids.tolist() for ids in batch.ids] == [[[3, 0, 0, 0]], [[5, 6, 7, 0]]]


def test_batches_hold_every_row_once(tmp_path):
    rows = [[1 + i % 15] for i in range(23)]
    write_processed(
        tmp_path, "listops", {s: (rows, [i % 10 for i in range(23)]) for s in data.SPLITS}
    )
    _, splits = data.load(tmp_path)
    batches = list(splits["test"].batches(5, 16))
    assert [len(b) for b in batches] == [5, 5, 5, 5, 3]
    assert torch.cat([b.labels for b in batches]).tolist() == [i % 10 for i in range(23)]
    assert [len(b) for b in splits["test"].batches(5, 16, limit=12)] == [5, 5, 2]


@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 5))
def test_training_order_is_a_chain_of_permutations(num_rows, batch_size, seed):
    steps = -(-3 * num_rows // batch_size)
    chain = np.concatenate(
        [data.training_rows(num_rows, batch_size, s, seed) for s in range(steps)]
    )
    for epoch in range(3):
        part = chain[epoch * num_rows : (epoch + 1) * num_rows]
        assert sorted(part) == list(range(num_rows))
    again = data.training_rows(num_rows, batch_size, steps - 1, seed)
    assert (chain[-batch_size:] == again).all()


def test_missing_data_name_the_command(tmp_path):
    with pytest.raises(data.DataError, match="snakemake .*manifest.json --cores 2"):
        data.load(tmp_path / "lra" / "listops")


def test_files_that_do_not_match_their_manifest(tmp_path):
    write_processed(tmp_path, "listops", {s: ([[1], [2]], [0, 1]) for s in data.SPLITS})
    manifest = json.loads((tmp_path / "manifest.json").read_text())

    whole = (tmp_path / "dev.arrow").read_bytes()
    (tmp_path / "dev.arrow").write_bytes(whole[:-9])
    with pytest.raises(data.DataError, match=r"dev.arrow.*manifest"):
        data.load(tmp_path)
    (tmp_path / "dev.arrow").write_bytes(whole)

    manifest["splits"]["dev"]["rows"] = 3
    (tmp_path / "manifest.json").write_text(json.dumps(seal.add(manifest)))
    with pytest.raises(data.DataError, match="2 rows"):
        data.load(tmp_path)
    empty = json.dumps(seal.add({}))
    for broken, words in (("{", "not JSON"), (empty, "no manifest"), ("[1]", "expected an object")):
        (tmp_path / "manifest.json").write_text(broken)
        with pytest.raises(data.DataError, match=words):
            data.load(tmp_path)


@given(st.integers(min_value=0), st.integers(0, 7))
def test_one_flipped_bit_of_the_data_is_found(tmp_path_factory, place, bit):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    if not folder.is_dir():
        write_processed(folder, "listops", {s: ([[1], [2]], [0, 1]) for s in data.SPLITS})
    path = folder / "test.arrow"
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[place % len(whole)] ^= 1 << bit
    path.write_bytes(changed)
    try:
        with pytest.raises(data.DataError, match="is not the file that its manifest describes"):
            data.load(folder)
    finally:
        path.write_bytes(whole)


def test_a_split_that_is_gone_is_named(tmp_path):
    write_processed(tmp_path, "listops", {s: ([[1], [2]], [0, 1]) for s in data.SPLITS})
    (tmp_path / "test.arrow").unlink()
    with pytest.raises(data.DataError, match=r"test.arrow is missing; delete .* preprocess again"):
        data.load(tmp_path)
