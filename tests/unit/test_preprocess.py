"""Encodings, orders, caps and refused rows of preprocessing; the same bytes in every process."""

import hashlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from unittest import mock

import extract
import inspect_data
import numpy as np
import preprocess
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lra import encode, order, readers
from lra.arrow import read_arrow
from PIL import Image

from sat import seal

SCRIPTS = Path(preprocess.__file__).parent
LEVEL = "curv_contour_length_14"
any_time = settings(deadline=None, database=None)  # the machine may be busy
NO_CAPS = {"train": None, "dev": None, "test": None}

# ---------------------------------------------------------------- encodings


def listops_row(ids: np.ndarray) -> bytes:
    """A line with these symbols; parentheses and target are of no matter."""
    return f"( {encode.decode_listops(ids)} )\t3\n".encode()


@any_time
@given(st.lists(st.lists(st.integers(1, 15), min_size=1, max_size=30), min_size=1, max_size=20))
def test_listops_decodes_to_what_was_encoded(rows):
    rows = [np.array(row) for row in rows]
    ids, lengths, labels, faults = encode.encode_listops(b"".join(map(listops_row, rows)), 30)
    assert lengths.tolist() == [len(row) for row in rows]
    assert ids.tolist() == np.concatenate(rows).tolist()
    assert labels.tolist() == [3] * len(rows)
    assert not faults.any()


@any_time
@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(1, 50))
def test_text_decodes_to_what_was_encoded(texts, max_length):
    rows = encode.encode_text(texts, max_length).to_pylist()
    assert [encode.decode_text(row) for row in rows] == [text[:max_length] for text in texts]


@any_time
@given(st.lists(st.binary(min_size=12, max_size=12), max_size=9))
def test_images_decode_to_what_was_encoded(images):
    pixels = np.frombuffer(b"".join(images), np.uint8).reshape(-1, 3, 4)
    assert [bytes(row) for row in encode.encode_images(pixels).to_pylist()] == images


@any_time
@given(st.data())
def test_both_ways_to_encode_listops_agree(data):
    """Good lines with a few bytes exchanged, inserted or taken out: the quick way says the same or nothing."""
    lines = bytearray(b"( ( [MIN 1 ) [SM 2 ) 3 ] ) ] )\t1\n( [MAX 4 ) [MED 0 ) ] ) ] )\t9\r\n")
    for _ in range(data.draw(st.integers(0, 3))):
        at = data.draw(st.integers(0, len(lines) - 1))
        new = data.draw(
            st.sampled_from([b"", b" ", *(bytes([b]) for b in b"()[]MINAXEDSZ09\t\r\n\x01\xc3")])
        )
        lines[at : at + data.draw(st.integers(0, 2))] = new
    if not lines.endswith(b"\n"):
        lines += b"\n"
    brackets = data.draw(st.booleans())
    quick = encode.encode_faultless_listops(bytes(lines), 7, brackets)
    other = encode.encode_any_listops(bytes(lines), 7, brackets)
    if quick is None:
        assert other[3].any()
    else:
        assert [part.tolist() for part in quick] == [part.tolist() for part in other]


def test_listops_ids_are_in_the_written_order():
    line = b"( ( ( ( [MIN 0 ) ( [MAX 9 ) ) ( [MED 5 ) ) ( [SM 1 ) ] )\t7\r\n"
    ids, lengths, labels, _ = encode.encode_listops(line, 100)
    assert ids.tolist() == [1, 6, 2, 15, 3, 11, 4, 7, 5]
    assert (lengths.tolist(), labels.tolist()) == ([9], [7])
    assert encode.encode_listops(line, 100, brackets=False)[0].tolist() == [
        1,
        6,
        2,
        15,
        3,
        11,
        4,
        7,
    ]


FAULTS = [
    (b"", "two fields"),
    (b"( [MAX 1 ) 2 ] )", "two fields"),
    (b"( [MAX 1 ) 2 ] )\t1\t1", "two fields"),
    (b"( [MAX 1 ) 2 ] )\t10", "label"),
    (b"( [MAX 1 ) 2 ] )\t", "label"),
    (b"( [MAX 1 ) 2 ] )\tx", "label"),
    (b"( [MAX 1 ) 2 ] )\t]", "label"),
    (b"( [MAD 1 ) 2 ] )\t1", "unknown"),
    (b"( [MAXX 1 ) 2 ] )\t1", "unknown"),
    (b"( [MAX 12 ) 2 ] )\t1", "unknown"),
    (b"( [MAX1 ) 2 ] )\t1", "unknown"),
    (b"( [ 1 ) 2 ] )\t1", "unknown"),
    (b"( \x02 1 ) 2 ] )\t1", "unknown"),
    (b"( [SM \xc3\xa9 ) 2 ] )\t1", "unknown"),
    (b"( [MAX 1 ) 2 3 4 5 ] )\t1", "longer"),
    (b"( )\t1", "no symbols"),
]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize(("line", "reason"), FAULTS)
def test_listops_fault_takes_out_its_own_row_only(line, reason, end):
    good = b"( [SM 4 ) ] )\t4" + end
    ids, lengths, labels, faults = encode.encode_listops(good + line + end + good, 5)
    assert faults[[0, 2]].tolist() == [0, 0]
    assert reason in encode.LISTOPS_FAULTS[faults[1]]
    assert lengths.tolist() == [3, 0, 3]
    assert ids.tolist() == [4, 10, 5] * 2
    assert labels[[0, 2]].tolist() == [4, 4]


@any_time
@given(st.data())
def test_listops_agrees_with_a_plain_reading(data):
    alphabet = st.sampled_from([*encode.SYMBOLS, "(", ")", "[MAD", "x", "", "MIN", "[", "11"])
    sources = st.lists(alphabet, max_size=12).map(" ".join)
    lines = data.draw(
        st.lists(
            st.tuples(sources, st.sampled_from("05x\t")).map("\t".join), min_size=1, max_size=9
        )
    )
    expected = []
    for line in lines:
        fields = line.split("\t")
        symbols = [s for s in fields[0].split(" ") if s not in ("", "(", ")")]
        good = (
            len(fields) == 2 and fields[1] in tuple("0123456789") and symbols and len(symbols) < 9
        )
        good = good and all(symbol in encode.SYMBOLS for symbol in symbols)
        expected.append([encode.SYMBOLS.index(s) + 1 for s in symbols] if good else [])
    ids, lengths, _, faults = encode.encode_listops("".join(f"{x}\n" for x in lines).encode(), 8)
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [index for row in expected for index in row]
    assert (faults > 0).tolist() == [not row for row in expected]


