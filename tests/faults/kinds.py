"""The kinds of faults. Each is a function (world, folder, draw) that does one to a job and sees what comes of it.

It returns "survived" when the next run gave the right result, "refused" when there was a clear error (and, that
mended, the right result), and raises world.Wrong otherwise. `draw`, a random.Random of the fault's seed, decides all.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from server import BAD
from world import LIMIT, MARK, End, Job, World, Wrong, copy, run_folder

SURVIVED, REFUSED = "survived", "refused"
TALLY: dict[str, Counter] = defaultdict(Counter)  # kind -> outcome -> how often
Fault = Callable[[World, Path, random.Random], str]
LITTER = (".tmp", ".partial", ".part", ".lock", "checkpoint", "checkpoint.old")


# ---------------------------------------------------------------- what must hold after a fault


def judge(job: Job, folder: Path, end: End, *, signalled: bool = False) -> str:
    """Of a run under the fault: right, or a clear error; signalled: it may also have been ended by a signal."""
    if end.code == 0:
        job.check(folder)
        return SURVIVED
    if not end.clear and not (signalled and end.code in (-9, -15, -2, 143, 130)):
        raise Wrong(f"{job.name} ended with {end.code} and without a clear error:\n{end.said}")
    return REFUSED


def again(world: World, job: Job, folder: Path) -> None:
    """The next run, with nothing in its way, gives the right result and leaves nothing else behind."""
    end = world.run(job, folder)
    if end.code != 0:
        raise Wrong(f"{job.name}, run again, ended with {end.code}:\n{end.said}")
    job.check(folder)
    litter = [
        name
        for path in folder.rglob("*")
        if path.name.endswith(LITTER)
        and (name := str(path.relative_to(folder))) not in job.kept
        and path.name != ".checksums.lock"
    ]
    if litter:
        raise Wrong(f"{job.name} left {litter}")


def signal_group(process: int, number: int) -> None:
    try:
        os.killpg(process, number)
    except ProcessLookupError:
        pass


# ---------------------------------------------------------------- kills and hangs


def kill(name: str) -> Fault:
    """SIGKILL at random moments, one to three times, and on until one finds the job at work; then a run left alone."""

    def fault(world: World, folder: Path, draw: random.Random) -> str:
        job = world.jobs[name]
        job.prepare(folder)
        attempts, landed = draw.randint(1, 3), 0
        for attempt in range(10):
            if attempt >= attempts and landed:
                break
            process = world.start(job.argv, folder)
            time.sleep(draw.uniform(0, job.seconds))
            signal_group(process, signal.SIGKILL)
            end = world.wait(process, folder)
            judge(job, folder, end, signalled=True)
            landed += end.code == -signal.SIGKILL
            if end.code == 0:  # too late; what it left would make the next one quick
                shutil.rmtree(folder)
                folder.mkdir()
                job.prepare(folder)
        else:
            raise Wrong(f"no kill found {name} at work")
        again(world, job, folder)
        return SURVIVED

    return fault


def kill_parent(world: World, folder: Path, draw: random.Random) -> str:
    """A download is killed, its curl is not; the next one comes at once."""
    job = world.jobs["download"]
    process = world.start(job.argv, folder)
    time.sleep(draw.uniform(0.1, 0.9 * job.seconds))
    try:
        os.kill(process, signal.SIGKILL)
        judge(job, folder, world.wait(process, folder), signalled=True)
        outcome = judge(job, folder, world.run(job, folder))
        until = time.monotonic() + LIMIT
        while (found := world.run(job, folder)).code != 0 and time.monotonic() < until:
            judge(job, folder, found)
            time.sleep(0.2)
        again(world, job, folder)
    finally:
        signal_group(process, signal.SIGKILL)
    return outcome


def hang(name: str) -> Fault:
    """The process stops (SIGSTOP) at a random moment; it is let go on, asked to end, or killed."""

    def fault(world: World, folder: Path, draw: random.Random) -> str:
        job = world.jobs[name]
        job.prepare(folder)
        process = world.start(job.argv, folder)
        time.sleep(draw.uniform(0, 0.9 * job.seconds))
        signal_group(process, signal.SIGSTOP)
        time.sleep(draw.uniform(0, 0.5))
        then = draw.choice(["go on", "SIGTERM", "SIGKILL"])
        if then != "go on":
            signal_group(process, signal.Signals[then])
        signal_group(process, signal.SIGCONT)
        end = world.wait(process, folder)
        if end.code is None:
            signal_group(process, signal.SIGKILL)
            raise Wrong(f"{name} did not end after {then}:\n{end.said}")
        judge(job, folder, end, signalled=then != "go on")
        again(world, job, folder)
        return SURVIVED

    return fault


def two_at_once(name: str) -> Fault:
    """The same job twice at a time."""

    def fault(world: World, folder: Path, draw: random.Random) -> str:
        job = world.jobs[name]
        job.prepare(folder)
        first = world.start(job.argv, folder, "first")
        time.sleep(draw.uniform(0, 0.8 * job.seconds))
        second = world.start(job.argv, folder, "second")
        ends = [world.wait(p, folder, n) for p, n in ((first, "first"), (second, "second"))]
        for end in ends:
            if end.code != 0 and not end.clear:
                raise Wrong(f"{name} beside another ended with {end.code}:\n{end.said}")
        if all(end.code == 0 for end in ends):
            job.check(folder)
        again(world, job, folder)
        return SURVIVED if all(end.code == 0 for end in ends) else REFUSED

    return fault


# ---------------------------------------------------------------- disks


class Disk:
    """A file system of its own at `folder`, in memory; gone afterwards."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Disk:
        if os.geteuid() != 0:
            pytest.skip("to mount a small disk takes root")
        self.folder.mkdir(exist_ok=True)
        done = self._mount("-t", "tmpfs", "-o", "size=256m", "none")
        if done.returncode:
            pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
        return self

    def remount(self, options: str) -> None:
        done = self._mount("-o", f"remount,{options}")
        assert done.returncode == 0, done.stderr

    def _mount(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["mount", *arguments, self.folder], capture_output=True, text=True)

    @property
    def used(self) -> int:
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def __exit__(self, *_) -> None:
        done = subprocess.run(["umount", self.folder], capture_output=True, text=True)
        if done.returncode:
            subprocess.run(["umount", "--lazy", self.folder], check=True)


