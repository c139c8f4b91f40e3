"""The world in which faults happen, the tally of them, and what must be gone at the end."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest
import stub_project
from kinds import TALLY, Pipeline, results
from server import Server
from world import MARK, World

from sat.config import ROOT

UNWATCHED = {".git", ".venvs", ".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__"}


def files_of_project() -> set[str]:
    found = set()
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in UNWATCHED]
        found |= {str(Path(folder, name)) for name in files}
    return found


def marked_processes(mark: str) -> list[str]:
    """Command lines of the processes that the campaign started and that are still there."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it has just ended, or is somebody else's
    return found


@pytest.fixture(scope="session")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory, kernels_dir, server):
    """What went well once; at the end no process, mount or file is left."""
    before = files_of_project()
    root, mark = tmp_path_factory.mktemp("faults"), uuid.uuid4().hex
    world = World(root, kernels_dir, mark, server)
    stub_project.make(root / "fresh")
    started = time.perf_counter()
    pipeline = Pipeline(world, root / "finished", root / "fresh")
    code, said = pipeline.end(pipeline.start())
    assert code == 0 and results(root / "finished"), said
    world.pipeline_seconds = time.perf_counter() - started
    yield world
    world.close()
    until = time.monotonic() + 20
    while (left := marked_processes(mark)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left, f"processes are left: {left}"
    assert str(root) not in Path("/proc/self/mounts").read_text(), "a mount is left"
    shutil.rmtree(root)
    assert files_of_project() == before, "files of the project were added or removed"


def pytest_terminal_summary(terminalreporter):
    if not TALLY:
        return
    columns = ("tried", "survived", "refused", "skipped", "wrong")
    write = terminalreporter.write_line
    terminalreporter.section("faults")
    total = Counter()
    for counts in TALLY.values():
        counts["tried"] = sum(counts[name] for name in columns[1:] if name != "skipped")
        total.update(counts)
    write(f"{'':<32}" + "".join(f"{name:>10}" for name in columns))
    for kind, counts in [*sorted(TALLY.items()), ("all", total)]:
        write(f"{kind:<32}" + "".join(f"{counts[name]:>10}" for name in columns))
