"""Make the other tables of a run set: beside published figures, ablations, and what everything cost.

    python workflow/scripts/compare.py --output-dir results/demo/tables \\
        --published config/published.csv --benchmarks results/demo/benchmarks \\
        --config '{"run": "demo", "tasks": ["listops"], "attentions": ["softmax", "sat"],
                   "seeds": [1001, 1002]}'

Writes, each as csv, md and tex:

    published     our test accuracies and speed-ups beside published ones, each with source and caveat;
                  figures of generated data stand in a table of their own, ranked with nobody
    ablation      the runs by what sets them apart: transition rule, denominator, pattern source,
                  learning rate after the switch and every other setting of the method that differs
    cost          time, processor time, memory of the trainings
    preparation   time and memory of the steps before: downloads, preprocessing, kernels

What a run was trained with is read from its folder (config.json), times of jobs from the tables that
Snakemake writes for each (`benchmark:`); a job that was interrupted counts its last attempt only.
"""

import argparse
import csv
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tables
from collect import (
    COLUMNS,
    DISPLAY,
    MEMORY_NOTE,
    add_run_arguments,
    build_table,
    caption,
    ordered_tasks,
    read_arguments,
    seeds_text,
)
from tables import interval_95, number, write_all

PUBLISHED = ("system", "task", "metric", "value", "std", "n", "unit", "source", "note")
ACCURACY = "accuracy"
KINDS = ("released", "own", "generated", "unknown")  # of data: never ranked with each other
SPEED_UP = "speedup of a sparse step over a dense step"

# Settings of the method by the words of the table's heading; what else differs is named in full.
ABLATED = {
    "transition rule": ("transition", "rule"),
    "denominator": ("model", "denominator"),
    "pattern source": ("pattern", "source"),
    "learning rate after": ("transition", "learning_rate"),
}
METHOD = ("transition", "pattern", "model", "training")  # blocks in which attentions may differ
# What only the switch and what follows it read: it sets no dense attention apart.
OF_THE_SWITCH = (
    "transition.",
    "pattern.",
    "model.block_size",
    "model.density",
    "training.attn_loss_scale",
    "training.distance",
    "training.num_dense_train_steps",
    "training.num_init_steps",
    "training.skewness",
)

PUBLISHED_COLUMNS = {
    "task": "",
    "metric": "",
    "data": "",
    "system": "",
    "ours": "",
    "value": ".4f",
    "sd": ".4f",
    "n": "d",
    "unit": "",
    "source": "",
    "caveat": "",
    "status": "",
    "failures": "",
}
ABLATION_COLUMNS = {
    "task": "",
    "attention": "",
    "base": "",
    **{heading.replace(" ", "_"): "" for heading in ABLATED},
    "other_differences": "",
    "status": "",
    "failures": "",
    "num_seeds": "d",
    "test_accuracy_mean_percent": ".4f",
    "test_accuracy_sd_percent": ".4f",
    "test_loss_mean": ".6f",
    "difference_percent": ".4f",
    "difference_95_low_percent": ".4f",
    "difference_95_high_percent": ".4f",
    "num_pairs": "d",
    "transition_steps": "",
    "density_mean": ".6f",
    "mass_mean": ".6f",
    "best_mass_mean": ".6f",
    "random_mass_mean": ".6f",
    "speed_up_median": ".3f",
}
COST_COLUMNS = {
    "task": "",
    "attention": "",
    "status": "",
    "failures": "",
    "num_seeds": "d",
    "device": "",
    "cpu_seconds_mean": ".1f",
    "gpu_seconds_mean": ".1f",
    "training_seconds_mean": ".1f",
    "job_seconds_mean": ".1f",
    "dense_steps_per_second": ".3f",
    "sparse_steps_per_second": ".3f",
    "dense_peak_memory_max_mib": ".1f",
    "sparse_peak_memory_max_mib": ".1f",
}
PREPARATION_COLUMNS = {
    "step": "",
    "seconds": ".1f",
    "cpu_seconds": ".1f",
    "peak_memory_mib": ".1f",
}


