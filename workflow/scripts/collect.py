"""Collect the metrics of finished runs into one table: table.csv, table.md and table.tex.

    python workflow/scripts/collect.py --output-dir results/demo \\
        --config '{"run": "demo", "tasks": ["listops"], "attentions": ["softmax", "sat"],
                   "seeds": [1001, 1002]}' \\
        results/demo/runs/*/*/*/metrics.json

One row a (task, attention) over all seeds. The csv holds the bare numbers, units in the column
names; the Markdown and LaTeX tables hold the same, rounded and explained. Two runs of the same
configuration on the same machine give the same csv byte for byte, except for its last columns,
VOLATILE_COLUMNS: they hold times and memory.
"""

import argparse
import json
import math
import os
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pandas as pd

SCHEMA_VERSION = 1
LRA_TASKS = ("listops", "text", "retrieval", "image", "pathfinder")
MIB = 2**20

# csv column -> format of its numbers. Nothing else decides the order.
STABLE_COLUMNS = {
    "task": "",
    "attention": "",
    "data": "",
    "options": "",
    "status": "",
    "num_seeds": "d",
    "test_accuracy_mean_percent": ".4f",
    "test_accuracy_sd_percent": ".4f",
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


def one_of(*values: Any) -> tuple[str, Callable[[Any], bool]]:
    return (f"one of {', '.join(json.dumps(v) for v in values)}", lambda v: v in values)


PHASE = {"steps": COUNT, "ms_per_step": TIME, "seconds": TIME, "peak_memory_bytes": COUNT}
METRICS = {
    "schema_version": (
        f"{SCHEMA_VERSION} (a run of another version must be trained again)",
        lambda v: v == SCHEMA_VERSION,
    ),
    "run": TEXT,
    "task": TEXT,
    "attention": TEXT,
    "seed": INTEGER,
    "data": one_of("released", "generated"),
    "test": {
        "accuracy": SHARE,
        "loss": NUMBER,
        "examples": COUNT,
        "chance": SHARE,
        "baseline?": SHARE,
    },
    "dev": {"accuracy": SHARE, "loss": NUMBER, "examples": COUNT, "step": COUNT, "phase": TEXT},
    "transition_rule": TEXT,
    "transition": {"step?": COUNT, "reason?": one_of("rule", "limit", "start")},
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
    "device": {"type": TEXT, "name": TEXT, "threads": COUNT},
    "config_sha256": TEXT,
    "data_sha256": TEXT,
    "options": [TEXT],
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


def read_metrics(path: Path) -> dict[str, Any]:
    """The checked content of one metrics.json; ValueError names the file and the key."""
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
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
    expected = {
        f"{task}/{attention}/seed{seed}": task
        for task in config["tasks"]
        for attention in config["attentions"]
        for seed in config["seeds"]
    }
    for path in sorted(path for path in paths if path.exists()):
        metrics = read_metrics(path)
        name = run_name(metrics)
        if metrics["run"] != config["run"] or name not in expected:
            raise ValueError(
                f"{path}: run {metrics['run']!r}, {name}: not among the runs of --config"
            )
        digest = config.get("digests", {}).get(name)
        if digest is not None and metrics["config_sha256"] != digest:
            raise ValueError(
                f"{path}: trained with other settings than those of the configuration (by hand, "
                f"perhaps): train again with {retrain_command(config, metrics['task'])} and "
                "--forcerun train"
            )
        if name in runs:
            raise ValueError(f"{path}: {name} is already given by {origin[name]}")
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
    threads = device["threads"]
    return f"{device['name']} ({device['type']}, {threads} thread{'s' if threads > 1 else ''})"


def describe_switches(runs: list[dict[str, Any]]) -> str:
    """What made the switch: "rule", "limit", "start", "never", or counts if seeds differ."""
    counts = Counter(run["transition"]["reason"] or "never" for run in runs)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{r} {counts[r]}" for r in ("rule", "limit", "start", "never") if r in counts)


def above_chance(runs: list[dict[str, Any]]) -> str:
    """Whether the mean test accuracy exceeds chance, or the baseline where there is one.

    "yes" when it does by more than two standard errors, else "no".
    """
    test = runs[0]["test"]
    chance, examples = max(test["chance"], test["baseline"] or 0), test["examples"]
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
    accuracies = [100 * run["test"]["accuracy"] for run in runs]
    steps = [run["transition"]["step"] for run in runs]
    switched = [run for run in runs if run["transition"]["step"] is not None]
    dense, sparse = (
        [run["phases"][phase] for run in runs if run["phases"][phase] is not None]
        for phase in ("dense", "sparse")
    )
    pairs = [run["phases"] for run in runs if all(run["phases"].values())]
    row = {
        "data": runs[0]["data"],
        "options": ", ".join(runs[0]["options"]),
        "status": "complete" if complete else f"{len(runs)} of {num_expected} seeds",
        "num_seeds": len(runs),
        "test_accuracy_mean_percent": statistics.fmean(accuracies),
        "test_accuracy_sd_percent": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "chance_percent": 100 * runs[0]["test"]["chance"],
        "baseline_percent": None
        if runs[0]["test"]["baseline"] is None
        else 100 * runs[0]["test"]["baseline"],
        "above_chance": above_chance(runs),
        "dev_accuracy_mean_percent": statistics.fmean(100 * r["dev"]["accuracy"] for r in runs),
        "test_loss_mean": statistics.fmean(run["test"]["loss"] for run in runs),
        "num_parameters": runs[0]["num_parameters"],
        "device": "; ".join(sorted({describe_device(run["device"]) for run in runs})),
        "training_seconds_mean": statistics.fmean(run["training_seconds"] for run in runs),
    }
    if dense:
        row["dense_ms_per_step_median"] = statistics.median(p["ms_per_step"] for p in dense)
        row["dense_peak_memory_max_mib"] = max(p["peak_memory_bytes"] for p in dense) / MIB
    if runs[0]["transition_rule"] != "never":
        row["transition_steps"] = " ".join("never" if s is None else str(s) for s in steps)
        row["transition_made_by"] = describe_switches(runs)
    if switched:
        row["transition_step_mean"] = statistics.fmean(s for s in steps if s is not None)
        row["density_mean"] = statistics.fmean(d for r in switched for d in r["pattern"]["density"])
    if sparse:
        row["sparse_ms_per_step_median"] = statistics.median(p["ms_per_step"] for p in sparse)
        row["sparse_peak_memory_max_mib"] = max(p["peak_memory_bytes"] for p in sparse) / MIB
    if pairs:
        row["speed_up_median"] = statistics.median(
            pair["dense"]["ms_per_step"] / pair["sparse"]["ms_per_step"] for pair in pairs
        )
    return row


def build_table(runs: dict[str, dict[str, Any]], config: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows in their fixed order, every csv column present (None: no value)."""
    rows = []
    for task in ordered_tasks(config["tasks"]):
        for attention in config["attentions"]:
            names = [f"{task}/{attention}/seed{seed}" for seed in config["seeds"]]
            found = [runs[name] for name in names if name in runs]
            require_equal(found, "num_parameters", config)
            row = summarise(found, len(config["seeds"]))
            row |= {"task": task, "attention": attention}
            rows.append({column: row.get(column) for column in COLUMNS})
    return rows


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Numbers in the fixed formats of COLUMNS, so that equal results are equal bytes."""
    cells = [
        {c: "" if row[c] is None else format(row[c], spec) for c, spec in COLUMNS.items()}
        for row in rows
    ]
    return pd.DataFrame(cells, columns=list(COLUMNS)).to_csv(index=False, lineterminator="\n")


# The tables for people: heading -> (alignment, text of a row).


def number(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def accuracy_text(row: dict[str, Any]) -> str:
    if not row["num_seeds"]:
        return row["status"]
    sd = row["test_accuracy_sd_percent"]
    return number(row["test_accuracy_mean_percent"], ".2f") + ("" if sd is None else f" ± {sd:.2f}")


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
    """ "3", or "2 of 3" when runs are missing."""
    some_missing = row["status"].endswith(" seeds")
    return row["status"].removesuffix(" seeds") if some_missing else str(row["num_seeds"])


DISPLAY: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "task": ("l", lambda r: r["task"] + (f" ({r['options']})" if r["options"] else "")),
    "attention": ("l", lambda r: r["attention"]),
    "data": ("l", lambda r: r["data"] or "–"),
    "seeds": ("r", seeds_text),
    "test accuracy (%)": ("r", accuracy_text),
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
    "training (s)": ("r", lambda r: number(r["training_seconds_mean"], ".1f")),
}
NOTES = (
    "Test accuracy: mean ± standard deviation over the seeds (n − 1; none for one seed), every "
    "test example counted once. Bold: the best of a task, where at least two attentions finished and "
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
    "Times and memory vary from run to run; all else is the same for the same seeds and machine.",
)


def display_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    return [[text(row) for _, text in DISPLAY.values()] for row in rows]


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
    kinds = {kind: [] for kind in ("released", "generated")}
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
    devices = sorted({d for row in rows if row["device"] for d in row["device"].split("; ")})
    if devices:
        sentences.append(f"Hardware: {'; '.join(devices)}.")
    return sentences


MARKDOWN_ESCAPES = str.maketrans({c: "\\" + c for c in "\\|*_`<"})
LATEX_ESCAPES = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "{": r"\{",
        "}": r"\}",
        "$": r"\$",
        "&": r"\&",
        "#": r"\#",
        "%": r"\%",
        "_": r"\_",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        "±": r"$\pm$",
        "−": "$-$",
        "–": "--",
    }
)


def to_markdown(rows: list[dict[str, Any]], run: str) -> str:
    """A table that reads well as it is and when rendered."""
    best = best_rows(rows)
    accuracy = list(DISPLAY).index("test accuracy (%)")
    lines = [list(DISPLAY)]
    for i, cells in enumerate(display_rows(rows)):
        cells = [cell.translate(MARKDOWN_ESCAPES) for cell in cells]
        if i in best:
            cells[accuracy] = f"**{cells[accuracy]}**"
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(DISPLAY))]
    right = [align == "r" for align, _ in DISPLAY.values()]
    lines.insert(
        1,
        ["-" * (w - 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)],
    )
    table = "\n".join(
        "| "
        + " | ".join(
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)
        )
        + " |"
        for line in lines
    )
    head = " ".join(caption(rows, run)).translate(MARKDOWN_ESCAPES)
    notes = "\n".join(f"- {note}" for note in NOTES)
    return f"{head}\n\n{table}\n\n{notes}\n"


