"""Scoring: every example once, the last, smaller batch included.

`evaluate` is used on dev while training; `evaluate_run` scores a finished run on test, as
`python -m sat --mode eval` does.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from sat import data, runtime
from sat.config import RunConfig
from sat.model import Classifier, loss_and_hits


def batch_size(config: RunConfig) -> int:
    """Sequences that a device takes at once."""
    return min(config.training.batch_size, config.model.batch_size or config.training.batch_size)


@torch.inference_mode()
def evaluate(
    model: Classifier,
    split: data.Split,
    config: RunConfig,
    device: torch.device,
    masks: list[torch.Tensor] | None,
    limit: int | None = None,
    confusion: torch.Tensor | None = None,
) -> dict:
    """{accuracy in [0, 1], loss in nats, examples} of a split, or of its first `limit` rows.

    confusion: an int64 matrix [C, C] (true class, predicted class) to add the counts to.
    """
    model.eval()
    loss = hits = examples = 0
    for batch in split.batches(batch_size(config), config.model.sequence_length, limit):
        batch = batch.to(device)
        logits, _ = model(batch, masks)
        batch_loss, batch_hits = loss_and_hits(logits, batch.labels)
        loss, hits, examples = loss + batch_loss.double(), hits + batch_hits, examples + len(batch)
        if confusion is not None:
            pairs = batch.labels * confusion.shape[1] + logits.argmax(1)
            confusion += (
                torch.bincount(pairs, minlength=confusion.numel()).view_as(confusion).to(confusion)
            )
    return {"accuracy": int(hits) / examples, "loss": float(loss) / examples, "examples": examples}


def chance(manifest: dict) -> float:
    """Accuracy of always answering the most frequent class of test."""
    counts = manifest["splits"]["test"]["label_counts"].values()
    return max(counts) / sum(counts)


def baseline(task: str, splits: dict[str, data.Split]) -> float | None:
    """ListOps: test accuracy of the most frequent answer to the root operator, as counted in train.

    Without it a ListOps accuracy says little: on the released data it is 37 %. None for other tasks.
    """
    if task != "listops":
        return None
    train, test = splits["train"], splits["test"]
    roots, labels = train.columns[0].first(), train.labels
    counts = np.zeros((int(roots.max()) + 1, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(counts, (roots, labels), 1)
    answers = counts[np.minimum(test.columns[0].first(), len(counts) - 1)].argmax(axis=1)
    return float((answers == test.labels).mean())


def load_run(
    folder: Path, device: torch.device
) -> tuple[RunConfig, Classifier, list[torch.Tensor] | None]:
    """(settings, model, block masks or None when the run ended dense) of a finished run.

    Raises data.DataError when the run is not finished.
    """
    folder = Path(folder)
    missing = [
        n
        for n in ("metrics.json", "config.json", "model.safetensors", "pattern.safetensors")
        if not (folder / n).is_file()
    ]
    if missing:
        raise data.DataError(
            f"no finished run in {folder}: {missing[0]} is not there; train it first"
        )
    config = RunConfig.from_dict(json.loads((folder / "config.json").read_text()))
    num_inputs = json.loads((folder / "metrics.json").read_text())["num_inputs"]
    model = Classifier(
        config.model,
        num_inputs,
        config.transition.padded_queries,
        config.pattern.source == "parameter",
    )
    safetensors.torch.load_model(model, str(folder / "model.safetensors"))
    stored = safetensors.torch.load_file(str(folder / "pattern.safetensors"))
    count = sum(name.startswith("layer_") for name in stored)
    masks = [stored[f"layer_{index}"].bool().to(device) for index in range(count)] or None
    return config, model.to(device), masks


def evaluate_run(
    folder: Path, data_dir: Path, device: str | None = None, threads: int | None = None
) -> dict:
    """Score a finished run on test with the phase it ended in; the result is also written to <folder>/eval.json."""
    accelerator = runtime.make_accelerator(device, threads)
    config, model, masks = load_run(folder, accelerator.device)
    manifest, splits = data.load(data_dir)
    confusion = torch.zeros(config.model.num_classes, config.model.num_classes, dtype=torch.int64)
    confusion = confusion.to(accelerator.device)
    runtime.reset_peak_memory(accelerator.device)
    started = time.perf_counter()
    result = evaluate(model, splits["test"], config, accelerator.device, masks, confusion=confusion)
    seconds = time.perf_counter() - started
    result |= {
        "task": config.task,
        "attention": config.attention,
        "seed": config.seed,
        "data": manifest["data"],
        "phase": "dense" if masks is None else "sparse",
        "chance": chance(manifest),
        "confusion": confusion.tolist(),
        "ms_per_batch": 1000 * seconds / -(-len(splits["test"]) // batch_size(config)),
        "peak_memory_bytes": runtime.peak_memory(accelerator.device),
    }
    partial = Path(folder) / "eval.json.partial"
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(Path(folder) / "eval.json")
    return result