def test_gray_of_known_colours():
    colours = [(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (10, 200, 30)]
    expected = [0, 255, 76, 149, 29, 124]
    assert encode.to_gray(np.array(colours, np.uint8)).tolist() == expected


@any_time
@given(st.integers(0, 255))
def test_gray_of_gray_is_itself(value):
    assert encode.to_gray(np.full((1, 1, 3), value, np.uint8)).item() == value


ALL_COLOURS = """
import numpy as np, tensorflow as tf
from lra.encode import to_gray
colours = np.stack(np.broadcast_arrays(0, *np.ogrid[:256, :256]), 2).astype(np.uint8)
result = []
for red in range(256):
    colours[..., 0] = red
    if (to_gray(colours) != tf.image.rgb_to_grayscale(colours).numpy()[..., 0]).any():
        result.append(red)
"""


def test_gray_is_that_of_tensorflow(in_tensorflow):
    assert in_tensorflow(ALL_COLOURS) == []


# ---------------------------------------------------------------- orders and choices


def test_cifar_order_is_that_of_tfds():
    found = order.tfds_order(range(50_000), "train")
    assert found[:3].tolist() == [16399, 1680, 47917]
    assert found[45_000:45_005].tolist() == [13431, 9237, 17462, 32685, 9518]
    joined = ",".join(map(str, found.tolist())).encode()
    expected = "4b69f5cd2d2dbc981ba882aeb0eefa50909b65ed2703a64525c6c2056ad252f7"
    assert hashlib.sha256(joined).hexdigest() == expected


@any_time
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 99)), min_size=1, max_size=80),
    st.integers(1, 90),
    st.randoms(),
)
def test_cap_is_a_stratified_subset_of_its_size(rows, cap, random):
    labels = np.array([label for label, _ in rows], np.uint8)
    keys = np.array([key for _, key in rows], np.uint64)
    chosen = order.choose_capped(labels, keys, cap)
    assert chosen.sum() == min(cap, len(rows))
    for label in set(labels.tolist()):
        share = (labels == label).sum() * chosen.sum() / len(rows)
        assert abs((chosen & (labels == label)).sum() - share) < 1
        others = keys[(labels == label) & ~chosen]
        assert all((keys[(labels == label) & chosen, None] <= others).ravel())
    shuffled = random.sample(range(len(rows)), len(rows))
    again = order.choose_capped(labels[shuffled], keys[shuffled], cap)
    pairs = sorted(zip(labels[chosen].tolist(), keys[chosen].tolist(), strict=True))
    assert pairs == sorted(
        zip(labels[shuffled][again].tolist(), keys[shuffled][again].tolist(), strict=True)
    )


@any_time
@given(st.lists(st.integers(0, 9), max_size=60))
def test_holdout_has_the_smallest_keys(keys):
    keys = np.array(keys, np.uint64)
    chosen = order.choose_holdout(keys, 0.1)
    assert chosen.sum() == round(len(keys) * 0.1)
    assert all((keys[chosen, None] <= keys[~chosen]).ravel())


# ---------------------------------------------------------------- whole tasks


def add_record(run_data: Path, file: str, data: str = "generated") -> None:
    path = run_data / "archives" / f"{file}.source.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"name": file, "file": file, "url": "file:///here", "sha256": "00", "bytes": 1}
    path.write_text(json.dumps(record | {"data": data, "licence": "", "provenance": ""}))


def listops_lines(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        f"( ( [SM {' ) '.join(map(str, rng.integers(0, 10, rng.integers(2, 9))))} ) ] )\t{label}"
        for label in rng.integers(0, 10, count)
    ]


def make_listops(
    run_data: Path, lines: dict[str, list[str]] | None = None, end: str = "\n"
) -> None:
    add_record(run_data, "lra_release.gz", "released")
    folder = run_data / "raw" / "listops"
    folder.mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(("train", "val", "test")):
        rows = (lines or {}).get(split) or listops_lines(3000 if split == "train" else 40, seed)
        text = "".join(row + end for row in ["Source\tTarget", *rows])
        (folder / f"basic_{split}.tsv").write_bytes(text.encode())


def run(run_data: Path, task: str, max_length: int, caps: dict | None = None, **options) -> dict:
    config = {"task": task, "caps": NO_CAPS | (caps or {}), "max_length": max_length}
    return preprocess.preprocess(task, config | {"options": options}, run_data, run_data / task)


# Writes data sets in the layout of TFDS, records in the given order: {folder: {split: examples}}, bytes as Latin-1.
# Then preprocesses: [[task, config, run_data, output_dir]].
WRITER = """
from pathlib import Path
import numpy as np
from lra.tfds_folder import import_tfds
import preprocess
data_sets, jobs = data
for folder, splits in data_sets.items():
    tfds = import_tfds()
    folder = Path(folder)
    folder.mkdir(parents=True)
    kinds = {"image": tfds.features.Image(), "label": tfds.features.Scalar(np.int64)}
    names = next(iter(splits.values()))[0]
    features = tfds.features.FeaturesDict({n: kinds.get(n, tfds.features.Text()) for n in names})
    name = folder.parts[-3] if "plain_text" in folder.parts else folder.parts[-2]
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(folder.name), data_dir=str(folder), module_name="a.b"
    )
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    # Several files a split, as large data sets have them.
    writer = tfds.core.SequentialWriter(info, 50)
    writer.initialize_splits(list(splits))
    for split, rows in splits.items():
        pack = lambda value: value.encode("latin-1") if isinstance(value, str) else value
        writer.add_examples({split: [{n: pack(v) for n, v in row.items()} for row in rows]})
    writer.close_all()
result = []
for task, config, run_data, output_dir in jobs:
    try:
        result.append(preprocess.preprocess(task, config, Path(run_data), Path(output_dir)))
    except ValueError as error:
        result.append(str(error))
"""