# ---------------------------------------------------------------- published figures


def read_published(path: Path) -> list[dict[str, Any]]:
    """Rows of config/published.csv; ValueError names the line."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != PUBLISHED:
            raise ValueError(f"{path}: expected the columns {', '.join(PUBLISHED)}")
        rows = []
        for line, row in enumerate(reader, start=2):
            try:
                row["value"] = float(row["value"])
                row["std"] = float(row["std"]) if row["std"] else None
                row["n"] = int(row["n"]) if row["n"] else None
            except (TypeError, ValueError):
                raise ValueError(f"{path}: line {line}: value, std or n is not a number") from None
            if None in row:
                raise ValueError(
                    f"{path}: line {line}: more values than columns; put a value with a comma in quotes"
                )
            if not row["source"]:
                raise ValueError(f"{path}: line {line}: a published figure needs its source")
            rows.append(row)
    return rows


def published_rows(
    rows: list[dict[str, Any]], published: list[dict[str, Any]], run: str
) -> list[dict[str, Any]]:
    """Published figures and ours by task, metric and kind of data, the best first and failed runs last in each."""
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows)]
    kinds = {row["task"]: row["data"] for row in rows if row["data"]}
    found = [
        {
            "task": row["task"] or None,
            "metric": row["metric"],
            "data": "released",
            "system": row["system"],
            "ours": None,
            "value": row["value"],
            "sd": row["std"],
            "n": row["n"],
            "unit": row["unit"],
            "source": row["source"],
            "caveat": row["note"] or None,
            "status": None,
            "failures": None,
        }
        for row in published
        if row["task"] in tasks or not row["task"]
    ]
    for row in rows:
        baseline = row["baseline_percent"]
        caveats = [row["options"], baseline and f"root operator alone {baseline:.2f} %"]
        of_speed_up = [row["options"], "the dense step also gathers what the switch needs"]
        common = {
            "task": row["task"],
            "data": kinds.get(row["task"], "unknown"),
            "system": row["attention"],
            "ours": "ours",
            "source": f"run {run}",
            "status": row["status"],
            "failures": row["failures"],
            "num_seeds": row["num_seeds"],
        }
        accuracy = {
            "metric": ACCURACY,
            "unit": "%",
            "n": row["num_seeds"],
            "value": row["test_accuracy_mean_percent"],
            "sd": row["test_accuracy_sd_percent"],
            "caveat": "; ".join(filter(None, caveats)) or None,
        }
        found.append(common | accuracy)
        if row["speed_up_median"] is not None:
            speed_up = {
                "metric": SPEED_UP,
                "unit": "x",
                "n": row["num_seeds"],
                "value": row["speed_up_median"],
                "sd": None,
                "caveat": "; ".join(filter(None, of_speed_up)),
            }
            found.append(common | speed_up)
    metrics = list(dict.fromkeys(row["metric"] for row in found))
    metrics.sort(key=lambda metric: metric != ACCURACY)

    def rank(value: float | None) -> float:
        return -math.inf if value is None else value

    def place(row: dict[str, Any]) -> tuple:
        task = tasks.index(row["task"]) if row["task"] in tasks else len(tasks)
        return KINDS.index(row["data"]), task, metrics.index(row["metric"]), -rank(row["value"])

    return sorted(found, key=place)


def value_text(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return row["status"]
    spec = (
        ".2f" if row["ours"] or row["unit"] == "%" else "g"
    )  # not more digits than the source has
    sd = "" if row["sd"] is None else f" ± {row['sd']:.2f}"
    return f"{row['value']:{spec}}{sd} {row['unit']}"


def published_tables(rows: list[dict[str, Any]], run: str) -> list[tables.Table]:
    """One table of released data, and one of generated data where there are such runs."""
    columns = {
        "task": ("l", lambda r: r["task"] or "any"),
        "metric": ("l", lambda r: r["metric"]),
        "system": ("l", lambda r: f"{r['system']} (ours)" if r["ours"] else r["system"]),
        "value": ("r", value_text),
        "n": ("r", lambda r: seeds_text(r) if r["ours"] else number(r["n"], "d")),
        "source": ("l", lambda r: r["source"]),
        "caveat": ("l", lambda r: r["caveat"] or "–"),
    }
    ours_too = any(row["ours"] and row["data"] == "released" for row in rows)
    texts = {
        "released": f"Published figures{f' and those of run {run}' if ours_too else ''} on released data, best first.",
        "generated": f"Run {run} on generated data: not the data of the published figures, and not to be ranked with "
        "them.",
        "own": f"Run {run} on data of one's own: nothing published to compare with.",
        "unknown": f"Run {run}, tasks without a finished run.",
    }
    notes = (
        "Ours: mean ± standard deviation of test accuracy over n seeds, median speed-up over n seeds. "
        "Published: as their source gives them; – where it does not say. Systems differ in model size, "
        "training and preprocessing: a caveat names what is known to differ.",
    )
    result = []
    for kind in KINDS:
        text = texts[kind]
        of_kind = [row for row in rows if row["data"] == kind]
        if of_kind:
            result.append(
                tables.make_table(
                    text,
                    columns,
                    of_kind,
                    lambda i, heading, of_kind=of_kind: heading == "system" and of_kind[i]["ours"],
                    notes,
                )
            )
    return result


# ---------------------------------------------------------------- ablations


def method_of(run: dict[str, Any]) -> dict[str, Any]:
    """Settings in which attentions can differ, "block.key" -> value."""
    settings = run["settings"]
    return {
        f"{block}.{key}": value
        for block in METHOD
        for key, value in settings.get(block, {}).items()
    }


def base_of(groups: dict[str, list[dict[str, Any]]]) -> str | None:
    """The attention that the others are compared with: sat, or else the first that learns its pattern."""
    if "sat" in groups:
        return "sat"
    learned = (
        attention
        for attention, runs in groups.items()
        if runs[0]["settings"]["pattern"]["source"] == "parameter"
    )
    return next(learned, None)


def mean_of(runs: list[dict[str, Any]], key: str) -> float | None:
    """Mean over runs and layers of a list in metrics.pattern that not every run has."""
    values = [v for run in runs for v in (run["pattern"] or {}).get(key) or []]
    return statistics.fmean(values) if values else None


def ablation_rows(
    runs: dict[str, dict[str, Any]], rows: list[dict[str, Any]], config: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row for each attention of a task that differs from its base in settings of the method alone."""
    result = []
    summaries = {(row["task"], row["attention"]): row for row in rows}
    # An efficient attention is another model, not the method with a part taken out.
    efficient = {
        run["attention"]
        for run in runs.values()
        if run["settings"] and method_of(run).get("model.attention") not in (None, "softmax")
    }
    for task in ordered_tasks(config["tasks"]):
        groups: dict[str, list[dict[str, Any]]] = {}
        for attention in config["attentions"]:
            of_attention = [
                run
                for run in runs.values()
                if (run["task"], run["attention"]) == (task, attention) and run["settings"]
            ]
            if of_attention and attention not in efficient:
                groups[attention] = of_attention
        base = base_of(groups)
        if base is None:
            continue
        base_method = method_of(groups[base][0])
        by_seed = {run["seed"]: run for run in groups[base]}
        for attention in config["attentions"]:
            summary = summaries[task, attention]
            if attention not in groups:
                if summary["failures"] and not summary["num_seeds"] and attention not in efficient:
                    result.append(failed_row(summary, base))
                continue
            group = groups[attention]
            method = method_of(group[0])
            dense = method["transition.rule"] == "never"
            named = {".".join(path) for path in ABLATED.values()}
            others = [
                f"{key} {method[key]} (base {base_method.get(key)})"
                for key in method
                if key not in named
                and method[key] != base_method.get(key)
                and not (dense and key.startswith(OF_THE_SWITCH))
            ]
            differences = [
                100 * (run["test"]["accuracy"] - by_seed[run["seed"]]["test"]["accuracy"])
                for run in group
                if attention != base and run["seed"] in by_seed
            ]
            low, high = interval_95(differences) or (None, None)
            result.append(
                {
                    "task": task,
                    "attention": attention,
                    "base": base,
                    **{
                        heading.replace(" ", "_"): "–"
                        if dense and heading != "transition rule"
                        else str(method[".".join(path)])
                        for heading, path in ABLATED.items()
                    },
                    "other_differences": "; ".join(others) or None,
                    "difference_percent": statistics.fmean(differences) if differences else None,
                    "difference_95_low_percent": low,
                    "difference_95_high_percent": high,
                    "num_pairs": len(differences),
                    "mass_mean": mean_of(group, "mass"),
                    "best_mass_mean": mean_of(group, "best_mass"),
                    "random_mass_mean": mean_of(group, "random_mass"),
                    **{key: summary[key] for key in ABLATION_COLUMNS if key in summary},
                }
            )
    return result


