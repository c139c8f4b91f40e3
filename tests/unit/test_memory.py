"""What does not fit is done in smaller parts, and the results stay those of the whole batch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processed import repeated_symbol, write_processed
from test_training import history, settings_of
from torch.utils._python_dispatch import TorchDispatchMode

from sat import config, data, evaluation, memory, runtime, seal, training
from sat.model import Classifier

SIZES = {"train": 128, "dev": 40, "test": 40}
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried ..."
    ),
    RuntimeError(
        "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"
    ),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]


@pytest.fixture(scope="module", autouse=True)
def kernels(kernels_dir):
    """The compiled kernels, as in a real run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processed")
    write_processed(folder, "listops", repeated_symbol("listops", SIZES, 64))
    return folder


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__} {error}"[:40])
def test_work_is_halved_until_it_fits(error):
    tried = []

    def work(size):
        tried.append(size)
        if size > 5:
            raise error
        return "done"

    assert memory.halving(20, work, "a test") == (5, "done")
    assert tried == [20, 10, 5]


def test_one_sequence_too_many_is_an_error_with_advice():
    def work(size):
        raise MemoryError

    with pytest.raises(
        memory.OutOfMemory, match=r"step 7, with one sequence .* lower model.max_seq"
    ):
        memory.halving(4, work, "step 7")


def test_other_errors_are_not_mistaken_for_it():
    def work(size):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        memory.halving(4, work, "a test")


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n"}, None),
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": "max\n"}, None),
        ({"proc/self/cgroup": "0::/job\n", "sys/fs/cgroup/job/memory.max": "4096\n"}, 4096),
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/memory.max": "2048\n",
            },
            2048,
        ),
        # a container, which sees its own group as the root
        ({"proc/self/cgroup": "0::/outside\n", "sys/fs/cgroup/memory.max": "1024\n"}, 1024),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n2:cpu:/\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "512\n",
            },
            512,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            None,
        ),
    ],
)
def test_the_limit_of_the_control_group(tmp_path, files, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.limit_bytes(None, 0, tmp_path) == limit
    assert memory.limit_bytes(1e-6, 0, tmp_path) == min(1000, limit or 1000)


V1, V2 = "sys/fs/cgroup/memory/job", "sys/fs/cgroup/job"


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        # 700 in use, of which 200 are files and, of those, 50 shared memory, which stays; 100 are of this training
        (
            {
                "proc/self/cgroup": "0::/job\n",
                f"{V2}/memory.max": "4096\n",
                f"{V2}/memory.current": "700\n",
                f"{V2}/memory.stat": "anon 400\nfile 200\nshmem 50\nslab_reclaimable 10\n",
            },
            4096 - (700 - 200 + 50 - 10 - 100),
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/job\n",
                f"{V1}/memory.limit_in_bytes": "4096\n",
                f"{V1}/memory.usage_in_bytes": "700\n",
                f"{V1}/memory.stat": "cache 1\nshmem 2\ntotal_cache 200\ntotal_shmem 50\n",
            },
            4096 - (700 - 200 + 50 - 100),
        ),
        # others above the group of the job, in a smaller limit
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                f"{V2}/step/memory.max": "3000\n",
                f"{V2}/step/memory.current": "100\n",
                f"{V2}/step/memory.stat": "file 0\nshmem 0\n",
                f"{V2}/memory.max": "4096\n",
                f"{V2}/memory.current": "3100\n",
                f"{V2}/memory.stat": "file 0\nshmem 0\n",
            },
            1096,
        ),
        # it counts its own memory a little later than the group does
        (
            {
                "proc/self/cgroup": "0::/job\n",
                f"{V2}/memory.max": "4096\n",
                f"{V2}/memory.current": "90\n",
                f"{V2}/memory.stat": "file 0\nshmem 0\n",
            },
            4096,
        ),
        (
            {
                "proc/self/cgroup": "0::/job\n",
                f"{V2}/memory.max": "4096\n",
                f"{V2}/memory.current": "9000\n",
                f"{V2}/memory.stat": "file 0\nshmem 0\n",
            },
            0,
        ),
    ],
    ids=["version 2", "version 1", "a group above", "no others", "full"],
)
def test_what_others_in_the_control_group_hold_is_not_there(tmp_path, files, limit):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.limit_bytes(None, 100, tmp_path) == limit


