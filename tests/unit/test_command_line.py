"""`python -m sat`: what users of SAT type, and what they are told when it is wrong."""

import json
import subprocess
import sys

import pytest

from sat import __main__ as command_line
from sat import config
from sat.config import ROOT


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "sat", *map(str, arguments)],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )


def test_the_line_that_users_of_sat_type():
    options = command_line.parse(
        "--mode train --task lra-image --random 1001 --name sat --sk 1.5 --ds 1.2 --train_steps 5000".split()
    )
    settings = command_line.resolve(options)
    assert (settings["run"], settings["task"], settings["attention"]) == ("lra", "image", "sat")
    assert settings["seed"] == 1001
    training = settings["training"]
    assert (training["skewness"], training["distance"], training["num_train_steps"]) == (
        1.5,
        1.2,
        5000,
    )


def test_run_picks_another_run_set():
    options = command_line.parse("--mode eval --task listops --run demo".split())
    assert command_line.resolve(options)["run"] == "demo"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "lra-imag"], ["unknown task 'lra-imag'", "did you mean 'image'"]),
        (["--task", "image", "--name", "stat"], ["unknown attention 'stat'", "did you mean 'sat'"]),
        (["--task", "image", "--run", "no"], ["unknown run set 'no'"]),
        (["--task", "image", "--ds", "-1"], ["training.distance"]),
        (
            ["--task", "image"],
            ["no processed data in data/lra/image", "snakemake data/lra/image/manifest.json"],
        ),
    ],
)
def test_mistakes_are_answered_in_one_line(tmp_path, arguments, words):
    done = run("--mode", "train", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert not list(tmp_path.iterdir())


def test_eval_of_a_run_that_is_not_there(tmp_path):
    done = run("--mode", "eval", "--task", "image", cwd=tmp_path)
    assert done.returncode == 1
    assert "no finished run in results/lra/runs/image/sat/seed1001" in done.stderr


def test_task_is_needed(tmp_path):
    done = run("--mode", "train", cwd=tmp_path)
    assert done.returncode == 2 and "--task" in done.stderr


def test_settings_are_taken_whole():
    whole = config.resolve(config.load("demo"), "text", "sat", 5)
    options = command_line.parse(["--mode", "train", "--settings", json.dumps(whole)])
    assert command_line.resolve(options) == whole


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object"),
        ('{"run": "x"}', "'task' is None"),
        ('{"run": "x", "task": "text", "attention": "sat", "seed": 1, "mdl": {}}', "'mdl'"),
        ('{"run": "x", "task": "text", "attention": "sat", "seed": 1}', "lacks the key"),
    ],
)
def test_broken_settings_are_named(text, words):
    with pytest.raises(config.ConfigError, match=words):
        command_line.resolve(command_line.parse(["--mode", "train", "--settings", text]))


@pytest.mark.parametrize(
    ("error", "kind", "step"),
    [
        (MemoryError(), "out of memory", None),
        (RuntimeError("CUDA out of memory. Tried"), "out of memory", None),
        (
            RuntimeError("the loss is nan in step 17 (dense phase). Lower it"),
            "loss not finite",
            17,
        ),
        (OSError("no space left"), "failed", None),
    ],
)
def test_a_training_that_fails_leaves_a_record(tmp_path, monkeypatch, error, kind, step):
    from sat import training

    def fail(*arguments, **options):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "train", fail)
    whole = json.dumps(config.resolve(config.load("demo"), "text", "sat", 5))
    arguments = ["--mode", "train", "--settings", whole, "--output-dir", "run"]
    with pytest.raises(type(error)):
        command_line.main(arguments)
    record = json.loads((tmp_path / "run/failed.json").read_text())
    assert (record["task"], record["attention"], record["seed"]) == ("text", "sat", 5)
    assert (record["kind"], record["step"]) == (kind, step) and record["message"]

    monkeypatch.setattr(training, "train", lambda *arguments, **options: None)
    assert command_line.main(arguments) == 0
    assert not (tmp_path / "run/failed.json").exists()
