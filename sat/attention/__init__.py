"""Attention behind one door: block_sparse_attention and dense_attention, the same numbers everywhere.

Backends: `reference` (plain PyTorch, any device and dtype), `cpu` and `cuda` (compiled kernels of
csrc/; `cpu` in float32, `cuda` in bfloat16 and float16 too), `flex` (torch's FlexAttention,
block-sparse only, without dropout; on the CPU only by name and without gradients). "auto" takes the
kernels of the tensors' device once they have been checked against `reference` in this process, on a
GPU without them `flex` after the same check; `selected_backend(device_type)` names the choice,
`python -m sat.backends` prints all of them.

Where torch is set to multiply float32 in TF32 on GPUs, torch.set_float32_matmul_precision("high"), the
`cuda` kernels do so too, on tensor cores (head widths up to 128, from sm_80 on).

The kernel libraries come from the folder $SAT_KERNELS or the newest results/<run>/kernels.
"""

import contextlib

import torch

from sat.attention.blocks import block_csr
from sat.attention.kernels import DENOMINATORS
from sat.attention.selection import resolve, run_block_sparse, run_dense, selected_backend

__all__ = ["block_csr", "block_sparse_attention", "dense_attention", "selected_backend"]


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    *,
    block_size: int,
    lengths: torch.Tensor | None = None,
    denominator: str = "zero_logits",
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
):
    """softmax(q kᵀ / √D) v over the selected blocks only.

    With J_i the real keys in the blocks selected for row i and n_i the selected keys, padded ones
    counted (Yoon et al., IEEE Access 12, 2024, and the authors' code):

        zero_logits    p_ij = exp(s_ij) / (Σ_{j∈J_i} exp(s_ij) + N − n_i)
        renormalised   p_ij = exp(s_ij) / Σ_{j∈J_i} exp(s_ij)

    Args:
        q, k, v: [B, H, N, D], any batch, head and row strides; N a multiple of block_size.
        block_mask: bool [N/block_size, N/block_size], True where selected; for all batches and
            heads. Its CSR is kept as long as the tensor is not written to.
        lengths: integer [B], real tokens of each sequence, in [0, N]. Padded keys get no weight,
            padded query rows give 0. Checked when on the CPU; on a GPU, where a check would wait
            for the device, and under torch.compile the kernels clamp them to [0, N].
        denominator: "zero_logits" or "renormalised".
        dropout_p: dropout on the probabilities; every backend drops the same ones.
        seed: of the dropout, int64 [] on the CPU; None: one from torch's default generator.
        return_lse: also return log Σ_{j∈J_i} exp(s_ij) [B, H, N] (-inf for rows that give 0,
            whatever the denominator), which carries no gradient.
        backend: "auto", "reference", "cpu", "cuda" or "flex".

    Returns: [B, H, N, D], or (that, lse).
    Raises: ValueError that says what was expected.
    """
    _check_qkv(q, k, v, dropout_p, seed)
    length = q.shape[2]
    if not isinstance(block_size, int) or block_size < 1 or length % block_size:
        raise ValueError(
            f"block_size: expected a divisor of the length {length}, got {block_size!r}"
        )
    num_blocks = length // block_size
    _check_tensor("block_mask", block_mask)
    if block_mask.dtype != torch.bool or tuple(block_mask.shape) != (num_blocks, num_blocks):
        raise ValueError(
            f"block_mask: expected torch.bool [{num_blocks}, {num_blocks}] for length {length} and "
            f"block size {block_size}, got {block_mask.dtype} {list(block_mask.shape)}"
        )
    if denominator not in DENOMINATORS:
        raise ValueError(
            f"denominator: expected one of {', '.join(DENOMINATORS)}, got {denominator!r}"
        )
    lengths = _check_lengths(lengths, q)
    backend = resolve(backend, q, block_size, dropout_p)
    with _without_autocast(q.device.type):  # in the precision of q
        o, lse = run_block_sparse(
            backend, q, k, v, block_mask, block_size, lengths, denominator, dropout_p, seed
        )
    return (o, lse.detach()) if return_lse else o


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    padded_queries: str = "zero",
    return_map: bool = False,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    backend: str = "auto",
):
    """softmax(q kᵀ / √D) v over all real keys.

    Args:
        q, k, v, lengths, dropout_p, seed, backend: as for block_sparse_attention; any N.
        padded_queries: "zero": rows from `lengths` on give 0, in the map too. "attend": they attend
            to the real keys as any other row, as in SAT's dense phase.
        return_map: also return the mean attention map over batch and heads, float32 [N, N], before
            dropout and without a gradient. No [B, H, N, N] tensor is made for it.

    Returns: [B, H, N, D], or (that, map).
    Raises: ValueError that says what was expected.
    """
    _check_qkv(q, k, v, dropout_p, seed)
    if padded_queries not in ("zero", "attend"):
        raise ValueError(f"padded_queries: expected zero or attend, got {padded_queries!r}")
    lengths = _check_lengths(lengths, q)
    backend = resolve(backend, q, None)
    with _without_autocast(q.device.type):  # in the precision of q
        o, mean_map = run_dense(
            backend, q, k, v, lengths, padded_queries, return_map, dropout_p, seed
        )
    return (o, mean_map.detach()) if return_map else o


def _without_autocast(device_type: str):
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()  # a tenth of a short call faster


def _check_tensor(name, x) -> None:
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(x).__name__}")


def _check_qkv(q, k, v, dropout_p, seed) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x)
    if q.dim() != 4 or not q.is_floating_point() or 0 in q.shape:
        raise ValueError(
            f"q: expected floating point [B, H, N, D], none of them 0, got {q.dtype} {list(q.shape)}"
        )
    for name, x in (("k", k), ("v", v)):
        if (x.shape, x.dtype, x.device) != (q.shape, q.dtype, q.device):
            raise ValueError(
                f"{name}: expected {q.dtype} {list(q.shape)} on {q.device} as q, "
                f"got {x.dtype} {list(x.shape)} on {x.device}"
            )
    if not 0 <= dropout_p < 1 - 2**-25:  # which is 1 in float32
        raise ValueError(f"dropout_p: expected a number in [0, 1), got {dropout_p}")
    if seed is not None:
        _check_tensor("seed", seed)
        if seed.dtype != torch.int64 or seed.dim():
            raise ValueError(f"seed: expected int64 [], got {seed.dtype} {list(seed.shape)}")


def _check_lengths(lengths, q) -> torch.Tensor | None:
    """lengths as contiguous int32 on the device of q."""
    if lengths is None:
        return None
    _check_tensor("lengths", lengths)
    if (
        lengths.is_floating_point()
        or lengths.dtype == torch.bool
        or tuple(lengths.shape) != (q.shape[0],)
    ):
        raise ValueError(
            f"lengths: expected integers [{q.shape[0]}], got {lengths.dtype} {list(lengths.shape)}"
        )
    if lengths.device.type == "cpu" and len(lengths) and not torch.compiler.is_compiling():
        low, high = lengths.aminmax()
        if low < 0 or high > q.shape[2]:
            raise ValueError(
                f"lengths: expected values in [0, {q.shape[2]}], got {int(low)} to {int(high)}"
            )
    return lengths.to(q.device, torch.int32).contiguous()
