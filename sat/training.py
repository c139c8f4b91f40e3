"""One training: dense until the attention maps settle, then sparse over the blocks of the pattern; then the test.

`train` reads a processed task and writes a run's folder:

    config.json           the settings, whole
    history.jsonl         every step, evaluation and the transition
    model.safetensors     weights of the best evaluation on dev within the phase in which the run ended
    pattern.safetensors   layer_<i>: the block mask of a layer; pooled_layer_<i>: the mean attention map of the last
                          dense step, pooled to blocks (no tensor when the run stayed dense)
    tensorboard/          the curves
    metrics.json          what the results table is made from; written last

Files get their names when they are complete. Steps count from 1 in what is written, from 0 in the code.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sat import attention, data, runtime
from sat.config import ConfigError, RunConfig, digest
from sat.evaluation import baseline, batch_size, chance, evaluate
from sat.model import Classifier, loss_and_hits, num_parameters
from sat.optimiser import make_optimiser, set_schedule
from sat.pattern import describe, floodfill_score, pool, select_blocks, static_score
from sat.transition import MapStatistics, pattern_loss, transition_reason

GRADIENT_LIMIT = 1.0
# What sat.load needs of the manifest to encode new inputs as the preprocessing does.
INPUT_KEYS = ("input_type", "id_offset", "max_length", "options", "symbols", "classes")


class TrainingFailed(RuntimeError):
    """The training cannot go on; the message says in which step and why."""


def check_data(config: RunConfig, manifest: dict) -> None:
    """Raises ConfigError when the model cannot take the data."""
    model = config.model
    if manifest["task"] != config.task:
        raise ConfigError(
            f"the data are those of task {manifest['task']}, the settings those of {config.task}"
        )
    if manifest["vocab_size"] > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {model.vocab_size}, the data need {manifest['vocab_size']}"
        )
    if manifest["num_classes"] != model.num_classes:
        raise ConfigError(
            f"model.num_classes is {model.num_classes}, the data have {manifest['num_classes']}"
        )
    if manifest["max_length"] > model.max_seq_len:
        raise ConfigError(
            f"model.max_seq_len is {model.max_seq_len}, the data need {manifest['max_length']}"
        )


def option_labels(config: RunConfig, manifest: dict) -> list[str]:
    """What sets these numbers apart from the usual protocol, in words for the table."""
    options = manifest["options"]
    labels = []
    if options.get("dev_split") == "lra":
        labels.append("dev = test")
    if options.get("brackets") is False:
        labels.append("no brackets")
    if options.get("level", "curv_contour_length_14") != "curv_contour_length_14":
        labels.append(options["level"])
    if config.model.zero_pixel_is_padding:
        labels.append("black pixels left out")
    labels += [f"{s} ≤ {n}" for s in data.SPLITS if (n := config.dataset.get(s)) is not None]
    return labels


def over_real_queries(
    maps: list[list[torch.Tensor]], batch: data.Batch
) -> tuple[list[list[torch.Tensor]], int | None]:
    """Maps whose rows are means over the real queries alone, and the longest length of the first input."""
    mended = []
    for tower, lengths in zip(maps, batch.lengths, strict=True):
        if lengths is not None:
            position = torch.arange(len(tower[0]))
            real = (position < lengths[:, None]).sum(dim=0).clamp(min=1)
            scale = (len(batch) / real).to(tower[0])[:, None]
            tower = [a * scale for a in tower]
        mended.append(tower)
    first = batch.lengths[0]
    return mended, None if first is None else int(first.max())


class Training:
    """The state of a training between two steps."""

    def __init__(self, config: RunConfig, num_inputs: int, accelerator: Accelerator):
        torch.manual_seed(config.seed)
        self.config = config
        self.accelerator = accelerator
        learned = config.pattern.source == "parameter"
        self.model = Classifier(config.model, num_inputs, config.transition.padded_queries, learned)
        self.model.to(accelerator.device)
        self.phase = "dense"
        self.masks: list[torch.Tensor] | None = None
        self.pattern_report: dict | None = None  # what metrics.json says of the masks
        self.pooled_maps: list[torch.Tensor] | None = None  # [n, n] a layer, of the last dense step
        self.map_statistics = MapStatistics(config.transition.ema)
        self.pooled_sum: list[torch.Tensor] | None = None
        self.num_pooled = 0
        self.transition = {"step": None, "reason": None}
        if config.transition.rule == "start":
            self._choose_blocks()
            self.phase, self.transition = "sparse", {"step": 0, "reason": "start"}
        self.optimiser = make_optimiser(self.model, config, self.phase)
        self.best: dict | None = None
        self.best_weights: dict[str, torch.Tensor] = {}
        self.evaluations_since_best = 0

    def step(self, index: int, batch: data.Batch) -> dict:
        """One optimiser step on the whole batch, in parts that the device can take; -> the line of the history."""
        config = self.config
        rate = set_schedule(self.optimiser, config, self.phase, index)
        self.model.train()
        self.optimiser.zero_grad(set_to_none=True)
        want_maps = self.phase == "dense" and config.transition.rule != "never"
        loss = hits = torch.zeros((), device=self.accelerator.device)
        maps: list[list[torch.Tensor]] = []
        for start in range(0, len(batch), batch_size(config)):
            part = batch.slice(start, start + batch_size(config)).to(self.accelerator.device)
            logits, part_maps = self.model(part, self.masks, want_maps)
            part_loss, part_hits = loss_and_hits(logits, part.labels)
            self.accelerator.backward(part_loss / len(batch))
            loss, hits = loss + part_loss.detach(), hits + part_hits
            share = len(part) / len(batch)
            weighted = [[a.detach() * share for a in tower] for tower in part_maps]
            maps = (
                weighted
                if not maps
                else [
                    [a + b for a, b in zip(*towers, strict=True)]
                    for towers in zip(maps, weighted, strict=True)
                ]
            )
        step_statistics = None
        if want_maps:
            size = None
            if config.transition.padded_queries == "ignored":
                maps, size = over_real_queries(maps, batch)
            self._pattern_step(maps)
            step_statistics = self.map_statistics.update(maps[0], size)
        self._check_finite(index, float(loss))
        self.accelerator.clip_grad_value_(self.model.parameters(), GRADIENT_LIMIT)
        self.optimiser.step()
        line = {
            "event": "train",
            "step": index + 1,
            "phase": self.phase,
            "loss": float(loss) / len(batch),
            "accuracy": int(hits) / len(batch),
            "learning_rate": rate,
            "skewness": None,
            "distance": None,
            "change": None,
        }
        if step_statistics is not None:
            line |= vars(step_statistics)
            reason = transition_reason(config, index + 1, step_statistics)
            if reason is not None and index + 1 < config.training.num_train_steps:
                self.transition = {"step": index + 1, "reason": reason}
        return line

    def _pattern_step(self, maps: list[list[torch.Tensor]]) -> None:
        """Gradient of the pattern loss in P (the maps are constants), and the running sum of the pooled maps."""
        if self.config.pattern.source not in ("parameter", "pooled"):
            return
        block = self.config.model.block_size
        pooled = [[pool(a, block) for a in tower] for tower in maps]
        if self.model.pattern:
            scale = self.config.training.attn_loss_scale * len(self.model.pattern) / len(pooled)
            losses = [
                pattern_loss(P, target)
                for tower in pooled
                for P, target in zip(self.model.pattern, tower, strict=True)
            ]
            self.accelerator.backward(scale * torch.stack(losses).sum())
        else:
            towers = [torch.stack(layers).mean(dim=0) for layers in zip(*pooled, strict=True)]
            sums = self.pooled_sum or [torch.zeros_like(target) for target in towers]
            self.pooled_sum = [total + target for total, target in zip(sums, towers, strict=True)]
            self.num_pooled += 1

    def _check_finite(self, index: int, loss: float) -> None:
        if math.isfinite(loss):
            return
        names = [
            n
            for n, p in self.model.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        where = f"; first gradient that is not finite: {names[0]}" if names else ""
        raise TrainingFailed(
            f"the loss is {loss} in step {index + 1} ({self.phase} phase){where}. Lower training.learning_rate "
            f"(now {self.config.training.learning_rate:g}) or raise training.warmup."
        )

    def go_sparse(self) -> None:
        """Choose the blocks, start a new optimiser, forget the best weights of the dense phase."""
        config = self.config
        self._choose_blocks()
        self.phase = "sparse"
        self.optimiser = make_optimiser(self.model, config, "sparse")
        self.map_statistics, self.pooled_sum = MapStatistics(config.transition.ema), None
        self.best, self.best_weights, self.evaluations_since_best = None, {}, 0

    def _choose_blocks(self) -> None:
        """The block masks of the layers by pattern.source, and what metrics.json says of them."""
        config, model = self.config, self.config.model
        maps = self.map_statistics.maps  # of the last dense step, None without one
        if config.pattern.source == "parameter":
            scores = [(P @ P.T).detach() for P in self.model.pattern]
        elif config.pattern.source == "pooled":
            scores = [total / self.num_pooled for total in self.pooled_sum]
        elif config.pattern.source == "floodfill":
            scores = [floodfill_score(a, model.block_size) for a in maps]
        else:
            scores = [
                static_score(
                    config.pattern.source, model.num_blocks, model.density, config.seed, layer
                )
                for layer in range(model.num_layers)
            ]
        self.masks = [
            select_blocks(score, model.density, config.pattern.min_per_row).to(
                self.accelerator.device
            )
            for score in scores
        ]
        self.pattern_report = describe(self.masks, model.block_size, maps)
        self.pooled_maps = maps and [pool(a, model.block_size).float() for a in maps]

    def evaluate(self, split: data.Split, step: int) -> dict:
        """Score dev after `step` steps and keep the weights when they are the best of this phase."""
        config = self.config
        limit = None  # in rows, so that what a device takes at once changes nothing
        if config.training.num_eval_steps is not None:
            limit = config.training.num_eval_steps * config.training.batch_size
        scored = evaluate(
            self.model,
            split,
            config,
            self.accelerator.device,
            self.masks,
            limit,
        )
        scored |= {"step": step, "phase": self.phase}
        if self.best is None or scored["accuracy"] > self.best["accuracy"]:
            self.best = scored
            self.best_weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1
        return scored

    @property
    def out_of_patience(self) -> bool:
        """Whether to stop; a run whose switch is still to come by its limit goes on until then."""
        patience = self.config.training.patience
        will_switch = (
            self.phase == "dense"
            and self.config.transition.rule != "never"
            and self.config.training.num_dense_train_steps is not None
        )
        return patience is not None and not will_switch and self.evaluations_since_best >= patience


def train(
    settings: dict,
    data_dir: Path,
    output_dir: Path,
    *,
    device: str | None = None,
    threads: int | None = None,
) -> dict:
    """Train, test and write the run's folder; -> metrics.

    Raises ConfigError (settings and data do not fit), DataError (no usable data), TrainingFailed (loss not finite).
    """
    config = RunConfig.from_dict(settings)
    manifest, splits = data.load(data_dir)
    check_data(config, manifest)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in (
        "metrics.json",
        "config.json",
        "history.jsonl",
        "model.safetensors",
        "pattern.safetensors",
        "eval.json",
    ):
        (output_dir / name).unlink(missing_ok=True)
    for old in (output_dir / "tensorboard").glob("events.*"):
        old.unlink()

    accelerator = runtime.make_accelerator(device, threads)
    training = Training(config, manifest["num_inputs"], accelerator)
    phases = {training.phase: Phase(accelerator.device)}
    started = time.perf_counter()
    history_path = output_dir / "history.jsonl.partial"
    with (
        _unfinished(history_path) as history,
        SummaryWriter(str(output_dir / "tensorboard")) as board,
    ):
        progress = tqdm(
            range(config.training.num_train_steps), disable=not sys.stderr.isatty(), unit="step"
        )
        for index in progress:
            before = time.perf_counter()
            rows = data.training_rows(
                len(splits["train"]), config.training.batch_size, index, config.seed
            )
            batch = splits["train"].batch(rows, config.model.sequence_length)
            line = training.step(index, batch)
            line["ms"] = 1000 * (time.perf_counter() - before)
            phases[training.phase].milliseconds.append(line["ms"])
            _record(history, board, line)
            progress.set_postfix(loss=f"{line['loss']:.3f}", phase=training.phase, refresh=False)

            step = index + 1
            if (
                step % config.training.eval_frequency == 0
                or step == config.training.num_train_steps
            ):
                scored = training.evaluate(splits["dev"], step)
                _record(history, board, {"event": "eval", "split": "dev", **scored})
                _say(
                    f"step {step}/{config.training.num_train_steps} {training.phase}: train loss {line['loss']:.4f}, "
                    f"dev loss {scored['loss']:.4f}, dev accuracy {100 * scored['accuracy']:.2f} %, {line['ms']:.0f} ms"
                )
            if training.transition["step"] == step:
                phases["dense"].end()
                training.go_sparse()
                phases["sparse"] = Phase(accelerator.device)
                _record(history, board, {"event": "transition", **training.transition})
                _say(f"step {step}: sparse from here on (by {training.transition['reason']})")
            elif training.out_of_patience:
                _say(
                    f"step {step}: no better dev accuracy in {config.training.patience} evaluations; stopping"
                )
                break
    phases[training.phase].end()
    seconds = time.perf_counter() - started

    training.model.load_state_dict(training.best_weights)
    test = evaluate(training.model, splits["test"], config, accelerator.device, training.masks)
    metrics = {
        "schema_version": 1,
        "run": config.run,
        "task": config.task,
        "attention": config.attention,
        "seed": config.seed,
        "data": manifest["data"],
        "num_inputs": manifest["num_inputs"],
        "input": {key: manifest.get(key) for key in INPUT_KEYS},
        "test": test | {"chance": chance(manifest), "baseline": baseline(config.task, splits)},
        "dev": training.best,
        "transition_rule": config.transition.rule,
        "transition": training.transition,
        "pattern": training.pattern_report,
        "num_parameters": num_parameters(training.model),
        "num_steps": step,
        "phases": {
            name: phases[name].summary() if name in phases else None for name in ("dense", "sparse")
        },
        "training_seconds": seconds,
        "device": runtime.describe_device(accelerator.device),
        "backend": attention.selected_backend(accelerator.device.type)
        if config.model.attention == "softmax"
        else config.model.attention,
        "versions": runtime.versions(),
        "git_commit": runtime.git_commit(),
        "config_sha256": digest(settings),
        "data_sha256": data.data_digest(manifest),
        "sources": manifest["sources"],
        "options": option_labels(config, manifest),
    }
    patterns = {
        f"layer_{i}": mask.to(torch.uint8).cpu().contiguous()
        for i, mask in enumerate(training.masks or [])
    } | {
        f"pooled_layer_{i}": pooled.cpu().contiguous()
        for i, pooled in enumerate(training.pooled_maps or [])
    }
    _write(output_dir / "config.json", lambda path: path.write_text(_json(settings)))
    _write(
        output_dir / "model.safetensors",
        lambda path: safetensors.torch.save_model(training.model, str(path)),
    )
    _write(
        output_dir / "pattern.safetensors",
        lambda path: safetensors.torch.save_file(patterns, str(path)),
    )
    os.replace(history_path, output_dir / "history.jsonl")
    _write(output_dir / "metrics.json", lambda path: path.write_text(_json(metrics)))
    _say(
        f"test accuracy {100 * test['accuracy']:.2f} % (chance {100 * chance(manifest):.2f} %), {output_dir}"
    )
    return metrics


class Phase:
    """Times and memory of a phase."""

    def __init__(self, device: torch.device):
        self.device = device
        self.milliseconds: list[float] = []
        self.peak = 0
        self.started = time.perf_counter()
        self.seconds = 0.0
        runtime.reset_peak_memory(device)

    def end(self) -> None:
        self.peak = runtime.peak_memory(self.device)
        self.seconds = time.perf_counter() - self.started

    def summary(self) -> dict:
        """Median milliseconds a step; seconds include the evaluations."""
        return {
            "steps": len(self.milliseconds),
            "ms_per_step": statistics.median(self.milliseconds) if self.milliseconds else None,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak,
        }


@contextlib.contextmanager
def _unfinished(path: Path):
    """A new text file that does not outlive an exception."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            yield file
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _record(history, board: SummaryWriter, line: dict) -> None:
    for key in ("distance", "change", "skewness"):  # JSON has no NaN
        if line.get(key) is not None:
            line[key] = [value if math.isfinite(value) else None for value in line[key]]
    history.write(json.dumps(line) + "\n")
    if line["event"] == "transition":
        return
    prefix = "train" if line["event"] == "train" else "dev"
    for key in ("loss", "accuracy", "learning_rate", "ms"):
        if line.get(key) is not None:
            board.add_scalar(f"{prefix}/{key}", line[key], line["step"])
    for key in ("skewness", "distance", "change"):
        for layer, value in enumerate(line.get(key) or []):
            if value is None:
                continue
            board.add_scalar(f"{key}/layer_{layer}", value, line["step"])


def _say(message: str) -> None:
    tqdm.write(message, file=sys.stderr)


def _json(content: dict) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _write(path: Path, write) -> None:
    """Call write(temporary path) and give the file its name when it is complete."""
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)
