"""Several processes, mixed precision and torch.compile: the same training as one process in float32."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from processed import repeated_symbol, write_processed

from sat import config, devices, runtime, training
from sat.config import ROOT, ConfigError

SIZES = {"train": 256, "dev": 60, "test": 70}


@pytest.fixture(scope="module", autouse=True)
def kernels(kernels_dir):
    """The compiled kernels, as in a real run."""


@pytest.fixture
def new_accelerator():
    """Accelerate refuses a second precision in a process; a program has one."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processed") / "listops"
    write_processed(folder, "listops", repeated_symbol("listops", SIZES, 64))
    return folder


def settings_of(**blocks):
    changes = {
        "dataset": {"max_length": 64},
        "model": {
            "num_layers": 2,
            "max_seq_len": 64,
            "block_size": 16,
            "density": 0.3,
            "dropout_prob": 0.0,
        },
        "training": {
            "batch_size": 15,
            "learning_rate": 3e-3,
            "warmup": 5,
            "num_train_steps": 12,
            "num_dense_train_steps": 6,
            "eval_frequency": 4,
            "skewness": 1e9,
        },
    }
    return config.resolve(
        config.load("demo"), "listops", "sat", 3, changes=config.merge(changes, blocks)
    )


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def losses(run):
    return [line["loss"] for line in history(run) if line["event"] == "train"]


def trained(settings, folder, run):
    training.train(settings, folder, run, device="cpu", threads=1)
    return losses(run)


ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
ACCELERATE += ["--main_process_port", "0"]
ENVIRONMENT = {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}


def sat(*arguments, launcher=("-m", "sat"), status=0):
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, arguments), "--device", "cpu", "--threads", "2"],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr
    return done


def test_two_machines_train_as_one(folder, tmp_path):
    """A launcher on each, as docs/cluster.md says; here both are this machine, and speak through its loopback."""
    settings = settings_of()
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    trained(settings, folder, alone)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--master-addr", "127.0.0.1", "--master-port", str(port), "--node-rank"]
    program = ["-m", "sat", "--mode", "train", "--settings", json.dumps(settings)]
    where = ["--data-dir", folder, "--output-dir", shared]
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(
            lambda rank: sat(*where, launcher=[*launcher, rank, *program]), ["0", "1"]
        ):
            pass
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-4)
    assert json.loads((shared / "metrics.json").read_text())["device"]["processes"] == 2


# A batch of 15 in parts of 4: two processes take 7 and 8, and each row drops the same.
SHARED = {
    "model": {"batch_size": 4, "dropout_prob": 0.1, "attention_dropout": 0.1},
    "transition": {"padded_queries": "ignored"},
    "training": {"patience": 9, "checkpoint_seconds": 0},
}


def arguments_for(folder, run):
    settings = json.dumps(settings_of(**SHARED))
    return ["--mode", "train", "--settings", settings, "--data-dir", folder, "--output-dir", run]


@pytest.fixture(scope="module")
def trained_twice(folder, tmp_path_factory):
    """(run of one process, run of two, what they said)."""
    runs = tmp_path_factory.mktemp("runs")
    trained(settings_of(**SHARED), folder, runs / "alone")
    done = sat(*arguments_for(folder, runs / "shared"), "--processes", "2")
    return runs / "alone", runs / "shared", done


def test_two_processes_train_and_score_as_one(folder, trained_twice):
    """Then the run is scored under accelerate's own launcher."""
    alone, shared, done = trained_twice
    assert done.stderr.count("sparse from here on") == 1  # one process speaks
    assert not list(shared.glob("*.partial")) and not (shared / "checkpoint").exists()
    assert losses(shared) == pytest.approx(losses(alone), rel=1e-4)
    one, two = history(alone), history(shared)
    assert [line["event"] for line in one] == [line["event"] for line in two]
    for a, b in zip(one, two, strict=True):
        if a["event"] == "train" and a["phase"] == "dense":
            assert b["skewness"] == pytest.approx(a["skewness"], rel=1e-3)
    metrics = {run: json.loads((run / "metrics.json").read_text()) for run in (alone, shared)}
    assert metrics[alone]["device"]["processes"] == 1
    assert metrics[shared]["device"]["processes"] == 2
    assert (
        metrics[shared]["transition"]
        == metrics[alone]["transition"]
        == {
            "step": 6,
            "reason": "limit",
        }
    )
    assert metrics[shared]["test"]["examples"] == SIZES["test"]
    assert metrics[shared]["test"]["loss"] == pytest.approx(
        metrics[alone]["test"]["loss"], rel=1e-3
    )
    masks = [safetensors.torch.load_file(str(run / "pattern.safetensors")) for run in metrics]
    for name, stored in masks[0].items():  # masks exactly, pooled maps up to rounding
        torch.testing.assert_close(masks[1][name], stored)

    arguments = ["eval" if x == "train" else x for x in arguments_for(folder, shared)]
    done = sat(*arguments, launcher=[*ACCELERATE, "-m", "sat"])
    scored = json.loads((shared / "eval.json").read_text())
    assert json.loads(done.stdout) == scored
    assert scored["device"]["processes"] == 2
    assert scored["accuracy"] == metrics[shared]["test"]["accuracy"]
    assert sum(map(sum, scored["confusion"])) == SIZES["test"]