def in_tf(
    in_tensorflow, data_sets: dict[Path, dict[str, list[dict]]], jobs: list[tuple] = ()
) -> list[dict | str]:
    """Write data sets, preprocess; returns the manifest or the error of every job."""
    written = {
        str(folder): {
            split: [
                {n: v.decode("latin-1") if isinstance(v, bytes) else v for n, v in row.items()}
                for row in rows
            ]
            for split, rows in splits.items()
        }
        for folder, splits in data_sets.items()
    }
    jobs = [(task, config, str(data), str(output)) for task, config, data, output in jobs]
    return in_tensorflow(WRITER, [written, jobs])


def run_in(
    in_tensorflow, run_data: Path, task: str, max_length: int, caps: dict | None = None,
    source: str | None = None, **options,
) -> dict:  # fmt: skip
    """`run` in a process of the TensorFlow environment, which texts and images need."""
    config = {"task": task, "caps": NO_CAPS | (caps or {}), "max_length": max_length}
    config |= {"options": options} | ({"source": source} if source else {})
    (found,) = in_tf(in_tensorflow, {}, [(task, config, run_data, run_data / task)])
    if isinstance(found, str):
        raise ValueError(found)
    return found


def rows_of(run_data: Path, task: str, split: str) -> list[dict]:
    return [row for b in read_arrow(run_data / task / f"{split}.arrow") for row in b.to_pylist()]


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_raw_files_that_extraction_did_not_write_are_refused(tmp_path):
    make_listops(tmp_path)
    names = [f"listops/basic_{name}.tsv" for name in ("train", "val", "test")]
    record = tmp_path / "raw/files.json"
    record.write_text(json.dumps(seal.add({}, record.parent, names)))
    assert run(tmp_path, "listops", 20)["splits"]["test"]["rows"]
    shutil.copyfile(tmp_path / "raw" / names[0], tmp_path / "raw" / names[2])
    with pytest.raises(ValueError, match="raw/listops/basic_test.tsv is not the file.*extract.py"):
        run(tmp_path, "listops", 20)
    (tmp_path / "raw" / names[2]).unlink()
    with pytest.raises(ValueError, match="raw/listops/basic_test.tsv is missing.*extract.py"):
        run(tmp_path, "listops", 20)


def test_listops_files_and_manifest(tmp_path):
    lines = {"test": ["( [MAX 1 ) 2 ] )\t2", "( [BAD 1 ) 2 ] )\t2", "( [MIN 1 ) 2 ] )\t1"]}
    make_listops(tmp_path, lines)
    manifest = run(tmp_path, "listops", 20)
    assert rows_of(tmp_path, "listops", "test") == [
        {"input_ids_0": [2, 7, 8, 5], "label": 2},
        {"input_ids_0": [1, 7, 8, 5], "label": 1},
    ]
    path = tmp_path / "listops" / "test.arrow"
    assert json.loads((tmp_path / "listops" / "manifest.json").read_text()) == manifest
    assert manifest["splits"]["test"] == {
        "file": "test.arrow",
        "rows": 2,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
        "label_counts": {str(n): int(n in (1, 2)) for n in range(10)},
        "length": {"min": 4, "max": 4, "mean": 4.0},
        "refused": [{"file": "basic_test.tsv", "line": 3, "reason": "unknown symbol"}],
        "num_refused": 1,
    }
    fixed = {"vocab_size": 16, "num_classes": 10, "num_inputs": 1, "padding_id": 0}
    fixed |= {"data": "released", "input_type": "text", "symbols": list(encode.SYMBOLS)}
    assert fixed.items() <= manifest.items()
    assert "file:///here" not in json.dumps(manifest)
    schema = pa.ipc.open_file(path).schema
    assert schema == pa.schema([("input_ids_0", pa.list_(pa.uint8())), ("label", pa.uint8())])
    assert sorted(hashes(tmp_path / "listops")) == [
        "dev.arrow", "manifest.json", "test.arrow", "train.arrow",
    ]  # fmt: skip


def test_line_ends_and_sizes_of_reads_do_not_matter(tmp_path, monkeypatch):
    found = []
    for end, size in (("\n", 1 << 20), ("\r\n", 1 << 20), ("\n", 100), ("\n", 5000)):
        monkeypatch.setattr(readers, "READ_BYTES", size)
        make_listops(tmp_path, end=end)
        run(tmp_path, "listops", 20)
        found.append(hashes(tmp_path / "listops"))
    assert all(hashed == found[0] for hashed in found)


def test_last_line_without_an_end(tmp_path):
    make_listops(tmp_path)
    path = tmp_path / "raw/listops/basic_test.tsv"
    path.write_bytes(path.read_bytes().rstrip())
    assert run(tmp_path, "listops", 20)["splits"]["test"]["rows"] == 40


def test_hash_seed_does_not_matter(tmp_path):
    make_listops(tmp_path)
    config = {"task": "listops", "caps": {"train": 500, "dev": None, "test": 7}, "max_length": 20}
    found = []
    for seed in ("1", "2"):
        command = [sys.executable, SCRIPTS / "preprocess.py", "--task", "lra-listops"]
        command += ["--config", json.dumps(config), "--run-data", tmp_path]
        command += ["--output-dir", tmp_path / seed]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        found.append(hashes(tmp_path / seed))
    assert found[0] == found[1]


def test_cap_keeps_order_and_does_not_depend_on_it(tmp_path):
    lines = list(dict.fromkeys(listops_lines(3000, 1)))
    make_listops(tmp_path, {"train": lines})
    run(tmp_path, "listops", 20)
    full = rows_of(tmp_path, "listops", "train")
    manifest = run(tmp_path, "listops", 20, {"train": 1500})
    capped = rows_of(tmp_path, "listops", "train")
    assert manifest["splits"]["train"]["rows"] == len(capped) == 1500
    rest = iter(full)
    assert all(row in rest for row in capped)
    make_listops(tmp_path, {"train": lines[::-1]})
    run(tmp_path, "listops", 20, {"train": 1500})
    assert rows_of(tmp_path, "listops", "train") == capped[::-1]