def failed_row(summary: dict[str, Any], base: str) -> dict[str, Any]:
    """The row of an attention of which no run is finished: what it was to differ in is not known."""
    unknown = {heading.replace(" ", "_"): "–" for heading in ABLATED}
    return (
        dict.fromkeys(ABLATION_COLUMNS)
        | {key: summary[key] for key in ABLATION_COLUMNS if key in summary}
        | unknown
        | {"base": base, "other_differences": "not known: no run is finished"}
    )


def difference_text(row: dict[str, Any]) -> str:
    if row["difference_percent"] is None:
        return "–"
    text = f"{row['difference_percent']:+.2f}"
    if row["difference_95_low_percent"] is None:
        return text
    return f"{text} ({row['difference_95_low_percent']:+.2f} to {row['difference_95_high_percent']:+.2f})"


def mass_text(row: dict[str, Any]) -> str:
    if row["mass_mean"] is None:
        return "–"
    others = (row["best_mass_mean"], row["random_mass_mean"])
    return (
        f"{100 * row['mass_mean']:.1f} ({' / '.join(number(v and 100 * v, '.1f') for v in others)})"
    )


def failed_text(rows: list[dict[str, Any]]) -> str:
    """A sentence on the rows of the main table that have failed runs; empty where none has."""
    failed = [f"{r['task']} {r['attention']} ({r['failures']})" for r in rows if r["failures"]]
    return f" Failed: {', '.join(failed)}." if failed else ""


