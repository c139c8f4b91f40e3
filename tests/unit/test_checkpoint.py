"""A training that is killed, at any moment and in any way, ends like one that was not; broken state is never used."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processed import repeated_symbol, write_processed
from test_efficient import OWN
from test_training import history, settings_of, without_volatile

from sat import checkpoint, memory, training
from sat.interruption import Interrupted

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module", autouse=True)
def kernels(kernels_dir):
    """The compiled kernels, as in a real run."""


@pytest.fixture(scope="module")
def listops(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processed") / "listops"
    sizes = {"train": 256, "dev": 60, "test": 70}
    write_processed(folder, "listops", repeated_symbol("listops", sizes, 64), width=-1)
    return folder


def often(**blocks):
    """Settings that save after every step."""
    blocks["training"] = {"checkpoint_seconds": 0} | blocks.get("training", {})
    return settings_of(**blocks)


def assert_same_end(one: Path, other: Path) -> None:
    """Weights and pattern bit for bit; metrics, history but for times and memory; nothing left over."""
    for name in ("model.safetensors", "pattern.safetensors", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, other)]
    assert without_volatile(metrics[0]) == without_volatile(metrics[1])
    lines = [[line | {"ms": 0} for line in history(run)] for run in (one, other)]
    assert lines[0] == lines[1]
    for run in (one, other):
        assert not list(run.glob("checkpoint*")) and not list(run.glob("*.partial"))


def run_with_kills(settings, data, folder, kills):
    """Ends of the attempts; compares the last one's results with those of an uninterrupted training."""
    folder.mkdir()
    case = {"settings": settings, "data": str(data), "output": str(folder), "kills": kills}
    (folder / "case.json").write_text(json.dumps(case))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interrupted_training.py"), folder / "case.json"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    assert ends[-1] == 0, (ends, done.stderr[-2000:])
    assert_same_end(folder / "whole", folder / "killed")
    return ends, done.stderr


