"""When a SAT run goes sparse, and which blocks it keeps.

Formulas from B. Yoon et al., IEEE Access 12 (2024), and the authors' code. For every dense step and layer, with a the
mean attention map [S, S] over batch and heads:

    skewness   mean(((a - mean) / std)^3), population, over all S^2 entries
    distance   d_t = ||a_t - a_(t-1)||_F
    change     r_t = 100 |d_t - d_(t-1)| / d_(t-1), in percent
"""

from __future__ import annotations

import dataclasses
import math

import torch

from sat.config import RunConfig


def moments(
    a_SS: torch.Tensor, other_SS: torch.Tensor | None = None, size: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(skewness of a, ||a - other||_F or NaN without another map), 0-dim float64 tensors on the device of a.

    Sums are float64, taken a few rows at a time so that no double copy of the map is made. A constant map has the
    skewness NaN. size: take the skewness of the first `size` rows and columns, behind which all is padding.
    """
    size = len(a_SS) if size is None else size
    count = size * size
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
    """Follows the mean attention maps of the layers from step to step."""

    def __init__(self) -> None:
        self.maps: list[torch.Tensor] | None = None
        self.distance: list[float] | None = None

    def update(self, maps: list[torch.Tensor], size: int | None = None) -> StepStatistics:
        """maps: the mean attention map [S, S] of every layer; size: as in `moments`."""
        previous = self.maps or [None] * len(maps)
        values = [moments(a, b, size) for a, b in zip(maps, previous, strict=True)]
        # One transfer for all layers: a GPU waits once a step.
        skewness, distance = torch.stack([torch.stack(pair) for pair in values], dim=1).tolist()
        first = self.maps is None
        change = None
        if self.distance is not None:
            change = [
                100 * abs(d - before) / before if before else math.nan
                for d, before in zip(distance, self.distance, strict=True)
            ]
        self.maps = maps
        self.distance = None if first else distance
        return StepStatistics(skewness, self.distance, change)


def wants_sparse(rule: str, statistics: StepStatistics, skewness: float, distance: float) -> bool:
    """Whether every layer meets the rule in this step. NaN meets no rule.

    settled: skewness at or above its threshold and change below `distance`; documented: skewness and change above.
    """
    if statistics.change is None or rule == "never":
        return False
    pairs = list(zip(statistics.skewness, statistics.change, strict=True))
    if rule == "settled":
        return all(s >= skewness and r < distance for s, r in pairs)
    return all(s > skewness and r > distance for s, r in pairs)


def transition_reason(config: RunConfig, step: int, statistics: StepStatistics) -> str | None:
    """Why the run goes sparse after dense step `step` (from 1): 'rule', 'limit' or None for not yet."""
    if config.transition.rule == "never":
        return None
    training = config.training
    if training.num_dense_train_steps is not None and step >= training.num_dense_train_steps:
        return "limit"
    if training.num_init_steps is not None and step < training.num_init_steps:
        return None
    met = wants_sparse(config.transition.rule, statistics, training.skewness, training.distance)
    return "rule" if met else None


def pool(a_SS: torch.Tensor, block_size: int) -> torch.Tensor:
    """Mean of every block_size x block_size tile: [S, S] -> [n, n]."""
    n = len(a_SS) // block_size
    return a_SS.view(n, block_size, n, block_size).mean(dim=(1, 3))


def pattern_loss(P_nd: torch.Tensor, pooled_nn: torch.Tensor) -> torch.Tensor:
    """mean((P P^T - T)^2) with T the pooled mean map.

    SAT takes the mean over samples and heads of (P P^T - pooled map of each)^2. Both have the same gradient in P, for
    the two differ by the variance of the pooled maps, which P is not part of; this one needs no map of each head.
    """
    return (P_nd @ P_nd.T - pooled_nn).square().mean()


def select_blocks(score_nn: torch.Tensor, density: float, min_per_row: int = 0) -> torch.Tensor:
    """Bool mask [n, n] of the floor(n^2 * density) blocks of highest score, ties to the lower index.

    With `min_per_row`, every block row first gets that many of its best blocks, and the rest go by score.
    """
    n = len(score_nn)
    count = max(1, int(n * n * density + 1e-9))
    score_nn = score_nn.double().clone()
    if min_per_row:
        best = score_nn.argsort(dim=1, descending=True, stable=True)[:, :min_per_row]
        score_nn.scatter_(1, best, math.inf)
        count = max(count, n * min_per_row)
    chosen = score_nn.flatten().argsort(descending=True, stable=True)[:count]
    mask_nn = torch.zeros(n * n, dtype=torch.bool, device=score_nn.device)
    mask_nn[chosen] = True
    return mask_nn.view(n, n)


def describe(masks: list[torch.Tensor], block_size: int) -> dict:
    """What metrics.json says of a pattern: blocks, density and empty block rows of every layer."""
    return {
        "block_size": block_size,
        "num_blocks": len(masks[0]),
        "selected": [int(mask.sum()) for mask in masks],
        "density": [float(mask.double().mean()) for mask in masks],
        "empty_rows": [int((~mask.any(dim=1)).sum()) for mask in masks],
    }
