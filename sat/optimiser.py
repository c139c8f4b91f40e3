"""Learning rate, beta1 and the two optimisers of a run: one for the dense phase, a new one at the switch to sparse.

The dense schedule is that of SAT (torch's OneCycleLR with linear annealing): up from max/25 over `warmup` steps, then
down to almost nothing at the last step, with Adam's beta1 going the other way. Steps count from 0.
"""

from __future__ import annotations

import torch
from torch import nn

from sat.config import RunConfig, Training

START_DIVISOR = 25.0
END_DIVISOR = 1e4
BETA1_LOW, BETA1_HIGH = 0.85, 0.95
BETA1, BETA2, EPS = 0.9, 0.999, 1e-6


def cycle(training: Training, step: int) -> float:
    """Position on the triangle at `step`: 0 at the start, 1 at the end of the warm-up, 0 at the last step."""
    peak = max(training.warmup - 1, 0)
    if step <= peak:
        return step / peak if peak else 1.0
    last = training.num_train_steps - 1
    return max(0.0, (last - step) / (last - peak))


def learning_rate(training: Training, step: int) -> float:
    """Learning rate of dense step `step`."""
    peak, start = training.learning_rate, training.learning_rate / START_DIVISOR
    warming = step < max(training.warmup - 1, 0)
    if not warming and training.lr_decay == "constant":
        return peak
    floor = start if warming else start / END_DIVISOR
    return floor + (peak - floor) * cycle(training, step)


def beta1(training: Training, step: int) -> float:
    if not training.cycle_beta1:
        return BETA1
    return BETA1_HIGH - (BETA1_HIGH - BETA1_LOW) * cycle(training, step)


def make_optimiser(model: nn.Module, config: RunConfig, phase: str) -> torch.optim.AdamW:
    """AdamW of a phase; the sparse one starts with empty moments and leaves the frozen pattern parameters out."""
    if phase == "sparse":
        for parameter in model.pattern:
            parameter.requires_grad_(False)
            parameter.grad = None
    parameters = [p for p in model.parameters() if p.requires_grad]
    # foreach: the same arithmetic as the plain loop, one call for all tensors.
    return torch.optim.AdamW(
        parameters,
        lr=config.training.learning_rate,
        betas=(BETA1, BETA2),
        eps=EPS,
        weight_decay=config.training.weight_decay,
        foreach=True,
    )


def set_schedule(
    optimiser: torch.optim.Optimizer, config: RunConfig, phase: str, step: int
) -> float:
    """Set learning rate and beta1 for the coming step; returns the learning rate.

    A run that is sparse from its first step has one optimiser, and the schedule of the dense phase.
    """
    training = config.training
    if phase == "dense" or config.transition.rule == "start":
        rate, first = learning_rate(training, step), beta1(training, step)
    elif config.transition.learning_rate == "constant":
        rate, first = training.learning_rate / 2, BETA1
    else:
        rate, first = learning_rate(training, step) / 2, BETA1
    for group in optimiser.param_groups:
        group["lr"], group["betas"] = rate, (first, BETA2)
    return rate
