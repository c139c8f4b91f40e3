"""A task of one's own: files of texts with labels, encoded like the task text."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from preprocess_own import preprocess_own

ROWS = [
    ("a fine film", "good"),
    ('with "quotes", a comma\nand a line', "good"),
    ("dull", "bad"),
    ("naïve café", "bad"),
] * 10


def csv_text(rows, delimiter=","):
    def quoted(text):
        return '"' + text.replace('"', '""') + '"'

    lines = [delimiter.join(("label", "id", "text"))]
    lines += [delimiter.join((label, str(i), quoted(t))) for i, (t, label) in enumerate(rows)]
    return "\n".join(lines) + "\n"


def write_as(suffix, path, rows):
    if suffix == ".csv":
        path.write_text(csv_text(rows))
    elif suffix == ".tsv":
        path.write_text(csv_text([(t.replace("\n", " "), label) for t, label in rows], "\t"))
    elif suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": t, "label": x}) + "\n" for t, x in rows))
    else:
        texts, labels = zip(*rows, strict=True)
        pa.parquet.write_table(pa.table({"text": texts, "label": labels}), path)
    return str(path)


def config_of(tmp_path, train=ROWS, test=ROWS[:4], suffix=".csv", **changes):
    files = {"train": write_as(suffix, tmp_path / f"train{suffix}", train)}
    files["test"] = write_as(suffix, tmp_path / f"test{suffix}", test)
    options = {"files": files, "text_column": "text", "label_column": "label"}
    return {"options": options | changes, "max_length": 32, "caps": {}}


def rows_of(folder, split):
    table = pa.ipc.open_file(str(folder / f"{split}.arrow")).read_all()
    texts = [np.array(row, np.uint8).tobytes() for row in table["input_ids_0"].to_pylist()]
    return list(zip(texts, table["label"].to_pylist(), strict=True))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_kind_of_file(tmp_path, suffix):
    manifest = preprocess_own("films", config_of(tmp_path, suffix=suffix), tmp_path / "films")
    assert manifest["classes"] == ["bad", "good"] and manifest["data"] == "own"
    assert (manifest["id_offset"], manifest["vocab_size"], manifest["num_inputs"]) == (1, 257, 1)
    rows = rows_of(tmp_path / "films", "test")
    expected = [(text.encode()[:32], int(label == "good")) for text, label in ROWS[:4]]
    if suffix == ".tsv":
        expected = [(text.replace(b"\n", b" "), label) for text, label in expected]
    assert rows == expected
    splits = manifest["splits"]
    assert splits["train"]["rows"] + splits["dev"]["rows"] == 40 and splits["dev"]["rows"] > 0
    assert [source["name"] for source in manifest["sources"]] == [f"train{suffix}", f"test{suffix}"]
    assert json.loads((tmp_path / "films/manifest.json").read_text()) == manifest


def test_a_dev_file_and_caps_are_used(tmp_path):
    config = config_of(tmp_path)
    config["options"]["files"]["dev"] = write_as(".csv", tmp_path / "dev.csv", ROWS[:8])
    config["caps"] = {"train": 20, "dev": None, "test": 2}
    splits = preprocess_own("films", config, tmp_path / "films")["splits"]
    assert [splits[s]["rows"] for s in ("train", "dev", "test")] == [20, 8, 2]
    assert splits["train"]["label_counts"] == {"0": 10, "1": 10}


def test_numbers_as_labels_are_in_their_order(tmp_path):
    rows = [(text, str(label)) for label, text in enumerate("abcdefghijkl")]
    manifest = preprocess_own("n", config_of(tmp_path, rows * 2, rows), tmp_path / "n")
    assert manifest["classes"] == [str(label) for label in range(12)]


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    test = [*ROWS[:2], ("", "good"), ("text", ""), ("text", "odd")]
    manifest = preprocess_own("films", config_of(tmp_path, test=test), tmp_path / "films")
    refused = manifest["splits"]["test"]
    assert (refused["rows"], refused["num_refused"]) == (2, 3)
    assert [(row["line"], row["reason"]) for row in refused["refused"]] == [
        (3, "no text"),
        (4, "no label"),
        (5, "label 'odd' is none of train's"),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_column": "body"}, r"train.csv: no column 'body'; it has label, id, text"),
        ({"files": {"train": "nowhere.csv", "test": "b.csv"}}, "nowhere.csv is missing"),
        ({"label_column": "id"}, None),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, changes, words):
    config = config_of(tmp_path, **changes)
    if words is None:  # 40 ids are 40 classes: allowed, but dev and test may lack some
        assert preprocess_own("films", config, tmp_path / "films")["num_classes"] == 40
        return
    with pytest.raises(ValueError, match=words):
        preprocess_own("films", config, tmp_path / "films")
    assert not (tmp_path / "films").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "text,label\n", r"a.txt: expected .csv, .tsv, .jsonl or .parquet, found .txt"),
        ("a.csv", "text,label\na\n", r"a.csv: .*Expected 2 columns"),
        ("a.jsonl", "{", r"a.jsonl: "),
        ("a.parquet", "no parquet", r"a.parquet: "),
        ("a.csv", "text,label\na,x\nb,x\n", r"has 1 different labels, expected 2 to 256"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, words):
    config = config_of(tmp_path)
    (tmp_path / name).write_text(content)
    config["options"]["files"]["train"] = str(tmp_path / name)
    with pytest.raises(ValueError, match=words):
        preprocess_own("films", config, tmp_path / "films")
    assert not (tmp_path / "films").exists()