def ablation_table(rows: list[dict[str, Any]], head: str) -> tables.Table:
    bases = {row["task"]: row for row in rows if row["attention"] == row["base"]}

    def differs(i: int, heading: str) -> bool:
        key = heading.replace(" ", "_")
        return (
            heading in ABLATED
            and rows[i]["num_seeds"]
            and rows[i][key] != bases[rows[i]["task"]][key]
        )

    columns = {
        "task": ("l", lambda r: r["task"]),
        "attention": (
            "l",
            lambda r: r["attention"] + (" (base)" if r["attention"] == r["base"] else ""),
        ),
        **{heading: ("l", lambda r, h=heading: r[h.replace(" ", "_")]) for heading in ABLATED},
        "other differences": ("l", lambda r: r["other_differences"] or "–"),
        "seeds": ("r", seeds_text),
        "test accuracy (%)": ("r", DISPLAY["test accuracy (%)"][1]),
        "difference from base": ("r", difference_text),
        "test loss": ("r", DISPLAY["test loss"][1]),
        "switch at step": ("r", lambda r: r["transition_steps"] or "–"),
        "density": ("r", DISPLAY["density"][1]),
        "mass held (%)": ("r", mass_text),
        "speed-up": ("r", DISPLAY["speed-up"][1]),
    }
    notes = (
        "A row an attention that is softmax over all blocks or over chosen ones, by what sets it apart from the base "
        "(bold); settings are those that the runs were trained with.",
        "Difference from base: mean over the seeds that both have, in points of accuracy, with its 95 % interval "
        "(paired, Student's t) from three seeds on.",
        "Mass held: share of the mean attention map that lies in the selected blocks, mean over layers and seeds "
        "(in the best blocks of the same number / in as many random ones).",
    )
    return tables.make_table(f"Ablations. {head}", columns, rows, differs, notes)


