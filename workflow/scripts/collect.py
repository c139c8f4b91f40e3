"""Collect the metrics of finished runs into one table: table.{csv,md,tex} and table_short.tex.

    python workflow/scripts/collect.py --output-dir results/demo \\
        --config '{"run": "demo", "tasks": ["listops"], "attentions": ["softmax", "sat"],
                   "seeds": [1001, 1002]}' \\
        results/demo/runs/*/*/*/metrics.json

One row a (task, attention) over all seeds. With --allow-missing the table is made of what is there,
and a run that failed says so (its trainer leaves failed.json). Without metrics.json arguments the
runs are looked for below --runs-dir.

The csv holds the bare numbers, units in the column names; the Markdown and LaTeX tables hold the
same, rounded and explained; table_short.tex has the columns that fit a page. Two runs of the same
configuration on the same machine give the same csv byte for byte, except for its last columns,
VOLATILE_COLUMNS: they hold times and memory.
"""

import argparse
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tables
from tables import interval_95, number, write_all

sys.path.append(str(Path(__file__).resolve().parents[2]))
from sat import seal  # noqa: E402

SCHEMA_VERSION = 1
LRA_TASKS = ("listops", "text", "retrieval", "image", "pathfinder")
MIB = 2**20
AGAIN = "delete it and run the same command again, which trains the run again"

# csv column -> format of its numbers. Nothing else decides the order.
STABLE_COLUMNS = {
    "task": "",
    "attention": "",
    "data": "",
    "options": "",
    "status": "",
    "failures": "",
    "num_seeds": "d",
    "test_accuracy_mean_percent": ".4f",
    "test_accuracy_sd_percent": ".4f",
    "test_accuracy_95_low_percent": ".4f",
    "test_accuracy_95_high_percent": ".4f",
    "chance_percent": ".4f",
    "baseline_percent": ".4f",
    "above_chance": "",
    "dev_accuracy_mean_percent": ".4f",
    "test_loss_mean": ".6f",
    "transition_step_mean": ".1f",
    "transition_steps": "",
    "transition_made_by": "",
    "density_mean": ".6f",
    "num_parameters": "d",
    "num_steps_mean": ".1f",
    "batch_size": "d",
    "device": "",
}
VOLATILE_COLUMNS = {
    "dense_ms_per_step_median": ".3f",
    "sparse_ms_per_step_median": ".3f",
    "speed_up_median": ".3f",
    "dense_peak_memory_max_mib": ".1f",
    "sparse_peak_memory_max_mib": ".1f",
    "training_seconds_mean": ".1f",
}
COLUMNS = STABLE_COLUMNS | VOLATILE_COLUMNS

# What a value must be: (words for the message, test). A dict stands for an object with at least
# these keys ("key?": may be null), a one-element list for a list of such values.
TEXT = ("a text", lambda v: isinstance(v, str) and v != "")
INTEGER = ("a whole number", lambda v: type(v) is int)
COUNT = ("a whole number from 0 up", lambda v: type(v) is int and v >= 0)
NUMBER = ("a number", lambda v: type(v) in (int, float))  # a loss that diverged may be NaN
SHARE = ("a number from 0 to 1", lambda v: type(v) in (int, float) and 0 <= v <= 1)
TIME = ("a finite number above 0", lambda v: type(v) in (int, float) and 0 < v < math.inf)


REASONS = ("rule", "limit", "start")  # start: sparse from the first step, with no dense phase


def one_of(*values: Any) -> tuple[str, Callable[[Any], bool]]:
    return (f"one of {', '.join(json.dumps(v) for v in values)}", lambda v: v in values)


