"""The compiled kernels of csrc/ as torch.library operators: backends `cpu` and `cuda`.

The operators sat::block_sparse and sat::dense and their backwards take tensors whose last
dimension is contiguous; ctypes hands pointers and strides to libsat_cpu.so or libsat_cuda.so. They
check nothing: sat.attention does.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import struct
from ctypes import c_char_p, c_int, c_void_p
from pathlib import Path

import torch

from sat.attention.blocks import block_csr

ABI_VERSION = 4
BLOCK_SIZES = (16, 32, 64)
DENOMINATORS = ("zero_logits", "renormalised")  # in the order of the C enum
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of the C enum
TF32 = 3  # and float32 with products in TF32
MAX_CUDA_WIDTH = 256
BUILD_COMMAND = "snakemake --cores 1 kernels"
PROJECT = Path(__file__).resolve().parents[2]

OUT_OF_MEMORY = -2
ERRORS = {-1: "bad argument", OUT_OF_MEMORY: "out of memory", -3: "not supported"}


class KernelLibraryError(Exception):
    """A kernel library that cannot be used; the text says why."""


# The structures of csrc/sat_kernels.h as bytes: ctypes' own take twice as long to make, and a sparse
# call is short.
_TENSOR = struct.Struct("@P3q")
_PROBLEM = struct.Struct("@4q2Pf2ifQ")
_BLOCKS = struct.Struct("@q4P")
_SIGNATURES = {
    "sat_block_sparse_forward": [*[c_char_p] * 6, *[c_void_p] * 3],
    "sat_block_sparse_backward": [
        *[c_char_p] * 6,
        *[c_void_p] * 2,
        *[c_char_p] * 4,
        *[c_void_p] * 2,
    ],
    "sat_dense_forward": [*[c_char_p] * 5, *[c_void_p] * 4],
    "sat_dense_backward": [*[c_char_p] * 5, *[c_void_p] * 2, *[c_char_p] * 4, *[c_void_p] * 2],
}


def kernels_folder() -> Path | None:
    """$SAT_KERNELS, else the newest results/<run>/kernels that holds a library, else None."""
    if os.environ.get("SAT_KERNELS"):
        return Path(os.environ["SAT_KERNELS"])
    found = PROJECT.glob("results/*/kernels/libsat_cpu.so")
    newest = max(found, key=lambda path: (path.stat().st_mtime_ns, str(path)), default=None)
    return newest and newest.parent


@functools.cache
def load_library(device_type: str) -> ctypes.CDLL:
    """libsat_<device_type>.so; raises KernelLibraryError that says what to do."""
    folder = kernels_folder()
    if folder is None:
        raise KernelLibraryError(f"no kernel library found; build it with: {BUILD_COMMAND}")
    path, rebuild = folder / f"libsat_{device_type}.so", f"build it anew with: {BUILD_COMMAND}"
    try:
        record = json.loads((folder / "kernels.json").read_text(encoding="utf-8"))[device_type]
        if not record["built"]:
            raise KernelLibraryError(
                f"{path.name} was not built: {record['reason']}; once that is mended, build it with: {BUILD_COMMAND}"
            )
        content = path.read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise KernelLibraryError(f"{path}: {error!r}; {rebuild}") from error
    # Before loading: the loader of a truncated library can end the process.
    if hashlib.sha256(content).hexdigest() != record.get("sha256"):
        raise KernelLibraryError(f"{path} is not the file that kernels.json describes; {rebuild}")
    try:
        library = ctypes.CDLL(str(path))
        version = library.sat_abi_version()
        if version != ABI_VERSION:
            raise KernelLibraryError(
                f"{path} has interface version {version}, expected {ABI_VERSION}; {rebuild}"
            )
        for name, arguments in _SIGNATURES.items():
            getattr(library, name).argtypes = arguments
            getattr(library, name).restype = c_int
        library.sat_instruction_set.restype = ctypes.c_char_p
        library.sat_use_instruction_set.argtypes = [ctypes.c_char_p]
    except (OSError, AttributeError) as error:
        raise KernelLibraryError(f"{path} cannot be loaded: {error}; {rebuild}") from error
    return library


def instruction_set(device_type: str) -> str:
    """Name of the instruction set that the library of a device uses, e.g. "avx2"."""
    return load_library(device_type).sat_instruction_set().decode()


def _tensor(x: torch.Tensor) -> bytes:
    return _TENSOR.pack(x.data_ptr(), *x.stride()[:3])


_forced_tf32: bool | None = None  # of products_in_tf32, for all threads: a backward runs in another


@contextlib.contextmanager
def products_in_tf32(chosen: bool):
    """Within it the CUDA kernels multiply float32 in TF32 or not, whatever torch is set to."""
    global _forced_tf32
    _forced_tf32 = chosen
    try:
        yield
    finally:
        _forced_tf32 = None


def uses_tf32(x: torch.Tensor) -> bool:
    """Whether products of a tensor run on tensor cores, as torch is set for its own matrix products."""
    if not x.is_cuda or x.dtype != torch.float32:
        return False
    if _forced_tf32 is not None:
        return _forced_tf32
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _problem(q, key_lengths, query_lengths, denominator, dropout_p, seed) -> bytes:
    return _PROBLEM.pack(
        *q.shape,
        0 if key_lengths is None else key_lengths.data_ptr(),
        0 if query_lengths is None else query_lengths.data_ptr(),
        q.shape[-1] ** -0.5,
        DENOMINATORS.index(denominator),
        TF32 if uses_tf32(q) else DTYPES.index(q.dtype),
        dropout_p,
        seed.item() % 2**64 if dropout_p > 0 else 0,
    )


def _new_sums(q: torch.Tensor) -> torch.Tensor:
    """[2, B, H, N]: the log-sum-exp and what its rounding to float32 left out."""
    return torch.empty((2, *q.shape[:3]), dtype=torch.float32, device=q.device)


def _call(name: str, like: torch.Tensor, *arguments) -> None:
    device_type = like.device.type
    library = load_library(device_type)
    if device_type == "cuda":
        with torch.cuda.device(like.device):
            stream = torch.cuda.current_stream().cuda_stream
            status = getattr(library, name)(*arguments, stream)
    else:
        library.sat_set_num_threads(torch.get_num_threads())
        status = getattr(library, name)(*arguments, None)
    check_status(name, device_type, status)


def check_status(name: str, device_type: str, status: int) -> None:
    """Raises what a status of the library that is not 0 means."""
    if status:
        kind = torch.OutOfMemoryError if status == OUT_OF_MEMORY else RuntimeError
        raise kind(f"{name} on {device_type}: {ERRORS.get(status, f'error {status}')}")


def _new_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _pointers(sums: torch.Tensor) -> tuple[int, int]:
    """Addresses of the two parts of [2, B, H, N]."""
    return sums.data_ptr(), sums.data_ptr() + 4 * (sums.numel() // 2)


def _blocks(csr, block_size: int) -> bytes:
    return _BLOCKS.pack(block_size, *(x.data_ptr() for x in csr))


def _forward(name, problem, blocks, q, k, v, *rest) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of a forward of the library; rest: its last arguments."""
    o, sums = _new_like(q), _new_sums(q)
    _call(name, q, problem, *blocks, *map(_tensor, (q, k, v, o)), *_pointers(sums), *rest)
    return o, sums


