"""Which backend computes attention: availability, check against `reference`, choice.

A kernel library is trusted after it has given the numbers of `reference` on small shapes, forward
and backward, in this process on this machine: every block size, head width and type of its kernels,
with dropout too. Of several that are trusted the fastest is taken.
"""

import functools
import logging
import statistics
import time

import torch

from sat.attention import dropout, flex, kernels, reference

logger = logging.getLogger(__name__)

BACKENDS = ("cuda", "cpu", "flex", "reference")
CANDIDATES = {"cuda": ("cuda", "flex"), "cpu": ("cpu",)}  # of "auto" on a device
# (block size, head width) of the kernels that a library has
KERNELS = {
    "cpu": ((16, 32), (32, 64), (64, 32), (32, 8)),
    "cuda": ((16, 32), (32, 64), (64, 128), (32, 256)),
    "flex": ((32, 32),),
}
TOLERANCE = 1e-5  # largest error against float64, relative to the largest value
TF32_TOLERANCE = 4e-3  # of products whose factors have 11 significant bits
HALF_TOLERANCES = {torch.bfloat16: 4e-2, torch.float16: 5e-3}  # some roundings of their 8, 11 bits


def unavailable(backend: str) -> str | None:
    """Why a backend cannot be used on this machine, or None if it can."""
    if backend == "reference":
        return None
    if backend in ("cuda", "flex") and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if backend == "flex":
        return None
    try:
        kernels.load_library(backend)
    except kernels.KernelLibraryError as error:
        return str(error)
    return None


def _seed(seed, dropout_p, q):
    """None without dropout, the caller's seed or a new one."""
    if dropout_p == 0:
        return None
    return dropout.draw_seed(q.shape[1] * q.shape[2]) if seed is None else seed


def run_block_sparse(
    backend, q, k, v, block_mask, block_size, lengths, denominator, dropout_p, seed=None
):
    """Output and log-sum-exp from a backend, which is not "auto"."""
    seed = _seed(seed, dropout_p, q)
    if backend == "reference":
        return reference.block_sparse_attention(
            q, k, v, block_mask, block_size, lengths, denominator, dropout_p, seed
        )
    if backend == "flex":
        return flex.block_sparse_attention(q, k, v, block_mask, block_size, lengths, denominator)
    q, k, v = (kernels.last_contiguous(x) for x in (q, k, v))
    o, sums = kernels.block_sparse(
        q, k, v, block_mask, lengths, seed, block_size, denominator, dropout_p
    )
    return o, sums[0]


def run_dense(backend, q, k, v, lengths, padded_queries, return_map, dropout_p, seed=None):
    """Output and mean map (or None) from a backend, which is not "auto"."""
    seed = _seed(seed, dropout_p, q)
    if backend == "reference":
        return reference.dense_attention(
            q, k, v, lengths, padded_queries, return_map, dropout_p, seed
        )
    q, k, v = (kernels.last_contiguous(x) for x in (q, k, v))
    query_lengths = lengths if padded_queries == "zero" else None
    o, _, mean_map = kernels.dense(q, k, v, lengths, query_lengths, seed, dropout_p, return_map)
    return o, mean_map if return_map else None


def _check_cases(backend):
    """(head width, function (backend, q, k, v, lengths) -> outputs on [3, 2, 128, width])."""
    seed = torch.tensor(3)

    def sparse(mask, block, denominator, dropout_p):
        def call(backend, q, k, v, lengths):
            where = mask.to(q.device), block, lengths, denominator, dropout_p, seed
            return run_block_sparse(backend, q, k, v, *where)[:1]

        return call

    def dense(padded_queries, dropout_p):
        return lambda backend, q, k, v, lengths: run_dense(
            backend, q, k, v, lengths, padded_queries, True, dropout_p, seed
        )

    for number, (block, width) in enumerate(KERNELS.get(backend, KERNELS["cpu"])):
        blocks = 128 // block
        mask = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(1)) < 0.5
        mask[0], mask[1] = False, True
        dropout_p = 0.25 * (number % 2)  # flex has one case, the first
        for denominator in kernels.DENOMINATORS:
            yield width, sparse(mask, block, denominator, dropout_p)
        if backend != "flex":
            yield width, dense("zero", 0.0)
            yield width, dense("attend", 0.25)


