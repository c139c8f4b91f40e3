"""Time and memory of the attention backends beside other ways to compute attention on the CPU.

    python -m sat.benchmark attention --json attention.json [--quick] [--threads 1] [--length 1024]
    python -m sat.benchmark step --json step.json [--quick] [--threads 2]      (see sat/step_benchmark.py)
    python -m sat.benchmark cost --json cost.json [--quick] [--threads 2]      (see sat/cost_benchmark.py)

All in one process with the same threads and allocator settings, interleaved in a new order every
round; the median counts. The reference is torch's scaled_dot_product_attention over all keys.
With one thread the clock is the CPU time of the process, which other work on the machine disturbs
little, else wall time. workflow/scripts/benchmark_report.py makes tables and figures of the JSON.
"""

import argparse
import ctypes
import json
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path

from sat.launch import with_allocator_settings

HEADS, WIDTH = 2, 32
BATCHES, LENGTHS, BLOCKS = (8, 32), (1024, 2048, 4096), (32, 64)
DENSITIES = (0.02, 0.05, 0.1, 0.25, 1.0)
MATERIALISED_LENGTH = 1024  # longest with a [B, H, N, N] tensor
MATERIALISED_BATCH = 8
GATHERED_ELEMENTS = 2**26  # most scores that gather + bmm may hold


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sat.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["attention", "step", "cost"])
    parser.add_argument("--json", type=Path, required=True, help="file to write")
    parser.add_argument("--quick", action="store_true", help="one small shape, two densities")
    parser.add_argument("--batch", type=int, action="append", help=f"default: {BATCHES}")
    parser.add_argument("--length", type=int, action="append", help=f"default: {LENGTHS}")
    parser.add_argument("--block-size", type=int, action="append", help=f"default: {BLOCKS}")
    parser.add_argument("--width", type=int, default=WIDTH, help=f"of a head (default: {WIDTH})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each (default: 7)")
    parser.add_argument("--no-flex", action="store_true", help="leave out FlexAttention")
    return parser.parse_args(arguments)


def random_mask(num_blocks: int, density: float, generator):
    """bool [num_blocks, num_blocks] with round(density * num_blocks²) blocks, at least one."""
    import torch

    count = max(1, round(density * num_blocks**2))
    order = torch.randperm(num_blocks**2, generator=generator)
    mask = torch.zeros(num_blocks**2, dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(num_blocks, num_blocks)


def materialised(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def gather_bmm(mask, block_size: int):
    """Zero-logit attention in plain PyTorch: blocks gathered, multiplied, added up by row."""
    rows, columns = mask.nonzero(as_tuple=True)

    def attend(q, k, v):
        B, H, N, D = q.shape
        q, k, v = (x.reshape(B * H, -1, block_size, D) for x in (q, k, v))
        weights = (q[:, rows] @ k[:, columns].mT / math.sqrt(D)).exp()
        total = q.new_zeros(q.shape[:3]).index_add(1, rows, weights.sum(-1))
        total = total + (N - block_size * mask.sum(1)).view(1, -1, 1)
        o = q.new_zeros(q.shape).index_add(1, rows, weights @ v[:, columns])
        return (o / total[..., None]).view(B, H, N, D)

    return attend


def flex_forward(mask, block_size: int):
    """FlexAttention, compiled, over the blocks of a mask. It has no backward on the CPU."""
    import torch
    from torch.nn.attention import flex_attention as flex

    compiled = torch.compile(flex.flex_attention, dynamic=False)
    counts = mask.sum(1, dtype=torch.int32)[None, None]
    order = torch.argsort(mask.int(), dim=1, descending=True, stable=True).int()[None, None]
    # All blocks are full. A tensor must not be given twice: the C++ code that torch 2.13 makes would
    # then name it once and not compile.
    blocks = flex.BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(order), counts, order, BLOCK_SIZE=block_size
    )
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks)


def _forward(function, inputs):
    import torch

    def run():
        with torch.no_grad():
            function(*inputs[:3])

    return run


def _forward_backward(function, inputs):
    import torch

    leaves = [x.detach().requires_grad_() for x in inputs[:3]]

    def run():
        torch.autograd.grad(function(*leaves), leaves, inputs[3])

    return run


def extra_bytes(call) -> int | None:
    """Most memory that a call held at once beyond what there was before it; None if not known."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status("VmRSS:")
        call()
        return _status("VmHWM:") - before
    except (OSError, AttributeError):
        return None


def _largest_error(function, inputs) -> dict[str, float]:
    """Pass -> largest error against float64, relative to the largest value, on the first sequence."""
    import torch

    from sat.attention.selection import relative_error

    results = []
    for dtype in (torch.float64, torch.float32):  # float64 goes through `reference`
        *leaves, d_o = (x[:1].to(dtype).detach() for x in inputs)
        o = function(*(x.requires_grad_() for x in leaves))
        results.append([o.detach(), *torch.autograd.grad(o, leaves, d_o)])
    errors = [relative_error(*pair) for pair in zip(*results, strict=True)]
    return {"forward": errors[0], "forward+backward": max(errors)}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {key} in /proc/self/status")


def _measure(calls: dict, rounds: int, clock) -> dict:
    """Median seconds of every call; the order is shuffled in every round."""
    times = {name: [] for name in calls}
    order, generator = list(calls), random.Random(0)
    for call in calls.values():
        call()  # warms up, compiles
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            start = clock()
            calls[name]()
            times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def cases(batch: int, length: int, blocks, densities, use_flex: bool):
    """(implementation, block size or None, density or None, selected share, function, has backward)."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from sat.attention import block_sparse_attention, dense_attention

    yield "sdpa", None, None, 1.0, scaled_dot_product_attention, True
    yield "sat dense", None, None, 1.0, lambda q, k, v: dense_attention(q, k, v), True
    with_map = lambda q, k, v: dense_attention(q, k, v, return_map=True)[0]  # noqa: E731
    yield "sat dense with map", None, None, 1.0, with_map, True
    real = torch.full((batch,), length // 2, dtype=torch.int32)
    padded = lambda q, k, v: dense_attention(q, k, v, lengths=real)  # noqa: E731
    yield "sat dense half padded", None, None, 1.0, padded, True
    counted = lambda q, k, v: dense_attention(  # noqa: E731   as sat's dense phase: padded queries attend
        q, k, v, lengths=real, padded_queries="attend", return_map=True
    )[0]
    yield "sat dense half padded, counted", None, None, 1.0, counted, True
    if length <= MATERIALISED_LENGTH and batch <= MATERIALISED_BATCH:
        yield "materialised", None, None, 1.0, materialised, True
    generator = torch.Generator().manual_seed(0)
    for block in blocks:
        for density in densities:
            mask = random_mask(length // block, density, generator)
            selected = mask.float().mean().item()

            def sparse(q, k, v, mask=mask, block=block, lengths=None):
                return block_sparse_attention(q, k, v, mask, block_size=block, lengths=lengths)

            def half(q, k, v, sparse=sparse):
                return sparse(q, k, v, lengths=real)

            yield "sat", block, density, selected, sparse, True
            yield "sat half padded", block, density, selected, half, True
            if batch * HEADS * mask.sum() * block**2 <= GATHERED_ELEMENTS:
                yield "gather + bmm", block, density, selected, gather_bmm(mask, block), True
            if use_flex:
                yield "flex", block, density, selected, flex_forward(mask, block), False


def about(rounds: int, clock, load: float) -> dict:
    """What a file of a benchmark says of machine, software and conditions."""
    import torch

    from sat.attention import selected_backend
    from sat.runtime import describe_device

    return {
        "schema_version": 1,
        "machine": describe_device(torch.device("cpu")),
        "backend": selected_backend("cpu"),
        "torch": torch.__version__,
        "clock": clock.__name__,
        "rounds": rounds,
        "allocator": os.environ.get("GLIBC_TUNABLES"),
        "load": load,
    }


def attention(options: argparse.Namespace) -> dict:
    """What is written to the JSON file."""
    import torch

    from sat.attention import kernels, selected_backend

    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    if options.quick:
        batches, lengths, blocks, densities = (2,), (256,), (32,), (0.1, 1.0)
    else:
        batches, lengths = options.batch or BATCHES, options.length or LENGTHS
        blocks, densities = options.block_size or BLOCKS, DENSITIES
    backend = selected_backend("cpu")
    results, load = [], [os.getloadavg()]
    use_flex = not options.no_flex
    for length in lengths:
        for batch in batches:
            generator = torch.Generator().manual_seed(0)
            shape = (batch, HEADS, length, options.width)
            inputs = [torch.randn(shape, generator=generator) for _ in range(4)]
            calls, rows = {}, []
            torch.compiler.reset()  # of FlexAttention, before it has seen too many shapes
            for name, block, density, selected, function, has_backward in cases(
                batch, length, blocks, densities, use_flex
            ):
                kinds = {"forward": _forward(function, inputs)}
                if has_backward:
                    kinds["forward+backward"] = _forward_backward(function, inputs)
                try:
                    kinds["forward"]()
                except Exception as error:  # a compiler that is not there, of any kind
                    if name != "flex":
                        raise
                    print(f"no FlexAttention: {str(error).splitlines()[0]}", file=sys.stderr)
                    use_flex = False
                    continue
                exact = name in ("sat", "sat dense")
                errors = _largest_error(function, inputs) if exact else {}
                for kind, call in kinds.items():
                    key = len(rows)
                    calls[key] = call
                    rows.append(
                        {
                            "implementation": name,
                            "pass": kind,
                            "batch": batch,
                            "heads": HEADS,
                            "length": length,
                            "width": options.width,
                            "block_size": block,
                            "density": density,
                            "selected": selected,
                            "extra_bytes": extra_bytes(call),
                            "largest_error": errors.get(kind),
                        }
                    )
            seconds = _measure(calls, options.rounds, clock)
            results += [row | {"seconds": seconds[key]} for key, row in enumerate(rows)]
            load.append(os.getloadavg())
            print(f"batch {batch}, length {length}: done", file=sys.stderr)
    return about(options.rounds, clock, max(values[0] for values in load)) | {
        "instruction_set": kernels.instruction_set("cpu") if backend == "cpu" else None,
        "results": results,
    }


def of_steps(options: argparse.Namespace) -> dict:
    import torch

    from sat import cost_benchmark, step_benchmark

    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    program = step_benchmark if options.what == "step" else cost_benchmark
    return program.run(options, clock)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    record = attention(options) if options.what == "attention" else of_steps(options)
    text = json.dumps(record, indent=1) + "\n"
    options.json.parent.mkdir(parents=True, exist_ok=True)
    partial = options.json.with_name(options.json.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, options.json)


if __name__ == "__main__":
    with_allocator_settings()  # before torch is imported
    main()