def test_thirty_kills_at_random_moments_of_one_run(listops, tmp_path):
    """In its start, and at moments of steps, their checkpoints and evaluations, in both phases."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # pytest shows it when the test fails
    generator = random.Random(seed)
    settings = often(
        model={"attention_dropout": 0.1},
        training={"num_train_steps": 80, "num_dense_train_steps": 32},
        transition={"ema": 0.5},
    )
    kills = [
        {"step": step, "wait": generator.uniform(0, 2 / 80)}
        for step in sorted(generator.sample(range(1, 64), 25))
    ]
    for _ in range(5):
        kills.insert(generator.randrange(len(kills)), {"wait": generator.uniform(0, 0.1)})
    kills = [kill | {"signal": int(signal.SIGKILL)} for kill in kills]
    ends, said = run_with_kills(settings, listops, tmp_path / "run", kills)
    assert ends == [-signal.SIGKILL] * 30 + [0]
    assert len(set(re.findall("going on from step [0-9]+", said))) >= 15, said


RESULTS = (
    "config.json",
    "model.safetensors",
    "pattern.safetensors",
    "history.jsonl",
    "metrics.json",
)


def test_a_kill_between_the_last_files_loses_no_state(listops, tmp_path):
    """Before and after each rename of the checkpoint and of the results, and while the state is removed."""
    renames = [("checkpoint", "before"), ("checkpoint", "after")]
    renames += [("checkpoint.old", "before"), ("checkpoint.old", "after")]
    results = [(name, moment) for name in RESULTS for moment in ("before", "after")]
    removals = [(name, "removed") for name in ("checkpoint", "checkpoint.old")]
    removals += [("history.jsonl.partial", "removed")]
    kills = [{"at": at} for at in (*renames, *results, *removals)]
    ends, said = run_with_kills(settings_of(), listops, tmp_path / "run", kills)
    assert ends == [-signal.SIGKILL] * len(kills) + [0], said
    # Each attempt after the first at the results has the whole state, until metrics.json is there.
    assert said.count("going on from step 24") == len(results), said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_state_and_ends_with_its_code(listops, tmp_path, number):
    """With the usual time between checkpoints: what there is comes from the signal."""
    settings = settings_of(pattern={"source": "pooled"})
    kills = [{"wait": 0.5, "signal": int(number)}] * 3
    ends, said = run_with_kills(settings, listops, tmp_path / "run", kills)
    assert ends[0] == 128 + number, (ends, said)
    assert "going on from step" in said


class Stopped(Exception):
    pass


def interrupt(settings, data, folder, monkeypatch, step=14):
    """A training that dies in the middle of step `step` (from 0)."""
    real = training.Training.step

    def dying(self, index, batch):
        if index == step:
            raise Stopped
        return real(self, index, batch)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(training.Training, "step", dying)
        training.train(settings, data, folder, device="cpu", threads=1)


def cut_short(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def swap_for_another_file(path):
    path.write_text("not a checkpoint, but as long as it needs to be" * 10)


@pytest.mark.parametrize("spoil", [cut_short, flip_a_bit, empty, swap_for_another_file])
def test_a_broken_checkpoint_is_left_out_and_the_one_before_used(
    listops, tmp_path, monkeypatch, capsys, spoil
):
    settings = often()
    training.train(settings, listops, tmp_path / "whole", device="cpu", threads=1)
    interrupt(settings, listops, tmp_path / "broken", monkeypatch)
    spoil(tmp_path / "broken/checkpoint")
    capsys.readouterr()
    training.train(settings, listops, tmp_path / "broken", device="cpu", threads=1)
    said = capsys.readouterr().err
    assert "checkpoint is not used: it is cut short or changed" in said
    assert "going on from step 13" in said
    assert_same_end(tmp_path / "whole", tmp_path / "broken")


def test_two_broken_checkpoints_mean_a_new_start(listops, tmp_path, monkeypatch, capsys):
    settings = often()
    training.train(settings, listops, tmp_path / "whole", device="cpu", threads=1)
    interrupt(settings, listops, tmp_path / "broken", monkeypatch)
    for name in ("checkpoint", "checkpoint.old"):
        cut_short(tmp_path / "broken" / name)
    training.train(settings, listops, tmp_path / "broken", device="cpu", threads=1)
    assert "going on" not in capsys.readouterr().err
    assert_same_end(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.parametrize(
    ("spoil", "words"), [(cut_short, "is cut short"), (flip_a_bit, "was changed")]
)
def test_a_history_that_was_changed_means_a_new_start(
    listops, tmp_path, monkeypatch, capsys, spoil, words
):
    settings = often()
    training.train(settings, listops, tmp_path / "whole", device="cpu", threads=1)
    interrupt(settings, listops, tmp_path / "cut", monkeypatch)
    spoil(tmp_path / "cut/history.jsonl.partial")
    training.train(settings, listops, tmp_path / "cut", device="cpu", threads=1)
    assert f"history.jsonl.partial {words}" in capsys.readouterr().err
    assert_same_end(tmp_path / "whole", tmp_path / "cut")


def test_a_checkpoint_of_other_settings_data_or_code_is_not_used(
    listops, tmp_path, monkeypatch, capsys
):
    other_data = tmp_path / "other"
    sizes = {"train": 250, "dev": 60, "test": 70}
    write_processed(other_data, "listops", repeated_symbol("listops", sizes, 64), width=-1)
    for name, settings, data, code in (
        ("settings", often(training={"learning_rate": 1e-3}), listops, None),
        ("data", often(), other_data, None),
        ("code", often(), listops, "another"),
    ):
        interrupt(often(), listops, tmp_path / name, monkeypatch)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            if code:
                patch.setattr(checkpoint, "code_digest", lambda: code)  # noqa: B023
            training.train(settings, data, tmp_path / name, device="cpu", threads=1)
            training.train(settings, data, tmp_path / f"{name} new", device="cpu", threads=1)
        said = capsys.readouterr().err
        assert f"is not used: it was made with other {name}" in said
        assert "going on" not in said
        assert_same_end(tmp_path / f"{name} new", tmp_path / name)


def test_a_checkpoint_of_another_precision_or_version_is_not_used(
    listops, tmp_path, monkeypatch, capsys
):
    """As when a training that a GPU began in fp16 goes on on a CPU."""
    for name, change in (
        ("precision (fp16; here it is fp32)", lambda i: {"precision": "fp16"}),
        ("torch (2.0; here it is", lambda i: {"torch": "2.0"}),
    ):
        folder = tmp_path / name[:5]
        real = checkpoint.identity
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "identity", lambda *a: real(*a) | change(a))  # noqa: B023
            interrupt(often(), listops, folder, monkeypatch)
        capsys.readouterr()
        training.train(often(), listops, folder, device="cpu", threads=1)
        said = capsys.readouterr().err
        assert f"is not used: it was made with other {name}" in said and "going on" not in said


def test_a_checkpoint_of_an_edited_attention_is_not_used(listops, tmp_path, monkeypatch, capsys):
    """One's own, which lies outside of sat/."""
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "edited_attention.py"
    source.write_text(OWN)
    settings = often(
        attention="softmax",
        model={"attention": "edited_attention:Average", "attention_arguments": {"start": 0.5}},
    )
    interrupt(settings, listops, tmp_path / "run", monkeypatch)
    source.write_text(OWN + "# edited\n")
    capsys.readouterr()
    training.train(settings, listops, tmp_path / "run", device="cpu", threads=1)
    said = capsys.readouterr().err
    assert "made with other source of the attention (edited_attention.py)" in said
    assert "going on" not in said


