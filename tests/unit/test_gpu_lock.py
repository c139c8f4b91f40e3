"""Locks of GPUs: in real processes, on made-up device names, for the machines of the tests have no GPU."""

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from sat import __main__ as command_line
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


@pytest.mark.parametrize("variable", [None, "1", "GPU-11aa,0"])
def test_another_order_of_numbers_is_refused(variable):
    """Which device CUDA's number 0 is, nvidia-smi does not tell then."""
    environment = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    environment |= {} if variable is None else {"CUDA_VISIBLE_DEVICES": variable}
    with pytest.raises(ConfigError, match="CUDA_DEVICE_ORDER is FASTEST_FIRST.*PCI_BUS_ID"):
        gpu_lock.visible_gpus(LISTED, environment)
    assert gpu_lock.visible_gpus(LISTED[:1], environment)[:1] in ([], LISTED[:1])
    assert gpu_lock.visible_gpus([], environment) == []


def test_names_need_no_order():
    environment = {"CUDA_DEVICE_ORDER": "FASTEST_FIRST", "CUDA_VISIBLE_DEVICES": "GPU-22c,GPU-1"}
    assert gpu_lock.visible_gpus(LISTED, environment) == ["GPU-22cc", "GPU-11aa"]


def test_cuda_is_told_to_number_as_nvidia_smi_does(monkeypatch):
    """Under a launcher, which leaves numbers to the processes, and without GPUs alike; a user's order stays."""
    monkeypatch.setattr(gpu_lock, "listed_gpus", list)
    for variable in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(variable, "1")
    options = command_line.parse(["--mode", "train", "--task", "image"])
    for before, after in ((None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")):
        monkeypatch.setenv("CUDA_DEVICE_ORDER", before or "")
        if before is None:
            monkeypatch.delenv("CUDA_DEVICE_ORDER")
        command_line.take_devices(options, [])
        assert os.environ["CUDA_DEVICE_ORDER"] == after


def test_a_lock_with_descriptor_0_is_held(tmp_path, monkeypatch):
    """Of a job without standard input."""
    monkeypatch.setattr(gpu_lock, "_held", held := [])
    monkeypatch.setattr(gpu_lock, "try_lock", lambda path, for_all: 0)
    assert gpu_lock.take(["a"], 1, tmp_path, say=pytest.fail) == ["a"]
    assert held == [0]


@pytest.fixture
def for_all():
    """A folder like /tmp, which every user can reach."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


AS_USER = """
import os, sys
from pathlib import Path
from sat import gpu_lock
os.umask(0o077)
os.setgroups([])
os.setuid(int(sys.argv[1]))
print(gpu_lock.take(["a", "b"], 1, gpu_lock.lock_folder(), poll_seconds=0.02)[0], flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be other users")
def test_users_share_the_locks(for_all):
    """Whoever comes first makes the folder and the files; the kernel opens them to the others."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SAT_GPU_LOCKS": str(for_all / "locks")}
    processes = []
    try:
        for user, device in ((65533, "a"), (65534, "b"), (0, None)):
            command = [sys.executable, "-c", AS_USER, str(user)]
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            processes.append(subprocess.Popen(command, text=True, env=environment, **pipes))
            if device is None:
                assert "2 of 2 GPUs are taken" in processes[-1].stderr.readline()
            else:
                assert taken(processes[-1]) == device
        processes[0].stdin.close()
        assert taken(processes[-1]) == "a"
    finally:
        for process in processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                pipe.close()
    assert (for_all / "locks").stat().st_mode & 0o7777 == 0o1777


def test_the_folder_is_one_for_the_machine(tmp_path, monkeypatch):
    """Not a job's own folder of temporary files; and a link or a file in its place is no folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "of the job"))
    assert gpu_lock.lock_folder({"SAT_GPU_LOCKS": str(tmp_path / "locks")}) == tmp_path / "locks"
    assert [path.name for path in tmp_path.iterdir()] == ["locks"]
    monkeypatch.setattr(gpu_lock, "FOLDER", tmp_path / "usual")
    assert gpu_lock.lock_folder({}) == gpu_lock.lock_folder({}) == tmp_path / "usual"
    (tmp_path / "link").symlink_to(tmp_path / "locks")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(ConfigError, match=f"{name}, which holds .* set SAT_GPU_LOCKS"):
            gpu_lock.lock_folder({"SAT_GPU_LOCKS": str(tmp_path / name)})
    with pytest.raises(ConfigError, match="cannot make .*none/locks.*No such file"):
        gpu_lock.lock_folder({"SAT_GPU_LOCKS": str(tmp_path / "none/locks")})


def test_a_lock_is_no_link_to_another_file(tmp_path):
    (tmp_path / "precious").write_text("content")
    for name in ("choosing", "a.lock"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="cannot open .*choosing, a lock of GPUs"):
        gpu_lock.take(["a"], 1, tmp_path)
    assert (tmp_path / "precious").read_text() == "content"
