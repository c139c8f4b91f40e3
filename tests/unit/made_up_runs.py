"""Run folders with made-up results, for the tests of the table and the figures."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sat import config as settings
from sat import seal

SEALED_FILES = ("config.json", "history.jsonl", "model.safetensors", "pattern.safetensors")

NUM_BLOCKS = 4
MASKS = np.zeros((2, NUM_BLOCKS, NUM_BLOCKS), np.uint8)  # two layers
MASKS[0, 0, :2] = 1  # 2 of 16 blocks, 3 empty rows
MASKS[1, :, 3] = 1  # 4 of 16 blocks, no empty row


def make_config(**changes: Any) -> dict[str, Any]:
    config = {
        "run": "demo",
        "tasks": ["listops"],
        "attentions": ["softmax", "sat"],
        "seeds": [1001, 1002],
    }
    return config | changes


def make_metrics(
    task: str = "listops",
    attention: str = "softmax",
    seed: int = 1001,
    *,
    accuracy: float = 0.5,
    switch: tuple[int, str] | None = None,
    dense_ms: float = 80.0,
    sparse_ms: float = 20.0,
    **changes: Any,
) -> dict[str, Any]:
    """metrics.json of a run; `switch` is (step, "rule", "limit" or "start"), None: it stayed dense."""
    metrics = {
        "schema_version": 1,
        "run": "demo",
        "task": task,
        "attention": attention,
        "seed": seed,
        "data": "generated",
        "test": {
            "accuracy": accuracy,
            "loss": 1.5,
            "examples": 200,
            "chance": 0.125,
            "baseline": None,
        },
        "dev": {
            "accuracy": accuracy + 0.01,
            "loss": 1.4,
            "examples": 100,
            "chance": 0.125,
            "baseline": None,
            "step": 200,
            "phase": "sparse" if switch else "dense",
        },
        "transition_rule": "never" if attention == "softmax" else "settled",
        "transition": {
            "step": switch[0] if switch else None,
            "reason": switch[1] if switch else None,
        },
        "pattern": {
            "block_size": 32,
            "num_blocks": NUM_BLOCKS,
            "selected": [2, 4],
            "density": [0.125, 0.25],
            "empty_rows": [3, 0],
        }
        if switch
        else None,
        "num_parameters": 160650,
        "num_steps": 300,
        "phases": {
            "dense": make_phase(dense_ms, 512) if not switch or switch[1] != "start" else None,
            "sparse": make_phase(sparse_ms, 256) if switch else None,
        },
        "training_seconds": 30.0,
        "device": {"type": "cpu", "name": "Test CPU", "threads": 2, "processes": 1},
        "backend": {"dense": "cpu", "sparse": "cpu"},
        "versions": {},
        "git_commit": "0" * 40,
        "config_sha256": "c" * 64,
        "data_sha256": "d" * 64,
        "options": [],
    }
    return metrics | changes


def make_phase(ms_per_step: float, mib: int) -> dict[str, Any]:
    return {
        "steps": 150,
        "ms_per_step": ms_per_step,
        "seconds": 12.0,
        "cpu_seconds": 20.0,
        "peak_memory_bytes": mib * 2**20,
    }


@functools.cache
def demo_settings(attention: str) -> str:
    known = attention if attention in settings.known("attentions") else "sat"
    return json.dumps(settings.resolve(settings.load("demo"), "listops", known, 1001))


def make_settings(metrics: dict[str, Any]) -> dict[str, Any]:
    """config.json of a run: the demo's settings of the attention, under the run's own names."""
    names = {key: metrics[key] for key in ("run", "task", "attention", "seed")}
    return json.loads(demo_settings(metrics["attention"])) | names


def write_metrics(output_dir: Path, metrics: dict[str, Any]) -> Path:
    """Write a metrics.json where the workflow keeps it below `output_dir`; returns its path."""
    name = f"{metrics['task']}/{metrics['attention']}/seed{metrics['seed']}"
    path = output_dir / "runs" / name / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(seal.add(dict(metrics))))
    return path


def seal_run(run_dir: Path) -> None:
    """Give a run folder that was written or changed the checksums of its files."""
    path = run_dir / "metrics.json"
    names = [name for name in SEALED_FILES if (run_dir / name).is_file()]
    path.write_text(json.dumps(seal.add(json.loads(path.read_text()), run_dir, names)))


def write_run(
    output_dir: Path, metrics: dict[str, Any], *, num_steps: int = 300, pooled: bool = True
) -> Path:
    """Write a whole run folder, with 6 evaluations on dev; returns the folder.

    pooled: with the pooled attention maps of the switch.
    """
    run_dir = write_metrics(output_dir, metrics).parent
    (run_dir / "config.json").write_text(json.dumps(make_settings(metrics)))
    switch = metrics["transition"]
    sparse_from = num_steps + 1 if switch["step"] is None else switch["step"]
    every = num_steps // 6
    lines = []
    for step in range(1, num_steps + 1):
        if num_steps <= 300 and step % every:
            continue  # short histories are enough for most tests
        phase = "sparse" if step > sparse_from else "dense"
        loss = {"step": step, "phase": phase, "loss": 100 / step}
        accuracy = metrics["test"]["accuracy"] * step / num_steps
        dense = phase == "dense" and metrics["attention"] != "softmax"
        maps = {
            "skewness": [1 + step / num_steps, 2.0] if dense else None,
            "distance": [1 / step, 0.5] if dense else None,
            "change": [100 / step, None] if dense and step > every else None,
        }
        times = {"learning_rate": 0.001, "ms": 80.0 if phase == "dense" else 20.0}
        lines.append({"event": "train", **loss, "accuracy": accuracy, **maps, **times})
        if step % every == 0:
            lines.append({"event": "eval", "split": "dev", **loss, "accuracy": accuracy})
        if step == switch["step"]:
            lines.append({"event": "transition", **switch})
            lines.append({"event": "eval", "split": "dev", **loss, "accuracy": 0.125})
    (run_dir / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tensors = {}
    if metrics["pattern"]:
        for layer, mask in enumerate(make_masks(metrics["pattern"]["num_blocks"])):
            tensors[f"layer_{layer}"] = mask
            if pooled:
                tensors[f"pooled_layer_{layer}"] = (mask + 0.1).astype(np.float32)
    save_file(tensors, run_dir / "pattern.safetensors")
    seal_run(run_dir)
    return run_dir


def make_masks(num_blocks: int) -> np.ndarray:
    """MASKS, or as many blocks as asked for with a band kept."""
    if num_blocks == NUM_BLOCKS:
        return MASKS
    distance = np.abs(np.subtract.outer(np.arange(num_blocks), np.arange(num_blocks)))
    return np.stack([distance < 2, distance < 4]).astype(np.uint8)
