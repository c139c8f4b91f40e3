"""Print the attention backends of this machine: available or why not, correct, speed.

    python -m sat.backends

Correct: largest error of values and gradients against float64, relative to the largest value, on
small shapes. Speed: milliseconds of block-sparse attention forward and backward, batch 4, 2 heads,
length 1024, head width 32, block 32, a tenth of the blocks selected; median of 5.
"""

import statistics
import time

import torch

from sat.attention import selection

HEADER = ("backend", "available", "correct", "speed")


def milliseconds(backend: str) -> float:
    """Median time of one forward and backward; see the head of this file."""
    device = "cuda" if backend in ("cuda", "flex") else "cpu"
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_o = (torch.randn(4, 2, 1024, 32, generator=generator).to(device) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    mask = (torch.rand(32, 32, generator=generator) < 0.1).to(device)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        o, _ = selection.run_block_sparse(backend, *leaves, mask, 32, None, "zero_logits", 0.0)
        torch.autograd.grad(o, leaves, d_o)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])  # the first one warms up


def table() -> list[tuple[str, str, str, str]]:
    """A row for each backend, texts in the order of HEADER."""
    rows = []
    for backend in selection.BACKENDS:
        reason = selection.unavailable(backend)
        if reason:
            rows.append((backend, f"no: {reason}", "-", "-"))
            continue
        error = selection.largest_error(backend)
        correct = "yes" if error <= selection.TOLERANCE else "NO"
        speed = f"{milliseconds(backend):.1f} ms"
        rows.append((backend, "yes", f"{correct} ({error:.0e})", speed))
    return rows


def main() -> None:
    rows = [HEADER, *table()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    for device_type in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        print(f"auto on {device_type}: {selection.selected_backend(device_type)}")


if __name__ == "__main__":
    main()