# ---------------------------------------------------------------- cost


def read_benchmark(path: Path) -> dict[str, float | None] | None:
    """{seconds, cpu_seconds, peak_memory_mib} of a job, as Snakemake measured it; None where there is no file.

    CPU time and memory are what Snakemake saw when it last looked (every half second, after 15 s every 30 s): None of a
    job of less than a second, of which it may have seen the shell alone.
    """
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        row = next(csv.DictReader(file, delimiter="\t"), None)
    if row is None or "s" not in row:
        raise ValueError(f"{path}: expected a benchmark table of Snakemake with the column s")

    def value(key: str) -> float | None:
        try:
            return float(row[key])
        except (KeyError, TypeError, ValueError):  # "-" or "NA"
            return None

    seen = (value("s") or 0) >= 1
    return {
        "seconds": value("s"),
        "cpu_seconds": value("cpu_time") if seen else None,
        "peak_memory_mib": value("max_rss") if seen else None,
    }


def cost_rows(
    runs: dict[str, dict[str, Any]], rows: list[dict[str, Any]], benchmarks: Path
) -> list[dict[str, Any]]:
    """What the trainings of each (task, attention) cost, mean over its finished seeds."""
    result = []
    for row in rows:
        group = [
            (name, run)
            for name, run in runs.items()
            if (run["task"], run["attention"]) == (row["task"], row["attention"])
        ]
        cpu = [
            sum(phase["cpu_seconds"] for phase in run["phases"].values() if phase)
            for _, run in group
        ]
        gpu = [
            run["training_seconds"] * run["device"]["processes"]
            for _, run in group
            if run["device"]["type"].startswith("cuda")
        ]
        jobs = [
            job_seconds(read_benchmark(benchmarks / "train" / f"{name}.tsv"), run)
            for name, run in group
        ]
        result.append(
            {key: row[key] for key in COST_COLUMNS if key in COLUMNS}
            | {
                "cpu_seconds_mean": mean_known(cpu),
                "gpu_seconds_mean": mean_known(gpu),
                "job_seconds_mean": mean_known(jobs),
                "dense_steps_per_second": per_second(row["dense_ms_per_step_median"]),
                "sparse_steps_per_second": per_second(row["sparse_ms_per_step_median"]),
            }
        )
    return result


def job_seconds(job: dict[str, float | None] | None, run: dict[str, Any]) -> float | None:
    """Seconds of the job that made the run; None without one, or when it made only the end of the run."""
    if not job or not job["seconds"] or job["seconds"] < run["training_seconds"]:
        return None
    return job["seconds"]


