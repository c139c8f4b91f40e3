"""The parts of a Transformer layer around attention and matrix products, each in one pass over its rows.

    embed            x' = M (embedded + position),  h = LayerNorm(x')
    dropout_add_norm x' = x + M (y + bias),         h = LayerNorm(x')
    gelu_dropout     M GELU(u + bias),              GELU(x) = x (1 + erf(x / √2)) / 2

M are the factors of dropout of sat/attention/dropout.py, drawn from a seed and the place in the
batch, in the backward anew; without dropout the seed is None. In float32 on the CPU the compiled
kernels of csrc/cpu/layer.cpp do it, where sat.attention chose those for attention too; elsewhere
plain PyTorch, which drops the same elements. Shape suffixes: B batch, S length, D and C channels.
"""

import ctypes
import functools
import struct
from ctypes import c_char_p, c_double, c_int, c_int64, c_void_p

import torch
from torch.nn import functional as F

from sat.attention import dropout, kernels, selected_backend

NORM_EPS = 1e-5  # of the kernels too

_ROWS = struct.Struct("@4qfQ")  # sat_rows of csrc/sat_kernels.h
_SIGNATURES = {
    "sat_norm_forward": [c_char_p, c_void_p, c_void_p, c_int64, *[c_void_p] * 6],
    "sat_norm_backward": [c_char_p, *[c_void_p] * 8],
    "sat_gelu_forward": [c_char_p, *[c_void_p] * 3],
    "sat_gelu_backward": [c_char_p, *[c_void_p] * 5],
    "sat_map_sums": [c_int64, c_int64, c_void_p, c_void_p, c_double, c_void_p],
}


# ---------------------------------------------------------------- plain PyTorch


def dropped(x_BSC: torch.Tensor, p: float, seed: torch.Tensor | None, length: int) -> torch.Tensor:
    """x times its factors of dropout; length: rows of a sequence that the counter goes by."""
    if seed is None:
        return x_BSC
    factors_BSC = dropout.element_factors(seed, p, x_BSC.shape, length, x_BSC.device)
    return x_BSC * factors_BSC.to(x_BSC.dtype)


def plain_add_norm(y_BSD, y_bias, x_BSD, weight_D, bias_D, p, seed, length):
    """See dropout_add_norm; y_bias [D] or [S, D], x None for 0."""
    new_BSD = dropped(y_BSD + y_bias, p, seed, length)
    if x_BSD is not None:
        new_BSD = x_BSD + new_BSD
    return new_BSD, F.layer_norm(new_BSD, new_BSD.shape[-1:], weight_D, bias_D, NORM_EPS)


def plain_gelu_dropout(u_BSC, bias_C, p, seed, length):
    return dropped(F.gelu(u_BSC + bias_C), p, seed, length)


# ---------------------------------------------------------------- kernels


@functools.cache
def _library() -> ctypes.CDLL:
    library = kernels.load_library("cpu")
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = c_int
    return library


def _call(name: str, *arguments) -> None:
    library = _library()
    library.sat_set_num_threads(torch.get_num_threads())
    kernels.check_status(name, "cpu", getattr(library, name)(*arguments))


def _rows(x_BSC: torch.Tensor, p: float, seed: torch.Tensor | None, length: int) -> bytes:
    drops = seed is not None and p > 0
    return _ROWS.pack(
        *x_BSC.shape, length, p if drops else 0.0, seed.item() % 2**64 if drops else 0
    )


