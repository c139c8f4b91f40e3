"""`python -m sat`: what users of SAT type, and what they are told when it is wrong."""

import json
import subprocess
import sys

import pytest
from processed import repeated_symbol, write_processed

from sat import __main__ as command_line
from sat import config, seal
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
    done = run("--mode", "eval", "--task", "lra-image", "--random", "7", cwd=tmp_path)
    assert done.returncode == 1
    assert "no finished run in results/lra/runs/image/sat/seed7" in done.stderr
    assert "python -m sat --mode train --task image --random 7 --name sat\n" in done.stderr


def test_eval_of_an_unfinished_run(tmp_path):
    folder = tmp_path / "results/demo/runs/image/sat/seed1001"
    folder.mkdir(parents=True)
    (folder / "history.jsonl.partial").write_text("")
    done = run("--mode", "eval", "--task", "image", "--run", "demo", cwd=tmp_path)
    assert done.returncode == 1
    assert "seed1001 is unfinished: metrics.json is not there yet" in done.stderr
    assert "--mode train --task image --random 1001 --name sat --run demo" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--task", "lra-imag"], "did you mean 'image'"),
        (["--task", "image", "--name", "stat"], "did you mean 'sat'"),
        (["--task", "image", "--run", "no"], "unknown run set 'no'"),
    ],
)
def test_mistakes_when_scoring(tmp_path, arguments, words):
    done = run("--mode", "eval", *arguments, cwd=tmp_path)
    assert done.returncode == 1 and words in done.stderr and done.stderr.count("\n") == 1


def test_eval_reports_and_leaves_the_run_as_it_was(tmp_path, monkeypatch, capsys, caplog):
    """Of a run whose attention has no configuration any more, with settings older than some keys."""
    monkeypatch.chdir(tmp_path)

    def main(*arguments):
        status = command_line.main([*map(str, arguments), "--device", "cpu", "--threads", "1"])
        return status, capsys.readouterr()

    whole = config.resolve(
        config.load("demo"),
        "listops",
        "sat",
        3,
        changes={
            "dataset": {"max_length": 64},
            "model": {"num_layers": 1, "max_seq_len": 64, "block_size": 16, "density": 0.3},
            "training": {
                "batch_size": 16,
                "warmup": 1,
                "num_train_steps": 4,
                "num_dense_train_steps": 2,
                "eval_frequency": 2,
            },
        },
    )
    sizes = {"train": 32, "dev": 20, "test": 35}
    data = tmp_path / "data/demo/listops"
    write_processed(data, "listops", repeated_symbol("listops", sizes, 64))
    folder = tmp_path / "results/demo/runs/listops/gone/seed3"
    where = ["--data-dir", data, "--output-dir", folder]
    status, said = main("--mode", "train", "--settings", json.dumps(whole), *where)
    assert status == 0, said.err
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["config"] == whole
    assert metrics["phases"]["sparse"]["backend"] == metrics["backend"]

    stored = json.loads((folder / "config.json").read_text())
    del stored["training"]["precision"]
    (folder / "config.json").write_text(json.dumps(stored))
    metrics = seal.add(metrics, folder, metrics["files"])
    (folder / "metrics.json").write_text(json.dumps(metrics))
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    command = "--mode eval --task lra-listops --random 3 --name gone --run demo".split()
    status, said = main(*command)
    assert status == 0, said.err
    scored = json.loads(said.out)
    assert scored["phase"] == "sparse" and scored["examples"] == 35
    assert scored["loss"] == pytest.approx(metrics["test"]["loss"], rel=1e-5)
    assert sum(map(sum, scored["confusion"])) == 35
    assert scored["ms_per_batch"] > 0 and scored["peak_memory_bytes"] > 2**20
    assert scored == json.loads((folder / "eval.json").read_text())
    for words in (
        "listops, sat, seed 3, run demo: sparse attention",
        f"test accuracy                   {100 * scored['accuracy']:.2f} %",
        "true / answer",
    ):
        assert words in said.err
    assert {path: path.read_bytes() for path in folder.glob("*.*")} == before | {
        folder / "eval.json": (folder / "eval.json").read_bytes()
    }

    changed = repeated_symbol("listops", sizes, 64, seed=1)
    write_processed(data, "listops", changed)
    assert main(*command)[0] == 0
    assert "are not those that the run was trained on" in caplog.text
    write_processed(data, "text", repeated_symbol("text", sizes, 64))
    status, said = main(*command)
    assert status == 1 and "the data are those of task text" in said.err
    (data / "manifest.json").unlink()
    status, said = main(*command)
    assert status == 1 and "snakemake data/demo/listops/manifest.json" in said.err


def test_task_is_needed(tmp_path):
    done = run("--mode", "train", cwd=tmp_path)
    assert done.returncode == 2 and "--task" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--mode eval --task image --sk 1", "--sk changes a training; --mode eval scores"),
        ("--mode eval --task image --train-steps 5", "--train_steps changes a training"),
        ("--mode train --settings {} --ds 1.5", "--settings holds every setting, --ds too"),
        ("--mode train --settings {} --random 1001", "--settings holds every setting, --random"),
        ("--mode eval --settings {} --task image", "--settings holds every setting, --task"),
    ],
)
def test_an_option_without_effect_is_refused(arguments, words, capsys):
    with pytest.raises(SystemExit) as exit:
        command_line.parse(arguments.split())
    assert exit.value.code == 2 and words in capsys.readouterr().err


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
        (
            RuntimeError("the gradient is not finite in step 3 (dense phase), in 2 of 9 tensors"),
            "loss not finite",
            3,
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
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text("{}")
    arguments = ["--mode", "train", "--settings", whole, "--output-dir", "run"]
    arguments += ["--data-dir", "data"]
    if isinstance(error, OSError):
        assert command_line.main(arguments) == 1
    else:
        with pytest.raises(type(error)):
            command_line.main(arguments)
    record = json.loads((tmp_path / "run/failed.json").read_text())
    assert (record["task"], record["attention"], record["seed"]) == ("text", "sat", 5)
    assert (record["kind"], record["step"]) == (kind, step) and record["message"]
    assert not list((tmp_path / "run").glob("*.partial"))

    monkeypatch.setattr(training, "train", lambda *arguments, **options: None)
    assert command_line.main(arguments) == 0
    assert not (tmp_path / "run/failed.json").exists()
