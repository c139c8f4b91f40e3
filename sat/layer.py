"""The parts of a Transformer layer around attention and matrix products, each in one pass over its rows.

    embed            x = D (embedding + position),  h = LayerNorm(x)
    dropout_add_norm x = x + D (y + bias),          h = LayerNorm(x)
    gelu_dropout     D GELU(u + bias)

D are the factors of dropout of sat/attention/dropout.py, drawn from a seed and the place in the
batch; without dropout the seed is None. Shape suffixes: B batch, S length, D and C channels.
"""

import torch
from torch.nn import functional as F

from sat.attention import dropout

NORM_EPS = 1e-5


def dropped(x_BSC: torch.Tensor, p: float, seed: torch.Tensor | None, length: int) -> torch.Tensor:
    """x times its factors of dropout; length: rows of a sequence that the counter goes by."""
    if seed is None:
        return x_BSC
    return x_BSC * dropout.element_factors(seed, p, x_BSC.shape, length, x_BSC.device)


def norm(x_BSD: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x_BSD, x_BSD.shape[-1:], weight_D, bias_D, NORM_EPS)


def embed(
    embedded_BSD: torch.Tensor,
    position_SD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    p: float,
    seed: torch.Tensor | None,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, LayerNorm(x)) with x = D (embedded + position)."""
    x_BSD = dropped(embedded_BSD + position_SD, p, seed, length)
    return x_BSD, norm(x_BSD, weight_D, bias_D)


def dropout_add_norm(
    y_BSD: torch.Tensor,
    y_bias_D: torch.Tensor,
    x_BSD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    p: float,
    seed: torch.Tensor | None,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x, LayerNorm(x)) with x = x + D (y + y_bias)."""
    x_BSD = x_BSD + dropped(y_BSD + y_bias_D, p, seed, length)
    return x_BSD, norm(x_BSD, weight_D, bias_D)


def gelu_dropout(
    u_BSC: torch.Tensor, bias_C: torch.Tensor, p: float, seed: torch.Tensor | None, length: int
) -> torch.Tensor:
    """D GELU(u + bias), GELU with erf."""
    return dropped(F.gelu(u_BSC + bias_C), p, seed, length)