def test_lossy_form_of_listops_is_labelled(tmp_path):
    make_listops(tmp_path)
    manifest = run(tmp_path, "listops", 20, brackets=False)
    assert manifest["options"] == {"brackets": False}
    assert not any(encode.CLOSE in r["input_ids_0"] for r in rows_of(tmp_path, "listops", "train"))


def test_split_without_rows_leaves_what_was_there(tmp_path):
    make_listops(tmp_path)
    run(tmp_path, "listops", 20)
    before = hashes(tmp_path / "listops")
    make_listops(tmp_path, {"test": ["no fields"]})
    with pytest.raises(ValueError, match=r"test split has no rows: 1 refused.*basic_test.tsv"):
        run(tmp_path, "listops", 20)
    assert hashes(tmp_path / "listops") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archives", "listops", "raw"]


def test_missing_header(tmp_path):
    make_listops(tmp_path)
    (tmp_path / "raw/listops/basic_val.tsv").write_text("( [MAX 1 ) ] )\t1\n")
    with pytest.raises(ValueError, match=r"basic_val.tsv:1: expected the header"):
        run(tmp_path, "listops", 20)


def test_retrieval_rows(tmp_path):
    add_record(tmp_path, "lra_release.gz")
    folder = tmp_path / "raw" / "retrieval"
    folder.mkdir(parents=True)
    rows = [
        b'1.0\ta\tb\tsays "yes\tand\tmore\r\n',
        b"0\ta\tb\t\xff\xfe not utf-8\t" + b"x" * 50 + b"\n",
        b"0\ta\tb\tfour fields\n",
        b"\n",
        b"2\ta\tb\tone\ttwo\n",
        b"nan\ta\tb\tone\ttwo\n",
        b"1\ta\tb\tone\ttwo",
    ]
    for name in ("train", "eval", "test"):
        (folder / f"new_aan_pairs.{name}.tsv").write_bytes(b"".join(rows))
    manifest = run(tmp_path, "retrieval", 12)
    texts = [
        (decode(row["input_ids_0"]), decode(row["input_ids_1"]), row["label"])
        for row in rows_of(tmp_path, "retrieval", "dev")
    ]
    assert texts == [
        (b'says "yes', b"and\tmore", 1),
        (b"\xff\xfe not utf-8"[:12], b"x" * 12, 0),
        (b"one", b"two", 1),
    ]
    refused = manifest["splits"]["train"]["refused"]
    assert [(row["file"], row["line"]) for row in refused] == [
        ("new_aan_pairs.train.tsv", line) for line in (3, 4, 5, 6)
    ]
    assert ["fields" in row["reason"] for row in refused] == [True, True, False, False]
    assert (manifest["num_inputs"], manifest["vocab_size"]) == (2, 257)


@pytest.mark.parametrize("size", [50, 1000, 1 << 20])
def test_pairs_agree_with_a_plain_reading(tmp_path, monkeypatch, size):
    monkeypatch.setattr(readers, "READ_BYTES", size)
    rng = random.Random(size)
    lines = []
    for _ in range(600):
        fields = [rng.choice(["0", "1", "0.0", "1.0", "2", ""])]
        for _ in range(rng.choice([0, 2, 3, 4, 4, 4, 4, 5])):
            fields.append("".join(rng.choices('ab" \xe9\r', k=rng.randrange(300))))
        lines.append("\t".join(fields).encode() + rng.choice([b"\n", b"\r\n"]))
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"".join(lines)[:-1])
    expected = []
    for line in path.read_bytes().split(b"\n"):
        fields = line.removesuffix(b"\r").split(b"\t", 4)
        if len(fields) == 5 and fields[0] in (b"0", b"1", b"0.0", b"1.0"):
            expected.append((int(fields[0][:1]), fields[3][:100], fields[4][:100]))
    refused = readers.Refused()
    found = [
        (row["label"], bytes(row["input_ids_0"]), bytes(row["input_ids_1"]))
        for batch in readers.read_retrieval(path, 100, refused)
        for row in batch.to_pylist()
    ]
    assert found == expected
    assert refused.count == 600 - len(expected)


def decode(ids: list[int]) -> bytes:
    return encode.decode_text(np.array(ids))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def make_pathfinder(run_data: Path, reverse: bool = False, changes: dict | None = None) -> dict:
    """200 images in 12 folders; returns the pixels by key."""
    add_record(run_data, "lra_release.gz")
    rng = np.random.default_rng(0)
    files: dict[str, bytes] = {}
    pixels: dict[str, tuple[list[int], int]] = {}
    for folder in range(12):
        lines = []
        for number in range(20):
            image = rng.integers(0, 256, (8, 8), dtype=np.uint8)
            files[f"imgs/{folder}/sample_{number}.png"] = png(image)
            label = int(rng.integers(0, 2))
            lines.append(f"imgs/{folder} sample_{number}.png {number} {label} 1.0 14 4 2 0.5 1 1\n")
            key = f"imgs/{folder}_sample_{number}.png_{number + 1}"
            pixels[key] = (image.ravel().tolist(), label)
        files[f"metadata/{folder}.npy"] = "".join(lines).encode()
    files |= changes or {}
    path = run_data / "raw" / "pathfinder" / f"{LEVEL}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in sorted(files, reverse=reverse):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            tar.addfile(info, io.BytesIO(files[name]))
    return pixels


def all_rows(run_data: Path, task: str) -> list[tuple[list[int], int]]:
    return [
        (row["input_ids_0"], row["label"])
        for split in preprocess.SPLITS
        for row in rows_of(run_data, task, split)
    ]


def test_pathfinder_splits_follow_the_order_of_tfds(tmp_path, in_tensorflow):
    pixels = make_pathfinder(tmp_path)
    manifest = run_in(in_tensorflow, tmp_path, "pathfinder", 64, image_size=8)
    assert [manifest["splits"][s]["rows"] for s in preprocess.SPLITS] == [192, 24, 24]
    keys = sorted(pixels, key=lambda key: hashlib.md5(f"hard{key}".encode()).hexdigest())
    assert all_rows(tmp_path, "pathfinder") == [pixels[key] for key in keys]
    assert manifest["padding_id"] is None
    schema = pa.ipc.open_file(tmp_path / "pathfinder" / "dev.arrow").schema
    assert schema.field("input_ids_0").type == pa.list_(pa.uint8(), 64)


