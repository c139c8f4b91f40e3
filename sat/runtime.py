"""The machine a run is on: device, threads, memory, versions."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from sat import devices
from sat.config import ROOT


def device_type(device: str | None) -> str:
    """cuda or cpu: what a training takes when its --device is `device`."""
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"


def make_accelerator(
    device: str | None, threads: int | None, precision: str = "fp32"
) -> Accelerator:
    """Accelerate's device handling; `device` cpu keeps off a GPU, threads: CPU threads of torch and the kernels.

    precision: as training.precision. Raises ConfigError when the device does not have it.
    """
    kind = device_type(device)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads or torch.get_num_threads()))
    # Another process may take its time: it waits for a GPU, or checks the kernels.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(hours=2))
    accelerator = Accelerator(
        # cpu: without it, accelerate starts no process group where there is no GPU
        cpu=kind == "cpu",
        mixed_precision=devices.mixed_precision(precision, kind),
        kwargs_handlers=[patience],
    )
    if threads:
        torch.set_num_threads(threads)
    return accelerator


def describe_device(device: torch.device) -> dict:
    if device.type == "cuda":
        return {
            "type": "cuda",
            "name": torch.cuda.get_device_name(device),
            "threads": torch.get_num_threads(),
        }
    return {"type": device.type, "name": _cpu_name(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def release_memory() -> None:
    """Give what was freed back to the system; glibc keeps it otherwise, and it counts on."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass


def reset_peak_memory(device: torch.device) -> None:
    """Let the next `peak_memory` be that of the phase that begins now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    release_memory()
    try:
        # Linux: the peak of the resident set becomes its present size.
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # elsewhere the peak is that of the process so far


def peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU, resident on a CPU, at most since `reset_peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_memory() -> int:
    """Bytes that this process holds and the kernel cannot take back, so without files; 0 where it does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return 1024 * sum(int(fields.get(key, "0").split()[0]) for key in ("RssAnon", "RssShmem"))


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of torch's generators, of the CPU and of the device."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def versions() -> dict[str, str]:
    packages = ("torch", "accelerate", "numpy", "pyarrow", "safetensors")
    return {"python": platform.python_version()} | {
        p: importlib.metadata.version(p) for p in packages
    }


def git_commit() -> str | None:
    """The commit of the code, with '-dirty' when tracked files differ from it; None outside a repository."""
    try:
        done = subprocess.run(
            [
                "git",
                "-C",
                str(ROOT),
                "describe",
                "--always",
                "--dirty",
                "--abbrev=40",
                "--exclude=*",
            ],
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    return done.stdout.strip() or None