PHASE = {
    "steps": COUNT,
    "ms_per_step?": TIME,
    "seconds": TIME,
    "cpu_seconds": TIME,
    "peak_memory_bytes": COUNT,
}
METRICS = {
    "schema_version": (
        f"{SCHEMA_VERSION} (a run of another version must be trained again)",
        lambda v: v == SCHEMA_VERSION,
    ),
    "run": TEXT,
    "task": TEXT,
    "attention": TEXT,
    "seed": INTEGER,
    "data": one_of("released", "generated", "own"),
    "test": {
        "accuracy": SHARE,
        "loss": NUMBER,
        "examples": COUNT,
        "chance": SHARE,
        "baseline?": SHARE,
    },
    "dev": {
        "accuracy": SHARE,
        "loss": NUMBER,
        "examples": COUNT,
        "chance": SHARE,
        "baseline?": SHARE,
        "step": COUNT,
        "phase": TEXT,
    },
    "transition_rule": TEXT,
    "transition": {"step?": COUNT, "reason?": one_of(*REASONS)},
    "pattern?": {
        "block_size": COUNT,
        "num_blocks": COUNT,
        "selected": [COUNT],
        "density": [SHARE],
        "empty_rows": [COUNT],
    },
    "num_parameters": COUNT,
    "num_steps": COUNT,
    "phases": {"dense?": PHASE, "sparse?": PHASE},
    "training_seconds": TIME,
    "device": {"type": TEXT, "name": TEXT, "threads": COUNT, "processes": COUNT},
    "config_sha256": TEXT,
    "data_sha256": TEXT,
    "options": [TEXT],
}
FAILURE = {
    "task": TEXT,
    "attention": TEXT,
    "seed": INTEGER,
    "kind": one_of("out of memory", "loss not finite", "failed"),
    "message": TEXT,
}
CONFIG = {"run": TEXT, "tasks": [TEXT], "attentions": [TEXT], "seeds": [INTEGER]}


def check(value: Any, shape: Any, where: str, key: str = "") -> None:
    """Raise ValueError, naming `where` and the key, unless `value` has the `shape`."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: {key or 'content'}: expected an object, found {value!r}")
        for marked_name, inner in shape.items():
            name = marked_name.removesuffix("?")
            inner_key = f"{key}.{name}" if key else name
            if name not in value:
                raise ValueError(f"{where}: {inner_key} is missing")
            if value[name] is not None or name == marked_name:
                check(value[name], inner, where, inner_key)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise ValueError(f"{where}: {key}: expected a list, found {value!r}")
        for i, item in enumerate(value):
            check(item, shape[0], where, f"{key}[{i}]")
    else:
        words, accepts = shape
        if not accepts(value):
            raise ValueError(f"{where}: {key}: expected {words}, found {value!r}")


def parse_config(text: str) -> dict[str, Any]:
    """The --config argument: which runs belong to the result, in which order."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--config: not JSON: {error}") from error
    check(config, CONFIG, "--config")
    if unknown := sorted(set(config) - set(CONFIG)):
        raise ValueError(f"--config: unknown key {unknown[0]!r}, allowed are {', '.join(CONFIG)}")
    return config


def read_metrics(path: Path, names: Iterable[str] = ()) -> dict[str, Any]:
    """The checked content of one metrics.json; ValueError names the file and the key.

    names: files beside it that must be those of the run.
    """
    metrics = seal.read(path, AGAIN, names)
    check(metrics, METRICS, str(path))
    switched = metrics["transition"]["step"] is not None
    if (metrics["transition"]["reason"] is not None) != switched:
        raise ValueError(f"{path}: transition.reason: must be null exactly when the step is")
    if (metrics["pattern"] is not None) != switched:
        raise ValueError(f"{path}: pattern: must be null exactly when transition.step is")
    if switched and not metrics["pattern"]["density"]:
        raise ValueError(f"{path}: pattern.density: expected a value a layer, found none")
    if (metrics["phases"]["dense"] is None) != (metrics["transition"]["reason"] == "start"):
        raise ValueError(
            f"{path}: phases.dense: must be null exactly if transition.reason is start"
        )
    if metrics["phases"]["sparse"] is not None and not switched:
        raise ValueError(f"{path}: phases.sparse: must be null when transition.step is")
    return metrics