def test_a_training_goes_on_with_other_limits_of_its_machine(
    listops, tmp_path, monkeypatch, capsys
):
    """After running out of memory, say: settings that change no result do not make it begin anew."""
    training.train(often(), listops, tmp_path / "whole", device="cpu", threads=1)
    interrupt(often(), listops, tmp_path / "run", monkeypatch)
    capsys.readouterr()
    changed = settings_of(model={"batch_size": 4}, training={"checkpoint_seconds": 100})
    metrics = training.train(changed, listops, tmp_path / "run", device="cpu", threads=1)
    assert "going on from step 14" in capsys.readouterr().err
    assert metrics["micro_batch"] == 4 and metrics["config"] == changed
    whole, other = (
        [line for line in history(tmp_path / name) if line["event"] == "train"]
        for name in ("whole", "run")
    )
    assert [line["micro_batch"] for line in other] == [16] * 14 + [4] * 10
    losses = [line["loss"] for line in whole]
    assert [line["loss"] for line in other] == pytest.approx(losses, rel=1e-4)


def test_what_fitted_before_an_interruption_stays_while_it_fits(listops, tmp_path, monkeypatch):
    """The limit comes and goes with the other programs; the same parts give the same bits."""
    share = 10**10
    monkeypatch.setattr(memory, "share_of_limit", lambda *_: share)
    measured, fits = [], memory.largest_that_fits

    def noted(most, limit, fixed, peak):
        measured.append(most)
        return fits(4 if len(measured) == 1 else most, limit, fixed, peak)

    monkeypatch.setattr(memory, "largest_that_fits", noted)
    interrupt(often(), listops, tmp_path, monkeypatch)
    assert measured == [16]
    share = 9 * 10**9
    interrupt(often(), listops, tmp_path, monkeypatch, step=16)
    assert measured == [16]
    other = often(model={"memory_limit_gb": 9})
    metrics = training.train(other, listops, tmp_path, device="cpu", threads=1)
    assert measured == [16, 16] and metrics["micro_batch"] == 16
    sizes = [x["micro_batch"] for x in history(tmp_path) if x["event"] == "train"]
    assert sizes == [4] * 16 + [16] * 8


@pytest.mark.parametrize(("seconds", "saved_step"), [(0, 14), (300, 12)])
def test_checkpoints_keep_their_distance(listops, tmp_path, monkeypatch, seconds, saved_step):
    """After every step with 0; else, in a training this short, at the switch alone."""
    interrupt(often(training={"checkpoint_seconds": seconds}), listops, tmp_path, monkeypatch)
    _, record = checkpoint.read(tmp_path / "checkpoint")
    assert record["step"] == saved_step


def test_the_code_digest_knows_the_kernels(kernels_dir, monkeypatch, tmp_path):
    before = checkpoint.code_digest()
    (tmp_path / "libsat_cpu.so").write_bytes(b"another build")
    monkeypatch.setenv("SAT_KERNELS", str(tmp_path))
    assert checkpoint.code_digest() != before


def test_a_signal_in_an_evaluation_ends_it_at_once(listops, tmp_path, monkeypatch):
    settings = settings_of()
    training.train(settings, listops, tmp_path / "whole", device="cpu", threads=1)
    real, calls = training.evaluate, []

    def evaluate(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the evaluation went on")
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(training, "evaluate", evaluate)
        training.train(settings, listops, tmp_path / "stopped", device="cpu", threads=1)
    assert (tmp_path / "stopped/checkpoint").is_file()
    training.train(settings, listops, tmp_path / "stopped", device="cpu", threads=1)
    assert_same_end(tmp_path / "whole", tmp_path / "stopped")


def test_the_last_good_checkpoint_outlives_a_loss_that_is_not_finite(listops, tmp_path):
    settings = often(training={"learning_rate": 1e30})
    with pytest.raises(training.TrainingFailed, match="step"):
        training.train(settings, listops, tmp_path, device="cpu", threads=1)
    _, record = checkpoint.read(tmp_path / "checkpoint")
    assert record["step"] >= 1


def test_nested_state_survives_the_file(tmp_path):
    state = {
        "weights": {"a": torch.arange(3.0), "b": [torch.ones(2, dtype=torch.bool), None]},
        0: (0.1, float("inf"), "text", True),
        "empty": [],
    }
    tensors, skeleton = checkpoint.flatten("state", state)
    checkpoint.save(tmp_path, tensors, {"state": skeleton})
    read, record = checkpoint.read(tmp_path / "checkpoint")
    back = checkpoint.unflatten(record["state"], read)
    assert list(back) == list(state)
    assert torch.equal(back["weights"]["a"], state["weights"]["a"])
    assert back["weights"]["b"][1] is None and back["weights"]["b"][0].dtype == torch.bool
    assert back[0] == state[0] and back["empty"] == []


def test_the_switch_is_scored_with_the_same_weights_before_and_after(listops, tmp_path):
    metrics = training.train(settings_of(), listops, tmp_path, device="cpu", threads=1)
    (line,) = [line for line in history(tmp_path) if line["event"] == "transition"]
    assert line["dev"] == metrics["switch"]
    assert metrics["switch"]["dense"] != metrics["switch"]["sparse"]
    at_switch = [x for x in history(tmp_path) if x["event"] == "eval" and x["step"] == line["step"]]
    assert at_switch[0]["loss"] == metrics["switch"]["dense"]["loss"]