def test_pathfinder_does_not_depend_on_the_order_of_members(tmp_path, in_tensorflow):
    found = []
    for reverse in (False, True):
        make_pathfinder(tmp_path, reverse)
        run_in(in_tensorflow, tmp_path, "pathfinder", 64, {"train": 50}, image_size=8)
        found.append(hashes(tmp_path / "pathfinder"))
    assert found[0] == found[1]


def test_pathfinder_refuses_broken_images_and_lines(tmp_path, in_tensorflow):
    good = png(np.arange(64, dtype=np.uint8).reshape(8, 8))
    lines = ["imgs/0 sample_0.png 0 1", "imgs/0 sample_1.png 1 7", "imgs/0", "imgs/0 gone.png 2 1"]
    lines += [f"imgs/0 sample_{number}.png {number} 0" for number in range(4, 20)]
    changes = {
        "metadata/0.npy": "".join(line + "\n" for line in lines).encode(),
        "imgs/0/sample_0.png": b"",
        "imgs/0/sample_5.png": good[:50],
        "imgs/0/sample_6.png": b"no image",
        "imgs/0/sample_7.png": png(np.zeros((9, 8), np.uint8)),
    }
    pixels = make_pathfinder(tmp_path, changes=changes)
    manifest = run_in(in_tensorflow, tmp_path, "pathfinder", 64, image_size=8)
    refused = [row for s in preprocess.SPLITS for row in manifest["splits"][s]["refused"]]
    found = {row["line"]: row["reason"] for row in refused}
    assert {row["file"] for row in refused} == {f"{LEVEL}/metadata/0.npy"}
    expected = {
        1: "is empty", 2: "label '7'", 3: "4 fields", 4: "not in the archive",
        6: "broken PNG", 7: "broken PNG", 8: "8x9",
    }  # fmt: skip
    assert found.keys() == expected.keys()
    assert all(expected[line] in reason for line, reason in found.items())
    # The shares are those of all 240 rows, as LRA cuts the splits before it leaves out empty images.
    splits = manifest["splits"].values()
    assert [split["rows"] + split["num_refused"] for split in splits] == [192, 24, 24]
    assert len(pixels) == 240


def test_pathfinder_image_size_must_fit_max_length(tmp_path, in_tensorflow):
    make_pathfinder(tmp_path)
    with pytest.raises(ValueError, match="max_length is 1024, but images of 8x8 have 64 pixels"):
        run_in(in_tensorflow, tmp_path, "pathfinder", 1024, image_size=8)


def test_binary_metadata_is_never_unpickled(tmp_path, in_tensorflow):
    buffer = io.BytesIO()
    np.save(buffer, np.array([["imgs/0"]], dtype=object), allow_pickle=True)
    make_pathfinder(tmp_path, changes={"metadata/3.npy": buffer.getvalue()})
    with pytest.raises(ValueError, match="metadata/3.npy is a binary NumPy file"):
        run_in(in_tensorflow, tmp_path, "pathfinder", 64, image_size=8)


def test_tar_of_another_program_is_refused(tmp_path, in_tensorflow):
    make_pathfinder(tmp_path, changes={"evil/name": b""})
    with pytest.raises(ValueError, match="unexpected member 'evil/name'"):
        run_in(in_tensorflow, tmp_path, "pathfinder", 64, image_size=8)


def test_cut_tar_is_refused(tmp_path, in_tensorflow):
    make_pathfinder(tmp_path)
    path = tmp_path / "raw" / "pathfinder" / f"{LEVEL}.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="is cut"):
        run_in(in_tensorflow, tmp_path, "pathfinder", 64, image_size=8)


def make_pathfinder_tfds(in_tensorflow, run_data: Path, level: str = "hard") -> None:
    """The images of make_pathfinder in the form of TFDS: by the md5 of their keys, one level a split."""
    add_record(run_data, "pathfinder_tfds.gz", "released")
    path = run_data / "raw" / "pathfinder" / f"{LEVEL}.tar"
    examples = {}
    with tarfile.open(path) as tar:
        for folder in range(12):
            lines = tar.extractfile(f"metadata/{folder}.npy").read().decode().splitlines()
            for number, line in enumerate(lines, 1):
                where, name, _, label = line.split()[:4]
                data = tar.extractfile(f"{where}/{name}").read()
                key = hashlib.md5(f"{level}{where}_{name}_{number}".encode()).hexdigest()
                examples[key] = {"image": data, "label": int(label)}
    rows = [examples[key] for key in sorted(examples)]
    folder = run_data / "tfds/pathfinder32/1.0.0"
    in_tf(in_tensorflow, {folder: {"easy": rows[:3], level: rows}})


@pytest.mark.parametrize("caps", [{}, {"train": 51, "dev": 5, "test": 7}])
def test_both_forms_of_pathfinder_give_the_same_examples(tmp_path, caps, in_tensorflow):
    empty = ("imgs/3/sample_4.png", "imgs/9/sample_0.png", "imgs/11/sample_7.png")
    make_pathfinder(tmp_path, changes=dict.fromkeys(empty, b""))
    make_pathfinder_tfds(in_tensorflow, tmp_path)
    manifest = run_in(in_tensorflow, tmp_path, "pathfinder", 64, caps, image_size=8)
    assert sum(split["num_refused"] for split in manifest["splits"].values()) == 3
    found = hashes(tmp_path / "pathfinder")
    other = run_in(
        in_tensorflow, tmp_path, "pathfinder", 64, caps, source="pathfinder_tfds", image_size=8
    )
    for split in preprocess.SPLITS:
        assert hashes(tmp_path / "pathfinder")[f"{split}.arrow"] == found[f"{split}.arrow"]
        for key in ("label_counts", "num_refused"):
            assert manifest["splits"][split][key] == other["splits"][split][key]
    assert [source["file"] for source in other["sources"]] == ["pathfinder_tfds.gz"]
    assert other["options"] == manifest["options"]