def read_settings(path: Path) -> dict[str, Any]:
    """The settings that a run was trained with (config.json of its folder)."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    check(settings, {"task": TEXT, "attention": TEXT, "seed": INTEGER}, str(path))
    return settings


def read_failures(config: dict[str, Any], runs_dir: Path) -> dict[str, dict[str, Any]]:
    """What failed.json says, by "<task>/<attention>/seed<seed>", of runs that have one and no metrics.json."""
    failures = {}
    for name in expected_runs(config):
        path = runs_dir / name / "failed.json"
        if not path.is_file() or (path.parent / "metrics.json").is_file():
            continue
        failures[name] = seal.read(path, "delete it or train the run again")
        check(failures[name], FAILURE, str(path))
    return failures


def expected_runs(config: dict[str, Any]) -> dict[str, str]:
    """ "<task>/<attention>/seed<seed>" -> task of every run of the configuration."""
    return {
        f"{task}/{attention}/seed{seed}": task
        for task in config["tasks"]
        for attention in config["attentions"]
        for seed in config["seeds"]
    }


def run_name(metrics: dict[str, Any]) -> str:
    return f"{metrics['task']}/{metrics['attention']}/seed{metrics['seed']}"


def retrain_command(config: dict[str, Any], task: str) -> str:
    return f"`snakemake --cores all {task}` (with the configuration of run {config['run']!r})"


def read_runs(
    paths: Iterable[Path], config: dict[str, Any], runs_dir: Path, allow_missing: bool
) -> dict[str, dict[str, Any]]:
    """Metrics by "<task>/<attention>/seed<seed>", whatever the order of `paths`.

    Raises ValueError for a file of another run, for two files of the same run, for runs of a task
    on different data and, unless `allow_missing`, for a run of `config` that has no file.
    """
    runs: dict[str, dict[str, Any]] = {}
    origin: dict[str, Path] = {}
    expected = expected_runs(config)
    for path in sorted(path for path in paths if path.exists()):
        metrics = read_metrics(path, ["config.json"])
        name = run_name(metrics)
        if metrics["run"] != config["run"] or name not in expected:
            raise ValueError(
                f"{path}: run {metrics['run']!r}, {name}: not among the runs of --config"
            )
        digest = config.get("digests", {}).get(name)
        if digest is not None and not metrics["config_sha256"].startswith(digest):
            raise ValueError(
                f"{path}: trained with other settings than those of the configuration (by hand, "
                f"perhaps): train again with {retrain_command(config, metrics['task'])} and "
                "--forcerun train"
            )
        if name in runs:
            raise ValueError(f"{path}: {name} is already given by {origin[name]}")
        settings = path.parent / "config.json"
        metrics["settings"] = read_settings(settings) if settings.is_file() else None
        runs[name], origin[name] = metrics, path

    missing = [name for name in expected if name not in runs]
    if missing and not allow_missing:
        raise ValueError(
            f"{runs_dir / missing[0] / 'metrics.json'}: not there, the run is not finished "
            f"({len(missing)} of {len(expected)} runs are missing): train with "
            f"{retrain_command(config, expected[missing[0]])}, or give --allow-missing"
        )
    for task in config["tasks"]:
        of_task = [run for run in runs.values() if run["task"] == task]
        for key in ("data", "data_sha256", "options"):
            require_equal(of_task, key, config)
    return runs


def require_equal(runs: list[dict[str, Any]], key: str, config: dict[str, Any]) -> None:
    """Runs of one ranking must agree in `key`; ValueError names two that do not."""
    for run in runs:
        if run[key] != runs[0][key]:
            raise ValueError(
                f"{key} of {run_name(run)} is {run[key]!r}, of {run_name(runs[0])} "
                f"{runs[0][key]!r}: they cannot be compared, train again with "
                f"{retrain_command(config, run['task'])}"
            )


def ordered_tasks(tasks: Iterable[str]) -> list[str]:
    """LRA's tasks in LRA's order, then a user's own by name."""
    return sorted(tasks, key=lambda t: (LRA_TASKS.index(t) if t in LRA_TASKS else 99, t))


def describe_device(device: dict[str, Any]) -> str:
    threads, processes = device["threads"], device["processes"]
    times = f"{processes} × " if processes > 1 else ""
    return (
        f"{times}{device['name']} ({device['type']}, {threads} thread{'s' if threads > 1 else ''})"
    )


