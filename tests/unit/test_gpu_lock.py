"""Locks of GPUs: in real processes, on made-up device names, for the machines of the tests have no GPU."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest

from sat import gpu_lock
from sat.config import ROOT, ConfigError

HOLD = """
import sys, time
from pathlib import Path
from sat import gpu_lock
devices, count, folder = sys.argv[1].split(","), int(sys.argv[2]), Path(sys.argv[3])
print(",".join(gpu_lock.take(devices, count, folder, poll_seconds=0.02)), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that takes devices and holds them until its stdin is closed."""
    started = []

    def start(count, devices="a,b", program=HOLD):
        process = subprocess.Popen(
            [sys.executable, "-c", program, devices, str(count), str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def taken(process):
    return process.stdout.readline().strip()


def test_processes_get_devices_of_their_own_and_the_last_waits(holder):
    first = holder(1)
    assert taken(first) == "a"
    second = holder(1)
    assert taken(second) == "b"
    third = holder(1)
    line = third.stderr.readline()
    assert "2 of 2 GPUs are taken" in line and "waiting for 1" in line
    assert str(first.pid) in line and str(second.pid) in line
    first.stdin.close()
    assert taken(third) == "a"


def test_a_killed_process_leaves_no_lock(holder):
    first = holder(1, devices="a")
    assert taken(first) == "a"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert taken(holder(1, devices="a")) == "a"


def test_two_jobs_of_two_devices_never_hold_one_each(holder):
    """Four at once for three devices: one at a time can have two of them, and none holds a third in vain."""
    jobs = [holder(2, devices="a,b,c") for _ in range(4)]
    done = []
    while len(done) < 4:
        ready = [j for j in jobs if j not in done and _has_output(j)]
        assert len(ready) <= 1
        for job in ready:
            assert taken(job) == "a,b"
            job.stdin.close()
            job.wait()
            done.append(job)


def _has_output(process):
    return bool(select.select([process.stdout], [], [], 0.05)[0])


def test_the_lock_outlives_the_start_of_another_program(holder):
    """A launcher takes the place of the process that locked: same process, other program."""
    program = HOLD.replace("sys.stdin.read()", "") + (
        "import os; os.execv(sys.executable, [sys.executable, '-c', 'import sys; sys.stdin.read()'])"
    )
    first = holder(1, devices="a", program=program)
    assert taken(first) == "a"
    time.sleep(0.1)
    second = holder(1, devices="a")
    assert "1 of 1 GPUs are taken" in second.stderr.readline()
    first.stdin.close()
    assert taken(second) == "a"


def test_too_few_devices_are_an_error_at_once(tmp_path):
    with pytest.raises(ConfigError, match="2 GPUs are wanted, one a process, and 1 are visible"):
        gpu_lock.take(["a"], 2, tmp_path)


LISTED = ["GPU-11aa", "GPU-22bb", "GPU-22cc"]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, LISTED),
        ("1,0", ["GPU-22bb", "GPU-11aa"]),
        ("GPU-22c", ["GPU-22cc"]),
        ("", []),
        ("-1", []),
        ("2,7,0", ["GPU-22cc"]),  # as CUDA reads it: nothing behind an entry that names no device
        ("GPU-22", []),  # of two
        ("0,0", ["GPU-11aa"]),
    ],
)
def test_visible_devices_are_respected(variable, expected):
    environment = {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    assert gpu_lock.visible_gpus(LISTED, environment) == expected


def test_the_list_of_the_driver(tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'echo "GPU 0: NVIDIA H100 (UUID: GPU-11aa)"\n'
        'echo "GPU 1: NVIDIA H100 (UUID: GPU-22bb)"\n'
        'echo "  MIG 3g.40gb     Device  0: (UUID: MIG-1)"\n'
        'echo "  MIG 3g.40gb     Device  1: (UUID: MIG-2)"\n'
        'echo "GPU 2: NVIDIA H100 (UUID: GPU-33cc)"\n'
        'echo "  MIG 7g.80gb     Device  0: (UUID: MIG-3)"\n'
    )
    program.chmod(0o755)
    assert gpu_lock.listed_gpus(str(program)) == ["GPU-11aa", "MIG-1", "MIG-2", "MIG-3"]
    assert gpu_lock.listed_gpus(str(tmp_path / "none")) == []


def test_the_folder_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_lock.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = gpu_lock.lock_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(gpu_lock.os, "getuid", lambda: os.stat(folder).st_uid + 1)
    (tmp_path / f"sat-lra-gpus-{os.getuid()}").mkdir()
    with pytest.raises(ConfigError, match="belongs to another user"):
        gpu_lock.lock_folder()