def of_2020(folder: Path) -> None:
    """Turn a data set into what TFDS wrote when LRA was released.

    No features.json; a description without the format and the names of the files, with fields that are gone today;
    files that are named -<number>-of-<how many>.
    """
    (folder / "features.json").unlink()
    info = json.loads((folder / "dataset_info.json").read_text())
    shape = {"dim": [{"size": "-1"}, {"size": "-1"}, {"size": "3"}]}
    schema = {"feature": [{"name": "image", "shape": shape, "type": "INT"}]}
    splits = [
        {
            "name": split["name"],
            "numBytes": split["numBytes"],
            "shardLengths": split["shardLengths"],
        }
        | {"numShards": str(len(split["shardLengths"]))}
        | {"statistics": {"numExamples": str(sum(map(int, split["shardLengths"])))}}
        for split in info["splits"]
    ]
    old = {"name": info["name"], "version": info["version"], "splits": splits, "schema": schema}
    old |= {"description": "pathfinder", "citation": "", "sizeInBytes": "9", "downloadSize": "9"}
    old["supervisedKeys"] = {"input": "image", "output": "label"}
    for split in splits:
        files = sorted(folder.glob(f"*-{split['name']}.tfrecord-*"))
        for number, path in enumerate(files):
            name = f"pathfinder32-{split['name']}.tfrecord-{number:05}-of-{len(files):05}"
            path.rename(folder / name)
    old["location"] = {"urls": ["https://example.org"]}
    (folder / "dataset_info.json").write_text(json.dumps(old))


def test_tfds_folder_of_2020(tmp_path, in_tensorflow):
    make_pathfinder(tmp_path)
    make_pathfinder_tfds(in_tensorflow, tmp_path)
    found = []
    for change in (lambda _: None, of_2020):
        change(tmp_path / "tfds/pathfinder32/1.0.0")
        run_in(in_tensorflow, tmp_path, "pathfinder", 64, source="pathfinder_tfds", image_size=8)
        found.append(hashes(tmp_path / "pathfinder"))
    assert found[0] == found[1]
    files = (tmp_path / "tfds/pathfinder32/1.0.0").glob("*-hard.tfrecord-*")
    assert min(files).name == "pathfinder32-hard.tfrecord-00000-of-00005"


def test_cap_of_images_takes_the_first_of_each_label_and_stops_there(tmp_path, in_tensorflow):
    make_pathfinder(tmp_path)
    run_in(in_tensorflow, tmp_path, "pathfinder", 64, image_size=8)
    full = [(r["label"], r["input_ids_0"]) for r in rows_of(tmp_path, "pathfinder", "train")]
    manifest = run_in(
        in_tensorflow, tmp_path, "pathfinder", 64, {"train": 31, "dev": 1, "test": 1}, image_size=8
    )
    capped = [(r["label"], r["input_ids_0"]) for r in rows_of(tmp_path, "pathfinder", "train")]
    assert len(capped) == 31
    counts = manifest["splits"]["train"]["label_counts"]
    for label in (0, 1):
        of_label = [row for row in full if row[0] == label]
        assert [row for row in capped if row[0] == label] == of_label[: counts[str(label)]]
        assert abs(counts[str(label)] - 31 * len(of_label) / len(full)) < 1


def test_image_behind_the_last_one_taken_is_not_decoded(tmp_path, monkeypatch):
    make_pathfinder(tmp_path)
    decoded = []

    def blank(files, side):
        decoded.extend(files)
        return np.zeros((len(files), side, side), np.uint8), np.arange(len(files)), {}

    monkeypatch.setattr(readers, "decode_pngs", blank)
    run(tmp_path, "pathfinder", 64, {"train": 31, "dev": 1, "test": 1}, image_size=8)
    assert len(decoded) == 33


SIZES = """
from pathlib import Path
from unittest import mock
import preprocess
from lra import readers, tfds_folder
root = Path(data)
for size in (7, 2048):
    images = mock.patch.object(readers, "IMAGES_PER_READ", size)
    examples = mock.patch.object(tfds_folder, "EXAMPLES_PER_READ", size)
    for source in ("lra_release", "pathfinder_tfds"):
        config = {"max_length": 64, "options": {"image_size": 8}, "source": source}
        with images, examples:
            preprocess.preprocess("pathfinder", config, root, root / f"{source}_{size}")
result = None
"""


def test_sizes_of_reads_do_not_matter_to_images(tmp_path, in_tensorflow):
    make_pathfinder(tmp_path)
    make_pathfinder_tfds(in_tensorflow, tmp_path)
    in_tensorflow(SIZES, str(tmp_path))
    found = []
    for folder in tmp_path.glob("*_*[0-9]"):
        (folder / "manifest.json").unlink()
        found.append(hashes(folder))
    assert len(found) == 4 and all(hashed == found[0] for hashed in found)


def test_broken_data_sets_of_tfds_are_said(tmp_path, in_tensorflow):
    names = ["cut", "flipped", "gone", "short", "no features", "no json", "no description"]
    data_sets, jobs = {}, []
    for name in names:
        data_sets |= make_texts(tmp_path / name, "text")[1]
        data = tmp_path / name
        jobs.append(("text", {"max_length": 9}, data, data / "text"))
    in_tf(in_tensorflow, data_sets)
    files = [min(folder.glob("*-train.tfrecord*")) for folder in data_sets]
    cut, flipped, gone, short, no_features, no_json, no_description = files
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-1])
    flipped.write_bytes(whole[:900] + bytes([whole[900] ^ 1]) + whole[901:])
    gone.unlink()
    short.write_bytes(b"")
    (no_features.parent / "features.json").unlink()
    (no_json.parent / "dataset_info.json").write_text("{")
    (no_description.parent / "dataset_info.json").unlink()
    errors = in_tf(in_tensorflow, {}, jobs)
    assert all("is cut or corrupt" in error for error in errors[:-1])
    assert "0 of its" in errors[3] and "features.json is missing" in errors[4]
    assert "prepare_tfds.py or extract.py" in errors[-1]
    assert not any((tmp_path / name / "text").exists() for name in names)