@pytest.mark.skipif(sys.platform != "linux", reason="read from /proc")
def test_what_this_process_holds(monkeypatch):
    """A training's own memory is not other programs' in its group."""
    before = runtime.held_memory()
    tensor = torch.ones(2**26)  # 256 MiB
    assert 2**28 <= runtime.held_memory() - before < 2**28 + 2**26
    del tensor

    held = []
    monkeypatch.setattr(memory, "cgroup_limit", lambda own, root: held.append(own) or 5 * 10**9)
    accelerator = runtime.make_accelerator("cpu", 1)
    assert memory.share_of_limit(None, accelerator) == 5 * 10**9
    assert memory.share_of_limit(2, accelerator) == 2 * 10**9
    assert held[0] > 2**20


@pytest.mark.parametrize(
    ("limit", "size", "most_tried"),
    [(10**9, 64, 64), (1000, 16, 16), (600, 8, 8), (340, 2, 2), (250, 1, 1)],
)
def test_the_largest_size_below_the_limit(limit, size, most_tried):
    """A process of 200 bytes and 30 a sequence, of which a tenth of the limit has to stay free."""
    tried = []

    def peak(size):
        tried.append(size)
        return 200 + 30 * size

    if limit == 250:
        with pytest.raises(memory.OutOfMemory, match="one sequence at a time takes"):
            memory.largest_that_fits(64, limit, 200, peak)
        return
    assert memory.largest_that_fits(64, limit, 200, peak) == (size, 200 + 30 * size)
    assert max(tried) == most_tried  # what would not fit is not even tried


def losses_of(run):
    return [line["loss"] for line in history(run) if line["event"] == "train"]


@pytest.mark.parametrize("failing", [4, 15], ids=["dense", "sparse"])
def test_a_step_that_runs_out_is_done_anew(folder, tmp_path, monkeypatch, failing):
    """The losses are those of an undisturbed run, dropout included, and the history tells the new size."""
    settings = settings_of(model={"attention_dropout": 0.2, "dropout_prob": 0.1})
    training.train(settings, folder, tmp_path / "whole", device="cpu", threads=1)
    forward, step, seen = Classifier.forward, training.Training.step, {}

    def noted(self, index, batch):
        seen.update(step=index + 1)
        return step(self, index, batch)

    def failing_late(self, batch, *arguments):
        if (
            self.training
            and seen["step"] >= failing
            and len(batch) + batch.first > 8
            and len(batch) > 4
        ):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, batch, *arguments)

    monkeypatch.setattr(training.Training, "step", noted)
    monkeypatch.setattr(Classifier, "forward", failing_late)
    metrics = training.train(settings, folder, tmp_path / "parts", device="cpu", threads=1)
    steps = [line for line in history(tmp_path / "parts") if line["event"] == "train"]
    assert [line["micro_batch"] for line in steps] == [16] * (failing - 1) + [4] * (25 - failing)
    assert metrics["micro_batch"] == 4 and metrics["num_steps"] == 24
    whole, parts = losses_of(tmp_path / "whole"), losses_of(tmp_path / "parts")
    assert whole[: failing - 1] == parts[: failing - 1]
    assert whole == pytest.approx(parts, rel=2e-4)


