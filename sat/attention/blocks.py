"""A block mask as CSR and as CSR of its transpose, worked out once for each mask."""

import collections

import torch

CACHE_SIZE = 64
_cache: collections.OrderedDict = collections.OrderedDict()


def _csr(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    row_ptr = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    row_ptr[1:] = mask.sum(1).cumsum(0)
    return row_ptr, mask.nonzero()[:, 1].to(torch.int32)


def block_csr(mask: torch.Tensor, device: torch.device | None = None) -> tuple[torch.Tensor, ...]:
    """(row_ptr, col_idx, col_ptr, row_idx), int32 on `device` (default: the mask's own).

    mask: bool [nb, nb]. A mask does not change after the transition, so the answer is kept for as
    long as the tensor is not written to; only the first call for a mask waits for the device.
    """
    device = mask.device if device is None else torch.device(device)
    if mask.is_inference():  # has no version to tell a change by
        return _build(mask, device)
    key = (mask.data_ptr(), mask._version, tuple(mask.shape), mask.stride(), mask.device, device)
    if key not in _cache:
        # The entry keeps the mask alive, so that no other tensor can get its address.
        with torch.inference_mode(False):  # an evaluation may come first, a training step after it
            _cache[key] = (mask, _build(mask, device))
        if len(_cache) > CACHE_SIZE:
            _cache.popitem(last=False)
    _cache.move_to_end(key)
    return _cache[key][1]


def _build(mask: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, ...]:
    mask = mask.detach()
    return tuple(x.to(device).contiguous() for x in (*_csr(mask), *_csr(mask.T.contiguous())))
