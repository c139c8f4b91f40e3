"""Which blocks a layer keeps when it goes sparse: a score for every block, of which the best are taken.

    parameter   P P^T, learned with the model (B. Yoon et al., IEEE Access 12, 2024)
    pooled      the running mean of the pooled attention map itself
    floodfill   the paths of large attention that run through the map (B. Yoon et al., "Layer-Wise Sparse Training of
                Transformer via Convolutional Flood Filling", PAKDD 2024, called SPION)
    local       a window around the diagonal
    bigbird     window, global and random blocks (M. Zaheer et al., "Big Bird", NeurIPS 2020)
    random      blocks drawn at random

All keep the same number of blocks, floor(n^2 density), so that they can be compared. The last three need no training
and are the same for the same seed and layer. Shape suffixes: S padded length, n blocks a side.
"""

from __future__ import annotations

import math

import torch

DIAGONAL_FILTER = 31  # taps of the filter along the diagonal, as SPION has it
# Big Bird's base model (ITC): 3 window, 2 global and 3 random blocks a row.
WINDOW_SHARE, GLOBAL_SHARE = 3 / 8, 2 / 5  # of all blocks; of what the window leaves
GOLDEN = (math.sqrt(5) - 1) / 2


def num_selected(n: int, density: float) -> int:
    """floor(n^2 density), at least one."""
    return max(1, int(n * n * density + 1e-9))


def pool(a_SS: torch.Tensor, block_size: int) -> torch.Tensor:
    """Mean of every block_size x block_size tile: [S, S] -> [n, n]."""
    n = len(a_SS) // block_size
    return a_SS.view(n, block_size, n, block_size).mean(dim=(1, 3))


def select_blocks(score_nn: torch.Tensor, density: float, min_per_row: int = 0) -> torch.Tensor:
    """Bool mask [n, n] of the floor(n^2 * density) blocks of highest score, ties to the lower index.

    With `min_per_row`, every block row first gets that many of its best blocks, and the rest go by score.
    """
    n = len(score_nn)
    count = num_selected(n, density)
    score_nn = score_nn.double().clone()
    if min_per_row:
        best = score_nn.argsort(dim=1, descending=True, stable=True)[:, :min_per_row]
        score_nn.scatter_(1, best, math.inf)
        count = max(count, n * min_per_row)
    chosen = score_nn.flatten().argsort(descending=True, stable=True)[:count]
    mask_nn = torch.zeros(n * n, dtype=torch.bool, device=score_nn.device)
    mask_nn[chosen] = True
    return mask_nn.view(n, n)


# ---------------------------------------------------------------- static patterns


def local_score(n: int) -> torch.Tensor:
    """Score [n, n] that falls with the distance from the diagonal.

    Within one distance it follows the multiples of the golden ratio, so that a band that is only partly kept is kept
    evenly along the sequence and not at its start alone.
    """
    index = torch.arange(n, dtype=torch.float64)
    row, column = index[:, None], index[None, :]
    spread = torch.minimum(row, column) * GOLDEN % 1
    return -(row - column).abs() - spread