def size_of(world: World, names: list[str]) -> int:
    return sum((world.good / n).stat().st_size for n in names if (world.good / n).is_file())


def full_disk(name: str) -> Fault:
    """Less room than the job needs, or just enough; then plenty."""

    def fault(world: World, folder: Path, draw: random.Random) -> str:
        job = world.jobs[name]
        with Disk(folder) as disk:
            job.prepare(folder)
            need = 3 * size_of(world, job.outputs) + 50_000
            disk.remount(f"size={disk.used + draw.randrange(4096, need)}")
            outcome = judge(job, folder, world.run(job, folder))
            disk.remount("size=256m")
            again(world, job, folder)
        return outcome

    return fault


def read_only(name: str) -> Fault:
    """The results cannot be written, on a new place or over earlier ones."""

    def fault(world: World, folder: Path, draw: random.Random) -> str:
        job = world.jobs[name]
        with Disk(folder) as disk:
            job.prepare(folder)
            if draw.random() < 0.5:
                for output in job.outputs:
                    if (world.good / output).exists():
                        copy(world.good / output, folder / output)
            disk.remount("ro")
            end = world.run(job, folder)
            if not end.clear:
                raise Wrong(f"{name} on a read-only disk ended with {end.code}:\n{end.said}")
            disk.remount("rw")
            again(world, job, folder)
        return REFUSED

    return fault


# ---------------------------------------------------------------- damage


def truncate(path: Path, draw: random.Random, world: World) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size))


def flip_bit(path: Path, draw: random.Random, world: World) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def flip_digit(path: Path, draw: random.Random, world: World) -> None:
    """Another digit in a text, which stays what it is; a flipped bit where there is none."""
    content = bytearray(path.read_bytes())
    digits = [i for i, byte in enumerate(content) if 48 <= byte < 58]
    if not digits:
        return flip_bit(path, draw, world)
    content[draw.choice(digits)] = draw.choice(b"0123456789")
    path.write_bytes(content)


