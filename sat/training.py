"""One training: dense until the attention maps settle, then sparse over the blocks of the pattern; then the test.

`train` reads a processed task and writes a run's folder:

    config.json           the settings, whole
    history.jsonl         every step, evaluation and the transition
    model.safetensors     weights of the best evaluation on dev within the phase in which the run ended
    pattern.safetensors   the block mask of every layer (no tensor when the run stayed dense)
    tensorboard/          the curves
    metrics.json          what the results table is made from; written last

Files get their names when they are complete. Steps count from 1 in what is written, from 0 in the code. While it runs,
the folder also holds history.jsonl.partial and the state to go on from after a kill (sat/checkpoint.py).
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

from sat import attention, checkpoint, data, interruption, runtime
from sat.config import ConfigError, RunConfig, digest
from sat.evaluation import baseline, batch_size, chance, evaluate
from sat.interruption import Interrupted, Stop
from sat.model import Classifier, loss_and_hits, num_parameters
from sat.optimiser import make_optimiser, set_schedule
from sat.pattern import describe, floodfill_score, pool, select_blocks, static_score
from sat.transition import MapStatistics, pattern_loss, transition_reason

GRADIENT_LIMIT = 1.0


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
        self.map_statistics = MapStatistics(config.transition.ema)
        self.pooled_sum: list[torch.Tensor] | None = None
        self.num_pooled = 0
        self.transition = {"step": None, "reason": None}
        self.switch: dict | None = None  # dev before and after it, by phase, with the same weights
        if config.transition.rule == "start":
            self.choose_blocks()
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

    def score(self, split: data.Split, masks: list[torch.Tensor] | None) -> dict:
        """Score dev, or as much of it as training.num_eval_steps says; changes nothing. masks: None is dense."""
        config = self.config
        limit = None  # in rows, so that what a device takes at once changes nothing
        if config.training.num_eval_steps is not None:
            limit = config.training.num_eval_steps * config.training.batch_size
        return evaluate(self.model, split, config, self.accelerator.device, masks, limit)

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
        random = {"cpu": torch.get_rng_state()}
        if self.accelerator.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.accelerator.device)
        return {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "map_statistics": vars(self.map_statistics),
            "random": random,
            **{name: getattr(self, name) for name in self._PLAIN_STATE},
        }

    _PLAIN_STATE = (
        "phase",
        "masks",
        "pattern_report",
        "pooled_sum",
        "num_pooled",
        "transition",
        "switch",
        "best",
        "best_weights",
        "evaluations_since_best",
    )

    def load_state(self, state: dict) -> None:
        device = self.accelerator.device
        self.model.load_state_dict(state["model"])
        self.optimiser = make_optimiser(self.model, self.config, state["phase"])
        self.optimiser.load_state_dict(state["optimiser"])
        vars(self.map_statistics).update(_moved(state["map_statistics"], device))
        for name in self._PLAIN_STATE:
            setattr(self, name, _moved(state[name], device))
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"] and device.type == "cuda":
            torch.cuda.set_rng_state(state["random"]["cuda"], device)

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
    """Train, test and write the run's folder; -> metrics. Goes on from a checkpoint in the folder where there is one.

    Raises ConfigError (settings and data do not fit), DataError (no usable data), TrainingFailed (loss not finite),
    Interrupted (SIGTERM or SIGINT came; the state is saved).
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

    accelerator = runtime.make_accelerator(device, threads)
    training = Training(config, manifest["num_inputs"], accelerator)
    identity = checkpoint.identity(settings, data.data_digest(manifest))
    unfinished = _Unfinished(training, output_dir, identity)
    with interruption.watching() as stop, unfinished.recording():
        _run_steps(training, splits, unfinished, stop)
        unfinished.end_phase()
        training.model.load_state_dict(training.best_weights)
        with stop.at_once():
            test = evaluate(
                training.model, splits["test"], config, accelerator.device, training.masks
            )
    metrics = {
        "schema_version": 1,
        "run": config.run,
        "task": config.task,
        "attention": config.attention,
        "seed": config.seed,
        "data": manifest["data"],
        "num_inputs": manifest["num_inputs"],
        "test": test | {"chance": chance(manifest), "baseline": baseline(config.task, splits)},
        "dev": training.best,
        "transition_rule": config.transition.rule,
        "transition": training.transition,
        "switch": training.switch,
        "pattern": training.pattern_report,
        "num_parameters": num_parameters(training.model),
        "num_steps": unfinished.step,
        "phases": {
            name: unfinished.phases[name].summary() if name in unfinished.phases else None
            for name in ("dense", "sparse")
        },
        "training_seconds": sum(phase.seconds for phase in unfinished.phases.values()),
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
    os.replace(unfinished.history_path, output_dir / "history.jsonl")
    _write(output_dir / "metrics.json", lambda path: path.write_text(_json(metrics)))
    checkpoint.remove(output_dir)
    _say(
        f"test accuracy {100 * test['accuracy']:.2f} % (chance {100 * chance(manifest):.2f} %), {output_dir}"
    )
    return metrics


def _run_steps(
    training: Training, splits: dict[str, data.Split], unfinished: _Unfinished, stop: Stop
) -> None:
    """The steps that are left, with their evaluations, the switch and the checkpoints."""
    config = training.config
    num_steps = config.training.num_train_steps
    progress = tqdm(
        total=num_steps, initial=unfinished.step, disable=not sys.stderr.isatty(), unit="step"
    )
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
            batch = splits["train"].batch(rows, config.model.sequence_length)
            line = training.step(index, batch)
            line["ms"] = 1000 * (time.perf_counter() - before)
            unfinished.finish_step(line)
            progress.update()
            progress.set_postfix(loss=f"{line['loss']:.3f}", phase=training.phase, refresh=False)
            unfinished.save_if(stop.requested is not None)
            if stop.requested is not None:
                raise Interrupted(stop.requested)
        step = unfinished.step
        switching = training.transition["step"] == step and training.phase == "dense"
        due = step % config.training.eval_frequency == 0 or step == num_steps
        if due or switching:
            with unfinished.saved_if_interrupted(), stop.at_once():
                now = training.masks if training.phase == "sparse" else None
                scored = after_switch = training.score(splits["dev"], now)
                if switching:
                    training.choose_blocks()
                    after_switch = training.score(splits["dev"], training.masks)
        if due:
            placed = training.keep_best(scored, step)
            unfinished.record({"event": "eval", "split": "dev", **placed})
            _say(
                f"step {step}/{num_steps} {training.phase}: train loss {unfinished.line['loss']:.4f}, dev loss "
                f"{scored['loss']:.4f}, dev accuracy {100 * scored['accuracy']:.2f} %, {unfinished.line['ms']:.0f} ms"
            )
        if switching:
            unfinished.end_phase()
            training.go_sparse()
            # The same weights through both attentions: the jump is part of the method, so it is shown.
            training.switch = {"dense": scored, "sparse": after_switch}
            unfinished.begin_phase()
            unfinished.record(
                {"event": "transition", **training.transition, "dev": training.switch}
            )
            _say(
                f"step {step}: sparse from here on (by {training.transition['reason']}); dev accuracy of the same "
                f"weights {100 * scored['accuracy']:.2f} % dense, {100 * after_switch['accuracy']:.2f} % sparse"
            )
        unfinished.evaluated = True
        unfinished.save_if(
            switching or unfinished.seconds_since_save >= config.training.checkpoint_seconds
        )
    if training.out_of_patience:
        _say(
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
        stored = checkpoint.load(self.folder, self.identity, _say)
        written = self.history_path.stat().st_size if self.history_path.is_file() else 0
        if stored is not None and written < stored[1]["history_bytes"]:
            _say(
                f"{self.folder}: the checkpoint is not used: {self.history_path.name} is cut short"
            )
            stored = None
        if stored is None:
            checkpoint.remove(self.folder)
            self.begin_phase()
            return
        tensors, record = stored
        state = checkpoint.unflatten(record["state"], tensors)
        self.training.load_state(state["training"])
        device = self.training.accelerator.device
        self.phases = {name: Phase(device, **parts) for name, parts in state["phases"].items()}
        self.step, self.evaluated = record["step"], record["evaluated"]
        self.line, self._history_bytes = record["line"], record["history_bytes"]
        _say(f"going on from step {self.step} ({self.training.phase} phase), {self.folder}")
        if record["threads"] != torch.get_num_threads():
            _say(
                f"with {torch.get_num_threads()} threads where there were {record['threads']}: the last bits may differ"
            )

    @contextlib.contextmanager
    def recording(self):
        """Open history and curves, behind what the checkpoint knows of."""
        self.history_path.touch()
        os.truncate(self.history_path, self._history_bytes)
        board_folder = self.folder / "tensorboard"
        if self.step == 0:
            for old in board_folder.glob("events.*"):
                old.unlink()
        with (
            open(self.history_path, "a", encoding="utf-8") as self._history,
            SummaryWriter(str(board_folder), purge_step=self.step + 1) as self._board,
        ):
            yield

    def record(self, line: dict) -> None:
        _record(self._history, self._board, line)

    def finish_step(self, line: dict) -> None:
        self.phases[self.training.phase].milliseconds.append(line["ms"])
        self.record(line)
        self.step, self.evaluated, self.line = self.step + 1, False, line

    def begin_phase(self) -> None:
        self.phases[self.training.phase] = Phase(self.training.accelerator.device)

    def end_phase(self) -> None:
        self.phases[self.training.phase].end()

    @property
    def seconds_since_save(self) -> float:
        return time.monotonic() - self.saved_at

    def save_if(self, wanted: bool) -> None:
        if not wanted or self.saved_step == (self.step, self.evaluated):
            return
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
        peak: int = 0,
        ended: bool = False,
    ):
        self.device = device
        self.milliseconds: list[float] = [] if milliseconds is None else milliseconds.tolist()
        self.peak, self.seconds, self.ended = peak, seconds, ended
        self._started = time.perf_counter()
        if not ended:
            runtime.reset_peak_memory(device)

    def end(self) -> None:
        if not self.ended:
            self.seconds, self.peak, self.ended = self._so_far() + (True,)

    def _so_far(self) -> tuple[float, int]:
        if self.ended:
            return self.seconds, self.peak
        elapsed = time.perf_counter() - self._started
        return self.seconds + elapsed, max(self.peak, runtime.peak_memory(self.device))

    def state(self) -> dict:
        seconds, peak = self._so_far()
        milliseconds = torch.tensor(self.milliseconds, dtype=torch.float64)
        return {
            "milliseconds": milliseconds,
            "seconds": seconds,
            "peak": peak,
            "ended": self.ended,
        }

    def summary(self) -> dict:
        """Median milliseconds a step; seconds include the evaluations."""
        return {
            "steps": len(self.milliseconds),
            "ms_per_step": statistics.median(self.milliseconds) if self.milliseconds else None,
            "seconds": self.seconds,
            "peak_memory_bytes": self.peak,
        }


def _moved(state, device: torch.device):
    """Nested state with its tensors on `device`."""
    if isinstance(state, torch.Tensor):
        return state.to(device)
    if isinstance(state, dict):
        return {key: _moved(value, device) for key, value in state.items()}
    if isinstance(state, list):
        return [_moved(value, device) for value in state]
    return state


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