def random_score(n: int, seed: int, layer: int) -> torch.Tensor:
    """Uniform score [n, n], a function of its arguments."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + layer) % 2**63)
    return torch.rand(n, n, generator=generator, dtype=torch.float64)


def bigbird_score(n: int, density: float, seed: int, layer: int) -> torch.Tensor:
    """Score [n, n] whose floor(n^2 density) highest are window, global and random blocks.

    The window gets 3/8 of the blocks, and the whole diagonal when there are enough for it; of the others 2/5 are
    global (the first block column and row, then the next) and 3/5 random.
    """
    count = num_selected(n, density)
    near = local_score(n)
    window = select_blocks(near, min(count, max(n, round(WINDOW_SHARE * count))) / n**2)
    num_global = round(GLOBAL_SHARE * (count - int(window.sum())))
    index = torch.arange(n, dtype=torch.float64)
    first = torch.minimum(index[:, None], index[None, :])  # 0 in the first row and column
    along = torch.maximum(index[:, None], index[None, :])
    wide = (-first - (along * GOLDEN % 1)).masked_fill(window, -math.inf)
    chosen = wide.flatten().argsort(descending=True, stable=True)[:num_global]
    wide = torch.zeros(n * n, dtype=torch.bool)
    wide[chosen] = True
    # Random blocks score below 1; with min_per_row the best of a row is then a window block, which it has.
    return random_score(n, seed, layer) + 2 * wide.view(n, n) + 4 * window


def static_score(source: str, n: int, density: float, seed: int, layer: int) -> torch.Tensor:
    """Score [n, n] of a source that needs no training."""
    if source == "local":
        return local_score(n)
    if source == "bigbird":
        return bigbird_score(n, density, seed, layer)
    assert source == "random", source
    return random_score(n, seed, layer)


# ---------------------------------------------------------------- flood filling


def along_diagonal(a_SS: torch.Tensor, taps: int = DIAGONAL_FILTER) -> torch.Tensor:
    """Convolution with a diagonal filter: out[i, j] = sum of a[i + t, j + t], |t| <= taps // 2, inside the map."""
    out_SS = a_SS.clone()
    for shift in range(1, taps // 2 + 1):
        out_SS[shift:, shift:] += a_SS[:-shift, :-shift]
        out_SS[:-shift, :-shift] += a_SS[shift:, shift:]
    return out_SS


def filled(pooled_nn: torch.Tensor) -> torch.Tensor:
    """Bool [n, n]: the blocks on the paths that start in every block of the first row and of the first column.

    From a block a path goes to the largest of its neighbours to the right, below and diagonally below, to the last
    on ties, until it leaves the map.
    """
    value = pooled_nn.tolist()
    n = len(value)
    visited = torch.zeros(n, n, dtype=torch.bool)
    seen = visited.numpy()  # the same memory; faster to index
    starts = [(0, k) for k in range(n)] + [(k, 0) for k in range(1, n)]
    for i, j in starts:
        while i + 1 < n and j + 1 < n:
            down, right, both = value[i + 1][j], value[i][j + 1], value[i + 1][j + 1]
            if both >= down and both >= right:
                i, j = i + 1, j + 1
            elif down > right:
                i += 1
            else:
                j += 1
            if seen[i, j]:  # from here on the path is one that was walked before
                break
            seen[i, j] = True
    return visited


def floodfill_score(a_SS: torch.Tensor, block_size: int) -> torch.Tensor:
    """Score [n, n] of a mean attention map: the diagonal first, then the filled blocks, then the others.

    Within these by the value of the filtered and pooled map. SPION keeps the filled blocks above a quantile and the
    diagonal, however many these are; here the threshold is the one that keeps as many as the other patterns have.
    """
    pooled_nn = pool(along_diagonal(a_SS.float()), block_size).double().cpu()
    n = len(pooled_nn)
    scale = pooled_nn.max().clamp(min=torch.finfo(torch.float64).tiny)
    return pooled_nn / scale + 2 * filled(pooled_nn) + 4 * torch.eye(n, dtype=torch.float64)


# ---------------------------------------------------------------- report


def describe(
    masks: list[torch.Tensor], block_size: int, maps: list[torch.Tensor] | None = None
) -> dict:
    """What metrics.json says of a pattern, a value a layer.

    selected, density, empty_rows (block rows without a block), symmetry (share of the blocks whose mirror image is
    selected too), and, of the mean attention maps [S, S] at the switch, the share of the attention that lies in the
    selected blocks (mass), in the best blocks of the same number (best_mass) and in as many random ones
    (random_mass, the expected value); null for a run that was sparse from the start.
    """
    report = {
        "block_size": block_size,
        "num_blocks": len(masks[0]),
        "selected": [int(mask.sum()) for mask in masks],
        "density": [float(mask.double().mean()) for mask in masks],
        "empty_rows": [int((~mask.any(dim=1)).sum()) for mask in masks],
        "symmetry": [float((mask & mask.T).sum() / mask.sum()) for mask in masks],
        "mass": None,
        "best_mass": None,
        "random_mass": None,
    }
    if maps is not None:
        for mask, a_SS in zip(masks, maps, strict=True):
            tile = pool(a_SS.float(), block_size).double().flatten()
            count = int(mask.sum())
            for key, part in (
                ("mass", tile[mask.flatten().to(tile.device)].sum()),
                ("best_mass", tile.topk(count).values.sum()),
                ("random_mass", tile.mean() * count),
            ):
                report[key] = (report[key] or []) + [float(part / tile.sum())]
    return report
