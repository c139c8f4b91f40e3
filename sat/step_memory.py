"""Peak memory of a dense training step, statistics included: ours beside attention that keeps all its weights.

`python -m sat.benchmark memory --json memory.json` runs both in processes of their own: the model of the text task with
random ids, one step to load and allocate what stays, and a second one that is measured. In `materialised`, plain
PyTorch makes the weights [B, H, N, N] of every layer, and autograd keeps them for the backward, as in SAT; all else is
the same.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

WAYS = ("ours", "materialised")


def compare(length: int, batch: int, layers: int, threads: int) -> dict:
    """What `python -m sat.benchmark memory` writes: bytes of both ways, and their ratio."""
    results = {}
    for way in WAYS:
        shape = json.dumps([way, length, batch, layers, threads])
        program = f"from sat import step_memory; step_memory.measure(*{shape})"
        done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SystemExit(f"the process of '{way}' ended with {done.returncode}")
        results[way] = json.loads(done.stdout.splitlines()[-1])
    ratio = results["ours"]["step_bytes"] / results["materialised"]["step_bytes"]
    return {
        "schema_version": 1,
        "length": length,
        "batch": batch,
        "layers": layers,
        "threads": threads,
        "allocator": os.environ.get("GLIBC_TUNABLES"),
        "ways": results,
        "ours_over_materialised": ratio,
    }


def measure(way: str, length: int, batch: int, layers: int, threads: int) -> None:
    """Print, as JSON, the bytes that a step takes at most beyond what the process holds between two steps."""
    import torch

    from sat import config, data, model, runtime, training

    if way == "materialised":
        model.dense_attention = materialised
    changes = {
        "dataset": {"max_length": length},
        "model": {"max_seq_len": length, "num_layers": layers, "batch_size": None},
        "training": {"batch_size": batch, "num_dense_train_steps": None, "skewness": 1e9},
    }
    settings = config.resolve(config.load("lra"), "text", "sat", 1, changes=changes)
    state = training.Training(
        config.RunConfig.from_dict(settings), 1, runtime.make_accelerator("cpu", threads)
    )
    generator = torch.Generator().manual_seed(1)
    device = torch.device("cpu")
    for step in range(2):
        ids = torch.randint(1, 257, (batch, length), generator=generator)
        runtime.reset_peak_memory(device)
        before = runtime.peak_memory(device)
        line = state.step(step, data.Batch([ids], [torch.full((batch,), length)], ids[:, 0] % 2))
        peak = runtime.peak_memory(device)
    assert math.isfinite(line["skewness"][0]) and line["distance"] is not None
    print(json.dumps({"step_bytes": peak - before, "process_bytes": peak}))


def materialised(q, k, v, *, return_map, dropout_p, **_):
    """sat.attention.dense_attention with the weights of all heads as one tensor; sequences without padding."""
    import torch

    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    o = torch.nn.functional.dropout(weights, dropout_p) @ v
    return (o, weights.detach().mean((0, 1))) if return_map else o
