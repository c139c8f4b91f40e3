"""What a training step does differently on several devices, in mixed precision and compiled.

Several processes (`python -m sat --processes N`, `accelerate launch`) train one model: each takes its share of the rows
of every batch, and what it sums over them, gradients and mean attention maps, is summed over the processes before
anything is decided. Every process then holds the same weights, and the run is that of one process with the same
batch but for the rounding of the sums.
"""

from __future__ import annotations

import os
import shutil

import torch
import torch.distributed
from accelerate import Accelerator
from torch import nn

from sat.config import ConfigError

COMPILER_BACKEND = "inductor"


# ---------------------------------------------------------------- precision


def mixed_precision(wanted: str, device_type: str) -> str:
    """Accelerate's name of the precision of matrix products for training.precision on a device: no, bf16 or fp16.

    auto: float32 on a CPU; on a GPU bfloat16 where it has it, else float16 with a gradient scaler. Weights, attention
    and statistics are float32 always. Raises ConfigError for fp16 on a CPU.
    """
    if wanted == "auto":
        if device_type != "cuda":
            return "no"
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if wanted == "fp16" and device_type != "cuda":
        raise ConfigError(
            f"training.precision is fp16, which needs a GPU, and this training is on the {device_type.upper()}: "
            "set it to auto, fp32 or bf16"
        )
    return {"fp32": "no"}.get(wanted, wanted)


def take_step(
    optimiser: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    limit: float,
    scaler: torch.amp.GradScaler | None = None,
) -> bool:
    """Clip the gradients to [-limit, limit] and step; -> whether the step was taken.

    A scaler's factor is taken out of the gradients before they are clipped. When they overflowed under it, the step is
    left out and the factor lowered.
    """
    if scaler is None:
        nn.utils.clip_grad_value_(parameters, limit)
        optimiser.step()
        return True
    scaler.unscale_(optimiser)
    nn.utils.clip_grad_value_(parameters, limit)
    scaler.step(optimiser)
    before = scaler.get_scale()
    scaler.update()
    return scaler.get_scale() >= before


# ---------------------------------------------------------------- torch.compile


def compiled(model: nn.Module, device_type: str) -> nn.Module:
    """`model` behind torch.compile; its weights are those of `model`.

    Raises ConfigError where torch's compiler would find no C++ compiler.
    """
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if COMPILER_BACKEND == "inductor" and not any(map(shutil.which, names)):
        raise ConfigError(
            f"training.compile is true, and torch.compile finds no C++ compiler ({' or '.join(names)}): install one, "
            "name one in the variable CXX, or set training.compile to false"
        )
    return torch.compile(model, backend=COMPILER_BACKEND)


# ---------------------------------------------------------------- several processes


def share(num_rows: int, accelerator: Accelerator) -> slice:
    """The rows of a batch that this process takes: as many as any other, or one more."""
    count, index = accelerator.num_processes, accelerator.process_index
    return slice(num_rows * index // count, num_rows * (index + 1) // count)


def check_batch(batch_size: int, accelerator: Accelerator) -> None:
    if batch_size < accelerator.num_processes:
        raise ConfigError(
            f"training.batch_size is {batch_size}, which {accelerator.num_processes} processes cannot share: start "
            "fewer (--processes, gpus_per_run)"
        )


def sum_in_place(accelerator: Accelerator, tensors: list[torch.Tensor]) -> None:
    """Replace every tensor by its sum over the processes, the same bits in each.

    Small ones travel together: a message each would cost more than what is in it.
    """
    if accelerator.num_processes == 1:
        return
    small: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() > 2**22 and tensor.is_contiguous():
            torch.distributed.all_reduce(tensor)
        else:
            small.setdefault(tensor.dtype, []).append(tensor)
    for group in small.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        torch.distributed.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in group])
        for tensor, part in zip(group, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def describe(accelerator: Accelerator) -> dict:
    """For metrics.json: number of processes, and the precision of matrix products."""
    names = {"no": "fp32"}
    return {
        "processes": accelerator.num_processes,
        "precision": names.get(accelerator.mixed_precision, accelerator.mixed_precision),
    }


def largest(accelerator: Accelerator, value: float) -> float:
    """The largest of the processes' values."""
    return _reduced(accelerator, value, torch.distributed.ReduceOp.MAX)


def total(accelerator: Accelerator, value: float) -> float:
    """The sum of the processes' values."""
    return _reduced(accelerator, value, torch.distributed.ReduceOp.SUM)


def _reduced(accelerator: Accelerator, value: float, operation) -> float:
    if accelerator.num_processes == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=accelerator.device)
    torch.distributed.all_reduce(tensor, operation)
    return tensor.item()
