"""When a run goes sparse (sat/pattern.py: which blocks it keeps), and the loss that the pattern learns from.

Formulas from B. Yoon et al., IEEE Access 12 (2024), and the authors' code. For every dense step and layer, with a the
mean attention map [S, S] over batch and heads:

    skewness   mean(((a - mean) / std)^3), population, over all S^2 entries
    distance   d_t = ||a_t - a_(t-1)||_F
    change     r_t = 100 |d_t - d_(t-1)| / d_(t-1), in percent

With transition.ema = e > 0, skewness and distance are running averages, e times the average so far + (1 - e) times the
value of the step, and the change is that of the averaged distance: one step's noise then does not make the switch.
"""

from __future__ import annotations

import dataclasses
import logging
import math

import torch

from sat import layer
from sat.config import RunConfig

logger = logging.getLogger(__name__)


def moments(
    a_SS: torch.Tensor, other_SS: torch.Tensor | None = None, size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(skewness of a, ||a - other||_F or NaN without another map), 0-dim float64 tensors on the device of a.

    Sums are float64, taken a few rows at a time so that no double copy of the map is made. A constant map has the
    skewness NaN. size: take the skewness of the first `size` rows and columns, behind which all is padding.
    """
    size = len(a_SS) if size is None else size
    count = size * size
    # Rows sum to one, so the mean is close to 1 / S: moments about that lose nothing.
    shift = 1 / len(a_SS)
    sums = layer.map_sums(a_SS, other_SS, size, shift)
    if sums is not None:
        d, square, cube = sums[:3] / count
        variance = square - d * d
        skewness = (cube - 3 * d * square + 2 * d**3) / variance**1.5
        # Of a constant map only the rounding of the sums is left.
        skewness = torch.where(variance > 1e-12 * square, skewness, math.nan)
        return skewness, sums[3].sqrt() if other_SS is not None else torch.full_like(d, math.nan)
    mean = a_SS[:size, :size].sum(dtype=torch.float64) / count
    second = third = squared = a_SS.new_zeros((), dtype=torch.float64)
    for start in range(0, len(a_SS), 256):
        rows = a_SS[start : start + 256].double()
        centred = rows[: max(0, size - start), :size] - mean
        square = centred * centred
        second = second + square.sum()
        third = third + (square * centred).sum()
        if other_SS is not None:
            squared = squared + (rows - other_SS[start : start + 256]).square().sum()
    skewness = (third / count) / (second / count) ** 1.5
    return skewness, squared.sqrt() if other_SS is not None else torch.full_like(mean, math.nan)


@dataclasses.dataclass
class StepStatistics:
    """Of one dense step, a value a layer; None where it needs steps that have not been yet."""

    skewness: list[float]
    distance: list[float] | None
    change: list[float] | None


class MapStatistics:
    """Follows the mean attention maps of the layers from step to step.

    ema in [0, 1): weight of the average so far; 0 takes each step as it is. Its attributes are all of its state.
    """

    def __init__(self, ema: float = 0.0) -> None:
        self.ema = ema
        self.maps: list[torch.Tensor] | None = None
        self.skewness: list[float] | None = None
        self.distance: list[float] | None = None
        self.reported = False  # that a statistic was not a number

    def update(self, maps: list[torch.Tensor], size: int | None = None) -> StepStatistics:
        """maps: the mean attention map [S, S] of every layer; size: as in `moments`."""
        previous = self.maps or [None] * len(maps)
        values = [moments(a, b, size) for a, b in zip(maps, previous, strict=True)]
        # One transfer for all layers: a GPU waits once a step.
        skewness, distance = torch.stack([torch.stack(pair) for pair in values], dim=1).tolist()
        first = self.maps is None
        self.maps = maps
        self.skewness = self._averaged(self.skewness, skewness)
        before, self.distance = (
            self.distance,
            None if first else self._averaged(self.distance, distance),
        )
        change = None
        if before is not None:
            change = [
                100 * abs(d - b) / b if b else math.nan
                for d, b in zip(self.distance, before, strict=True)
            ]
        self._report_nan(skewness, change)
        return StepStatistics(self.skewness, self.distance, change)

    def _report_nan(self, skewness: list[float], change: list[float] | None) -> None:
        """Say once a run that a statistic is not a number; such a one never makes the switch."""
        for name, values in (("skewness", skewness), ("change", change or [])):
            layers = [layer for layer, value in enumerate(values) if math.isnan(value)]
            if layers and not self.reported:
                self.reported = True
                logger.warning(
                    f"the {name} of the attention map of layer {layers[0]} is not a number (a constant map, or one "
                    "that did not move); such a step never makes the switch. Later ones are null in history.jsonl."
                )

    def _averaged(self, average: list[float] | None, new: list[float]) -> list[float]:
        if average is None:
            return new
        # A value that is not a number shows in its step and is left behind: NaN + anything would stay NaN.
        return [
            n if math.isnan(a) else self.ema * a + (1 - self.ema) * n
            for a, n in zip(average, new, strict=True)
        ]


def wants_sparse(rule: str, statistics: StepStatistics, skewness: float, distance: float) -> bool:
    """Whether every layer meets the rule in this step. NaN meets no rule.

    settled: skewness at or above its threshold and change below `distance`; documented: skewness and change above.
    """
    if statistics.change is None or rule in ("never", "start"):
        return False
    pairs = list(zip(statistics.skewness, statistics.change, strict=True))
    if rule == "settled":
        return all(s >= skewness and r < distance for s, r in pairs)
    return all(s > skewness and r > distance for s, r in pairs)


def transition_reason(config: RunConfig, step: int, statistics: StepStatistics) -> str | None:
    """Why the run goes sparse after dense step `step` (from 1): 'rule', 'limit' or None for not yet."""
    if config.transition.rule in ("never", "start"):
        return None
    training = config.training
    if training.num_dense_train_steps is not None and step >= training.num_dense_train_steps:
        return "limit"
    if training.num_init_steps is not None and step < training.num_init_steps:
        return None
    met = wants_sparse(config.transition.rule, statistics, training.skewness, training.distance)
    return "rule" if met else None


def pattern_loss(P_nd: torch.Tensor, pooled_nn: torch.Tensor) -> torch.Tensor:
    """mean((P P^T - T)^2) with T the pooled mean map.

    SAT takes the mean over samples and heads of (P P^T - pooled map of each)^2. Both have the same gradient in P, for
    the two differ by the variance of the pooled maps, which P is not part of; this one needs no map of each head.
    """
    return (P_nd @ P_nd.T - pooled_nn).square().mean()
