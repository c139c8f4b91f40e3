"""Print the attention backends of this machine: available or why not, correct, speed.

    python -m sat.backends

Correct: what "auto" asks for; in brackets the largest error of values and gradients in float32
against float64, relative to the largest value, on small shapes. Speed: milliseconds of block-sparse
attention forward and backward, batch 4, 2 heads, length 1024, head width 32, block 32, a tenth of the
blocks selected; median of 5.
"""

import torch

from sat.attention import selection

HEADER = ("backend", "available", "correct", "speed")


def table() -> list[tuple[str, str, str, str]]:
    """A row for each backend, texts in the order of HEADER."""
    rows = []
    for backend in selection.BACKENDS:
        reason = selection.unavailable(backend)
        if reason:
            rows.append((backend, f"no: {reason}", "-", "-"))
            continue
        error, failure = selection.check(backend)
        if failure:
            rows.append((backend, "yes", f"NO: {failure}", "-"))
        else:
            speed = f"{selection.milliseconds(backend):.1f} ms"
            rows.append((backend, "yes", f"yes ({error:.0e})", speed))
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
