"""One training: dense until the attention maps settle, then sparse over the blocks of the pattern; then the test.

`train` reads a processed task and writes a run's folder:

    config.json           the settings, whole
    history.jsonl         every step, evaluation and the transition
    model.safetensors     weights of the best evaluation on dev within the phase in which the run ended
    pattern.safetensors   layer_<i>: the block mask of a layer; pooled_layer_<i>: the mean attention map of the last
                          dense step, pooled to blocks (no tensor when the run stayed dense)
    tensorboard/          the curves
    metrics.json          what the results table is made from; written last

Files get their names when they are complete. Steps count from 1 in what is written, from 0 in the code. While it runs,
the folder also holds history.jsonl.partial, the state to go on from after a kill (sat/checkpoint.py) and a lock.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn

from sat import checkpoint, data, devices, folder_lock, interruption, memory, runtime, seal
from sat.attention import selection
from sat.attention.dropout import sequences_from
from sat.config import RunConfig, digest
from sat.evaluation import RUN_FILES, SEALED_FILES, batch_size, evaluate, floors
from sat.interruption import Interrupted, Stop
from sat.launch import is_main
from sat.model import Classifier, loss_and_hits, num_parameters
from sat.optimiser import make_optimiser, set_schedule
from sat.pattern import describe, floodfill_score, pool, select_blocks, static_score
from sat.transition import MapStatistics, pattern_loss, transition_reason
from sat.watching import Curves, Progress, say, without_nan

GRADIENT_LIMIT = 1.0
SMALLEST_SCALE = (
    2.0**-8
)  # of the loss in fp16: below, it is not the scale that makes the gradients overflow
# What sat.load needs of the manifest to encode new inputs as the preprocessing does.
INPUT_KEYS = ("input_type", "id_offset", "max_length", "options", "symbols", "classes")


class TrainingFailed(RuntimeError):
    """The training cannot go on; the message says in which step and why."""


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


def real_queries(batch: data.Batch, length: int, class_tokens: int) -> list[torch.Tensor]:
    """How many sequences of the batch have a real query at each position, [length] an input.

    class_tokens: how many the model puts in front of the ids, 1 with CLS pooling, else 0.
    """
    position = torch.arange(length)
    return [
        torch.full((length,), len(batch))
        if lengths is None
        else (position < class_tokens + lengths[:, None]).sum(dim=0)
        for lengths in batch.lengths
    ]


def over_real_queries(
    maps: list[list[torch.Tensor]], real: list[torch.Tensor], batch_size: int
) -> tuple[list[list[torch.Tensor]], int]:
    """Maps whose rows are means over the real queries alone, and the longest length of the first input.

    real: of the whole batch of `batch_size` sequences, as `real_queries` counts.
    """
    scales = [(batch_size / counts.clamp(min=1)).to(maps[0][0])[:, None] for counts in real]
    mended = [[a * scale for a in tower] for tower, scale in zip(maps, scales, strict=True)]
    return mended, int((real[0] > 0).sum())


def backends_of(config: RunConfig, device: torch.device) -> dict[str, str]:
    """What computes attention in a phase: a backend of sat.attention for these shapes, or an efficient attention."""
    model = config.model
    if model.attention != "softmax":
        return {"dense": model.attention, "sparse": model.attention}
    q = torch.empty(1, model.num_head, 0, model.head_dim, device=device)
    return {
        "dense": selection.resolve("auto", q, None, model.attention_dropout),
        "sparse": selection.resolve("auto", q, model.block_size, model.attention_dropout),
    }


class Training:
    """The state of a training between two steps."""

    def __init__(self, config: RunConfig, num_inputs: int, accelerator: Accelerator):
        torch.manual_seed(config.seed)
        self.config = config
        self.accelerator = accelerator
        learned = config.pattern.source == "parameter"
        self.model = Classifier(config.model, num_inputs, config.transition.padded_queries, learned)
        self.model.to(accelerator.device)
        self.forward = self.model
        if config.training.compile:
            self.forward = devices.compiled(self.model, accelerator.device.type)
        self.phase = "dense"
        self.masks: list[torch.Tensor] | None = None
        self.pattern_report: dict | None = None  # what metrics.json says of the masks
        self.pooled_maps: list[torch.Tensor] | None = None  # [n, n] a layer, of the last dense step
        self.map_statistics = MapStatistics(config.transition.ema)
        self.pooled_sum: list[torch.Tensor] | None = None
        self.num_pooled = 0
        self.transition = {"step": None, "reason": None}
        self.switch: dict | None = None  # dev before and after it, by phase, with the same weights
        if config.transition.rule == "start":
            self.choose_blocks()
            self.phase, self.transition = "sparse", {"step": 0, "reason": "start"}
        self.optimiser = make_optimiser(self.model, config, self.phase)
        self.micro_batch = batch_size(config)  # sequences that the device takes at once
        self.memory_peak: int | None = None  # bytes that a step of it takes, when it was measured
        self.best: dict | None = None
        self.best_weights: dict[str, torch.Tensor] = {}
        self.evaluations_since_best = 0
        self.skipped_steps = 0  # left out for gradients that overflowed in fp16

    def step(self, index: int, batch: data.Batch) -> dict:
        """One optimiser step, in parts that the device can take; -> the line of the history.

        batch: this process's share of the training.batch_size sequences of the step.
        """
        config = self.config
        rate = set_schedule(self.optimiser, config, self.phase, index)
        self.model.train()
        want_maps = self.phase == "dense" and config.transition.rule != "never"
        before = runtime.random_state(self.accelerator.device)
        self.micro_batch, (loss, hits, maps) = memory.halving(
            self.micro_batch,
            lambda size: self._accumulate(batch, size, want_maps, before),
            f"step {index + 1}",
        )
        real = []
        if want_maps and config.transition.padded_queries == "ignored":
            class_tokens = int(config.model.pooling_mode == "CLS")
            real = real_queries(batch, len(maps[0][0]), class_tokens)
            real = [counts.to(self.accelerator.device) for counts in real]
        self._sum_over_processes([loss, hits, *real, *(a for tower in maps for a in tower)])
        step_statistics = None
        if want_maps:
            size = None
            if real:
                maps, size = over_real_queries(maps, real, config.training.batch_size)
            self._pattern_step(maps)
            step_statistics = self.map_statistics.update(maps[0], size)
        self._check_finite(index, float(loss), batch, before)
        taken = self._take_step(index)
        line = {
            "event": "train",
            "step": index + 1,
            "phase": self.phase,
            "loss": float(loss) / config.training.batch_size,
            "accuracy": int(hits) / config.training.batch_size,
            "learning_rate": rate,
            "micro_batch": self.micro_batch,
            "skipped": not taken,
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

    def _sum_over_processes(self, tensors: list[torch.Tensor]) -> None:
        """Sum `tensors` and the gradients so far in place; the pattern's comes later, from the summed maps."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        devices.sum_in_place(self.accelerator, [*gradients, *tensors])

    def _accumulate(
        self, batch: data.Batch, size: int, want_maps: bool, random_state: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, list[list[torch.Tensor]]]:
        """Gradients of the batch from parts of `size` sequences; -> (summed loss, hits, mean maps an input).

        Every part draws from the same state of the random generators, and drops what it would drop as a part of the
        whole batch: the size changes the rounding of sums and nothing else.
        """
        device, total = self.accelerator.device, self.config.training.batch_size
        self.optimiser.zero_grad(set_to_none=True)
        loss = hits = torch.zeros((), device=device)
        maps: list[list[torch.Tensor]] = []
        for part in batch.parts(size):
            runtime.set_random_state(random_state, device)
            part = part.to(device)
            with sequences_from(part.first), self.accelerator.autocast():
                logits, part_maps = self.forward(part, self.masks, want_maps)
            part_loss, part_hits = loss_and_hits(logits, part.labels)
            self.accelerator.backward(part_loss / total)
            loss, hits = loss + part_loss.detach(), hits + part_hits
            share = len(part) / total
            if not maps:
                maps = part_maps
                if share < 1:
                    maps = [[a.mul_(share) for a in tower] for tower in maps]
                continue
            for sums, new in zip(maps, part_maps, strict=True):
                for a, b in zip(sums, new, strict=True):
                    a.add_(b, alpha=share)
        return loss, hits, maps

    def limit_memory(self, limit: int | None, num_inputs: int) -> None:
        """Choose how many sequences are trained on at once so that the process stays below `limit` bytes (CPU).

        What was chosen before an interruption stays where it fits. Raises memory.OutOfMemory when one is too much.
        """
        device, model = self.accelerator.device, self.config.model
        if limit is None:
            return
        if self.memory_peak is not None and self.memory_peak <= memory.USABLE * limit:
            return
        want_maps = self.phase == "dense" and self.config.transition.rule != "never"
        before = runtime.random_state(device)

        def peak(size: int) -> int:
            batch = data.blank_batch(model, num_inputs, size)
            runtime.reset_peak_memory(device)
            self._accumulate(batch, size, want_maps, before)
            return runtime.peak_memory(device) + kept

        self.model.train()
        maps = 4 * model.sequence_length**2 * model.num_layers * num_inputs if want_maps else 0
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters())
        # Not in a first step: moments and best weights, the maps of the step before and of the other parts.
        kept = 3 * weights + 2 * maps
        peak(1)  # loads libraries, starts threads
        self.optimiser.zero_grad(set_to_none=True)
        runtime.reset_peak_memory(device)
        fixed = runtime.peak_memory(device) + weights + maps + kept
        self.micro_batch, self.memory_peak = memory.largest_that_fits(
            self.micro_batch, limit, fixed, peak
        )
        self.optimiser.zero_grad(set_to_none=True)
        runtime.reset_peak_memory(device)
        runtime.set_random_state(before, device)

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

    def _check_finite(
        self, index: int, loss: float, batch: data.Batch, random_state: dict[str, torch.Tensor]
    ) -> None:
        """Raises TrainingFailed with step and layer when the loss is not a finite number."""
        if math.isfinite(loss):
            return

        def parts() -> Iterator[data.Batch]:
            for part in batch.parts(self.micro_batch):
                runtime.set_random_state(random_state, self.accelerator.device)
                yield part

        where = self._first_not_finite(parts(), self.masks)
        raise TrainingFailed(
            f"the loss is {loss} in step {index + 1} ({self.phase} phase); the first values that are not finite are "
            f"{where}. {self._advice}"
        )

    def check_scored(
        self,
        scored: dict,
        split: data.Split,
        name: str,
        masks: list[torch.Tensor] | None,
        step: int,
    ) -> None:
        """Raises TrainingFailed with step and layer when the loss of an evaluation is not a finite number."""
        if math.isfinite(scored["loss"]):
            return
        accelerator = self.accelerator
        mine = (accelerator.process_index, accelerator.num_processes)
        length = self.config.model.sequence_length
        where = self._first_not_finite(split.batches(self.micro_batch, length, None, *mine), masks)
        raise TrainingFailed(
            f"the loss is {scored['loss']} on {name} in step {step} ({self.phase} phase); the first values that are "
            f"not finite are {where}. {self._advice}"
        )

    def check_weights(self, step: int) -> None:
        """Raises TrainingFailed when a weight is not a finite number after `step` steps."""
        if bad := _not_finite(dict(self.model.named_parameters())):
            raise TrainingFailed(
                f"the weights are not finite after the update in step {step} ({self.phase} phase), first {bad[0]}. "
                f"{self._advice}"
            )

    def _take_step(self, index: int) -> bool:
        """Clip and step; -> whether it was taken. Raises TrainingFailed when a gradient is not a finite number.

        With a scaler such a step is left out, for a smaller scale may mend it.
        """
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() < SMALLEST_SCALE:
            self._check_gradients(index)
        parameters = list(self.model.parameters())
        taken = devices.take_step(self.optimiser, parameters, GRADIENT_LIMIT, scaler)
        self.skipped_steps += not taken
        return taken

    def _check_gradients(self, index: int) -> None:
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        # The largest absolute value, NaN when one is: one number to wait for.
        if math.isfinite(nn.utils.get_total_norm(gradients.values(), math.inf)):
            return
        names = _not_finite(gradients)
        bad = [name for name in names if not name.startswith("pattern.")] or names
        raise TrainingFailed(
            f"the gradient is not finite in step {index + 1} ({self.phase} phase), in {len(bad)} of {len(gradients)} "
            f"tensors; nearest to the loss is that of {bad[-1]}. {self._advice}"
        )

    @property
    def _advice(self) -> str:
        rate = self.config.training.learning_rate
        return f"Lower training.learning_rate (now {rate:g}) or raise training.warmup."

    def _first_not_finite(
        self, batches: Iterable[data.Batch], masks: list[torch.Tensor] | None
    ) -> str:
        """Where the forward of these batches first leaves the finite numbers, in any of the processes."""
        if bad := _not_finite(dict(self.model.named_parameters())):
            return f"in the weights {bad[0]}"
        names = [name for name, _ in self.model.named_modules() if name]
        found: list[str] = []

        def look(name, module, arguments, output):
            outputs = output if isinstance(output, tuple) else (output,)
            numbers = [x for x in outputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
            if not all(bool(x.isfinite().all()) for x in numbers):
                found.append(name)

        hooks = [
            self.model.get_submodule(name).register_forward_hook(functools.partial(look, name))
            for name in names
        ]
        try:
            with torch.no_grad():
                for part in batches:
                    with sequences_from(part.first), self.accelerator.autocast():
                        self.model(part.to(self.accelerator.device), masks)
                    if found:
                        break
        finally:
            for hook in hooks:
                hook.remove()
        place = names.index(found[0]) if found else len(names)
        place = int(-devices.largest(self.accelerator, -place))
        return f"those that {names[place]} gives" if place < len(names) else "in the loss itself"

    def go_sparse(self) -> None:
        """Choose the blocks, start a new optimiser, forget the best weights of the dense phase."""
        config = self.config
        if self.masks is None:
            self.choose_blocks()
        self.phase = "sparse"
        self.optimiser = make_optimiser(self.model, config, "sparse")
        self.map_statistics, self.pooled_sum = MapStatistics(config.transition.ema), None
        self.best, self.best_weights, self.evaluations_since_best = None, {}, 0

    def choose_blocks(self) -> None:
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

    def score(
        self, split: data.Split, masks: list[torch.Tensor] | None, check: Callable[[], None]
    ) -> dict:
        """Score dev, or as much of it as training.num_eval_steps says; changes nothing. masks: None is dense.

        check: as `evaluate` calls it.
        """
        config = self.config
        limit = None  # in rows, so that what a device takes at once changes nothing
        if config.training.num_eval_steps is not None:
            limit = config.training.num_eval_steps * config.training.batch_size
        return evaluate(
            self.model,
            split,
            config,
            self.accelerator,
            masks,
            limit,
            micro_batch=self.micro_batch,
            check=check,
        )

    def keep_best(self, scored: dict, step: int) -> dict:
        """Keep the weights when `scored`, after `step` steps, is the best of this phase; -> scored with its place."""
        scored = scored | {"step": step, "phase": self.phase}
        if self.best is None or scored["accuracy"] > self.best["accuracy"]:
            self.best = scored
            self.best_weights = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
            self.evaluations_since_best = 0
        else:
            self.evaluations_since_best += 1
        return scored

    def state(self) -> dict:
        """All that `load_state` needs to go on as if nothing had happened, the random generators' states included."""
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "map_statistics": vars(self.map_statistics),
            "random": runtime.random_state(self.accelerator.device),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "machine": self._machine_settings,
            **{name: getattr(self, name) for name in self._PLAIN_STATE},
        }

    @property
    def _machine_settings(self) -> dict:
        """What micro_batch was chosen for; a training that goes on with other ones chooses anew."""
        return {"most": batch_size(self.config), "limit": self.config.model.memory_limit_gb}

    _PLAIN_STATE = (
        "phase",
        "masks",
        "pattern_report",
        "pooled_maps",
        "pooled_sum",
        "num_pooled",
        "transition",
        "switch",
        "best",
        "best_weights",
        "evaluations_since_best",
        "skipped_steps",
        "micro_batch",
        "memory_peak",
    )

    def load_state(self, state: dict) -> None:
        device = self.accelerator.device
        self.model.load_state_dict(state["model"])
        self.optimiser = make_optimiser(self.model, self.config, state["phase"])
        self.optimiser.load_state_dict(state["optimiser"])
        vars(self.map_statistics).update(_moved(state["map_statistics"], device))
        for name in self._PLAIN_STATE:
            setattr(self, name, _moved(state[name], device))
        if state["machine"] != self._machine_settings:
            self.micro_batch, self.memory_peak = batch_size(self.config), None
        if state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        runtime.set_random_state(state["random"], device)

    @property
    def out_of_patience(self) -> bool:
        """Whether to stop; a run whose switch is still to come by its limit goes on until then."""
        training = self.config.training
        patience, limit = training.patience, training.num_dense_train_steps
        will_switch = (
            self.phase == "dense"
            and self.config.transition.rule != "never"
            and limit is not None
            and limit < training.num_train_steps
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
    """Train, test and write the run's folder; -> metrics. Goes on from a checkpoint in the folder where there is one.

    What the folder holds of a finished run stays until all is checked and the first step begins.

    Raises ConfigError (settings and data do not fit, another training is in the folder), DataError (no usable data),
    TrainingFailed (numbers not finite, no memory), Interrupted (SIGTERM or SIGINT came; the state is saved).
    """
    config = RunConfig.from_dict(settings)
    manifest, splits = data.load(data_dir)
    data.check_fits(config, manifest)
    accelerator = runtime.make_accelerator(device, threads, config.training.precision)
    devices.check_batch(config.training.batch_size, accelerator)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with folder_lock.held(output_dir, say) if is_main() else contextlib.nullcontext():
        with _told_when_memory_runs_out(lambda: "before the first step"):
            training = Training(config, manifest["num_inputs"], accelerator)
            precision = devices.describe(accelerator)["precision"]
            identity = checkpoint.identity(settings, data.data_digest(manifest), precision)
            unfinished = _Unfinished(training, output_dir, identity)
            limit = memory.share_of_limit(config.model.memory_limit_gb, accelerator)
            training.limit_memory(limit, manifest["num_inputs"])
        agree = None
        if accelerator.num_processes > 1:
            agree = functools.partial(devices.largest, accelerator)
        with (
            _told_when_memory_runs_out(unfinished.where),
            interruption.watching(agree) as stop,
            unfinished.recording(),
        ):
            _run_steps(training, splits, unfinished, stop)
            unfinished.end_phase()
            training.model.load_state_dict(training.best_weights)
            with stop.at_once():
                test = evaluate(
                    training.model,
                    splits["test"],
                    config,
                    accelerator,
                    training.masks,
                    micro_batch=training.micro_batch,
                    check=stop.check,
                )
        training.check_scored(test, splits["test"], "test", training.masks, unfinished.step)
        test |= floors(config.task, manifest, splits, "test")
        dev = training.best | floors(config.task, manifest, splits, "dev")
        metrics = _metrics(training, unfinished, settings, manifest, test, dev)
        if is_main():
            _write_results(training, unfinished, settings, metrics)
    say(
        f"test accuracy {100 * test['accuracy']:.2f} % (chance {100 * test['chance']:.2f} %), {output_dir}"
    )
    return metrics


def _metrics(
    training: Training,
    unfinished: _Unfinished,
    settings: dict,
    manifest: dict,
    test: dict,
    dev: dict,
) -> dict:
    """What metrics.json holds."""
    config, accelerator = training.config, training.accelerator
    backends = backends_of(config, accelerator.device)
    return {
        "schema_version": 1,
        "run": config.run,
        "task": config.task,
        "attention": config.attention,
        "seed": config.seed,
        "data": manifest["data"],
        "num_inputs": manifest["num_inputs"],
        "input": {key: manifest.get(key) for key in INPUT_KEYS},
        "test": test,
        "dev": dev,
        "transition_rule": config.transition.rule,
        "transition": training.transition,
        "switch": training.switch,
        "pattern": training.pattern_report,
        "num_parameters": num_parameters(training.model),
        "num_steps": unfinished.step,
        "skipped_steps": training.skipped_steps,
        "micro_batch": training.micro_batch,
        "phases": {
            name: unfinished.phases[name].summary(accelerator) | {"backend": backends[name]}
            if name in unfinished.phases
            else None
            for name in ("dense", "sparse")
        },
        "training_seconds": sum(phase.seconds for phase in unfinished.phases.values()),
        "device": runtime.describe_device(accelerator.device) | devices.describe(accelerator),
        "backend": backends[training.phase],
        "versions": runtime.versions(),
        "git_commit": runtime.git_commit(),
        "config": settings,
        "config_sha256": digest(settings),
        "data_sha256": data.data_digest(manifest),
        "sources": manifest["sources"],
        "options": option_labels(config, manifest),
    }


def _write_results(
    training: Training, unfinished: _Unfinished, settings: dict, metrics: dict
) -> None:
    """The files of a finished run. Its state stays until metrics.json, the last of them, is there."""
    folder = unfinished.folder
    patterns = {
        f"layer_{i}": mask.to(torch.uint8).cpu().contiguous()
        for i, mask in enumerate(training.masks or [])
    } | {
        f"pooled_layer_{i}": pooled.cpu().contiguous()
        for i, pooled in enumerate(training.pooled_maps or [])
    }
    _write(folder / "config.json", lambda path: path.write_text(_json(settings)))
    _write(
        folder / "model.safetensors",
        lambda path: safetensors.torch.save_model(training.model, str(path)),
    )
    _write(
        folder / "pattern.safetensors",
        lambda path: safetensors.torch.save_file(patterns, str(path)),
    )
    _write(folder / "history.jsonl", lambda path: shutil.copyfile(unfinished.history_path, path))
    seal.add(metrics, folder, SEALED_FILES)
    _write(folder / "metrics.json", lambda path: path.write_text(_json(metrics)))
    checkpoint.remove(folder)
    unfinished.history_path.unlink()


def _run_steps(
    training: Training, splits: dict[str, data.Split], unfinished: _Unfinished, stop: Stop
) -> None:
    """The steps that are left, with their evaluations, the switch and the checkpoints."""
    config = training.config
    num_steps = config.training.num_train_steps
    accelerator = training.accelerator
    progress = Progress(num_steps, unfinished.step)
    if unfinished.step == 0 and training.masks is not None:  # sparse from the start
        unfinished.curves.add_pattern(training.masks, 0)
    # A checkpoint stands between a step and its evaluation when a signal came in either.
    while not unfinished.evaluated or (
        unfinished.step < num_steps and not training.out_of_patience
    ):
        if unfinished.evaluated:
            before = time.perf_counter()
            index = unfinished.step
            rows = data.training_rows(
                len(splits["train"]), config.training.batch_size, index, config.seed
            )
            mine = devices.share(len(rows), accelerator)
            batch = splits["train"].batch(rows[mine], config.model.sequence_length)
            batch.first = mine.start
            line = training.step(index, batch)
            line["ms"] = 1000 * (time.perf_counter() - before)
            unfinished.finish_step(line)
            progress.update(line)
            # All processes stop after the same step, though the signal reaches each at its own time.
            requested = stop.agreed()
            unfinished.save_if(requested != 0)
            if requested:
                raise Interrupted(requested)
        step = unfinished.step
        switching = training.transition["step"] == step and training.phase == "dense"
        due = step % config.training.eval_frequency == 0 or step == num_steps
        if due or switching:
            with unfinished.saved_if_interrupted(), stop.at_once():
                now = training.masks if training.phase == "sparse" else None
                scored = after_switch = training.score(splits["dev"], now, stop.check)
                training.check_scored(scored, splits["dev"], "dev", now, step)
                if switching:
                    training.choose_blocks()
                    after_switch = training.score(splits["dev"], training.masks, stop.check)
                    training.check_scored(after_switch, splits["dev"], "dev", training.masks, step)
        if due:
            placed = training.keep_best(scored, step)
            unfinished.record({"event": "eval", "split": "dev", **placed})
            progress.say(
                f"step {step}/{num_steps} {training.phase}: train loss {unfinished.line['loss']:.4f}, dev loss "
                f"{scored['loss']:.4f}, dev accuracy {100 * scored['accuracy']:.2f} %, {unfinished.line['ms']:.0f} ms"
            )
        if training.map_statistics.maps is not None and (due or switching):
            unfinished.curves.add_maps(training.map_statistics.maps, step)
        if switching:
            unfinished.curves.add_pattern(training.masks, step)
            unfinished.end_phase()
            training.go_sparse()
            # The same weights through both attentions: the jump is part of the method, so it is shown.
            training.switch = {"dense": scored, "sparse": after_switch}
            unfinished.begin_phase()
            unfinished.record(
                {"event": "transition", **training.transition, "dev": training.switch}
            )
            progress.say(
                f"step {step}: sparse from here on (by {training.transition['reason']}); dev accuracy of the same "
                f"weights {100 * scored['accuracy']:.2f} % dense, {100 * after_switch['accuracy']:.2f} % sparse"
            )
        unfinished.evaluated = True
        unfinished.save_if(
            switching or unfinished.seconds_since_save >= config.training.checkpoint_seconds
        )
    if training.out_of_patience:
        say(
            f"step {unfinished.step}: no better dev accuracy in {config.training.patience} evaluations; stopping"
        )
    unfinished.save_if(True)
    progress.close()


class _Unfinished:
    """What a training has written so far, and the checkpoint that it goes on from."""

    def __init__(self, training: Training, folder: Path, identity: dict[str, str]):
        self.training, self.folder, self.identity = training, folder, identity
        self.history_path = folder / "history.jsonl.partial"
        self.step, self.evaluated = 0, True
        self.line: dict | None = None  # of the last step
        self.phases: dict[str, Phase] = {}
        self._history_bytes = 0
        self._restore()
        self.saved_step = (self.step, self.evaluated)
        self.saved_at = time.monotonic()

    def _restore(self) -> None:
        stored = checkpoint.load(self.folder, self.identity, say)
        written = self.history_path.stat().st_size if self.history_path.is_file() else 0
        if stored is not None and written < stored[1]["history_bytes"]:
            say(f"{self.folder}: the checkpoint is not used: {self.history_path.name} is cut short")
            stored = None
        elif stored is not None and stored[1]["history_sha256"] != seal.file_sha256(
            self.history_path, stored[1]["history_bytes"]
        ):
            say(f"{self.folder}: the checkpoint is not used: {self.history_path.name} was changed")
            stored = None
        self.training.accelerator.wait_for_everyone()  # all have read what one will change
        if stored is None:
            self.begin_phase()
            return
        tensors, record = stored
        state = checkpoint.unflatten(record["state"], tensors)
        self.training.load_state(state["training"])
        device = self.training.accelerator.device
        self.phases = {name: Phase(device, **parts) for name, parts in state["phases"].items()}
        self.step, self.evaluated = record["step"], record["evaluated"]
        self.line, self._history_bytes = record["line"], record["history_bytes"]
        say(f"going on from step {self.step} ({self.training.phase} phase), {self.folder}")
        if record["threads"] != torch.get_num_threads():
            say(
                f"with {torch.get_num_threads()} threads where there were {record['threads']}: the last bits may differ"
            )

    @contextlib.contextmanager
    def recording(self):
        """Open history and curves, behind what the checkpoint knows of; the main process alone writes them.

        What the folder holds of another run is removed.
        """
        history, board_folder = os.devnull, self.folder / "tensorboard"
        if is_main():
            for name in (*RUN_FILES, "history.jsonl", "eval.json"):
                (self.folder / name).unlink(missing_ok=True)
            if self.line is None:
                checkpoint.remove(self.folder)
            history = self.history_path
            history.touch()
            os.truncate(history, self._history_bytes)
            for old in board_folder.glob("events.*") if self.step == 0 else ():
                old.unlink()
        with (
            open(history, "a", encoding="utf-8") as self._history,
            Curves(board_folder, self.step + 1) as self.curves,
        ):
            yield

    def record(self, line: dict) -> None:
        line = without_nan(line)
        self._history.write(json.dumps(line, allow_nan=False) + "\n")
        if line["event"] == "train":
            memory = runtime.peak_memory(self.training.accelerator.device) if is_main() else None
            self.curves.add(line, memory)
        else:
            self.curves.add(line)

    def finish_step(self, line: dict) -> None:
        self.phases[self.training.phase].milliseconds.append(line["ms"])
        self.record(line)
        self.step, self.evaluated, self.line = self.step + 1, False, line

    def where(self) -> str:
        """In words, what the training is at: the next step, or the evaluation of the last one."""
        step = min(self.step + self.evaluated, self.training.config.training.num_train_steps)
        return f"in step {step}, outside of the model's forward and backward"

    def begin_phase(self) -> None:
        self.phases[self.training.phase] = Phase(self.training.accelerator.device)

    def end_phase(self) -> None:
        self.phases[self.training.phase].end()

    @property
    def seconds_since_save(self) -> float:
        return time.monotonic() - self.saved_at

    def save_if(self, wanted: bool) -> None:
        if not (wanted and is_main()) or self.saved_step == (self.step, self.evaluated):
            return
        self.training.check_weights(self.step)
        self._history.flush()
        os.fsync(self._history.fileno())
        phases = {name: phase.state() for name, phase in self.phases.items()}
        tensors, skeleton = checkpoint.flatten(
            "state", {"training": self.training.state(), "phases": phases}
        )
        record = {
            "identity": self.identity,
            "step": self.step,
            "evaluated": self.evaluated,
            "line": self.line,
            "history_bytes": self._history.tell(),
            "history_sha256": seal.file_sha256(self.history_path, self._history.tell()),
            "threads": torch.get_num_threads(),
            "state": skeleton,
        }
        checkpoint.save(self.folder, tensors, record)
        self.saved_step, self.saved_at = (self.step, self.evaluated), time.monotonic()

    @contextlib.contextmanager
    def saved_if_interrupted(self):
        try:
            yield
        except Interrupted:
            self.save_if(True)
            raise


class Phase:
    """Times and memory of a phase; they add up over the attempts of a training that was interrupted."""

    def __init__(
        self,
        device: torch.device,
        milliseconds: torch.Tensor | None = None,
        seconds: float = 0.0,
        cpu_seconds: float = 0.0,
        peak: int = 0,
        ended: bool = False,
    ):
        self.device = device
        self.milliseconds: list[float] = [] if milliseconds is None else milliseconds.tolist()
        self.seconds, self.cpu_seconds, self.peak, self.ended = seconds, cpu_seconds, peak, ended
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        if not ended:
            runtime.reset_peak_memory(device)

    def end(self) -> None:
        if not self.ended:
            self.seconds, self.cpu_seconds, self.peak = self._so_far()
            self.ended = True

    def _so_far(self) -> tuple[float, float, int]:
        if self.ended:
            return self.seconds, self.cpu_seconds, self.peak
        return (
            self.seconds + time.perf_counter() - self._started,
            self.cpu_seconds + time.process_time() - self._cpu_started,
            max(self.peak, runtime.peak_memory(self.device)),
        )

    def state(self) -> dict:
        seconds, cpu_seconds, peak = self._so_far()
        milliseconds = torch.tensor(self.milliseconds, dtype=torch.float64)
        return {
            "milliseconds": milliseconds,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak": peak,
            "ended": self.ended,
        }

    def summary(self, accelerator: Accelerator) -> dict:
        """Median milliseconds a step; seconds include the evaluations on dev; CPU seconds are those of all threads and
        processes; memory is that of the process with most."""
        return {
            "steps": len(self.milliseconds),
            "ms_per_step": statistics.median(self.milliseconds) if self.milliseconds else None,
            "seconds": self.seconds,
            "cpu_seconds": devices.total(accelerator, self.cpu_seconds),
            "peak_memory_bytes": int(devices.largest(accelerator, self.peak)),
        }


def _not_finite(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of those that hold a number that is not finite."""
    return [name for name, tensor in tensors.items() if not tensor.isfinite().all()]


@contextlib.contextmanager
def _told_when_memory_runs_out(where: Callable[[], str]) -> Iterator[None]:
    """Raises TrainingFailed for want of memory where smaller parts of the batch would not help."""
    try:
        yield
    except memory.OutOfMemory:
        raise
    except Exception as error:
        if not memory.ran_out(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise TrainingFailed(f"out of memory {where()} ({reason}): {memory.ADVICE}") from error


def _moved(state, device: torch.device):
    """Nested state with its tensors on `device`."""
    if isinstance(state, torch.Tensor):
        return state.to(device)
    if isinstance(state, dict):
        return {key: _moved(value, device) for key, value in state.items()}
    if isinstance(state, list):
        return [_moved(value, device) for value in state]
    return state


def _json(content: dict) -> str:
    return json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"


def _write(path: Path, write) -> None:
    """Call write(temporary path) and give the file its name when it is complete."""
    # With a dot: history.jsonl.partial is what a run goes on from.
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)