def to_latex(rows: list[dict[str, Any]], run: str) -> str:
    """A table environment with a booktabs tabular, caption and notes."""
    best = best_rows(rows)
    accuracy = list(DISPLAY).index("test accuracy (%)")
    body = []
    for i, cells in enumerate(display_rows(rows)):
        cells = [cell.translate(LATEX_ESCAPES) for cell in cells]
        if i in best:
            cells[accuracy] = rf"\textbf{{{cells[accuracy]}}}"
        body.append(cells)
    frame = pd.DataFrame(body, columns=[name.translate(LATEX_ESCAPES) for name in DISPLAY])
    columns = "".join(align for align, _ in DISPLAY.values())
    tabular = frame.to_latex(index=False, escape=False, column_format=columns).rstrip()
    head = " ".join(caption(rows, run)).translate(LATEX_ESCAPES)
    notes = " ".join(NOTES).translate(LATEX_ESCAPES)
    return (
        "% needs \\usepackage{booktabs} and \\usepackage{graphicx}\n"
        "\\begin{table}[htbp]\n"
        "\\centering\n"
        f"\\caption{{{head}}}\n"
        "\\resizebox{\\textwidth}{!}{%\n"
        f"{tabular}%\n"
        "}\n\n"
        f"\\smallskip\n{{\\footnotesize {notes}}}\n"
        "\\end{table}\n"
    )


