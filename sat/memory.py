"""How many sequences a device takes at once: fewer when memory runs out, and as many as a limit on the CPU allows.

What a device takes at once (the micro-batch) changes no result but for the rounding of sums: gradients are accumulated
over the batch, and what fails for want of memory is done anew in smaller parts.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from sat import devices, runtime

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

GIGABYTE = 10**9
# Of a limit, what a step may take by measurement: the heap of a process grows a little with time.
USABLE = 0.9
ADVICE = "free memory, or lower model.max_seq_len, model.num_layers or model.transformer_dim"


class OutOfMemory(RuntimeError):
    """A single sequence at a time is too much; the message says what to lower."""


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or should_reduce_batch_size(error)
        or isinstance(error, RuntimeError)
        # of other allocations than those of tensors
        and any(
            words in str(error)
            for words in ("std::bad_alloc", "DefaultCPUAllocator: not enough memory")
        )
    )


def halving(size: int, work: Callable[[int], Result], what: str) -> tuple[int, Result]:
    """(size, work(size)) with the first of size, size / 2, ... 1 for which there is enough memory.

    what: the words for it in messages. Raises OutOfMemory when there is not enough for 1.
    """
    while True:
        try:
            return size, work(size)
        except Exception as error:
            if not ran_out(error):
                raise
            if size == 1:
                raise OutOfMemory(
                    f"out of memory in {what}, with one sequence at a time ({_first_line(error)}): {ADVICE}"
                ) from error
            reason = _first_line(error)
        # Here, not above: the exception holds what the failed attempt had made.
        size //= 2
        clear_device_cache(garbage_collection=True)
        runtime.release_memory()
        logger.warning(
            "out of memory in %s (%s); from here on %d sequences at a time", what, reason, size
        )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------- a limit on the CPU


def share_of_limit(memory_limit_gb: float | None, accelerator: Accelerator) -> int | None:
    """Bytes that each process of this training may take on the CPU, the same number in each; None: no limit.

    The limit is that of a machine, shared by the processes on it.
    """
    if accelerator.device.type != "cpu":
        return None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
    held = devices.total(accelerator, runtime.held_memory()) / accelerator.num_processes
    limit = limit_bytes(memory_limit_gb, int(here * held))
    least = -devices.largest(accelerator, -math.inf if limit is None else -limit)
    return None if least == math.inf else int(least) // here


def limit_bytes(memory_limit_gb: float | None, own: int, root: Path = Path("/")) -> int | None:
    """Bytes that a training on the CPU may take: the smaller of the setting and what its control group leaves, or None.

    own: bytes that the processes of the training hold now (runtime.held_memory).
    """
    limits = [cgroup_limit(own, root)]
    if memory_limit_gb is not None:
        limits.append(int(memory_limit_gb * GIGABYTE))
    return min((limit for limit in limits if limit is not None), default=None)


def cgroup_limit(own: int, root: Path = Path("/")) -> int | None:
    """Bytes that the control group leaves to the holder of `own` bytes in it (Linux, versions 1 and 2), None: no limit.

    That is its limit less what other processes in it hold now; files in the page cache do not count, for the kernel
    drops them first. The groups above it count too. In a container the group's own path may not be visible; then the
    group is the visible root.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    mount = root / "sys/fs/cgroup"
    limits = []
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, version = mount, 2
        elif "memory" in controllers.split(","):
            top, version = mount / "memory", 1
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (top / group, *(top / parent for parent in group.parents)):
            limit = _group_limit(folder, version)
            if limit is not None:
                limits.append(max(0, limit - max(0, _group_holds(folder, version) - own)))
    return min(limits, default=None)


def _group_limit(folder: Path, version: int) -> int | None:
    name = {1: "memory.limit_in_bytes", 2: "memory.max"}[version]
    try:
        text = (folder / name).read_text().strip()
    except OSError:
        return None
    # Version 1 writes almost 2^63 for no limit.
    return None if text == "max" or int(text) >= 2**60 else int(text)


def _group_holds(folder: Path, version: int) -> int:
    """Bytes of a group and those below it that the kernel cannot take back; 0 where it does not tell."""
    usage, cache, shared, slab = {
        1: ("memory.usage_in_bytes", "total_cache", "total_shmem", "total_slab_reclaimable"),
        2: ("memory.current", "file", "shmem", "slab_reclaimable"),
    }[version]
    try:
        used = int((folder / usage).read_text())
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    values = {name: int(value) for name, value in map(str.split, lines)}
    return used - values.get(cache, 0) + values.get(shared, 0) - values.get(slab, 0)


def largest_that_fits(
    most: int, limit: int, fixed: int, peak: Callable[[int], int]
) -> tuple[int, int]:
    """The largest of most, most / 2, ... 1 sequences at once with which a step stays below the limit, and its peak.

    Steps are measured from the small end; one that would not fit, by the growth so far, is not tried.

    Args:
        most: sequences at once that are wanted.
        limit: bytes.
        fixed: bytes that are held whatever the size.
        peak: the most bytes that the process holds during a step with so many sequences at once.

    Raises: OutOfMemory when one sequence is too much.
    """
    usable, size, taken = USABLE * limit, 1, peak(1)
    if taken > usable:
        raise OutOfMemory(
            f"one sequence at a time takes {taken / GIGABYTE:.2f} GB, and {usable / GIGABYTE:.2f} GB are there "
            f"(model.memory_limit_gb, or what the control group leaves, less a tenth): raise the limit, or {ADVICE}"
        )
    first, growth = taken, max(taken - fixed, 0)  # of one more sequence
    fitting = taken
    for larger in reversed(ladder(most)[:-1]):
        if taken + growth * (larger - size) > usable:
            break
        taken = peak(larger)
        if taken > usable:
            break
        size, fitting, growth = larger, taken, (taken - first) / (larger - 1)
    return size, fitting


def ladder(most: int) -> list[int]:
    """most, most // 2, ... 1."""
    sizes = [most]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes
