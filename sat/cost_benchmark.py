"""What whole trainings cost on this machine's CPU, from the time of single steps.

    python -m sat.benchmark cost --json cost.json [--quick] [--threads 2] [--rounds 2]

For every task and attention of config/, a few sequences are trained and scored on in each phase, full
length and random ids; seconds a sequence times the sequences of a whole run (steps, evaluations of dev,
the test set of the LRA release) give its hours. A run that may switch is taken to switch at
`num_dense_train_steps`, the latest, and none to stop early for `patience`. Trimming to the longest
sequence makes real runs of listops, text and retrieval cheaper than this.
"""

import dataclasses
import os
import sys
from pathlib import Path

# dev and test of the released data (LRA; agnews and yelp: as their test sets and 10 % of train hold)
ROWS = {
    "listops": (2_000, 2_000),
    "text": (2_500, 25_000),
    "retrieval": (18_090, 17_437),
    "image": (5_000, 10_000),
    "pathfinder": (20_000, 20_000),
    "agnews": (12_000, 7_600),
    "yelp": (56_000, 38_000),
}
TOKENS = 2**13  # about as many in a measured batch


def names(folder: str) -> list[str]:
    return sorted(path.stem for path in Path("config", folder).glob("*.yaml"))


def seconds_a_sequence(config, num_inputs: int, rounds: int, clock) -> dict[str, float]:
    """{dense, dense score, sparse, sparse score}: of a step and of scoring; a phase the run has not is left out."""
    import torch

    from sat import step_benchmark
    from sat.benchmark import _measure

    size = max(1, TOKENS // config.model.sequence_length)
    batch = step_benchmark.random_batch(config, size)
    batch = dataclasses.replace(
        batch, ids=batch.ids * num_inputs, lengths=batch.lengths * num_inputs
    )
    calls = {}
    for phase in phases(config):
        training = step_benchmark.our_training(config, size, False, num_inputs=num_inputs)
        index = iter(range(1, 10**9))
        if phase == "sparse":
            if len(phases(config)) == 2:
                # A pattern may be chosen from the maps of the steps.
                training.step(next(index), batch)
            training.go_sparse()
        calls[phase] = lambda training=training, index=index: training.step(next(index), batch)

        def score(training=training):
            training.model.eval()
            with torch.inference_mode():
                training.model(batch, training.masks)

        calls[f"{phase} score"] = score
    return {name: value / size for name, value in _measure(calls, rounds, clock).items()}


def phases(config) -> list[str]:
    rule = config.transition.rule
    return {"never": ["dense"], "start": ["sparse"]}.get(rule, ["dense", "sparse"])


def hours(config, task: str, seconds: dict[str, float]) -> float:
    """Of one whole training and its score on test."""
    training, (dev, test) = config.training, ROWS[task]
    steps = {phase: training.num_train_steps for phase in phases(config)}
    if len(steps) == 2:
        steps["dense"] = min(training.num_dense_train_steps, training.num_train_steps)
        steps["sparse"] -= steps["dense"]
    if training.num_eval_steps is not None:
        dev = min(dev, training.num_eval_steps * training.batch_size)
    total = test * seconds[f"{phases(config)[-1]} score"]
    for phase, count in steps.items():
        total += count * training.batch_size * seconds[phase]
        total += count // training.eval_frequency * dev * seconds[f"{phase} score"]
    return total / 3600


def run(options, clock) -> dict:
    """What the file of the benchmark holds; prints the table."""
    from sat import config as settings
    from sat.benchmark import about

    whole = settings.load("lra")
    tasks, attentions = names("tasks"), names("attentions")
    if options.quick:
        tasks, attentions = ["image"], ["softmax", "sat"]
    results = []
    for task in tasks:
        for attention in attentions:
            resolved = settings.resolve(whole, task, attention, 1)
            config = settings.RunConfig.from_dict(resolved)
            inputs = 2 if task == "retrieval" else 1
            seconds = seconds_a_sequence(config, inputs, options.rounds, clock)
            row = {"task": task, "attention": attention, "seconds_a_sequence": seconds}
            results.append(row | {"hours": hours(config, task, seconds)})
            print(f"{task}, {attention}: {results[-1]['hours']:.1f} h", file=sys.stderr)
    record = about(options.rounds, clock, os.getloadavg()[0]) | {
        "results": results,
    }
    print("\n".join(table(record)))
    return record


def table(record: dict) -> list[str]:
    """Lines of Markdown: hours of one training, a row for each attention, a column for each task."""
    cells = {(row["task"], row["attention"]): row["hours"] for row in record["results"]}
    tasks, attentions = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    lines = [f"| attention | {' | '.join(tasks)} | all |", "|---|" + "---:|" * (len(tasks) + 1)]
    for attention in attentions:
        row = [cells[task, attention] for task in tasks]
        lines.append(
            f"| {attention} | {' | '.join(f'{value:,.1f}' for value in [*row, sum(row)])} |"
        )
    return lines