def write_all(contents: dict[Path, str]) -> None:
    """Write every file under a temporary name, then rename them: all or nothing half-written."""
    parts = {path: path.with_name(path.name + ".part") for path in contents}
    try:
        for path, text in contents.items():
            parts[path].write_text(text, encoding="utf-8", newline="\n")
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("metrics", nargs="*", type=Path, help="metrics.json files, in any order")
    parser.add_argument("--output-dir", type=Path, required=True, help="results/<run>")
    parser.add_argument(
        "--config", required=True, help="JSON object with run, tasks, attentions and seeds"
    )
    parser.add_argument(
        "--digests",
        default="{}",
        help="JSON object <task>/<attention>/seed<seed> -> sha256 of the settings it must have",
    )
    parser.add_argument(
        "--allow-missing", action="store_true", help="make the table of the runs that exist"
    )
    args = parser.parse_args(argv)
    try:
        config = parse_config(args.config) | {"digests": json.loads(args.digests)}
        runs = read_runs(args.metrics, config, args.output_dir / "runs", args.allow_missing)
        rows = build_table(runs, config)
        markdown = to_markdown(rows, config["run"])
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_all(
            {
                args.output_dir / "table.csv": to_csv(rows),
                args.output_dir / "table.md": markdown,
                args.output_dir / "table.tex": to_latex(rows, config["run"]),
            }
        )
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(markdown)
    print(f"written: {args.output_dir}/table.csv, table.md, table.tex")


if __name__ == "__main__":
    main()
