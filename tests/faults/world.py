"""A tiny run set that went well, and the jobs of it: what each reads, writes, and what right results are."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from server import Server

from sat import config
from sat.config import ROOT

HERE = Path(__file__).resolve().parent
SCRIPTS = ROOT / "workflow/scripts"
LEVEL = "curv_contour_length_14"
ROWS = {"train": 160, "val": 40, "test": 60}
RUNS = [(attention, seed) for attention in ("softmax", "sat") for seed in (1, 2)]
SPLITS = ("train", "dev", "test")
MARK = "SAT_FAULTS"  # in the environment of every process that a campaign starts
LIMIT = 120  # seconds after which a job that should end is called a hang


class Wrong(AssertionError):
    """The one thing that must not happen: a wrong result, or an end without clear words."""


@dataclass
class End:
    """How a job ended: its exit code (None: it goes on) and what it said."""

    code: int | None
    said: str

    @property
    def clear(self) -> bool:
        return self.code not in (0, None) and "error:" in self.said and "Traceback" not in self.said


class Runner:
    """The process of runner.py."""

    def __init__(self, mark: str):
        quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "GLIBC_TUNABLES": ""}
        self.process = subprocess.Popen(
            [sys.executable, HERE / "runner.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | quiet | {MARK: mark},
        )

    def ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@dataclass
class Job:
    """A program of the pipeline in a folder of its own.

    prepare(folder) puts there what the program reads; argv: how a rule calls it; check(folder) raises Wrong unless the
    outputs are right. Files are named below the folder; inputs: those that a fault may damage.
    """

    name: str
    argv: list[str]
    prepare: Callable[[Path], None]
    check: Callable[[Path], None]
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)  # files that stay beside the outputs
    seconds: float = 1.0  # that it takes, as measured


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)


def settings_of(attention: str, seed: int, **training) -> dict:
    changes = {
        "dataset": {"max_length": 64},
        "model": {"num_layers": 1, "max_seq_len": 64, "block_size": 16, "density": 0.3},
        "training": {
            "batch_size": 16,
            "learning_rate": 3e-3,
            "warmup": 2,
            "num_train_steps": 12,
            "eval_frequency": 3,
            "skewness": 1e9,
            "checkpoint_seconds": 0,
            **({"num_dense_train_steps": 6} if attention == "sat" else {}),
            **training,
        },
    }
    return config.resolve(config.load("demo"), "listops", attention, seed, changes=changes)


def make_archive(path: Path) -> None:
    """A small archive in the layout of the LRA release."""
    draw = random.Random(0)
    members = {}
    for split, rows in ROWS.items():
        lines = ["Source\tTarget"]
        for _ in range(rows):
            digits = [draw.randrange(10) for _ in range(draw.randrange(4, 30))]
            name = draw.choice(["MIN", "MAX"])
            value = {"MIN": min, "MAX": max}[name](digits)
            lines.append(f"[{name} {' '.join(map(str, digits))} ]\t{value}")
        members[f"listops-1000/basic_{split}.tsv"] = "\n".join(lines) + "\n"
    for split in ("train", "eval", "test"):
        pairs = [
            f"{draw.randrange(2)}\t{i}\t{i + 1}\tone text {draw.random()}\tanother {draw.random()}"
            for i in range(40)
        ]
        members[f"tsv_data/new_aan_pairs.{split}.tsv"] = "\n".join(pairs) + "\n"
    folder = f"pathfinder32/{LEVEL}"
    members[f"{folder}/metadata/1.npy"] = "imgs/1 sample_0.png 0 1\n"
    content = {name: text.encode() for name, text in members.items()}
    content[f"{folder}/imgs/1/sample_0.png"] = draw.randbytes(
        60_000
    )  # so that kills find it at work
    with tarfile.open(path, "w:gz") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(f"lra_release/lra_release/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


class World:
    """What went well once, below `root`, and the jobs that did it."""

    pipeline_seconds = 5.0  # that Snakemake takes for all, as measured

    def __init__(self, root: Path, kernels: Path, mark: str, server: Server):
        self.root, self.mark, self.server = root, mark, server
        self.runner = Runner(mark)
        self.archive = root / "archive/lra_release.gz"
        self.archive.parent.mkdir(parents=True)
        make_archive(self.archive)
        server.body = self.archive.read_bytes()
        self.archive_sha256 = sha256(self.archive)
        self.good = root / "good"
        self.good.mkdir()
        copy(kernels, self.good / "kernels")
        self.jobs: dict[str, Job] = {}
        self._make(server.url)

    # ------------------------------------------------------------ running

    def start(self, argv: list[str], folder: Path, log: str = "log", clock: float = 0) -> int:
        """Start a program; -> its id. What it says is in a file beside the folder, which may be full."""
        env = {MARK: self.mark, "SAT_KERNELS": str(folder / "kernels"), "GLIBC_TUNABLES": "x"}
        path = folder.with_suffix(f".{log}")
        path.unlink(missing_ok=True)
        request = {"argv": argv, "cwd": str(folder), "env": env, "log": str(path)}
        return self.runner.ask(**request, clock=clock)

    def wait(self, process: int, folder: Path, log: str = "log", seconds: float = LIMIT) -> End:
        code = self.runner.ask(wait=process, seconds=seconds)
        path = folder.with_suffix(f".{log}")
        return End(code, path.read_text(errors="replace") if path.exists() else "")

    def run(self, job: Job, folder: Path, argv: list[str] | None = None, clock: float = 0) -> End:
        """Run a job to its end. Raises Wrong when it hangs."""
        process = self.start(argv or job.argv, folder, clock=clock)
        end = self.wait(process, folder)
        if end.code is None:
            os.killpg(process, signal.SIGKILL)
            raise Wrong(f"{job.name} hangs; it said:\n{end.said}")
        return end

    def server_tries(self, path: str) -> int:
        return self.server.tries[path]

    def close(self) -> None:
        self.runner.close()

    # ------------------------------------------------------------ the jobs

    def _make(self, url: str) -> None:
        """Run every job once, keep its results as those that are right."""
        self._add_download(url)
        self._add_extract()
        for task in ("listops", "retrieval"):
            self._add_preprocess(task)
        self._add_kernels()
        for attention in ("sat", "softmax"):
            self._add_train(attention)
        self._finish_runs()
        self._add_evaluate()
        self._add_tables()

    def _add(self, job: Job, *results: str) -> None:
        """Run the job; keep `results`, files or folders of it, below `good`."""
        folder = self.root / "first" / job.name
        folder.mkdir(parents=True)
        job.prepare(folder)
        before = time.perf_counter()
        end = self.run(job, folder)
        job.seconds = time.perf_counter() - before
        assert end.code == 0, f"{job.name}: {end.said}"
        for name in results:
            copy(folder / name, self.good / name)
        job.check(folder)
        self.jobs[job.name] = job
        shutil.rmtree(folder)

    def same(self, *names: str) -> Callable[[Path], None]:
        """A check that files have the bytes of the good ones."""

        def check(folder: Path) -> None:
            for name in names:
                if not (folder / name).is_file():
                    raise Wrong(f"{name} is not there though the job says that it ended well")
                if (folder / name).read_bytes() != (self.good / name).read_bytes():
                    raise Wrong(f"{name} is not what it should be")

        return check

    def from_good(self, *names: str) -> Callable[[Path], None]:
        def prepare(folder: Path) -> None:
            for name in names:
                copy(self.good / name, folder / name)

        return prepare

    def source(self, url: str, sha256: str | None = None, size: int | None = None) -> str:
        row = {"name": "lra_release", "file": "lra_release.gz", "urls": [url], "sha256": sha256}
        return json.dumps(row | {"bytes": size, "licence": "none", "provenance": "made up"})

    def download_argv(
        self, url: str, sha256: str | None = None, size: int | None = None
    ) -> list[str]:
        where = ["--output", "archives/lra_release.gz", "--manual-dir", "manual"]
        where += ["--record", "archives/lra_release.gz.source.json"]
        return [str(SCRIPTS / "download.py"), "--source", self.source(url, sha256, size), *where]

    def _add_download(self, url: str) -> None:
        kept = [
            "checksums.json",
            ".checksums.lock",
            ".kept/lra_release.gz",
            ".kept/lra_release.gz.json",
        ]

        def check(folder: Path) -> None:
            if sha256(folder / "archives/lra_release.gz") != self.archive_sha256:
                raise Wrong("the archive is not the one that the server has")
            record = json.loads((folder / "archives/lra_release.gz.source.json").read_text())
            if record["sha256"] != self.archive_sha256:
                raise Wrong(f"the record is wrong: {record}")

        self._add(
            Job(
                "download",
                self.download_argv(f"{url}/slow"),
                lambda folder: None,
                check,
                outputs=["archives/lra_release.gz", "archives/lra_release.gz.source.json"],
                kept=[f"archives/{name}" for name in (*kept, ".lra_release.gz.lock")],
            ),
            "archives",
        )

    def _add_extract(self) -> None:
        names = [f"listops/basic_{split}.tsv" for split in ROWS]
        names += [f"retrieval/new_aan_pairs.{split}.tsv" for split in ("train", "eval", "test")]
        outputs = [f"raw/{name}" for name in (*names, f"pathfinder/{LEVEL}.tar")]
        self._add(
            Job(
                "extract",
                [str(SCRIPTS / "extract.py"), "--archive", "archives/lra_release.gz"]
                + ["--output-dir", "raw", "--level", LEVEL],
                self.from_good("archives"),
                self.same(*outputs),
                inputs=["archives/lra_release.gz"],
                outputs=outputs,
                kept=["raw/files.json", "raw/.extract.tmp.lock"],
            ),
            "raw",
        )

    def _add_preprocess(self, task: str) -> None:
        described = {"task": task, "caps": {}, "max_length": 64, "options": {}}
        outputs = [f"{task}/{name}" for name in (*(f"{s}.arrow" for s in SPLITS), "manifest.json")]
        self._add(
            Job(
                f"preprocess {task}",
                [str(SCRIPTS / "preprocess.py"), "--task", task, "--config", json.dumps(described)]
                + ["--run-data", ".", "--output-dir", task],
                self.from_good("raw", "archives/lra_release.gz.source.json"),
                self.same(*outputs),
                inputs=[
                    str(path.relative_to(self.good))
                    for path in sorted((self.good / "raw" / task).iterdir())
                ],
                outputs=outputs,
                kept=[f".{task}.tmp.lock"],
            ),
            task,
        )

    def _add_kernels(self) -> None:
        def check(folder: Path) -> None:
            record = json.loads((folder / "built/kernels.json").read_text())["cpu"]
            if record["sha256"] != sha256(folder / "built/libsat_cpu.so"):
                raise Wrong("kernels.json describes another library")
            script = "import ctypes; print(ctypes.CDLL('built/libsat_cpu.so').answer())"
            done = subprocess.run(
                [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True
            )
            if done.stdout != "42\n":
                raise Wrong(f"the library cannot be used: {done.stderr}")

        self._add(
            Job(
                "kernels",
                [str(SCRIPTS / "build_kernels.py"), "--source", "csrc", "--output-dir", "built"]
                + ["--cuda", "none"],
                lambda folder: copy(HERE / "csrc", folder / "csrc"),
                check,
                outputs=["built/libsat_cpu.so", "built/kernels.json"],
            )
        )

    def train_argv(self, attention: str, seed: int) -> list[str]:
        settings = json.dumps(settings_of(attention, seed))
        where = ["--data-dir", "listops", "--output-dir", run_folder(attention, seed)]
        machine = ["--kernels", "kernels", "--threads", "1", "--device", "cpu"]
        return ["-m", "sat", "--mode", "train", "--settings", settings, *where, *machine]

    def _add_train(self, attention: str) -> None:
        run = run_folder(attention, 1)
        names = ["config.json", "metrics.json", "history.jsonl", "model.safetensors"]
        outputs = [f"{run}/{name}" for name in (*names, "pattern.safetensors")]
        self._add(
            Job(
                f"train {attention}",
                self.train_argv(attention, 1),
                self.from_good("listops", "kernels"),
                lambda folder: self.check_run(folder, attention),
                inputs=[f"listops/{name}" for name in ("train.arrow", "dev.arrow", "test.arrow")]
                + ["listops/manifest.json", "kernels/libsat_cpu.so", "kernels/kernels.json"],
                outputs=outputs,
                kept=[f"{run}/{name}" for name in ("run.lock", ".lock")],
            ),
            run,
        )

    def check_run(self, folder: Path, attention: str, seed: int = 1) -> None:
        """Bit for bit but for times; with plain PyTorch in the place of kernels, the same up to rounding."""
        run = run_folder(attention, seed)
        for name in ("metrics.json", "model.safetensors", "pattern.safetensors", "history.jsonl"):
            if not (folder / run / name).is_file():
                raise Wrong(f"{run}/{name} is not there though the job says that it ended well")
        found, right = (stable(where / run / "metrics.json") for where in (folder, self.good))
        if found["backend"] != right["backend"]:  # the kernels were refused, with a line in the log
            close = abs(found["test"]["loss"] - right["test"]["loss"]) < 1e-3
            if not close or found["num_steps"] != right["num_steps"]:
                raise Wrong(f"other numbers without kernels: {found['test']}, not {right['test']}")
            return
        if found != right:
            keys = [key for key in right if found.get(key) != right[key]]
            raise Wrong(f"metrics.json differs in {keys}")
        self.same(f"{run}/model.safetensors", f"{run}/pattern.safetensors")(folder)
        lines = [history(where / run) for where in (folder, self.good)]
        if lines[0] != lines[1]:
            raise Wrong("history.jsonl differs")

    def _finish_runs(self) -> None:
        """The trainings of the second seed, and the state of one that was killed."""
        for attention in ("softmax", "sat"):
            folder = self.root / "first/seed2"
            self.jobs["train sat"].prepare(folder)
            end = self.run(self.jobs["train sat"], folder, self.train_argv(attention, 2))
            assert end.code == 0, end.said
            copy(folder / run_folder(attention, 2), self.good / run_folder(attention, 2))
            shutil.rmtree(folder)

    def _add_evaluate(self) -> None:
        run = run_folder("sat", 1)
        right = json.loads((self.good / run / "metrics.json").read_text())["test"]
        where = ["--data-dir", "listops", "--output-dir", run, "--kernels", "kernels"]
        settings = ["--settings", json.dumps(settings_of("sat", 1))]
        files = ["metrics.json", "config.json", "model.safetensors", "pattern.safetensors"]

        def check(folder: Path) -> None:
            found = json.loads((folder / run / "eval.json").read_text())
            for key in ("accuracy", "examples", "chance", "baseline"):
                if found[key] != right[key]:
                    raise Wrong(f"{key} is {found[key]}, in training it was {right[key]}")
            if abs(found["loss"] - right["loss"]) > 1e-4:
                raise Wrong(f"loss is {found['loss']}, in training it was {right['loss']}")

        self._add(
            Job(
                "evaluate",
                ["-m", "sat", "--mode", "eval", *settings, *where, "--threads", "1"]
                + ["--device", "cpu"],
                self.from_good("listops", "kernels", run),
                check,
                inputs=[f"{run}/{name}" for name in files]
                + [f"listops/{name}" for name in ("train.arrow", "test.arrow", "manifest.json")],
                outputs=[f"{run}/eval.json"],
                kept=[f"{run}/{name}" for name in ("run.lock", ".lock")],
            )
        )

    def _add_tables(self) -> None:
        order = {"run": "demo", "tasks": ["listops"], "attentions": ["softmax", "sat"]}
        order = ["--config", json.dumps(order | {"seeds": [1, 2]}), "--runs-dir", "runs"]
        digests = {
            f"listops/{attention}/seed{seed}": config.digest(settings_of(attention, seed))[:16]
            for attention, seed in RUNS
        }
        published = [
            "--published",
            str(ROOT / "config/published.csv"),
            "--benchmarks",
            "benchmarks",
        ]
        read = [
            f"{run_folder(attention, seed)}/{name}"
            for attention, seed in RUNS
            for name in ("metrics.json", "config.json")
        ]
        forms = ("csv", "md", "tex")
        names = [
            f"{n}.{f}" for n in ("published", "ablation", "cost", "preparation") for f in forms
        ]
        for name, options, outputs in (
            ("collect", ["--output-dir", "table"], [f"table/table.{form}" for form in forms]),
            ("compare", ["--output-dir", "tables"], [f"tables/{name}" for name in names]),
        ):
            extra = ["--digests", json.dumps(digests)] if name == "collect" else published
            self._add(
                Job(
                    name,
                    [str(SCRIPTS / f"{name}.py"), *order, *options, *extra],
                    self.from_good("runs"),
                    self.same(*outputs),
                    inputs=read,
                    outputs=outputs,
                ),
                *outputs,
            )


def run_folder(attention: str, seed: int) -> str:
    return f"runs/listops/{attention}/seed{seed}"


def stable(path: Path) -> dict:
    """metrics.json without times, memory and what depends on them."""
    metrics = json.loads(path.read_text())
    for phase in filter(None, metrics["phases"].values()):
        for key in ("ms_per_step", "seconds", "cpu_seconds", "peak_memory_bytes"):
            phase.pop(key)
    for key in ("training_seconds", "content_sha256", "files", "git_commit", "micro_batch"):
        metrics.pop(key, None)
    return metrics


def history(run: Path) -> list[dict]:
    lines = (run / "history.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "ms"} for line in lines]