def assert_same_run(one, other):
    """Weights and pattern bit for bit, losses too, and nothing left over."""
    for name in ("model.safetensors", "pattern.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert losses(one) == losses(other)
    assert not list(other.glob("*.partial")) and not list(other.glob("checkpoint*"))


def test_a_signal_to_one_process_ends_an_evaluation_in_all(folder, tmp_path, trained_twice):
    """To the second in a dev evaluation, in the turn after which only the first has a batch; to the first in the test.

    Nobody waits for a process that has ended, the state is saved each time, and the end is that of a whole run.
    """
    _, shared, _ = trained_twice
    run = tmp_path / "run"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["-m", "signalled_evaluation"]
    for rank, call, name in ((1, 14, "SIGTERM"), (0, 36, "SIGINT"), (0, 0, "SIGINT")):
        done = sat(
            rank,
            call,
            name,
            *arguments_for(folder, run),
            launcher=launcher,
            status=1 if call else 0,
        )
        assert (f"ended by {name}; the state is saved" in done.stderr) == bool(call)
        assert not (run / "failed.json").exists(), done.stderr
    assert "going on from step 12" in done.stderr
    assert_same_run(shared, run)


def descendants(process: int) -> list[int]:
    """Ids of a process's children, their children, ... and last its own."""
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [*(x for child in children for x in descendants(int(child))), process]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes below /proc")
def test_accelerate_launch_goes_on_after_all_its_processes_were_killed(
    folder, tmp_path, trained_twice
):
    """In the middle of the training, without a warning; the losses stay those of one process."""
    alone, shared, _ = trained_twice
    run = tmp_path / "run"
    command = [sys.executable, *ACCELERATE, "-m", "sat", *map(str, arguments_for(folder, run))]
    launched = subprocess.Popen(
        [*command, "--device", "cpu", "--threads", "2"],
        env=os.environ | ENVIRONMENT,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (run / "checkpoint.old").exists():  # the second step is saved
            assert launched.poll() is None
            time.sleep(0.001)
    finally:
        for process in descendants(launched.pid):
            os.kill(process, signal.SIGKILL)
        launched.wait()
    assert not (run / "metrics.json").exists()
    done = sat(*arguments_for(folder, run), launcher=[*ACCELERATE, "-m", "sat"])
    assert "going on from step" in done.stderr
    assert json.loads((run / "metrics.json").read_text())["device"]["processes"] == 2
    assert_same_run(shared, run)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)


def test_shares_cover_a_batch_once():
    for count in (1, 2, 3, 8):
        parts = [range(11)[devices.share(11, _Process(count, index))] for index in range(count)]
        assert [i for part in parts for i in part] == list(range(11))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


class _Process:
    def __init__(self, num_processes, process_index):
        self.num_processes, self.process_index = num_processes, process_index


def test_more_processes_than_sequences_are_refused():
    with pytest.raises(ConfigError, match="batch_size is 3, which 4 processes cannot share"):
        devices.check_batch(3, _Process(4, 0))


@pytest.mark.parametrize(
    ("wanted", "device", "bf16", "expected"),
    [
        ("auto", "cpu", True, "no"),
        ("auto", "cuda", True, "bf16"),
        ("auto", "cuda", False, "fp16"),
        ("fp32", "cuda", True, "no"),
        ("bf16", "cpu", False, "bf16"),
        ("fp16", "cuda", True, "fp16"),
    ],
)
def test_precision_of_a_device(monkeypatch, wanted, device, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    assert devices.mixed_precision(wanted, device) == expected


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(ConfigError, match="fp16, which needs a GPU.*auto, fp32 or bf16"):
        runtime.make_accelerator("cpu", 1, "fp16")


def test_bf16_trains_nearly_alike_and_attends_in_float32(
    folder, tmp_path, new_accelerator, monkeypatch
):
    exact = trained(settings_of(), folder, tmp_path / "fp32")
    AcceleratorState._reset_state(True)
    seen = set()
    direct = devices.take_step

    def look(optimiser, parameters, *others):
        seen.update(p.grad.dtype for p in parameters if p.grad is not None)
        return direct(optimiser, parameters, *others)

    monkeypatch.setattr(devices, "take_step", look)
    rough = trained(settings_of(training={"precision": "bf16"}), folder, tmp_path / "bf16")
    assert rough != exact
    assert rough == pytest.approx(exact, rel=2e-2)
    assert seen == {torch.float32}
    metrics = json.loads((tmp_path / "bf16/metrics.json").read_text())
    assert metrics["device"]["precision"] == "bf16" and metrics["backend"] == "cpu"
    model = safetensors.torch.load_file(str(tmp_path / "bf16/model.safetensors"))
    assert {tensor.dtype for tensor in model.values()} == {torch.float32}


@pytest.mark.parametrize("step", [3, 9], ids=["dense", "sparse"])
def test_bf16_goes_on_from_a_checkpoint(folder, tmp_path, new_accelerator, monkeypatch, step):
    """Dense, switch, sparse and test, with an end in the middle of a phase: the same bits as without."""
    settings = settings_of(
        model={"dropout_prob": 0.1}, training={"precision": "bf16", "checkpoint_seconds": 0}
    )
    trained(settings, folder, tmp_path / "whole")
    real = training.Training.step

    def dying(self, index, batch):
        if index == step:
            raise InterruptedError
        return real(self, index, batch)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(training.Training, "step", dying)
        trained(settings, folder, tmp_path / "run")
    trained(settings, folder, tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")
    phases = [x["phase"] for x in history(tmp_path / "run") if x["event"] == "train"]
    assert phases == ["dense"] * 6 + ["sparse"] * 6
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["device"]["precision"] == "bf16" and metrics["test"]["examples"] == 70


def test_a_training_with_fp16_on_a_cpu_is_refused_before_its_first_step(folder, tmp_path):
    settings = settings_of(training={"precision": "fp16"})
    with pytest.raises(ConfigError, match="training.precision is fp16, which needs a GPU"):
        trained(settings, folder, tmp_path)
    assert not list(tmp_path.iterdir())


def test_gradients_are_clipped_in_their_own_scale():
    """With the scaler's factor of 1024 in it, a gradient of 0.5 is not above a limit of 1, and one of 3 is."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((weight * torch.tensor([0.5, 3.0])).sum()).backward()
    assert devices.take_step(optimiser, [weight], 1.0, scaler)
    assert weight.tolist() == [-0.5, -1.0]


def test_a_step_that_overflowed_is_left_out():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((weight * torch.tensor([1.0, torch.inf])).sum()).backward()
    assert not devices.take_step(optimiser, [weight], 1.0, scaler)
    assert weight.tolist() == [0.0, 0.0]
    assert scaler.get_scale() == 512


def test_a_compiled_model_has_the_same_losses(folder, tmp_path, monkeypatch):
    """Traced and differentiated by torch.compile; aot_eager leaves out inductor, whose code takes minutes here."""
    monkeypatch.setattr(devices, "COMPILER_BACKEND", "aot_eager")
    plain = trained(settings_of(), folder, tmp_path / "plain")
    compiled = trained(settings_of(training={"compile": True}), folder, tmp_path / "compiled")
    assert compiled == pytest.approx(plain, rel=1e-5)


def test_the_code_of_inductor_has_the_same_losses(folder, tmp_path, monkeypatch):
    """A layer through both phases and their evaluations, as C++ that torch makes and compiles here."""
    if not any(map(shutil.which, ("g++", "clang++"))):
        pytest.skip("no C++ compiler for what inductor writes")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("no Python.h, which inductor's C++ includes")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch.compiler.reset()
    steps = {"num_train_steps": 4, "num_dense_train_steps": 2, "warmup": 1}
    with torch._inductor.config.patch(compile_threads=1):  # no processes of its own
        plain, compiled = (
            trained(
                settings_of(model={"num_layers": 1}, training={"compile": compile, **steps}),
                folder,
                tmp_path / str(compile),
            )
            for compile in (False, True)
        )
    assert list((tmp_path / "cache").rglob("*.cpp"))
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_compile_without_a_compiler_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler \(g\+\+ or clang\+\+\)"):
        devices.compiled(torch.nn.Linear(2, 2), "cpu")


def test_an_unusual_shape_is_recorded_as_plain_pytorch():
    settings = settings_of()
    run = config.RunConfig.from_dict(settings)
    assert training.backends_of(run, torch.device("cpu")) == {"dense": "cpu", "sparse": "cpu"}
    settings["model"]["head_dim"] = 12  # the kernels take multiples of 8; the schema refuses it too
    run = config.RunConfig.from_dict(settings)
    assert training.backends_of(run, torch.device("cpu"))["dense"] == "reference"
