"""Scoring: every example once, the last, smaller batch included.

`evaluate` is used on dev while training; `evaluate_run` scores a finished run on test, as
`python -m sat --mode eval` does. Several processes score a batch each in turn.
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator

from sat import data, devices, memory, runtime, seal
from sat.config import RunConfig, filled_in
from sat.launch import is_main
from sat.model import Classifier, loss_and_hits

logger = logging.getLogger(__name__)


def batch_size(config: RunConfig) -> int:
    """Sequences that a device takes at once."""
    return min(config.training.batch_size, config.model.batch_size or config.training.batch_size)


@torch.inference_mode()
def evaluate(
    model: Classifier,
    split: data.Split,
    config: RunConfig,
    accelerator: Accelerator,
    masks: list[torch.Tensor] | None,
    limit: int | None = None,
    confusion: torch.Tensor | None = None,
    micro_batch: int | None = None,
    check: Callable[[], None] | None = None,
) -> dict:
    """{accuracy in [0, 1], loss in nats, examples, micro_batch} of a split, or of its first `limit` rows.

    confusion: an int64 matrix [C, C] (true class, predicted class) to add the counts to.
    micro_batch: sequences at once, `batch_size` of the settings when not given; half of it, a quarter, ... where memory
    runs out, which changes nothing; what is returned is what it came to. Raises memory.OutOfMemory.
    check: called by every process before each batch, the same number of times in all.
    """
    model.eval()
    size = micro_batch or batch_size(config)
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # loss, hits, examples
    pairs = torch.zeros(config.model.num_classes**2, dtype=torch.int64, device=accelerator.device)
    batches = split.batches(
        batch_size(config),
        config.model.sequence_length,
        limit,
        accelerator.process_index,
        accelerator.num_processes,
    )
    for _ in range(turns(split, config, accelerator, limit)):
        if check is not None:
            check()
        batch = next(batches, None)
        if batch is None:
            continue
        batch = batch.to(accelerator.device)
        with accelerator.autocast():
            size, logits = memory.halving(
                size,
                lambda size, batch=batch: torch.cat(
                    [model(part, masks)[0] for part in batch.parts(size)]
                ),
                "an evaluation",
            )
        batch_loss, batch_hits = loss_and_hits(logits, batch.labels)
        sums += torch.stack([batch_loss, batch_hits, torch.full_like(batch_loss, len(batch))])
        if confusion is not None:
            pair = batch.labels * config.model.num_classes + logits.argmax(1)
            pairs += torch.bincount(pair, minlength=len(pairs))
    devices.sum_in_place(accelerator, [sums, pairs])
    if confusion is not None:
        confusion += pairs.view_as(confusion)
    loss, hits, examples = sums.tolist()
    return {
        "accuracy": hits / examples,
        "loss": loss / examples,
        "examples": int(examples),
        "micro_batch": size,
    }


def turns(
    split: data.Split, config: RunConfig, accelerator: Accelerator, limit: int | None = None
) -> int:
    """The most batches that a process scores."""
    rows = len(split) if limit is None else min(limit, len(split))
    return -(-rows // (batch_size(config) * accelerator.num_processes))


@torch.inference_mode()
def largest_micro_batch(
    model: Classifier,
    config: RunConfig,
    accelerator: Accelerator,
    masks: list[torch.Tensor] | None,
    num_inputs: int,
    most: int,
) -> int:
    """Sequences at once, at most `most`, with which this process keeps to the memory limit.

    Raises memory.OutOfMemory when one is too much.
    """
    limit = memory.share_of_limit(config.model.memory_limit_gb, accelerator)
    if limit is None:
        return most
    device = accelerator.device

    def peak(size: int) -> int:
        batch = data.blank_batch(config.model, num_inputs, size)
        runtime.reset_peak_memory(device)
        with accelerator.autocast():
            model(batch, masks)
        return runtime.peak_memory(device)

    model.eval()
    peak(1)  # loads libraries, starts threads
    runtime.reset_peak_memory(device)
    fixed = runtime.peak_memory(device)
    return memory.largest_that_fits(most, limit, fixed, peak)[0]


def chance(manifest: dict, split: str) -> float:
    """Accuracy of always answering the most frequent class of the split."""
    counts = manifest["splits"][split]["label_counts"].values()
    return max(counts) / sum(counts)


def baseline(task: str, splits: dict[str, data.Split], split: str) -> float | None:
    """ListOps: accuracy on the split of the most frequent answer to the root operator, as counted in train.

    Without it a ListOps accuracy says little: on the released data it is 37 %. None for other tasks.
    """
    if task != "listops":
        return None
    train, scored = splits["train"], splits[split]
    roots, labels = train.columns[0].first(), train.labels
    counts = np.zeros((int(roots.max()) + 1, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(counts, (roots, labels), 1)
    answers = counts[np.minimum(scored.columns[0].first(), len(counts) - 1)].argmax(axis=1)
    return float((answers == scored.labels).mean())


def floors(task: str, manifest: dict, splits: dict[str, data.Split], split: str) -> dict:
    """What an accuracy on the split has to exceed: {chance, baseline}."""
    return {"chance": chance(manifest, split), "baseline": baseline(task, splits, split)}


def settings_of(folder: Path) -> RunConfig:
    """The settings that a run was trained with; keys that came later have their defaults."""
    return RunConfig.from_dict(filled_in(json.loads((folder / "config.json").read_text())))


def load_run(
    folder: Path, device: torch.device
) -> tuple[RunConfig, Classifier, list[torch.Tensor] | None]:
    """(settings, model, block masks or None when the run ended dense) of a finished run.

    The settings are those that the run was trained with. Raises data.DataError when the run is not finished or a file
    of it is not what was written.
    """
    folder = Path(folder)
    check_finished(folder)
    num_inputs = read_metrics(folder, RUN_FILES[1:])["num_inputs"]
    config = settings_of(folder)
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


RUN_FILES = ("metrics.json", "config.json", "model.safetensors", "pattern.safetensors")
SEALED_FILES = (*RUN_FILES[1:], "history.jsonl")  # metrics.json holds their hashes


def read_metrics(folder: Path, names: Iterable[str] = ()) -> dict:
    """metrics.json of a finished run. Raises data.DataError when it or a file of `names` is not what was written."""
    try:
        return seal.read(folder / "metrics.json", "train the run again", names)
    except ValueError as error:
        raise data.DataError(str(error)) from None


def check_finished(folder: Path, command: str | None = None) -> None:
    """Raises data.DataError with `command`, which trains the run, when it is not there or not finished."""
    missing = [name for name in RUN_FILES if not (folder / name).is_file()]
    if not missing:
        return
    what = f"{missing[0]} is not there"
    state = f"no finished run in {folder}: {what}"
    if any(folder.glob("history.jsonl.*")):
        state = f"the run in {folder} is unfinished: {what} yet"
    raise data.DataError(f"{state}; train it with: {command}" if command else state)


def precision_here(config: RunConfig, device: str | None) -> str:
    """training.precision of the run, or fp32 where it needs a GPU and there is none."""
    if config.training.precision == "fp16" and runtime.device_type(device) != "cuda":
        logger.info("trained with fp16, which needs a GPU: scored in float32")
        return "fp32"
    return config.training.precision


def evaluate_run(
    folder: Path, data_dir: Path, device: str | None = None, threads: int | None = None
) -> dict:
    """Score a finished run on test with the phase it ended in; the result is also written to <folder>/eval.json.

    Sequences at once are at most those of the training, and fewer where a memory limit asks for it. Time and memory are
    without the first batch, which is scored twice.

    Raises data.DataError without a finished run or without data, ConfigError when the data are not those of the model.
    """
    folder = Path(folder)
    check_finished(folder)
    manifest, splits = data.load(data_dir)
    trained = read_metrics(folder, ["config.json"])
    if data.data_digest(manifest) != trained["data_sha256"]:
        logger.warning("the data in %s are not those that the run was trained on", data_dir)
    config = settings_of(folder)
    data.check_fits(config, manifest)
    accelerator = runtime.make_accelerator(device, threads, precision_here(config, device))
    config, model, masks = load_run(folder, accelerator.device)
    confusion = torch.zeros(config.model.num_classes, config.model.num_classes, dtype=torch.int64)
    confusion = confusion.to(accelerator.device)
    most = min(trained.get("micro_batch", batch_size(config)), batch_size(config))
    micro_batch = largest_micro_batch(
        model, config, accelerator, masks, manifest["num_inputs"], most
    )
    score = functools.partial(evaluate, model, splits["test"], config, accelerator, masks)
    # The first batch loads and checks, and finds out what fits.
    first = score(batch_size(config) * accelerator.num_processes, micro_batch=micro_batch)
    runtime.reset_peak_memory(accelerator.device)
    started = time.perf_counter()
    result = score(confusion=confusion, micro_batch=first["micro_batch"])
    seconds = time.perf_counter() - started
    result |= {
        "run": config.run,
        "task": config.task,
        "attention": config.attention,
        "seed": config.seed,
        "data": manifest["data"],
        "phase": "dense" if masks is None else "sparse",
        **floors(config.task, manifest, splits, "test"),
        "confusion": confusion.tolist(),
        "batch_size": batch_size(config),
        "ms_per_batch": 1000 * seconds / turns(splits["test"], config, accelerator),
        "peak_memory_bytes": int(
            devices.largest(accelerator, runtime.peak_memory(accelerator.device))
        ),
        "device": runtime.describe_device(accelerator.device) | devices.describe(accelerator),
    }
    if is_main():
        partial = folder / "eval.json.partial"
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.replace(folder / "eval.json")
    return result


def readable(result: dict) -> str:
    """What `evaluate_run` found, as a table for a person: rows of the matrix are true classes, columns answers."""
    per_second = 1000 * result["batch_size"] / result["ms_per_batch"]
    rows = [
        ("test accuracy", f"{100 * result['accuracy']:.2f} %"),
        ("always the most frequent class", f"{100 * result['chance']:.2f} %"),
        ("test loss", f"{result['loss']:.4f} nats"),
        ("examples", f"{result['examples']} ({result['data']} data)"),
        ("time of a batch", f"{result['ms_per_batch']:.1f} ms ({result['batch_size']} sequences)"),
        ("peak memory", f"{result['peak_memory_bytes'] / 2**20:.0f} MiB"),
        ("device", result["device"]["name"]),
    ]
    if result["baseline"] is not None:
        rows.insert(2, ("by the root operator alone", f"{100 * result['baseline']:.2f} %"))
    if result["device"]["processes"] == 1:
        rows.insert(-2, ("throughput", f"{per_second:.0f} sequences a second"))
    counts = result["confusion"]
    width = max(len(str(n)) for row in counts for n in row) + 2
    matrix = [
        f"{'true / answer':>16}" + "".join(f"{c:>{width}}" for c in range(len(counts))),
        *(f"{c:>16}" + "".join(f"{n:>{width}}" for n in row) for c, row in enumerate(counts)),
    ]
    title = (
        f"{result['task']}, {result['attention']}, seed {result['seed']}, run {result['run']}: "
        f"{result['phase']} attention"
    )
    left = max(len(name) for name, _ in rows)
    return "\n".join([title, *(f"  {name:<{left}}  {value}" for name, value in rows), *matrix])