def _place(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _norm(
    y: torch.Tensor,
    y_bias: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x', h, statistics [B, S, 2]: mean and 1 / deviation of x')."""
    y, y_bias, weight, bias = (t.contiguous() for t in (y, y_bias, weight, bias))
    x = None if x is None else x.contiguous()
    new, h = torch.empty_like(y), torch.empty_like(y)
    statistics = y.new_empty((*y.shape[:2], 2))
    stride = y_bias.stride(0) if y_bias.dim() == 2 else 0
    tensors = (x, weight, bias, new, h, statistics)
    _call(
        "sat_norm_forward",
        _rows(y, p, seed, length),
        y.data_ptr(),
        y_bias.data_ptr(),
        stride,
        *map(_place, tensors),
    )
    return new, h, statistics


def _norm_backward(
    d_new: torch.Tensor | None,
    d_h: torch.Tensor,
    new: torch.Tensor,
    weight: torch.Tensor,
    statistics: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx, dy, [3, D]: gradients of weight and bias, sum of dy over the rows)."""
    d_new = None if d_new is None else d_new.contiguous()
    d_h, weight = d_h.contiguous(), weight.contiguous()
    dx, dy = torch.empty_like(new), torch.empty_like(new)
    sums = new.new_empty((3, new.shape[-1]))
    tensors = (d_new, d_h, new, weight, statistics, dx, dy, sums)
    _call("sat_norm_backward", _rows(new, p, seed, length), *map(_place, tensors))
    return dx, dy, sums


def _gelu(
    u: torch.Tensor, bias: torch.Tensor, seed: torch.Tensor | None, p: float, length: int
) -> torch.Tensor:
    u, bias = u.contiguous(), bias.contiguous()
    out = torch.empty_like(u)
    _call("sat_gelu_forward", _rows(u, p, seed, length), *map(_place, (u, bias, out)))
    return out


def _gelu_backward(
    d_out: torch.Tensor,
    u: torch.Tensor,
    bias: torch.Tensor,
    seed: torch.Tensor | None,
    p: float,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(du, gradient of the bias)."""
    d_out, u, bias = d_out.contiguous(), u.contiguous(), bias.contiguous()
    du, sums = torch.empty_like(u), torch.empty_like(bias)
    tensors = (d_out, u, bias, du, sums)
    _call("sat_gelu_backward", _rows(u, p, seed, length), *map(_place, tensors))
    return du, sums


def map_sums(
    a_SS: torch.Tensor, other_SS: torch.Tensor | None, size: int, shift: float
) -> torch.Tensor | None:
    """Sums [4] in float64 of a - shift, its square, its cube in the first size rows and columns, and of (a - other)^2.

    None where there are no kernels for it.
    """
    if not _use_kernels(a_SS[None]) or not kernels.is_plain(a_SS):
        return None
    a_SS = a_SS.contiguous()
    other_SS = None if other_SS is None else other_SS.contiguous()
    sums = torch.empty(4, dtype=torch.float64)
    places = (a_SS.data_ptr(), _place(other_SS), shift, sums.data_ptr())
    _call("sat_map_sums", len(a_SS), size, *places)
    return sums


_operator = functools.partial(torch.library.custom_op, mutates_args=(), device_types="cpu")
norm_operator = _operator("sat::add_norm", _norm)
norm_backward_operator = _operator("sat::add_norm_backward", _norm_backward)
gelu_operator = _operator("sat::gelu_dropout", _gelu)
gelu_backward_operator = _operator("sat::gelu_dropout_backward", _gelu_backward)


def _new(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@norm_operator.register_fake
def _(y, *_):
    return _new(y), _new(y), y.new_empty((*y.shape[:2], 2))


@norm_backward_operator.register_fake
def _(d_new, d_h, new, *_):
    return _new(new), _new(new), new.new_empty((3, new.shape[-1]))


@gelu_operator.register_fake
def _(u, *_):
    return _new(u)


@gelu_backward_operator.register_fake
def _(d_out, u, bias, *_):
    return _new(u), _new(bias)


def _norm_setup(ctx, inputs, output):
    _, y_bias, x, weight, _, seed, ctx.p, ctx.length = inputs
    new, _, statistics = output
    ctx.of_positions, ctx.has_x = y_bias.dim() == 2, x is not None
    ctx.save_for_backward(new, weight, statistics, seed)


def _norm_gradients(ctx, d_new, d_h, _):
    new, weight, statistics, seed = ctx.saved_tensors
    if d_h is None:  # nothing comes from h where only x' is used
        d_h = torch.zeros_like(new)
    backward = _norm_backward if kernels.is_plain(d_h) else norm_backward_operator
    dx, dy, sums = backward(d_new, d_h, new, weight, statistics, seed, ctx.p, ctx.length)
    y_bias = dy.sum(dim=0) if ctx.of_positions else sums[2]
    return dy, y_bias, dx if ctx.has_x else None, sums[0], sums[1], None, None, None


def _gelu_setup(ctx, inputs, output):
    u, bias, seed, ctx.p, ctx.length = inputs
    ctx.save_for_backward(u, bias, seed)


def _gelu_gradients(ctx, d_out):
    backward = _gelu_backward if kernels.is_plain(d_out) else gelu_backward_operator
    return *backward(d_out, *ctx.saved_tensors, ctx.p, ctx.length), None, None, None


norm_operator.register_autograd(_norm_gradients, setup_context=_norm_setup)
gelu_operator.register_autograd(_gelu_gradients, setup_context=_gelu_setup)

_direct_norm = kernels.direct(_norm, _norm_setup, _norm_gradients, differentiable=2)
_direct_gelu = kernels.direct(_gelu, _gelu_setup, _gelu_gradients)


def _use_kernels(*tensors: torch.Tensor) -> bool:
    return (
        all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and tensors[0].dim() == 3
        and tensors[0].shape[-1] % 8 == 0
        and selected_backend("cpu") == "cpu"
    )


# ---------------------------------------------------------------- what the model calls


def embed(
    embedded_BSD: torch.Tensor,
    position_SD: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor,
    p: float,
    seed: torch.Tensor | None,
    length: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x', LayerNorm(x')) with x' = M (embedded + position)."""
    return _add_norm(embedded_BSD, position_SD, None, weight_D, bias_D, p, seed, length)


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
    """(x', LayerNorm(x')) with x' = x + M (y + y_bias)."""
    return _add_norm(y_BSD, y_bias_D, x_BSD, weight_D, bias_D, p, seed, length)


def _add_norm(y, y_bias, x, weight, bias, p, seed, length):
    if not _use_kernels(y, weight, y if x is None else x):
        return plain_add_norm(y, y_bias, x, weight, bias, p, seed, length)
    arguments = (y, y_bias, x, weight, bias, seed, p, length)
    if not kernels.is_plain(y):
        return norm_operator(*arguments)[:2]
    return (_direct_norm if torch.is_grad_enabled() else _norm)(*arguments)[:2]


def gelu_dropout(
    u_BSC: torch.Tensor, bias_C: torch.Tensor, p: float, seed: torch.Tensor | None, length: int
) -> torch.Tensor:
    """M GELU(u + bias)."""
    if not _use_kernels(u_BSC, bias_C):
        return plain_gelu_dropout(u_BSC, bias_C, p, seed, length)
    arguments = (u_BSC, bias_C, seed, p, length)
    if not kernels.is_plain(u_BSC):
        return gelu_operator(*arguments)
    return (_direct_gelu if torch.is_grad_enabled() else _gelu)(*arguments)
