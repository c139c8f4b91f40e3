"""Processed tasks in the layouts of other programs."""

import hashlib
import json
import pickle
import subprocess
import sys

import benchmark_preprocess
import export
import numpy as np
import pyarrow as pa
import pytest
from processed import write_processed

TEXTS = [[1, 256, 7], [5] * 20, [9]]


def make(folder, task="retrieval", width=-1):
    if task == "image":
        rows = [[n, 0, 255, n] for n in range(9)]
        splits = {name: (rows, list(range(9))) for name in ("train", "dev", "test")}
    else:
        splits = {name: (TEXTS, [0, 1, 0], TEXTS[::-1]) for name in ("train", "dev", "test")}
    write_processed(folder, task, splits, width=width, chunk=2)
    return folder


def test_pickles_of_skyformer(tmp_path):
    make(tmp_path / "retrieval")
    export.export(tmp_path / "retrieval", "skyformer", tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"lra-retrieval.{split}.pickle" for split in ("dev", "test", "train")]
    data = (tmp_path / "out" / names[0]).read_bytes()
    assert b"numpy._core" not in data
    rows = pickle.loads(data)  # what this test wrote itself
    assert [row["label"] for row in rows] == [0, 1, 0]
    assert [list(row) for row in rows] == [["input_ids_0", "input_ids_1", "label"]] * 3
    for row, one, other in zip(rows, TEXTS, TEXTS[::-1], strict=True):
        for ids, text in ((row["input_ids_0"], one), (row["input_ids_1"], other)):
            assert ids.dtype == np.int32
            assert ids.tolist() == text + [0] * (32 - len(text))


def test_pickles_of_images(tmp_path):
    make(tmp_path / "image", "image", 4)
    export.export(tmp_path / "image", "skyformer", tmp_path / "out")
    rows = pickle.loads((tmp_path / "out" / "lra-image.train.pickle").read_bytes())
    assert [row["input_ids_0"].tolist() for row in rows] == [[n, 0, 255, n] for n in range(9)]


def test_two_exports_are_the_same_bytes_and_need_no_order(tmp_path):
    make(tmp_path / "retrieval")
    found = []
    for name in ("one", "two"):
        for kind in ("skyformer", "huggingface"):
            export.export(tmp_path / "retrieval", kind, tmp_path / name / kind)
        paths = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        found.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in paths])
    assert found[0] == found[1]


@pytest.mark.parametrize(("task", "width"), [("retrieval", -1), ("image", 4)])
def test_folder_of_hugging_face(tmp_path, task, width):
    make(tmp_path / task, task, width)
    export.export(tmp_path / task, "huggingface", tmp_path / "out")
    assert json.loads((tmp_path / "out/dataset_dict.json").read_text()) == {
        "splits": ["train", "dev", "test"]
    }
    state = json.loads((tmp_path / "out/dev/state.json").read_text())
    with pa.OSFile(str(tmp_path / "out/dev" / state["_data_files"][0]["filename"])) as file:
        table = pa.ipc.open_stream(file).read_all()
    if task == "image":
        assert table["input_ids_0"].to_pylist()[3] == [3, 0, 255, 3]
    else:
        assert table["input_ids_0"].to_pylist() == TEXTS
        assert table["input_ids_1"].to_pylist() == TEXTS[::-1]
    features = json.loads((tmp_path / "out/dev/dataset_info.json").read_text())["features"]
    assert features["input_ids_0"]["length"] == width
    assert features["input_ids_0"]["feature"]["dtype"] == ("uint8" if width == 4 else "uint16")
    with pytest.raises(ValueError, match="exists"):
        export.export(tmp_path / task, "huggingface", tmp_path / "out")


def test_missing_task_is_one_line(tmp_path):
    command = [sys.executable, export.__file__, tmp_path / "text", "--format", "skyformer"]
    done = subprocess.run([*command, "--output", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "manifest.json is missing" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_benchmark_makes_its_input_and_measures(tmp_path, capsys, monkeypatch):
    arguments = ["benchmark_preprocess.py", "--scale", "0.002", "--tasks", "listops"]
    arguments += ["--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmark_preprocess.main()
    assert "listops         200" in capsys.readouterr().out
    whole = json.loads((tmp_path / "figures.json").read_text())["tasks"]["listops"]["whole"]
    assert whole["rows"] == 200 and whole["refused"] == 0
    assert 0 < whole["cpu_seconds"] < 60 and whole["share_of_pickles"] < 0.25
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