TEXT_SETS = {
    "text": ("imdb_reviews/plain_text/1.0.0", "aclImdb_v1.tar.gz", "text", 2),
    "agnews": ("ag_news_subset/1.0.0", "ag_news_csv.tar.gz", "description", 4),
    "yelp": ("yelp_polarity_reviews/0.2.0", "yelp_review_polarity_csv.tgz", "text", 2),
}


def make_texts(run_data: Path, task: str, reverse: bool = False) -> tuple[list[dict], dict]:
    """60 train and 20 test examples of a data set of texts; two of train have labels that are none.

    Returns them and what in_tf is to write.
    """
    folder, file, feature, num_classes = TEXT_SETS[task]
    add_record(run_data, file, "released")
    rows = [
        {feature: b"text \xff %d" % n, "title": b"title", "label": n % num_classes}
        for n in range(80)
    ]
    rows[7]["label"], rows[9]["label"] = -1, num_classes
    step = -1 if reverse else 1
    splits = {"train": rows[:60][::step], "test": rows[60:]}
    return rows, {run_data / "tfds" / folder: splits}


def test_texts_of_tfds(tmp_path, in_tensorflow):
    made, data_sets, jobs = {}, {}, []
    for task in TEXT_SETS:
        made[task], folders = make_texts(tmp_path, task)
        data_sets |= folders
        config = {"max_length": 9}
        jobs.append((task, config, tmp_path, tmp_path / task))
        config = config | {"options": {"dev_split": "lra"}}
        jobs.append((task, config, tmp_path, tmp_path / f"{task}_lra"))
    manifests = iter(in_tf(in_tensorflow, data_sets, jobs))
    for task, (folder, file, feature, num_classes) in TEXT_SETS.items():
        manifest, lra = next(manifests), next(manifests)
        assert manifest["num_classes"] == num_classes and manifest["vocab_size"] == 257
        assert manifest["sources"][0]["file"] == file
        assert [manifest["splits"][s]["rows"] for s in preprocess.SPLITS] == [52, 6, 20]
        name = f"{folder.split('/')[-2]} train"
        refused = manifest["splits"]["train"]["refused"]
        assert [(row["file"], row["line"]) for row in refused] == [(name, 8), (name, 10)]
        found = [
            (decode(row["input_ids_0"]), row["label"])
            for split in preprocess.SPLITS
            for row in rows_of(tmp_path, task, split)
        ]
        good = [row for row in made[task] if 0 <= row["label"] < num_classes]
        assert sorted(found) == sorted((row[feature][:9], row["label"]) for row in good)
        assert lra["splits"]["dev"]["sha256"] == lra["splits"]["test"]["sha256"]
        assert lra["splits"]["train"]["rows"] == 58


def test_capped_texts_are_the_same_in_any_order_of_records(tmp_path, in_tensorflow):
    data_sets, jobs = {}, []
    for name in ("False", "True"):
        data = tmp_path / name
        data_sets |= make_texts(data, "text", name == "True")[1]
        jobs.append(("text", {"max_length": 64, "caps": {"train": 20}}, data, data / "text"))
    in_tf(in_tensorflow, data_sets, jobs)
    found = [
        [sorted(map(str, rows_of(data, "text", s))) for s in preprocess.SPLITS]
        for _, _, data, _ in jobs
    ]
    assert found[0] == found[1]
    assert [len(rows) for rows in found[0]] == [20, 6, 20]


def test_pairs_of_the_mirror(tmp_path):
    for name in ("train", "eval", "test"):
        add_record(tmp_path, f"new_aan_pairs.{name}.tsv", "released")
        (tmp_path / "archives" / f"new_aan_pairs.{name}.tsv").write_bytes(b"1\ta\tb\tone\ttwo\n")
    config = {"max_length": 9, "source": "aan_mirror"}
    manifest = preprocess.preprocess("retrieval", config, tmp_path, tmp_path / "retrieval")
    assert len(manifest["sources"]) == 3
    assert manifest["splits"]["dev"]["rows"] == 1
    with pytest.raises(ValueError, match="source of retrieval is 'cifar10', expected one of"):
        preprocess.preprocess("retrieval", config | {"source": "cifar10"}, tmp_path, tmp_path)


def test_listops_from_files_put_there_by_hand(tmp_path):
    make_listops(tmp_path)
    run(tmp_path, "listops", 20)
    before = hashes(tmp_path / "listops")
    for name in ("train", "val", "test"):
        add_record(tmp_path, f"basic_{name}.tsv", "released")
        path = tmp_path / f"raw/listops/basic_{name}.tsv"
        path.rename(tmp_path / "archives" / path.name)
    config = {"max_length": 20, "source": "listops_tsv"}
    manifest = preprocess.preprocess("listops", config, tmp_path, tmp_path / "listops")
    after = hashes(tmp_path / "listops")
    assert all(after[f"{split}.arrow"] == before[f"{split}.arrow"] for split in preprocess.SPLITS)
    files = [source["file"] for source in manifest["sources"]]
    assert files == ["basic_train.tsv", "basic_val.tsv", "basic_test.tsv"]


@pytest.mark.parametrize("seed", range(3))
def test_order_of_rows_in_metadata_does_not_matter(tmp_path, seed, in_tensorflow):
    make_pathfinder(tmp_path)
    run_in(in_tensorflow, tmp_path, "pathfinder", 64, image_size=8)
    before = hashes(tmp_path / "pathfinder")
    changes = {}
    with tarfile.open(tmp_path / "raw" / "pathfinder" / f"{LEVEL}.tar") as tar:
        for folder in range(12):
            lines = tar.extractfile(f"metadata/{folder}.npy").read().splitlines(keepends=True)
            random.Random(seed).shuffle(lines)
            changes[f"metadata/{folder}.npy"] = b"".join(lines)
    make_pathfinder(tmp_path, changes=changes)
    run_in(in_tensorflow, tmp_path, "pathfinder", 64, image_size=8)
    assert hashes(tmp_path / "pathfinder") == before