def test_an_evaluation_that_runs_out_scores_the_same(folder, tmp_path, monkeypatch):
    training.train(settings_of(), folder, tmp_path / "whole", device="cpu", threads=1)
    forward = Classifier.forward

    def failing(self, batch, *arguments):
        if not self.training and len(batch) > 3:
            raise MemoryError
        return forward(self, batch, *arguments)

    monkeypatch.setattr(Classifier, "forward", failing)
    training.train(settings_of(), folder, tmp_path / "parts", device="cpu", threads=1)
    for whole, parts in zip(
        *(history(tmp_path / name) for name in ("whole", "parts")), strict=True
    ):
        if whole["event"] == "eval":
            assert whole["accuracy"] == parts["accuracy"]
            assert whole["loss"] == pytest.approx(parts["loss"], rel=1e-5)


LONG = {
    "dataset": {"max_length": 512},
    "model": {"max_seq_len": 512, "block_size": 32, "num_layers": 2} | {"batch_size": None},
    "training": {"batch_size": 64, "num_train_steps": 4, "num_dense_train_steps": 2, "warmup": 1}
    | {"eval_frequency": 4},
}
CHILD = """
import json, resource, sys
from pathlib import Path
from sat import runtime, training
settings, data, output, extra = json.loads(sys.argv[1]), *sys.argv[2:]
if extra != "none":
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + int(extra),) * 2)
training.train(settings, Path(data), Path(output), device="cpu", threads=1)
"""


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    """Processed task whose batch takes some hundred megabytes, and a run without a limit."""
    folder = tmp_path_factory.mktemp("long")
    write_processed(folder / "data", "listops", repeated_symbol("listops", SIZES, 512))
    done = run_child(folder, folder / "free", settings_of(**LONG))
    assert done.returncode == 0, done.stderr
    return folder


def run_child(folder: Path, output: Path, settings: dict, extra="none"):
    """A training in a process of its own, with `extra` bytes of address space above what torch takes."""
    command = [
        sys.executable,
        "-c",
        CHILD,
        json.dumps(settings),
        folder / "data",
        output,
        str(extra),
    ]
    # One arena: else every thread that allocates takes 64 MiB of address space.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=config.ROOT, env=environment)


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def rewrite_metrics(run: Path, changes: dict) -> None:
    """With `changes`, sealed anew with the files as they are."""
    metrics = metrics_of(run) | changes
    (run / "metrics.json").write_text(json.dumps(seal.add(metrics, run, metrics["files"])))


