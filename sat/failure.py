"""What a run that cannot go on leaves behind: failed.json, from which the results table makes a row.

Snakemake removes the declared outputs of a failed job; this file is none of them. The next attempt removes it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from sat import seal

FILE = "failed.json"


def kind_of(error: Exception) -> str:
    """'out of memory', 'loss not finite' or 'failed'."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    names = {type(e).__name__ for e in chain}
    if (
        names & {"OutOfMemoryError", "OutOfMemory", "MemoryError"}
        or "out of memory" in str(error).lower()
    ):
        return "out of memory"
    not_finite = re.match(
        "the (loss is|gradient is not finite|weights are not finite) ", str(error)
    )
    return "loss not finite" if not_finite else "failed"


def record(folder: Path, settings: dict, error: Exception) -> None:
    """Write failed.json into the folder of the run that ended with `error`."""
    step = re.search(r"\bin step (\d+)", str(error))
    content = {key: settings[key] for key in ("run", "task", "attention", "seed")} | {
        "kind": kind_of(error),
        "message": " ".join(str(error).split()) or type(error).__name__,
        "step": int(step[1]) if step else None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{FILE}.partial"
    try:
        partial.write_text(json.dumps(seal.add(content), indent=2) + "\n")
        partial.replace(folder / FILE)
    finally:
        partial.unlink(missing_ok=True)
