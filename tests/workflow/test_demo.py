"""The demo for real on a tiny configuration: environments, archives, kernels, trainings, table, figures."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas
import pytest
import stub_project
import yaml

TINY = {
    "run": "tiny",
    "demo": {
        "seed": 3,
        "listops": {
            "train": 200,
            "dev": 40,
            "test": 50,
            "min_length": 10,
            "max_length": 40,
            "max_depth": 4,
            "max_args": 4,
        },
        "retrieval": {"train": 64, "dev": 20, "test": 24, "length": 60},
        "pathfinder": {
            "examples": 120,
            "image_size": 16,
            "contour_length": 3,
            "distractor_length": 1,
            "level": "curv_contour_length_14",
        },
        "text": {"train": 80, "test": 30, "length": 80},
        "image": {"train": 60, "test": 20},
    },
}
TRAINING = {
    "batch_size": 8,
    "warmup": 2,
    "num_train_steps": 8,
    "num_dense_train_steps": 4,
    "eval_frequency": 4,
}


def tiny_configuration():
    config = yaml.safe_load((stub_project.ROOT / "config/demo.yaml").read_text())
    for settings in config["settings"].values():
        settings["training"] |= TRAINING
    return config | TINY | {"kernels": {"cuda": "none"}}


@pytest.fixture(scope="module")
def finished_demo(tmp_path_factory, tf_python):
    """A copy of the project in which the tiny demo has run with the real environments."""
    root = tmp_path_factory.mktemp("demo") / "my project"
    project = stub_project.make(root)
    shutil.rmtree(root / ".venvs")
    (root / ".venvs").symlink_to(stub_project.ROOT / ".venvs")
    (root / "config/tiny.yaml").write_text(yaml.safe_dump(tiny_configuration()))
    project.run("all")
    return project


def table_of(project):
    return pandas.read_csv(project.root / "results/tiny/table.csv")


def test_table_has_a_true_row_for_every_task_and_attention(finished_demo):
    table = table_of(finished_demo)
    assert list(zip(table["task"], table["attention"], strict=True)) == [
        (task, attention)
        for task in ("listops", "text", "retrieval", "image", "pathfinder")
        for attention in ("softmax", "sat")
    ]
    assert set(table["data"]) == {"generated"}
    for row in table.itertuples():
        run = finished_demo.root / f"results/tiny/runs/{row.task}/{row.attention}/seed1001"
        metrics = json.loads((run / "metrics.json").read_text())
        assert row.test_accuracy_mean_percent == pytest.approx(
            100 * metrics["test"]["accuracy"], abs=0.01
        )
        assert metrics["backend"] == "cpu"
        if row.attention == "sat":
            assert metrics["transition"]["step"] <= 4 and metrics["pattern"] is not None
        else:
            assert metrics["transition"]["step"] is None and metrics["pattern"] is None
        manifest = json.loads(
            (finished_demo.root / f"data/tiny/{row.task}/manifest.json").read_text()
        )
        assert metrics["test"]["examples"] == manifest["splits"]["test"]["rows"]
        assert metrics["sources"] == manifest["sources"]


def test_figures_are_there(finished_demo):
    for task in ("listops", "text", "retrieval", "image", "pathfinder"):
        for figure in ("accuracy", "pattern"):
            path = finished_demo.root / f"results/tiny/figures/{task}/{figure}.svg"
            assert path.read_text().lstrip().startswith("<?xml")


def test_a_second_call_plans_nothing(finished_demo):
    assert "Nothing to be done" in finished_demo.run("all")


def test_eval_mode_gives_the_number_of_the_table(finished_demo):
    python = stub_project.ROOT / ".venvs/torch/bin/python"
    done = subprocess.run(
        [python, "-m", "sat", "--mode", "eval", "--task", "lra-listops", "--random", "1001"]
        + ["--name", "sat", "--run", "tiny", "--threads", "1"],
        cwd=finished_demo.root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    table = table_of(finished_demo).set_index(["task", "attention"])
    expected = table.loc[("listops", "sat"), "test_accuracy_mean_percent"]
    assert 100 * json.loads(done.stdout)["accuracy"] == pytest.approx(expected, abs=0.01)


def test_data_are_the_same_bytes_in_another_process(finished_demo, tmp_path, monkeypatch):
    """Archives and Arrow files again, under another hash seed of Python."""
    root = tmp_path / "again"
    project = stub_project.make(root)
    shutil.rmtree(root / ".venvs")
    (root / ".venvs").symlink_to(stub_project.ROOT / ".venvs")
    (root / "config/tiny.yaml").write_text(yaml.safe_dump(tiny_configuration()))
    monkeypatch.setenv("PYTHONHASHSEED", "12345")
    project.run("data")
    files = sorted(p.relative_to(root) for p in (root / "data").rglob("*.arrow"))
    assert len(files) == 15
    for path in files:
        assert (root / path).read_bytes() == (finished_demo.root / path).read_bytes(), path

    # Snakemake removes the outputs that it knows before it makes them anew; the rest of the data sets is still there.
    (root / "data/tiny/archives/lra_release.gz").unlink()
    project.run("data/tiny/archives/lra_release.gz")
    assert (root / "data/tiny/tfds/cifar10/3.0.2/dataset_info.json").is_file()


def test_a_training_killed_with_snakemake_goes_on_to_the_same_result(finished_demo, tmp_path):
    """SIGKILL for Snakemake and all that it started, in the middle of a training; then the same command again."""
    root = shutil.copytree(finished_demo.root, tmp_path / "project", symlinks=True)
    project = stub_project.Project(root)
    longer = {"num_train_steps": 200, "num_dense_train_steps": 100, "checkpoint_seconds": 0}
    config = tiny_configuration()
    config["settings"]["listops"]["training"] |= longer
    (root / "config/tiny.yaml").write_text(yaml.safe_dump(config))
    run = root / "results/tiny/runs/listops/sat/seed1001"
    target = str((run / "metrics.json").relative_to(root))
    assert project.planned(target) == {"train listops sat 1001"}
    project.run(target)
    whole = run.rename(tmp_path / "whole")

    command = ["--cores", "2", target, "--configfile", "config/tiny.yaml"]
    with open(tmp_path / "said", "w") as said:
        snakemake = subprocess.Popen(
            [sys.executable, "-m", "snakemake", *command],
            cwd=root,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    history = run / "history.jsonl.partial"
    while not history.is_file() or history.read_text().count('"event": "train"') < 40:
        assert snakemake.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.005)
    os.killpg(snakemake.pid, signal.SIGKILL)
    snakemake.wait()
    while processes_in(root):
        time.sleep(0.01)
    assert (run / "checkpoint").is_file() and not (run / "metrics.json").exists()

    project.run("--unlock")
    project.run(target)
    log = (root / "results/tiny/logs/train/listops/sat/seed1001.log").read_text()
    assert "going on from step" in log
    for name in ("model.safetensors", "pattern.safetensors"):
        assert (run / name).read_bytes() == (whole / name).read_bytes()
    one, other = (json.loads((path / "metrics.json").read_text()) for path in (whole, run))
    for key in ("test", "dev", "switch", "transition", "pattern", "num_steps"):
        assert one[key] == other[key], key
    assert not list(run.glob("checkpoint*")) and not list(run.glob("*.partial"))


def processes_in(folder):
    """Ids of the processes that work in the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink() == folder:
                found.append(process.name)
    return found


def test_a_corrupt_archive_stops_with_its_name(finished_demo, tmp_path):
    archive = tmp_path / "lra_release.gz"
    whole = (finished_demo.root / "data/tiny/archives/lra_release.gz").read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    done = subprocess.run(
        [sys.executable, stub_project.ROOT / "workflow/scripts/extract.py", "--archive", archive]
        + ["--output-dir", tmp_path / "raw", "--level", "curv_contour_length_14"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )
    assert done.returncode != 0
    assert str(archive) in done.stderr and "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "raw").rglob("*") if path.is_file()]