def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    make_listops(tmp_path)
    run(tmp_path, "listops", 20)
    before = hashes(tmp_path / "listops")

    def full(path, *_):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(preprocess, "write_arrow", full)
    with pytest.raises(OSError, match="No space left"):
        run(tmp_path, "listops", 20)
    assert hashes(tmp_path / "listops") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archives", "listops", "raw"]


def test_write_that_fails_for_real_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands in for a full disk: writes of Arrow fail in the middle."""
    make_listops(tmp_path)
    config = json.dumps({"max_length": 20})
    command = [sys.executable, SCRIPTS / "preprocess.py", "--task", "listops", "--config", config]
    command += ["--run-data", tmp_path, "--output-dir", tmp_path / "listops"]

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["archives", "raw"]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "listops" / "manifest.json").exists()


@any_time
@given(st.integers(0, 10**6), st.sampled_from([(80, 90), (90,)]))
def test_parts_of_a_split_are_disjoint_and_complete(count, edges):
    with mock.patch.object(readers, "count_examples", lambda *_: count):
        shares = [0, *edges, 100]
        parts = [
            readers.edges_of(Path(), ("train", *pair))[1:]
            for pair in zip(shares, shares[1:], strict=False)
        ]
    assert parts[0][0] == 0 and parts[-1][1] == count
    assert all(left[1] == right[0] for left, right in zip(parts, parts[1:], strict=False))


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        (
            "listops",
            {"options": {"bracket": True}},
            r"no option \['bracket'\]; it has \['brackets'\]",
        ),
        ("listops", {"options": {"brackets": "no"}}, "option brackets of listops is 'no'"),
        ("listops", {"caps": {"valid": 3}}, r"unknown splits \['valid'\]"),
        ("listops", {"caps": {"train": 0}}, "caps.train is 0"),
        ("text", {"options": {"dev_split": "test"}}, "option dev_split of text"),
        ("pathfinder", {"options": {"level": "hard"}}, "option level of pathfinder"),
        ("listops", {"task": "text"}, "--task says 'listops'"),
    ],
)
def test_configuration_errors_name_the_key(tmp_path, task, change, message):
    with pytest.raises(ValueError, match=message):
        preprocess.preprocess(task, {"max_length": 8} | change, tmp_path, tmp_path / task)
    assert not (tmp_path / task).exists()


@pytest.mark.parametrize("missing", ["archives", "raw"])
def test_missing_input_names_the_step_that_makes_it(tmp_path, missing):
    make_listops(tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"is missing: (download|extract).py"):
        run(tmp_path, "listops", 20)


def test_unknown_task_is_one_line(tmp_path):
    command = [sys.executable, SCRIPTS / "preprocess.py", "--task", "lra-sudoku", "--config", "{}"]
    command += ["--run-data", tmp_path, "--output-dir", tmp_path / "x"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("error: unknown task 'lra-sudoku', expected one of listops,")
    assert len(result.stderr.splitlines()) == 1


def test_tasks_without_tfds_import_no_tensorflow(tmp_path):
    program = "import preprocess, sys; assert not {'tensorflow', 'cv2', 'PIL'} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(SCRIPTS)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_inspection_decodes_an_example(tmp_path):
    make_listops(tmp_path, {"test": ["( [MAX 1 ) 2 ] )\t2"] * 3})
    run(tmp_path, "listops", 20)
    report = inspect_data.inspect(tmp_path / "listops", "test", 2)
    assert report.splitlines()[-1] == "input_ids_0: [MAX 1 2 ]"
    assert "test: 3 rows, 0 refused" in report
    with pytest.raises(ValueError, match="rows 0 to 2, not 3"):
        inspect_data.inspect(tmp_path / "listops", "test", 3)


def test_inspection_of_text_and_images(tmp_path, in_tensorflow):
    rows, data_sets = make_texts(tmp_path, "text")
    in_tf(in_tensorflow, data_sets, [("text", {"max_length": 64}, tmp_path, tmp_path / "text")])
    report = inspect_data.inspect(tmp_path / "text", "test", 0)
    assert report.splitlines()[-1] == f"input_ids_0: {rows[60]['text'].decode(errors='replace')}"
    with pytest.raises(ValueError, match="the task text has no images"):
        inspect_data.inspect(tmp_path / "text", "test", 0, tmp_path / "x.png")
    make_pathfinder(tmp_path)
    run_in(in_tensorflow, tmp_path, "pathfinder", 64, image_size=8)
    report = inspect_data.inspect(tmp_path / "pathfinder", "dev", 3)
    assert len(report.splitlines()[-1]) == 16
    assert "length, percentiles 0 25 50 75 100: [64, 64, 64, 64, 64]" in report
    inspect_data.inspect(tmp_path / "pathfinder", "dev", 3, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        pixels = np.asarray(image)[::8, ::8].ravel().tolist()
    assert pixels == rows_of(tmp_path, "pathfinder", "dev")[3]["input_ids_0"]


def test_extraction_and_preprocessing_fit_together(tmp_path, in_tensorflow):
    """extract.py's tar is what the Pathfinder reader expects."""
    make_pathfinder(tmp_path)
    path = tmp_path / "raw" / "pathfinder" / f"{LEVEL}.tar"
    release = tmp_path / "release.tar"
    with tarfile.open(path) as source, tarfile.open(release, "w") as tar:
        for info in source:
            data = source.extractfile(info).read()
            info.name = f"lra_release/lra_release/pathfinder32/{LEVEL}/{info.name}"
            tar.addfile(info, io.BytesIO(data))
        for name in (*extract.LISTOPS, *extract.RETRIEVAL):
            folder = {"listops": "listops-1000", "retrieval": "tsv_data"}[name.split("/")[0]]
            tar.addfile(tarfile.TarInfo(f"lra_release/{folder}/{name.split('/')[1]}"))
    run_in(in_tensorflow, tmp_path, "pathfinder", 64, image_size=8)
    before = hashes(tmp_path / "pathfinder")
    path.unlink()
    extract.extract(release, tmp_path / "raw", LEVEL)
    run_in(in_tensorflow, tmp_path, "pathfinder", 64, image_size=8)
    assert hashes(tmp_path / "pathfinder") == before