def swap(path: Path, draw: random.Random, world: World) -> None:
    """Another file of the same kind, from another split, run or task."""
    others = [p for p in sorted(world.good.rglob(f"*{path.suffix}")) if p.is_file()]
    shutil.copyfile(draw.choice(others or [world.archive]), path)


def garbage(path: Path, draw: random.Random, world: World) -> None:
    path.write_bytes(draw.randbytes(draw.randrange(3000)))


def delete(path: Path, draw: random.Random, world: World) -> None:
    path.unlink()


def zeros(path: Path, draw: random.Random, world: World) -> None:
    """The end is zeros, as a file system may leave it after a power cut."""
    size = path.stat().st_size
    os.truncate(path, draw.randrange(size))
    os.truncate(path, size)


WAYS = [truncate, flip_bit, flip_bit, flip_digit, flip_digit, swap, swap, garbage, delete, zeros]


def damaged(name: str) -> Fault:
    """A file that the job reads is not what was written; then it is again."""

    def fault(world: World, folder: Path, draw: random.Random) -> str:
        job = world.jobs[name]
        job.prepare(folder)
        path = folder / draw.choice(job.inputs)
        whole = path.read_bytes()
        way = draw.choice(WAYS)
        way(path, draw, world)
        end = world.run(job, folder)
        try:
            outcome = judge(job, folder, end)
        except Wrong as wrong:
            raise Wrong(f"{way.__name__} of {path.relative_to(folder)}: {wrong}") from None
        if (
            outcome == REFUSED
            and path.name not in end.said
            and f"{path.parent.name}" not in end.said
        ):
            raise Wrong(f"{way.__name__} of {path.name}: the error does not name it:\n{end.said}")
        path.write_bytes(whole)
        again(world, job, folder)
        return outcome

    return fault


def damaged_output(name: str) -> Fault:
    """What an earlier run left is damaged; the job makes it anew."""

    def fault(world: World, folder: Path, draw: random.Random) -> str:
        job = world.jobs[name]
        job.prepare(folder)
        for output in job.outputs:
            if (world.good / output).exists():
                copy(world.good / output, folder / output)
        there = [folder / output for output in job.outputs if (folder / output).exists()]
        for path in draw.sample(there, draw.randint(0, len(there))):
            draw.choice(WAYS)(path, draw, world)
        again(world, job, folder)
        return SURVIVED

    return fault


def damaged_checkpoint(world: World, folder: Path, draw: random.Random) -> str:
    """A training is killed, and what it would go on from is damaged."""
    job = world.jobs["train sat"]
    job.prepare(folder)
    run = folder / run_folder("sat", 1)
    process = world.start(job.argv, folder)
    until = time.monotonic() + LIMIT
    while not (run / "checkpoint.old").exists() and time.monotonic() < until:
        if (end := world.wait(process, folder, seconds=0.01)).code is not None:
            raise Wrong(f"no checkpoint.old; it ended with {end.code}:\n{end.said}")
    time.sleep(draw.uniform(0, 0.3 * job.seconds))
    signal_group(process, signal.SIGKILL)
    world.wait(process, folder)
    state = [run / name for name in ("checkpoint", "checkpoint.old", "history.jsonl.partial")]
    state = [path for path in state if path.is_file() and path.stat().st_size]
    chosen = draw.sample(state, draw.randint(1, len(state))) if state else []
    for path in chosen:
        way = draw.choice(WAYS)
        way(path, draw, world)
        print(f"{way.__name__} of {path.name}")
    again(world, job, folder)
    return SURVIVED


def damaged_download(world: World, folder: Path, draw: random.Random) -> str:
    """What earlier downloads left (hashes, a second copy, a file put there by hand) is damaged."""
    job = world.jobs["download"]
    copy(world.good / "archives", folder / "archives")
    by_hand = folder / "manual/lra_release.gz"
    if draw.random() < 0.3:
        copy(world.archive, by_hand)
    folders = [folder / "archives", folder / "archives/.kept", folder / "manual"]
    files = [path for f in folders if f.is_dir() for path in sorted(f.iterdir()) if path.is_file()]
    path = draw.choice([path for path in files if path.stat().st_size])
    way = draw.choice(WAYS)
    way(path, draw, world)
    outcome = judge(job, folder, world.run(job, folder))
    if outcome == REFUSED:
        for name in ("archives/checksums.json", "archives/.kept", "manual"):
            shutil.rmtree(folder / name, ignore_errors=True)
            (folder / name).unlink(missing_ok=True) if (folder / name).is_file() else None
    again(world, job, folder)
    return outcome


