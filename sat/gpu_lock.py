"""One job a GPU: a lock file for each device, held for as long as a process that has it open lives.

`take` picks free ones among those that CUDA_VISIBLE_DEVICES leaves and waits when too few are free, so that jobs that
start at the same time share nothing. flock belongs to the open file, not to its name: a killed process leaves no lock.
A lock's name is the device's UUID, and its folder is one for all users of the machine ($SAT_GPU_LOCKS, where /tmp is
not shared). torch is not imported here, for the choice is made before CUDA starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

from sat.config import ConfigError

POLL_SECONDS = 2.0
ATTEMPTS = 20  # to open a file that another user is making
FOLDER = Path("/tmp/sat-lra-gpus")
# CUDA numbers devices like nvidia-smi with this one alone; without it, the fastest is number 0.
ORDER, SAME_AS_LISTED = "CUDA_DEVICE_ORDER", "PCI_BUS_ID"
_held: list[int] = []  # file descriptors; closing one would give its device back


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def lock_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of locks, which every user of the machine can write to. Raises ConfigError when it is none."""
    folder = Path(environment.get("SAT_GPU_LOCKS") or FOLDER)
    if not folder.exists():
        _make_for_all(folder)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{folder}, which holds the locks of GPUs, is no folder that you can write to: have it removed by its "
            "owner, or set SAT_GPU_LOCKS to a folder that all users of these GPUs share"
        )
    return folder


def _make_for_all(folder: Path) -> None:
    """Make a folder as /tmp is: all can make files, and remove their own alone. Another may make it meanwhile."""
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"cannot make {folder}, which holds the locks of GPUs ({error.strerror}); set SAT_GPU_LOCKS to a folder "
            "that all users of these GPUs share"
        ) from None
    partial.chmod(0o1777)
    try:
        partial.rename(folder)
    except OSError:
        partial.rmdir()


def listed_gpus(nvidia_smi: str = "nvidia-smi") -> list[str]:
    """UUIDs of this machine's GPUs by PCI bus id, a divided one (MIG) as its parts; [] without a driver."""
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

    As CUDA does it, what follows the first entry that names no device is left out. Raises ConfigError when the indices
    are counted in another order than that of `listed` (`number_as_listed` sets it).
    """
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    by_index = wanted is None or any(map(str.isdecimal, map(str.strip, wanted.split(","))))
    order = environment.get(ORDER, SAME_AS_LISTED)
    if by_index and order != SAME_AS_LISTED and len(listed) > 1:
        raise ConfigError(
            f"{ORDER} is {order}, which numbers GPUs in another way than nvidia-smi: set it to {SAME_AS_LISTED}, or "
            "name the GPUs in CUDA_VISIBLE_DEVICES by UUID (nvidia-smi -L)"
        )
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


def number_as_listed(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let CUDA, which has not started, number devices as nvidia-smi does, unless the user wants another order."""
    environment.setdefault(ORDER, SAME_AS_LISTED)


def _open(path: Path) -> int:
    """The descriptor of a file that every user can open; it may be another user's, and is then never made anew.

    Raises ConfigError when it cannot be opened, as by a user whom its owner has shut out.
    """
    for attempt in range(ATTEMPTS):
        try:
            # Not with O_CREAT: the kernel refuses it for other users' files in folders like /tmp.
            return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
                os.fchmod(descriptor, 0o666)  # whatever the umask
                return descriptor
        except OSError as error:
            if attempt == ATTEMPTS - 1:
                raise ConfigError(
                    f"cannot open {path}, a lock of GPUs ({error.strerror}): have its owner remove it while no "
                    "training runs"
                ) from None
            time.sleep(0.05)  # made just now, and not yet opened to all
    raise ConfigError(
        f"{path}, a lock of GPUs, comes and goes: something removes it again and again"
    )


@contextlib.contextmanager
def _choosing(folder: Path):
    """One process at a time chooses, so that two that want two devices each never hold one and wait for the other."""
    descriptor = _open(folder / "choosing")
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def try_lock(path: Path, for_all: bool = False) -> int | None:
    """The descriptor of a lock on the file, or None when it is taken; for_all: other users lock it too."""
    descriptor = _open(path) if for_all else os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
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
                if len(free) == count:
                    break
                descriptor = try_lock(folder / f"{device}.lock", for_all=True)
                if descriptor is not None:
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