def mean_known(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def per_second(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else 1000 / milliseconds


def cost_table(rows: list[dict[str, Any]], head: str) -> tables.Table:
    columns = {
        "task": ("l", lambda r: r["task"]),
        "attention": ("l", lambda r: r["attention"]),
        "seeds": ("r", seeds_text),
        "CPU seconds": ("r", lambda r: number(r["cpu_seconds_mean"], ",.0f")),
        "GPU seconds": ("r", lambda r: number(r["gpu_seconds_mean"], ",.0f")),
        "training (s)": ("r", lambda r: number(r["training_seconds_mean"], ",.0f")),
        "whole job (s)": ("r", lambda r: number(r["job_seconds_mean"], ",.0f")),
        "steps a second": (
            "r",
            lambda r: pair(r, "dense_steps_per_second", "sparse_steps_per_second", ".2f"),
        ),
        "peak MiB": (
            "r",
            lambda r: pair(r, "dense_peak_memory_max_mib", "sparse_peak_memory_max_mib", ".0f"),
        ),
    }
    notes = (
        "Means over the seeds; steps a second and peak MiB: dense phase / sparse phase, the largest peak of the seeds.",
        "Training: with the evaluations on dev, over all attempts of a run that was interrupted. CPU seconds: of all "
        "threads and processes in that time. GPU seconds: training times the number of GPUs. Whole job: Snakemake's "
        "measurement, with start and test; – of a run that no one job made from start to end.",
        MEMORY_NOTE,
    )
    return tables.make_table(f"What the trainings cost. {head}", columns, rows, notes=notes)


def pair(row: dict[str, Any], first: str, second: str, spec: str) -> str:
    return f"{number(row[first], spec)} / {number(row[second], spec)}"


def preparation_rows(benchmarks: Path) -> list[dict[str, Any]]:
    """Steps before the trainings, in the order in which data flow."""
    return [{"step": name} | read_benchmark(path) for name, path in preparation_steps(benchmarks)]


def preparation_steps(benchmarks: Path) -> Iterator[tuple[str, Path]]:
    def words(name: str) -> str:
        return name.replace("_", " ")

    for path in sorted(benchmarks.glob("download/*.tsv")):
        yield f"download {path.stem}", path
    for pattern in ("demo_archives", "extract*", "prepare_*"):
        for path in sorted(benchmarks.glob(f"{pattern}.tsv")):
            yield words(path.stem), path
    paths = {path.stem: path for path in benchmarks.glob("preprocess/*.tsv")}
    for task in ordered_tasks(paths):
        yield f"preprocess {task}", paths[task]
    for path in benchmarks.glob("compile_kernels.tsv"):
        yield "compile kernels", path


def preparation_table(rows: list[dict[str, Any]]) -> tables.Table:
    columns = {
        "step": ("l", lambda r: r["step"]),
        "seconds": ("r", lambda r: number(r["seconds"], ",.1f")),
        "CPU seconds": ("r", lambda r: number(r["cpu_seconds"], ",.1f")),
        "peak MiB": ("r", lambda r: number(r["peak_memory_mib"], ",.0f")),
    }
    notes = (
        "As Snakemake measured each job. Memory and CPU seconds are at least so much: it looks every half second, "
        "after 15 seconds every 30; a job of less than a second has none.",
    )
    title = "What came before the trainings cost."
    return tables.make_table(title, columns, rows, notes=notes)


# ---------------------------------------------------------------- files


def make_tables(
    config: dict[str, Any],
    runs: dict[str, dict[str, Any]],
    failures: dict[str, dict[str, Any]],
    published: list[dict[str, Any]],
    benchmarks: Path,
) -> dict[str, tuple[list[tables.Table], list[dict[str, Any]], dict[str, str]]]:
    """Name -> (tables for people, rows, columns of the csv)."""
    run = config["run"]
    rows = build_table(runs, config, failures)
    beside = published_rows(rows, published, run)
    ablation = ablation_rows(runs, rows, config)
    cost = cost_rows(runs, rows, benchmarks)
    before = preparation_rows(benchmarks)
    head = " ".join(caption(rows, run))
    return {
        "published": (published_tables(beside, run), beside, PUBLISHED_COLUMNS),
        "ablation": (
            [ablation_table(ablation, head + failed_text(rows))],
            ablation,
            ABLATION_COLUMNS,
        ),
        "cost": ([cost_table(cost, head)], cost, COST_COLUMNS),
        "preparation": ([preparation_table(before)], before, PREPARATION_COLUMNS),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument("--published", type=Path, required=True, help="config/published.csv")
    parser.add_argument("--benchmarks", type=Path, required=True, help="results/<run>/benchmarks")
    parser.add_argument("--output-dir", type=Path, required=True, help="results/<run>/tables")
    args = parser.parse_args(argv)
    try:
        config, runs, failures = read_arguments(args)
        made = make_tables(config, runs, failures, read_published(args.published), args.benchmarks)
        contents: dict[Path, str] = {}
        for name, (shown, rows, columns) in made.items():
            path = args.output_dir / name
            contents[path.with_suffix(".csv")] = tables.to_csv(rows, columns)
            contents[path.with_suffix(".md")] = "\n".join(map(tables.to_markdown, shown))
            latex = "\n".join(map(tables.to_latex, shown))
            contents[path.with_suffix(".tex")] = tables.LATEX_PACKAGES + latex
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_all(contents)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"written: {args.output_dir}/{{{','.join(made)}}}.{{csv,md,tex}}")


if __name__ == "__main__":
    main()