# ---------------------------------------------------------------- network and clock


def network(url: str) -> Fault:
    """The server cuts, stalls, resets, lies about lengths, sends something else or refuses; then it does well."""

    def fault(world: World, folder: Path, draw: random.Random) -> str:
        job = world.jobs["download"]
        size = world.archive.stat().st_size
        known = draw.choice([(None, None), (world.archive_sha256, size), (None, size)])
        kind, seed = draw.choice(BAD), draw.randrange(10**9)
        bad = draw.randint(1, 2 if known[0] else 1)
        argv = world.download_argv(f"{url}/{kind}/{seed}/{bad}", *known)
        end = world.run(job, folder, argv)
        outcome = REFUSED
        if end.code == 0:
            try:
                job.check(folder)
                return SURVIVED
            except Wrong:
                if known[0]:
                    raise
            # Nobody knew the hash: what came is believed until the next step opens it.
            end = world.run(world.jobs["extract"], folder)
            if end.code == 0 or "checksums.json" not in end.said:
                raise Wrong(f"a wrong archive ({kind}) was taken: {end.code}\n{end.said}")
            shutil.rmtree(folder / "archives")  # as the message says
        if not end.clear:
            raise Wrong(f"{kind}: ended with {end.code}:\n{end.said}")
        while (end := world.run(job, folder, argv)).code != 0:
            if world.server.tries[f"/{kind}/{seed}/{bad}"] > bad or not end.clear:
                raise Wrong(f"{kind}: run again, ended with {end.code}:\n{end.said}")
        job.check(folder)
        return outcome

    return fault


def clock(name: str) -> Fault:
    """The clock is years off while a job runs, and its inputs are from other times, some still to come."""

    def fault(world: World, folder: Path, draw: random.Random) -> str:
        job = world.jobs[name]
        job.prepare(folder)
        set_times(folder, draw)
        years = draw.choice([-50, -1, 1, 50])
        outcome = judge(job, folder, world.run(job, folder, clock=years * 3.15e7))
        set_times(folder, draw, 0)
        again(world, job, folder)
        return outcome

    return fault


def set_times(folder: Path, draw: random.Random, latest: float = 1e8) -> None:
    """Give the files random times, up to `latest` seconds from now."""
    for path in folder.rglob("*"):
        moment = time.time() + draw.uniform(-1e8, latest)
        os.utime(path, (moment, moment))


# ---------------------------------------------------------------- Snakemake


class Pipeline:
    """A run of Snakemake in a copy of a project with stub environments."""

    def __init__(self, world: World, folder: Path, template: Path):
        self.world = world
        shutil.copytree(template, folder, dirs_exist_ok=True, symlinks=True)
        self.root = folder

    def start(self, log: str = "log", *arguments: str) -> subprocess.Popen:
        options = arguments or ("--cores", "2", "all")
        with open(self.root.with_suffix(f".{log}"), "w") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "snakemake", *options, "--configfile", "config/tiny.yaml"],
                cwd=self.root,
                env=os.environ | {MARK: self.world.mark, "HOME": str(self.root / ".home")},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def end(self, process: subprocess.Popen, log: str = "log") -> tuple[int, str]:
        try:
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            signal_group(process.pid, signal.SIGKILL)
            raise Wrong("Snakemake hangs") from None
        return code, self.root.with_suffix(f".{log}").read_text(errors="replace")

    def finish(self) -> str:
        """Run to the end, unlocking if Snakemake asks for it; raises Wrong unless all is there and right."""
        outcome = SURVIVED
        code, said = self.end(self.start())
        if code and "--unlock" in said:
            outcome = REFUSED
            self.end(self.start("log", "--unlock"))
            code, said = self.end(self.start())
        if code:
            raise Wrong(f"Snakemake, run again, ended with {code}:\n{said[-3000:]}")
        found, right = results(self.root), results(self.root.parent / "finished")
        if found != right:
            names = [name for name in right | found if found.get(name) != right.get(name)]
            raise Wrong(f"Snakemake left other files: {sorted(names)[:9]}")
        return outcome


