"""Attention in plain PyTorch: any device, any floating dtype; the numbers the other backends must give.

    p_ij = exp(s_ij) / (sum_{j in J_i} exp(s_ij) + c_i),   s_ij = <q_i, k_j> / sqrt(D)

J_i: the real keys in the blocks selected for row i; c_i = N - n_i for zero_logits, n_i the selected
keys with the padded ones counted, and 0 for renormalised (Yoon et al., IEEE Access 12, 2024, and the
authors' code). Every sample or block row is checkpointed, so no tensor of [B, H, N, N] is kept for
the backward.

Shape suffixes: B batch, H heads, N length, D head width, R rows of a block, M selected keys.
"""

import math

import torch
from torch.utils.checkpoint import checkpoint

from sat.attention import dropout


def _checkpointed(function, *args):
    """function(*args), recomputed in the backward; nothing in it is random, dropout has a seed."""
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


def _weights(scores, real_keys, constant):
    """Attention weights and log-sum-exp of scores over the last dimension.

    real_keys: bool, broadcast to scores. constant: what the denominator holds besides the real keys.
    Rows without a real key give weight 0 and -inf.
    """
    scores = scores.masked_fill(~real_keys, -math.inf)
    # An empty row has no finite log-sum-exp; with 0 instead its weights are exp(-inf - 0) = 0.
    empty = ~real_keys.any(-1)
    shift = torch.logsumexp(scores.masked_fill(empty[..., None], 0), -1).masked_fill(empty, 0)
    lse = shift.masked_fill(empty, -math.inf)
    if constant:
        shift = torch.logaddexp(shift, shift.new_tensor(math.log(constant)))
    return torch.exp(scores - shift[..., None]), lse


def dense_attention(q, k, v, lengths, padded_queries, return_map, dropout_p, seed):
    """See sat.attention.dense_attention. Returns o [B, H, N, D] and the map [N, N] or None."""
    num_batch, num_heads, length, width = q.shape
    index = torch.arange(length, device=q.device)

    heads = torch.arange(num_heads, device=q.device)[:, None, None]

    def sample(q_HND, k_HND, v_HND, real, b):
        k_HND, v_HND = (x.masked_fill(~real[:, None], 0) for x in (k_HND, v_HND))
        if padded_queries == "zero":
            q_HND = q_HND.masked_fill(~real[:, None], 0)
        scores_HNN = q_HND @ k_HND.mT / math.sqrt(width)
        weights_HNN, _ = _weights(scores_HNN, real, 0)
        if padded_queries == "zero":
            weights_HNN = weights_HNN.masked_fill(~real[:, None], 0)
        map_NN = weights_HNN.detach().float().sum(0) if return_map else None
        if dropout_p > 0:
            pairs = b * num_heads + heads
            kept_HNN = dropout.factors(seed, dropout_p, pairs, index[:, None], index, length)
            weights_HNN = weights_HNN * kept_HNN.to(q.dtype)
        return weights_HNN @ v_HND, map_NN

    outputs, total = [], torch.zeros(length, length, device=q.device) if return_map else None
    for b in range(num_batch):
        real = index < (length if lengths is None else lengths[b])
        o_HND, map_NN = _checkpointed(sample, q[b], k[b], v[b], real, b)
        outputs.append(o_HND)
        if return_map:
            total += map_NN
    mean_map = total / (num_batch * num_heads) if return_map else None
    return torch.stack(outputs), mean_map


def block_sparse_attention(q, k, v, block_mask, block_size, lengths, denominator, dropout_p, seed):
    """See sat.attention.block_sparse_attention. Returns o [B, H, N, D] and lse [B, H, N]."""
    length, width = q.shape[2:]
    index = torch.arange(length, device=q.device)
    if lengths is None:
        real_BN = torch.ones(q.shape[0], length, dtype=torch.bool, device=q.device)
    else:
        real_BN = index < lengths[:, None]

    pairs = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(*q.shape[:2], 1, 1)

    def block_row(q_BHRD, k_BHND, v_BHND, keys_M, rows_R):
        real_BM = real_BN[:, keys_M]
        k_BHMD, v_BHMD = (
            x[:, :, keys_M].masked_fill(~real_BM[:, None, :, None], 0) for x in (k_BHND, v_BHND)
        )
        real_BR = real_BN[:, rows_R]
        q_BHRD = q_BHRD.masked_fill(~real_BR[:, None, :, None], 0)
        scores_BHRM = q_BHRD @ k_BHMD.mT / math.sqrt(width)
        constant = length - len(keys_M) if denominator == "zero_logits" else 0
        weights_BHRM, lse_BHR = _weights(scores_BHRM, real_BM[:, None, None, :], constant)
        weights_BHRM = weights_BHRM.masked_fill(~real_BR[:, None, :, None], 0)
        lse_BHR = lse_BHR.masked_fill(~real_BR[:, None, :], -math.inf)
        if dropout_p > 0:
            kept_BHRM = dropout.factors(seed, dropout_p, pairs, rows_R[:, None], keys_M, length)
            weights_BHRM = weights_BHRM * kept_BHRM.to(q.dtype)
        return weights_BHRM @ v_BHMD, lse_BHR.detach()

    outputs, sums = [], []
    for row, columns in enumerate(block_mask.cpu()):
        first = columns.nonzero().to(q.device) * block_size
        keys_M = (first + index[:block_size]).flatten()
        rows_R = index[row * block_size : (row + 1) * block_size]
        q_BHRD = q[:, :, row * block_size : (row + 1) * block_size]
        o_BHRD, lse_BHR = _checkpointed(block_row, q_BHRD, k, v, keys_M, rows_R)
        outputs.append(o_BHRD)
        sums.append(lse_BHR)
    return torch.cat(outputs, 2), torch.cat(sums, 2)
