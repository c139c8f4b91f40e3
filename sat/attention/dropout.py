"""Dropout from a counter: every backend, and the backward, draw the same factors.

The generator is that of csrc/sat_kernels.h: a factor depends on the seed and on the place of the
element only, so nothing of the size of what is dropped is kept. For attention the place is (sample
and head, query, key), for the elements of a layer (sample, position, channel).
"""

import contextlib
import ctypes

import torch

_WORD = 0xFFFFFFFF
_STEP = 0x9E3779B97F4A7C15  # between the seeds of two rows
_SITE = 0xD1B54A32D192ED03  # between the seeds of two places in a model
# Of the sequences at hand, the first one's place in the whole batch. A tensor, so that torch.compile
# reads it anew.
_first_sequence = torch.zeros((), dtype=torch.int64)


@contextlib.contextmanager
def sequences_from(first: int):
    """The sequences that a model sees are those of a larger batch from `first` on.

    They drop what they would drop as part of the whole batch when the generator is in the same state.
    """
    _first_sequence.fill_(first)
    try:
        yield
    finally:
        _first_sequence.fill_(0)


def draw_seed(rows: int) -> torch.Tensor:
    """A seed, int64 [] on the CPU, from torch's default generator: torch.manual_seed repeats it.

    rows: of one sequence, heads * length for attention weights; see `sequences_from`.
    """
    return torch.randint(2**63 - 1, ()) + _signed(_STEP) * (_first_sequence * rows)


def seed_of(seed: torch.Tensor, site: int, rows: int) -> torch.Tensor:
    """The seed, int64 [], of a place in a model from a seed of the whole; rows: as in `draw_seed`.

    The seed of the whole is drawn with rows = 0.
    """
    return seed + _signed(_SITE * (site + 1)) + _signed(_STEP) * (_first_sequence * rows)


def _signed(x: int) -> int:
    """A number modulo 2^64 as torch.int64 holds it."""
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def factors(
    seed: torch.Tensor, dropout_p: float, pairs: torch.Tensor, rows, columns, length: int
) -> torch.Tensor:
    """What multiplies the weights: 0 with probability dropout_p, else 1 / (1 - dropout_p).

    Args:
        seed: int64 [].
        pairs: int64, batch * num_heads + head. rows, columns: int64, places in the sequence.
            The three are broadcast to the result.
        length: of the sequence.

    Returns: float32.
    """
    # int64 wraps as the unsigned numbers of the definition do
    z = seed.to(pairs.device) + _signed(_STEP) * (pairs * length + rows + 1)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    z = z ^ _shift(z, 31)
    x = (z + 0x9E3779B9 * columns) & _WORD
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = (((x ^ (x >> 15)) + _shift(z, 32)) * 0x846CA68B) & _WORD
    x = x ^ (x >> 16)
    threshold = int(ctypes.c_float(dropout_p).value * 2**24 + 0.5)
    kept = 2**24 / (2**24 - threshold) if threshold < 2**24 else 0.0
    return torch.where((x >> 8) < threshold, 0.0, kept).to(torch.float32)


def element_factors(
    seed: torch.Tensor, dropout_p: float, shape: torch.Size, length: int, device: torch.device
) -> torch.Tensor:
    """Factors float32 [B, S, C] of the elements of a layer; length >= S counts the rows of a sample."""
    samples, positions, channels = (torch.arange(size, device=device) for size in shape)
    return factors(seed, dropout_p, samples[:, None, None], positions[:, None], channels, length)