def test_a_limit_is_kept_by_smaller_parts(long, tmp_path):
    """Half of what the free run took beyond torch itself."""
    free = metrics_of(long / "free")
    assert free["micro_batch"] == 64
    peak = free["phases"]["dense"]["peak_memory_bytes"]
    idle = 4 * 10**8
    limit = (idle + (peak - idle) // 2) / memory.GIGABYTE
    settings = settings_of(**config.merge(LONG, {"model": {"memory_limit_gb": limit}}))
    done = run_child(long, tmp_path, settings)
    assert done.returncode == 0, done.stderr
    kept = metrics_of(tmp_path)
    assert 1 <= kept["micro_batch"] < 64
    for phase in kept["phases"].values():
        assert phase["peak_memory_bytes"] <= limit * memory.GIGABYTE
    assert losses_of(long / "free") == pytest.approx(losses_of(tmp_path), rel=2e-4)


EVALUATION = """
import sys
from pathlib import Path
from sat import evaluation
evaluation.evaluate_run(Path(sys.argv[1]), Path(sys.argv[2]), "cpu", 1)
"""


def evaluated(run: Path, long: Path, **changes) -> dict:
    """eval.json of a copy of the free run, scored in a process of its own; changes: of its model settings."""
    shutil.copytree(long / "free", run)
    stored = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config.merge(stored, {"model": changes})))
    rewrite_metrics(run, {})
    command = [sys.executable, "-c", EVALUATION, run, long / "data"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=config.ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads((run / "eval.json").read_text())


def test_a_limit_is_kept_when_a_run_is_scored(long, tmp_path):
    free = evaluated(tmp_path / "free", long)
    assert free["micro_batch"] == 64
    usable = 0.92 * free["peak_memory_bytes"]
    limit = usable / memory.USABLE / memory.GIGABYTE
    kept = evaluated(tmp_path / "kept", long, memory_limit_gb=limit)
    assert 1 <= kept["micro_batch"] < 64
    assert kept["peak_memory_bytes"] < free["peak_memory_bytes"]
    assert kept["accuracy"] == free["accuracy"]
    assert kept["loss"] == pytest.approx(free["loss"], rel=1e-5)


def test_a_run_is_scored_in_the_parts_that_it_was_trained_in(folder, tmp_path, monkeypatch):
    """Its training had to take 3 sequences at once; so does its evaluation, and it goes on halving."""
    training.train(settings_of(), folder, tmp_path, device="cpu", threads=1)
    whole = evaluation.evaluate_run(tmp_path, folder, "cpu", 1)
    assert whole["micro_batch"] == 16
    rewrite_metrics(tmp_path, {"micro_batch": 3})
    sizes, forward = [], Classifier.forward

    def failing(self, batch, *arguments):
        sizes.append(len(batch))
        if len(batch) > 2:
            raise MemoryError
        return forward(self, batch, *arguments)

    monkeypatch.setattr(Classifier, "forward", failing)
    parts = evaluation.evaluate_run(tmp_path, folder, "cpu", 1)
    assert max(sizes) == 3 and parts["micro_batch"] == 1
    assert parts["accuracy"] == whole["accuracy"]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_time_and_memory_of_an_evaluation_are_without_its_first_batch(
    folder, tmp_path, monkeypatch
):
    """The first forward takes 1,000 seconds, by a clock of its own, and 512 MiB; each later one a second."""
    training.train(settings_of(), folder, tmp_path, device="cpu", threads=1)
    forward, calls = Classifier.forward, []

    def first_is_slow(self, *arguments):
        if not calls:
            torch.ones(2**27)
        calls.append(1 if calls else 1000)
        return forward(self, *arguments)

    monkeypatch.setattr(Classifier, "forward", first_is_slow)
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: sum(calls))
    before = runtime.peak_memory(torch.device("cpu"))
    scored = evaluation.evaluate_run(tmp_path, folder, "cpu", 1)
    assert calls[0] == 1000 and scored["examples"] == SIZES["test"]
    assert scored["ms_per_batch"] == 1000
    if os.access("/proc/self/clear_refs", os.W_OK):
        assert scored["peak_memory_bytes"] < before + 2**28


def test_too_small_a_limit_is_an_error(folder, tmp_path):
    settings = settings_of(model={"memory_limit_gb": 0.01})
    with pytest.raises(memory.OutOfMemory, match=r"model\.memory_limit_gb.*raise the limit"):
        training.train(settings, folder, tmp_path, device="cpu", threads=1)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems ignore RLIMIT_AS")
def test_a_run_goes_through_in_little_address_space(long, tmp_path):
    done = run_child(long, tmp_path, settings_of(**LONG), extra=400 * 2**20)
    assert done.returncode == 0, done.stderr
    assert "sequences at a time" in done.stderr
    assert metrics_of(tmp_path)["micro_batch"] < 64
    assert losses_of(long / "free") == pytest.approx(losses_of(tmp_path), rel=2e-4)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that was made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_a_dense_step_makes_no_tensor_of_all_scores(long):
    """B * H * N * N would be the largest by far: here the largest are B * N * hidden, and N * N of a mean map."""
    run = config.RunConfig.from_dict(
        settings_of(**config.merge(LONG, {"training": {"batch_size": 4}}))
    )
    _, splits = data.load(long / "data")
    state = training.Training(run, 1, runtime.make_accelerator("cpu", 1))
    batch = splits["train"].batch(data.training_rows(128, 4, 0, 3), 512)
    with Largest() as largest:
        line = state.step(0, batch)
    assert line["skewness"][0] is not None
    assert largest.elements < 4 * run.model.num_head * 512 * 512 / 2