def _backward(
    name, problem, blocks, d_o, q, k, v, o, sums
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of a backward of the library."""
    gradients = _new_like(q), _new_like(k), _new_like(v)
    d_o = last_contiguous(d_o)
    delta = torch.empty_like(sums[0]) if q.is_cuda else None
    _call(
        name,
        q,
        problem,
        *blocks,
        *map(_tensor, (q, k, v, o)),
        *_pointers(sums),
        *map(_tensor, (d_o, *gradients)),
        None if delta is None else delta.data_ptr(),
    )
    return gradients


def _block_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_mask: torch.Tensor,
    lengths: torch.Tensor | None,
    seed: torch.Tensor | None,
    block_size: int,
    denominator: str,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, N, D] and log-sum-exp [2, B, H, N] in two parts; lengths int32 [B].

    seed: int64 [] on the CPU, None without dropout.
    """
    csr = block_csr(block_mask, q.device)
    problem = _problem(q, lengths, lengths, denominator, dropout_p, seed)
    return _forward("sat_block_sparse_forward", problem, [_blocks(csr, block_size)], q, k, v)


def _block_sparse_backward(
    d_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    sums: torch.Tensor,
    block_mask: torch.Tensor,
    lengths: torch.Tensor | None,
    seed: torch.Tensor | None,
    block_size: int,
    denominator: str,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv [B, H, N, D]."""
    csr = block_csr(block_mask, q.device)
    problem = _problem(q, lengths, lengths, denominator, dropout_p, seed)
    blocks = [_blocks(csr, block_size)]
    return _backward("sat_block_sparse_backward", problem, blocks, d_o, q, k, v, o, sums)


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_lengths: torch.Tensor | None,
    query_lengths: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
    return_map: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp as block_sparse, mean map [N, N] (empty without return_map)."""
    size = q.shape[2:3] * 2 if return_map else 0
    mean_map = torch.empty(size, dtype=torch.float32, device=q.device)
    place = mean_map.data_ptr() if return_map else None
    problem = _problem(q, key_lengths, query_lengths, "renormalised", dropout_p, seed)
    return *_forward("sat_dense_forward", problem, [], q, k, v, place), mean_map


def _dense_backward(
    d_o: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    sums: torch.Tensor,
    key_lengths: torch.Tensor | None,
    query_lengths: torch.Tensor | None,
    seed: torch.Tensor | None,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv [B, H, N, D]."""
    problem = _problem(q, key_lengths, query_lengths, "renormalised", dropout_p, seed)
    return _backward("sat_dense_backward", problem, [], d_o, q, k, v, o, sums)


_operator = functools.partial(
    torch.library.custom_op, mutates_args=(), device_types=("cpu", "cuda")
)
block_sparse_operator = _operator("sat::block_sparse", _block_sparse)
block_sparse_backward_operator = _operator("sat::block_sparse_backward", _block_sparse_backward)
dense_operator = _operator("sat::dense", _dense)
dense_backward_operator = _operator("sat::dense_backward", _dense_backward)


@block_sparse_operator.register_fake
def _(q, k, v, block_mask, lengths, seed, block_size, denominator, dropout_p):
    return _new_like(q), _new_sums(q)


@dense_operator.register_fake
def _(q, k, v, key_lengths, query_lengths, seed, dropout_p, return_map):
    sums = _new_sums(q)
    return _new_like(q), sums, sums.new_empty(q.shape[2:3] * 2 if return_map else 0)


@block_sparse_backward_operator.register_fake
@dense_backward_operator.register_fake
def _(d_o, q, k, v, *_):
    return _new_like(q), _new_like(k), _new_like(v)


def is_plain(x: torch.Tensor) -> bool:
    """Whether a tensor is data, not a stand-in of torch.compile or of another tool."""
    return type(x) is torch.Tensor and not torch.compiler.is_compiling()


def _block_sparse_setup(ctx, inputs, output):
    q, k, v, block_mask, lengths, seed, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, block_mask, lengths, seed)


def _block_sparse_gradients(ctx, d_o, _):
    backward = _block_sparse_backward if is_plain(d_o) else block_sparse_backward_operator
    return *backward(d_o, *ctx.saved_tensors, *ctx.options), *[None] * 6


def _dense_setup(ctx, inputs, output):
    q, k, v, key_lengths, query_lengths, seed, ctx.dropout_p, _ = inputs
    o, sums, _ = output
    ctx.save_for_backward(q, k, v, o, sums, key_lengths, query_lengths, seed)


def _dense_gradients(ctx, d_o, *_):
    backward = _dense_backward if is_plain(d_o) else dense_backward_operator
    return *backward(d_o, *ctx.saved_tensors, ctx.dropout_p), *[None] * 5


block_sparse_operator.register_autograd(_block_sparse_gradients, setup_context=_block_sparse_setup)
dense_operator.register_autograd(_dense_gradients, setup_context=_dense_setup)


def direct(forward, setup, gradients, differentiable=1):
    """forward with gradients through autograd alone, for its first `differentiable` outputs.

    The operators are for torch.compile and the like. Going through torch's dispatcher costs about
    as much as a call with few blocks selected.
    """

    only_once = torch.autograd.function.once_differentiable(gradients)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            if isinstance(output, tuple):
                ctx.mark_non_differentiable(*output[differentiable:])
            ctx.set_materialize_grads(False)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *d_outputs):
            # Gradients are recorded if a second derivative is wanted, which is refused.
            return (only_once if torch.is_grad_enabled() else gradients)(ctx, *d_outputs)

    return Direct.apply


_direct_block_sparse = direct(_block_sparse, _block_sparse_setup, _block_sparse_gradients)
_direct_dense = direct(_dense, _dense_setup, _dense_gradients)


def block_sparse(q, *options):
    """_block_sparse with gradients; see there."""
    if not is_plain(q):
        return block_sparse_operator(q, *options)
    return (_direct_block_sparse if torch.is_grad_enabled() else _block_sparse)(q, *options)


def dense(q, *options):
    """_dense with gradients; see there."""
    if not is_plain(q):
        return dense_operator(q, *options)
    return (_direct_dense if torch.is_grad_enabled() else _dense)(q, *options)