def results(root: Path) -> dict[str, bytes]:
    """What a run leaves, without logs, times and links to places."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for part in ("data", "results")
        for path in (root / part).rglob("*")
        if path.is_file()
        and not {"logs", "benchmarks", ".kept"} & set(path.parts)
        and not path.name.endswith((".source.json", ".lock"))
    }


def kill_snakemake(world: World, folder: Path, draw: random.Random) -> str:
    """SIGKILL for Snakemake at a random moment, with its jobs or alone."""
    pipeline = Pipeline(world, folder, world.root / "fresh")
    process = pipeline.start()
    time.sleep(draw.uniform(0.1, 1.0) * world.pipeline_seconds)
    if draw.random() < 0.7:
        signal_group(process.pid, signal.SIGKILL)
    else:
        process.kill()
    pipeline.end(process)
    return pipeline.finish()


def two_snakemakes(world: World, folder: Path, draw: random.Random) -> str:
    pipeline = Pipeline(world, folder, world.root / "fresh")
    first = pipeline.start("first")
    time.sleep(draw.uniform(0, 0.7) * world.pipeline_seconds)
    second = pipeline.start("second")
    ends = [pipeline.end(first, "first"), pipeline.end(second, "second")]
    for code, said in ends:
        if code and "lock" not in said:
            raise Wrong(f"beside another, Snakemake ended with {code}:\n{said[-3000:]}")
    pipeline.finish()
    return SURVIVED if not any(code for code, _ in ends) else REFUSED


def hanging_worker(world: World, folder: Path, draw: random.Random) -> str:
    """A job never ends; Snakemake is asked to (Ctrl-C), and run again."""
    pipeline = Pipeline(world, folder, world.root / "fresh")
    python = folder / ".venvs" / draw.choice(["tf", "torch", "report"]) / "bin/python"
    whole = python.read_bytes()
    python.write_text("#!/bin/sh\nexec sleep 1000\n")
    process = pipeline.start()
    time.sleep(world.pipeline_seconds)
    number = draw.choice([signal.SIGINT, signal.SIGTERM])
    for _ in range(LIMIT // 10):  # a worker that starts after the signal waits for the next one
        signal_group(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
            break
    pipeline.end(process)
    python.write_bytes(whole)
    return pipeline.finish()


def clock_of_snakemake(world: World, folder: Path, draw: random.Random) -> str:
    """A finished run set whose files are from other times, some still to come."""
    pipeline = Pipeline(world, folder, world.root / "finished")
    for part in ("data", "results"):
        set_times(folder / part, draw)
    return pipeline.finish()


# ---------------------------------------------------------------- all of them


def kinds(url: str) -> list[tuple[str, Fault]]:
    """(name, fault) in an order in which every start of the list has some of everything."""
    steps = ["download", "extract", "preprocess listops", "preprocess retrieval", "kernels"]
    steps += ["train sat", "train softmax", "evaluate", "collect", "compare"]
    reading = [name for name in steps if name not in ("download", "kernels")]
    writing = [name for name in steps if name not in ("download", "preprocess retrieval")]
    found = [
        [(f"kill {name}", kill(name)) for name in steps],
        [(f"damaged input of {name}", damaged(name)) for name in reading * 2],
        [(f"full disk {name}", full_disk(name)) for name in writing],
        [(f"read-only {name}", read_only(name)) for name in writing],
        [(f"damaged output of {name}", damaged_output(name)) for name in writing],
        [(f"two at once {name}", two_at_once(name)) for name in steps],
        [(f"clock {name}", clock(name)) for name in steps],
        [(f"hang {name}", hang(name)) for name in steps],
        [("network", network(url))] * 6,
        [("kill snakemake", kill_snakemake), ("two snakemakes", two_snakemakes)],
        [("hanging worker", hanging_worker), ("clock of snakemake", clock_of_snakemake)],
        [("damaged checkpoint", damaged_checkpoint)] * 5,
        [("damaged download", damaged_download)] * 3,
        [("parent of curl killed", kill_parent)] * 2,
    ]
    mixed = []
    while any(found):
        mixed += [group.pop(0) for group in found if group]
    return mixed