def describe_switches(runs: list[dict[str, Any]]) -> str:
    """What made the switch: "rule", "limit", "start", "never", or counts if seeds differ."""
    counts = Counter(run["transition"]["reason"] or "never" for run in runs)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{r} {counts[r]}" for r in (*REASONS, "never") if r in counts)


def chance_of(scored: dict[str, Any]) -> tuple[str, float]:
    """What an accuracy has to exceed, in words and percent: chance, or the baseline where that is larger."""
    if (scored["baseline"] or 0) > scored["chance"]:
        return "root operator alone", 100 * scored["baseline"]
    return "chance", 100 * scored["chance"]


def above_chance(runs: list[dict[str, Any]]) -> str:
    """Whether the mean test accuracy exceeds chance, or the baseline where there is one.

    "yes" when it does by more than two standard errors, else "no".
    """
    test = runs[0]["test"]
    chance, examples = chance_of(test)[1] / 100, test["examples"]
    error = math.sqrt(chance * (1 - chance) / examples)  # all seeds are scored on the same examples
    mean = statistics.fmean(run["test"]["accuracy"] for run in runs)
    return "yes" if mean > chance + 2 * error else "no"


def summarise(runs: list[dict[str, Any]], num_expected: int) -> dict[str, Any]:
    """One row: csv column -> number or text over the seeds in `runs`; None where there is none.

    Accuracies in percent, sd with n - 1; times are medians, memory the largest of the seeds.
    """
    if not runs:
        return {"status": "no finished run", "num_seeds": 0}
    complete = len(runs) == num_expected
    low, high = interval_95([100 * run["test"]["accuracy"] for run in runs]) or (None, None)
    accuracies = [100 * run["test"]["accuracy"] for run in runs]
    steps = [run["transition"]["step"] for run in runs]
    switched = [run for run in runs if run["transition"]["step"] is not None]
    dense = [run["phases"]["dense"] for run in runs if run["phases"]["dense"] is not None]
    sparse = [run["phases"]["sparse"] for run in runs if run["phases"]["sparse"] is not None]
    row = {
        "data": runs[0]["data"],
        "options": ", ".join(runs[0]["options"]),
        "status": "complete" if complete else f"{len(runs)} of {num_expected} seeds",
        "num_seeds": len(runs),
        "test_accuracy_mean_percent": statistics.fmean(accuracies),
        "test_accuracy_sd_percent": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "test_accuracy_95_low_percent": low,
        "test_accuracy_95_high_percent": high,
        "chance_percent": 100 * runs[0]["test"]["chance"],
        "baseline_percent": None
        if runs[0]["test"]["baseline"] is None
        else 100 * runs[0]["test"]["baseline"],
        "above_chance": above_chance(runs),
        "dev_accuracy_mean_percent": statistics.fmean(100 * r["dev"]["accuracy"] for r in runs),
        "test_loss_mean": statistics.fmean(run["test"]["loss"] for run in runs),
        "num_parameters": runs[0]["num_parameters"],
        "num_steps_mean": statistics.fmean(run["num_steps"] for run in runs),
        "batch_size": (runs[0].get("settings") or {}).get("training", {}).get("batch_size"),
        "device": "; ".join(sorted({describe_device(run["device"]) for run in runs})),
        "training_seconds_mean": statistics.fmean(run["training_seconds"] for run in runs),
    }
    if runs[0]["transition_rule"] != "never":
        row["transition_steps"] = " ".join("never" if s is None else str(s) for s in steps)
        row["transition_made_by"] = describe_switches(runs)
    if switched:
        row["transition_step_mean"] = statistics.fmean(s for s in steps if s is not None)
        row["density_mean"] = statistics.fmean(d for r in switched for d in r["pattern"]["density"])
    for name, phases in (("dense", dense), ("sparse", sparse)):
        if not phases:
            continue
        times = [p["ms_per_step"] for p in phases if p["ms_per_step"] is not None]
        row[f"{name}_ms_per_step_median"] = statistics.median(times) if times else None
        row[f"{name}_peak_memory_max_mib"] = max(p["peak_memory_bytes"] for p in phases) / MIB
    if ratios := [ratio for run in runs if (ratio := speed_up(run)) is not None]:
        row["speed_up_median"] = statistics.median(ratios)
    return row