def relative_error(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Largest error of got, relative to the largest value of expected; inf if something is not finite."""
    expected, got = (x.double().cpu() for x in (expected, got))
    error = ((got - expected).abs().max() / expected.abs().max()).item()
    return error if error == error else float("inf")


def largest_error(backend: str, dtype: torch.dtype = torch.float32) -> float:
    """Largest error of a backend's values and gradients in a type against `reference` in float64.

    Relative to the largest value of each tensor; inf if something is not finite.
    """
    device = "cuda" if backend in ("cuda", "flex") else "cpu"
    error = 0.0
    # The first call of a process may come from inside an evaluation.
    with torch.inference_mode(False), torch.enable_grad():
        lengths = torch.tensor([128, 75, 0], dtype=torch.int32)
        for width, case in _check_cases(backend):
            generator = torch.Generator().manual_seed(0)
            inputs = [
                torch.randn(3, 2, 128, width, generator=generator).to(dtype) for _ in range(4)
            ]
            results = []
            for name, place, kind in (
                ("reference", "cpu", torch.float64),
                (backend, device, dtype),
            ):
                q, k, v, d_o = (x.to(place, kind) for x in inputs)
                leaves = [x.requires_grad_() for x in (q, k, v)]
                outputs = case(name, *leaves, lengths.to(place))
                gradients = torch.autograd.grad(outputs[0], leaves, d_o)
                results.append([x.detach() for x in (*outputs, *gradients)])
            error = max(error, *map(relative_error, *results))
    return error


def check(backend: str) -> tuple[float, str | None]:
    """(largest error in float32, why an available backend is not trusted or None)."""
    checks = [("float32", torch.float32, TOLERANCE)]
    if backend == "cuda":
        checks += [
            (str(dtype).removeprefix("torch."), dtype, tolerance)
            for dtype, tolerance in HALF_TOLERANCES.items()
        ]
        checks.append(("TF32", torch.float32, TF32_TOLERANCE))
    errors: dict[str, float] = {"float32": float("inf")}
    for name, dtype, tolerance in checks:
        try:
            with kernels.products_in_tf32(name == "TF32"):
                error = errors[name] = largest_error(backend, dtype)
        except RuntimeError as exception:  # of CUDA, or of torch's compiler
            return errors["float32"], f"its check failed: {exception}"
        if not error <= tolerance:
            reason = f"its kernels differ from reference by {error:.1e} in {name}, allowed {tolerance:.0e}"
            return errors["float32"], reason
    return errors["float32"], None


def milliseconds(backend: str) -> float:
    """Median of 5 of block-sparse attention forward and backward, on a device that is idle.

    Batch 4, 2 heads, length 1024, head width 32, block 32, a tenth of the blocks selected, float32.
    """
    device = "cuda" if backend in ("cuda", "flex") else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_o = (torch.randn(4, 2, 1024, 32, generator=generator).to(device) for _ in range(4))
    mask = (torch.rand(32, 32, generator=generator) < 0.1).to(device)
    times = []
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [x.requires_grad_() for x in (q, k, v)]
        for _ in range(6):
            start = time.perf_counter()
            o, _ = run_block_sparse(backend, *leaves, mask, 32, None, "zero_logits", 0.0)
            torch.autograd.grad(o, leaves, d_o)
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])  # the first one warms up


def _title(backend: str) -> str:
    return "flex" if backend == "flex" else f"kernels ({kernels.instruction_set(backend)})"


@functools.cache
def _choose(device_type: str) -> tuple[str, ...]:
    """Checks the backends of a device once, times those that pass and logs the choice.

    Returns those that are trusted, the fastest first, and behind them "reference".
    """
    failures, trusted = [], []
    for backend in CANDIDATES.get(device_type, ()):
        failure = unavailable(backend) or check(backend)[1]
        if failure is None:
            trusted.append(backend)
        else:
            failures.append(f"not {backend}: {failure}")
    if trusted:
        words = []
        if len(trusted) > 1:
            times = {name: milliseconds(name) for name in trusted}
            words = [f"{name} {value:.2f} ms a call" for name, value in times.items()]
            trusted.sort(key=times.get)
        words.insert(0, f"attention on {device_type}: {_title(trusted[0])}")
        logger.log(logging.WARNING if failures else logging.INFO, "; ".join([*words, *failures]))
    elif failures:
        reasons = "; ".join(failures)
        logger.warning("attention on %s: plain PyTorch, which is slow: %s", device_type, reasons)
    return (*trusted, "reference")


@torch.compiler.assume_constant_result
def _ranking(device_type: str) -> tuple[str, ...]:
    return _choose(device_type)


@torch.compiler.assume_constant_result
def selected_backend(device_type: str) -> str:
    """The backend that "auto" uses for float32 tensors on a device; see CANDIDATES.

    Where it is "flex", dense attention and dropout are those of the next one that is trusted.
    """
    return _choose(device_type)[0]


def resolve(backend: str, q: torch.Tensor, block_size: int | None, dropout_p: float = 0.0) -> str:
    """The backend of a call. ValueError if the one asked for cannot do it."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend: expected one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return backend
    if backend == "auto":
        able = [
            name
            for name in CANDIDATES.get(q.device.type, ())
            if _obstacle(name, q, block_size, dropout_p) is None
        ]
        if not able:  # before the libraries are loaded and checked
            return "reference"
        return next(name for name in _ranking(q.device.type) if name in (*able, "reference"))
    obstacle = _obstacle(backend, q, block_size, dropout_p)
    if obstacle is None and not (backend == "flex" and q.device.type == "cpu"):
        obstacle = unavailable(backend)
    if obstacle:
        raise ValueError(f"backend {backend!r} cannot be used: {obstacle}")
    return backend


def _obstacle(backend, q, block_size, dropout_p) -> str | None:
    """Why flex or the kernels of a device cannot compute a call, or None."""
    if backend == "flex":
        return flex.obstacle(q, block_size, dropout_p)
    width = q.shape[-1]
    if q.device.type != backend:
        return f"the tensors are on {q.device.type}"
    dtypes = kernels.DTYPES if backend == "cuda" else kernels.DTYPES[:1]
    if q.dtype not in dtypes:
        return f"it takes {', '.join(map(str, dtypes))}, got {q.dtype}"
    if width % 8 or (backend == "cuda" and width > kernels.MAX_CUDA_WIDTH):
        return f"head width {width} is not a multiple of 8 or too large"
    if block_size is not None and block_size not in kernels.BLOCK_SIZES:
        return f"block size {block_size} is not one of {kernels.BLOCK_SIZES}"
    return None
