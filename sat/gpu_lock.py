"""One job a GPU: a lock file for each device, held for as long as a process that has it open lives.

`take` picks free ones among those that CUDA_VISIBLE_DEVICES leaves and waits when too few are free, so that jobs that
start at the same time share nothing. flock belongs to the open file, not to its name: a killed process leaves no lock.
The files lie in the user's own folder of the system's temporary files. torch is not imported here, for the choice is
made before CUDA starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sat.config import ConfigError

POLL_SECONDS = 2.0
_held: list[int] = []  # file descriptors; closing one would give its device back


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def lock_folder() -> Path:
    """The user's folder of locks. Raises ConfigError when somebody else made it."""
    folder = Path(tempfile.gettempdir(), f"sat-lra-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder} belongs to another user; set TMPDIR to a folder of your own")
    return folder


def listed_gpus(nvidia_smi: str = "nvidia-smi") -> list[str]:
    """UUIDs of this machine's GPUs in the driver's order, a divided one (MIG) as its parts; [] without a driver."""
    try:
        done = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True)
    except OSError:
        return []
    gpus: list[str] = []
    for line in done.stdout.splitlines() if done.returncode == 0 else []:
        found = re.search(r"\(UUID: ((GPU|MIG)-[^)\s]+)\)", line)
        if found is None:
            continue
        uuid, kind = found.groups()
        if kind == "MIG" and gpus[-1].startswith("GPU-"):  # the whole of which it is the first part
            gpus.pop()
        gpus.append(uuid)
    return gpus


def visible_gpus(listed: list[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """UUIDs of those that CUDA_VISIBLE_DEVICES leaves, in its order; indices and starts of UUIDs are resolved.

    As CUDA does it, what follows the first entry that names no device is left out.
    """
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return listed
    visible: list[str] = []
    for entry in map(str.strip, wanted.split(",")):
        matches = [uuid for uuid in listed if entry and uuid.startswith(entry)]
        if entry.isdecimal() and int(entry) < len(listed):
            visible.append(listed[int(entry)])
        elif len(matches) == 1:
            visible.append(matches[0])
        else:
            break
    return list(dict.fromkeys(visible))


@contextlib.contextmanager
def _choosing(folder: Path):
    """One process at a time chooses, so that two that want two devices each never hold one and wait for the other."""
    with open(folder / "choosing", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_lock(path: Path) -> int | None:
    """The descriptor of a lock on the file, or None when it is taken."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"{os.getpid()}\n".encode())
    os.set_inheritable(descriptor, True)  # a launcher that replaces this process keeps the devices
    return descriptor


def take(
    devices: list[str],
    count: int = 1,
    folder: Path | None = None,
    say: Callable[[str], None] = say,
    poll_seconds: float = POLL_SECONDS,
) -> list[str]:
    """Lock `count` free ones of `devices` until this process ends; waits, with a line, while too few are free.

    Raises ConfigError when there are fewer than `count` at all.
    """
    if count > len(devices):
        raise ConfigError(
            f"{count} GPUs are wanted, one a process, and {len(devices)} are visible: lower --processes or "
            "gpus_per_run, or set CUDA_VISIBLE_DEVICES to more"
        )
    folder = folder or lock_folder()
    told = False
    while True:
        free: dict[str, int] = {}
        with _choosing(folder):
            for device in devices:
                if len(free) < count and (descriptor := try_lock(folder / f"{device}.lock")):
                    free[device] = descriptor
            if len(free) == count:
                _held.extend(free.values())
                return list(free)
            for descriptor in free.values():
                os.close(descriptor)
        if not told:
            taken = [device for device in devices if device not in free]
            holders = {(folder / f"{device}.lock").read_text().strip() for device in taken}
            say(
                f"{len(taken)} of {len(devices)} GPUs are taken (by process {', '.join(sorted(holders))}); "
                f"waiting for {count}"
            )
            told = True
        time.sleep(poll_seconds)
