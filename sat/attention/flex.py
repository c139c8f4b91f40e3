"""Block-sparse attention by torch's FlexAttention: backend `flex`.

FlexAttention gives renormalised attention R and its log-sum-exp λ. The zero-logit denominator is a
gate on it (Yoon et al., IEEE Access 12, 2024, solved for the weights that we need):

    o_i = R_i e^{λ_i} / (e^{λ_i} + N − n_i) = R_i sigmoid(λ_i − log(N − n_i))

On a GPU it is compiled, forward and backward. On the CPU PyTorch 2.13 has neither a backward nor a
compiled form with the log-sum-exp; there the forward runs uncompiled and makes all scores, [B, H, N,
N]: for tests.
"""

import functools
import warnings

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def obstacle(q: torch.Tensor, block_size: int | None, dropout_p: float) -> str | None:
    """Why flex cannot compute a call, or None. block_size: None for dense attention."""
    if block_size is None:
        return "it has no dense attention with a map; it is for block_sparse_attention"
    if dropout_p > 0:
        return "it has no dropout"
    if q.dtype not in DTYPES:
        return f"it takes {', '.join(map(str, DTYPES))}, got {q.dtype}"
    if q.device.type not in ("cpu", "cuda"):
        return f"the tensors are on {q.device.type}"
    if q.is_cuda and (block_size < 16 or block_size & (block_size - 1)):
        return f"on a GPU the block size must be a power of two from 16 on, got {block_size}"
    return None


@functools.cache
def _compiled():
    return torch.compile(flex_attention)


def _block_mask(mask, block_size: int, length: int, lengths) -> BlockMask:
    """A BlockMask of mask [nb, nb] and of the padding; nothing of it waits for the device."""
    counts = mask.sum(1, dtype=torch.int32)[None, None]
    # The selected blocks of a row in ascending order, then the others, which are not read.
    columns = mask.int().argsort(dim=1, descending=True, stable=True).to(torch.int32)[None, None]
    if lengths is None:

        def selected(b, h, i, j):
            return mask[i // block_size, j // block_size]

        # All blocks are full: compiled, the function above is not called.
        return BlockMask.from_kv_blocks(
            torch.zeros_like(counts),
            torch.zeros_like(columns),
            counts,
            columns,
            BLOCK_SIZE=block_size,
            mask_mod=selected,
            seq_lengths=(length, length),
        )

    def selected_and_real(b, h, i, j):
        return mask[i // block_size, j // block_size] & (i < lengths[b]) & (j < lengths[b])

    return BlockMask.from_kv_blocks(
        counts,
        columns,
        BLOCK_SIZE=block_size,
        mask_mod=selected_and_real,
        seq_lengths=(length, length),
    )


def block_sparse_attention(q, k, v, block_mask, block_size, lengths, denominator):
    """See sat.attention.block_sparse_attention. Returns o [B, H, N, D] and lse [B, H, N].

    Raises: ValueError where a gradient is asked for on the CPU.
    """
    length = q.shape[2]
    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "backend 'flex' has no backward on the CPU; use torch.no_grad() or another backend"
        )
    options = {
        "block_mask": _block_mask(block_mask.to(q.device), block_size, length, lengths),
        "return_aux": AuxRequest(lse=True),
    }
    if q.is_cuda:
        # Its own choice of tiles is larger than our blocks, which it refuses.
        tiles = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2")
        tile = min(block_size, 64)
        options["kernel_options"] = {name: tile for name in (*tiles, "bwd_BLOCK_N2")}
        o, aux = _compiled()(q, k, v, **options)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
            # Detached: it looks at requires_grad even where no gradient is recorded.
            o, aux = flex_attention(q.detach(), k.detach(), v.detach(), **options)
    if denominator == "zero_logits":
        unselected = (length - block_size * block_mask.sum(1)).repeat_interleave(
            block_size, output_size=length
        )
        unselected = unselected.to(q.device, torch.float32)
        gate = torch.sigmoid(aux.lse - unselected.clamp(min=1).log())
        o = o * torch.where(unselected > 0, gate, 1.0)[..., None].to(o.dtype)
    return o, aux.lse