def speed_up(run: dict[str, Any]) -> float | None:
    """Dense over sparse time a step of a run that had both."""
    dense, sparse = (
        phase and phase["ms_per_step"] for phase in (run["phases"][p] for p in ("dense", "sparse"))
    )
    return dense / sparse if dense and sparse else None


def describe_failures(failures: list[dict[str, Any]]) -> str:
    """ "seed 1003: out of memory at step 120; ..." """
    return "; ".join(
        f"seed {f['seed']}: {f['kind']}" + (f" at step {f['step']}" if f.get("step") else "")
        for f in failures
    )


def build_table(
    runs: dict[str, dict[str, Any]],
    config: dict[str, Any],
    failures: dict[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """The rows in their fixed order, every csv column present (None: no value)."""
    failures = failures or {}
    rows = []
    for task in ordered_tasks(config["tasks"]):
        for attention in config["attentions"]:
            names = [f"{task}/{attention}/seed{seed}" for seed in config["seeds"]]
            found = [runs[name] for name in names if name in runs]
            require_equal(found, "num_parameters", config)
            row = summarise(found, len(config["seeds"]))
            row |= {"task": task, "attention": attention}
            failed = [failures[name] for name in names if name in failures]
            row["failures"] = describe_failures(failed) or None
            if failed and not found:
                row["status"] = "/".join(sorted({f["kind"] for f in failed}))
            rows.append({column: row.get(column) for column in COLUMNS})
    return rows


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Numbers in the fixed formats of COLUMNS, so that equal results are equal bytes."""
    return tables.to_csv(rows, COLUMNS)


# The tables for people: heading -> (alignment, text of a row).


def accuracy_text(row: dict[str, Any]) -> str:
    if not row["num_seeds"]:
        return row["status"]
    sd = row["test_accuracy_sd_percent"]
    return number(row["test_accuracy_mean_percent"], ".2f") + ("" if sd is None else f" ± {sd:.2f}")


def interval_text(row: dict[str, Any]) -> str:
    low, high = row["test_accuracy_95_low_percent"], row["test_accuracy_95_high_percent"]
    return "–" if low is None else f"{low:.2f} to {high:.2f}"


def chance_text(row: dict[str, Any]) -> str:
    chance = number(row["chance_percent"], ".2f")
    if row["baseline_percent"] is not None:
        chance += f" (root operator {row['baseline_percent']:.2f})"
    return f"{chance}, not exceeded" if row["above_chance"] == "no" else chance


def switch_text(row: dict[str, Any]) -> str:
    """ "120", "150 (120–180)" when seeds differ, "never", or "–" where there is none to make."""
    if row["transition_steps"] is None:
        return "–"
    steps = [int(s) for s in row["transition_steps"].split() if s != "never"]
    if not steps:
        return "never"
    mean = f"{row['transition_step_mean']:.0f}"
    return mean if min(steps) == max(steps) else f"{mean} ({min(steps)}–{max(steps)})"


def pair_text(row: dict[str, Any], dense: str, sparse: str) -> str:
    if not row["num_seeds"]:
        return "–"
    return f"{number(row[dense], '.1f')} / {number(row[sparse], '.1f')}"


def seeds_text(row: dict[str, Any]) -> str:
    """ "3", or "2 of 3 (seed 1003: out of memory)" when runs are missing."""
    some_missing = row["status"].endswith(" seeds")
    text = row["status"].removesuffix(" seeds") if some_missing else str(row["num_seeds"])
    return f"{text} ({row['failures']})" if row["failures"] else text


DISPLAY: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "task": ("l", lambda r: r["task"] + (f" ({r['options']})" if r["options"] else "")),
    "attention": ("l", lambda r: r["attention"]),
    "data": ("l", lambda r: r["data"] or "–"),
    "seeds": ("r", seeds_text),
    "test accuracy (%)": ("r", accuracy_text),
    "95 % interval": ("r", interval_text),
    "chance (%)": ("r", chance_text),
    "best dev (%)": ("r", lambda r: number(r["dev_accuracy_mean_percent"], ".2f")),
    "test loss": ("r", lambda r: number(r["test_loss_mean"], ".3f")),
    "switch at step": ("r", switch_text),
    "made by": ("l", lambda r: r["transition_made_by"] or "–"),
    "density": ("r", lambda r: number(r["density_mean"], ".3f")),
    "ms a step": (
        "r",
        lambda r: pair_text(r, "dense_ms_per_step_median", "sparse_ms_per_step_median"),
    ),
    "speed-up": ("r", lambda r: number(r["speed_up_median"], ".2f")),
    "peak MiB": (
        "r",
        lambda r: pair_text(r, "dense_peak_memory_max_mib", "sparse_peak_memory_max_mib"),
    ),
    "parameters": ("r", lambda r: number(r["num_parameters"], ",d")),
    "steps × batch": (
        "r",
        lambda r: f"{number(r['num_steps_mean'], ',.0f')} × {number(r['batch_size'], 'd')}",
    ),
    "training (s)": ("r", lambda r: number(r["training_seconds_mean"], ".1f")),
}
SHORT = ("task", "attention", "test accuracy (%)", "switch at step", "speed-up", "peak MiB")
SHORT_NOTE = (
    "Test accuracy: mean ± standard deviation over the seeds, the best of a task in bold. Speed-up: dense over "
    "sparse time a training step of the same run, whose dense phase also gathers what the switch needs. Peak MiB: "
    "dense phase / sparse phase."
)
MEMORY_NOTE = (
    "Peak MiB: on a CPU resident memory of the whole process, on a GPU what torch has allocated."
)
NOTES = (
    "Test accuracy: mean ± standard deviation over the seeds (n − 1; none for one seed), every "
    "test example counted once. 95 % interval: of that mean, by Student's t, from three seeds on. "
    "Bold: the best of a task, where at least two attentions finished and "
    "it is above chance.",
    "Chance: the share of the most frequent class in the test split; root operator: the accuracy of "
    "the most frequent answer to a ListOps row's first operator, which needs no tree; not exceeded: "
    "the accuracy is not more than two standard errors above the larger of the two. Best dev: the "
    "dev accuracy of "
    "the tested checkpoint, mean over the seeds.",
    "Switch at step: the step at which training went sparse, mean (smallest–largest) over the "
    "seeds that did; made by: the rule on skewness and distance, or the limit on dense steps; start: "
    "sparse from the first step.",
    "Density: selected blocks over all blocks, mean over layers and seeds.",
    "ms a step and peak MiB: dense phase / sparse phase. Times are medians, memory is the largest "
    "of the seeds. Speed-up: dense over sparse time a step of the same run, a whole training step "
    "and not attention alone; the dense phase of a run that may switch also gathers what the "
    "switch needs.",
    MEMORY_NOTE,
    "Steps × batch: optimiser steps (mean over the seeds, which may stop early) and sequences in each. Training: with "
    "the evaluations on dev.",
    "Times and memory vary from run to run; all else is the same for the same seeds and machine.",
)


def best_rows(rows: list[dict[str, Any]]) -> set[int]:
    """Rows that hold the best test accuracy, as shown, of a task with two or more to compare."""
    best = set()
    for task in {row["task"] for row in rows}:
        shown = {
            i: round(row["test_accuracy_mean_percent"], 2)
            for i, row in enumerate(rows)
            if row["task"] == task and row["num_seeds"]
        }
        if len(shown) > 1:
            best |= {
                i
                for i, value in shown.items()
                if value == max(shown.values()) and rows[i]["above_chance"] == "yes"
            }
    return best


def caption(rows: list[dict[str, Any]], run: str) -> list[str]:
    """Sentences that say which run this is, on which data and on what hardware."""
    kinds = {kind: [] for kind in ("released", "generated", "own")}
    for row in rows:
        if row["data"] and row["task"] not in kinds[row["data"]]:
            kinds[row["data"]].append(row["task"])
    sentences = [f"Run {run}."]
    if kinds["released"] and kinds["generated"]:
        sentences.append(
            f"Released data: {', '.join(kinds['released'])}. "
            f"Generated data: {', '.join(kinds['generated'])}; "
            "the two are not comparable with each other."
        )
    elif kinds["generated"]:
        sentences.append(
            "Generated data: these are not the released Long Range Arena data sets, and the "
            "figures are not comparable with published ones."
        )
    elif kinds["released"]:
        sentences.append("Released data.")
    if kinds["own"]:
        sentences.append(f"Data of one's own: {', '.join(kinds['own'])}.")
    devices = sorted({d for row in rows if row["device"] for d in row["device"].split("; ")})
    if devices:
        sentences.append(f"Hardware: {'; '.join(devices)}.")
    return sentences


def display(rows: list[dict[str, Any]], run: str) -> tables.Table:
    """The table for people, the best of each task in bold."""
    best = best_rows(rows)
    return tables.make_table(
        " ".join(caption(rows, run)),
        DISPLAY,
        rows,
        lambda row, heading: row in best and heading == "test accuracy (%)",
        NOTES,
    )


def short_latex(rows: list[dict[str, Any]], run: str) -> str:
    """The columns of SHORT, unscaled: a table that fits the width of a page."""
    whole = display(rows, run)
    kept = [whole.headings.index(heading) for heading in SHORT]
    table = tables.Table(
        title=whole.title,
        headings=list(SHORT),
        align="".join(whole.align[j] for j in kept),
        cells=[[line[j] for j in kept] for line in whole.cells],
        bold=frozenset((i, kept.index(j)) for i, j in whole.bold if j in kept),
        notes=(SHORT_NOTE,),
    )
    return tables.LATEX_PACKAGES + tables.to_latex(table, scaled=False)


def to_markdown(rows: list[dict[str, Any]], run: str) -> str:
    return tables.to_markdown(display(rows, run))


def to_latex(rows: list[dict[str, Any]], run: str) -> str:
    return tables.LATEX_PACKAGES + tables.to_latex(display(rows, run))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument("--output-dir", type=Path, required=True, help="results/<run>")
    args = parser.parse_args(argv)
    try:
        config, runs, failures = read_arguments(args)
        rows = build_table(runs, config, failures)
        markdown = to_markdown(rows, config["run"])
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_all(
            {
                args.output_dir / "table.csv": to_csv(rows),
                args.output_dir / "table.md": markdown,
                args.output_dir / "table.tex": to_latex(rows, config["run"]),
                args.output_dir / "table_short.tex": short_latex(rows, config["run"]),
            }
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(markdown)
    print(f"written: {args.output_dir}/table.csv, table.md, table.tex, table_short.tex")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say which runs are meant; `read_arguments` reads them."""
    parser.add_argument(
        "metrics",
        nargs="*",
        type=Path,
        help="metrics.json files, in any order (default: those of --config below --runs-dir)",
    )
    parser.add_argument(
        "--config", required=True, help="JSON object with run, tasks, attentions and seeds"
    )
    parser.add_argument("--runs-dir", type=Path, help="default: results/<run>/runs")
    parser.add_argument(
        "--digests",
        default="{}",
        help="JSON object <task>/<attention>/seed<seed> -> sha256 of the settings it must have, or its start",
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="take the runs that are finished, and say which ones failed",
    )


def read_arguments(
    args: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """(configuration, runs by name, failures by name); ValueError as in `read_runs`."""
    config = parse_config(args.config) | {"digests": json.loads(args.digests)}
    runs_dir = args.runs_dir or Path("results", config["run"], "runs")
    paths = args.metrics or [runs_dir / name / "metrics.json" for name in expected_runs(config)]
    runs = read_runs(paths, config, runs_dir, args.allow_missing)
    return config, runs, read_failures(config, runs_dir)


if __name__ == "__main__":
    main()
