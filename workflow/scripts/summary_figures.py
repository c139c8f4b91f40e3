"""Draw the figures of a whole run set, each as SVG and PNG.

    python workflow/scripts/summary_figures.py --output-dir results/demo/figures \\
        --benchmarks results/demo/benchmarks \\
        --config '{"run": "demo", "tasks": ["listops"], "attentions": ["softmax", "sat"],
                   "seeds": [1001, 1002]}'

    summary       test accuracy of every attention by task: mean, 95 % interval, seeds
    speed         time of a training step by phase, a panel a task
    memory        peak memory by phase, a panel a task
    preparation   what the steps before the trainings took

The same runs give the same bytes.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from collect import add_run_arguments, build_table, caption, read_arguments
from compare import preparation_rows
from figures import COLOURS, STYLE, both, look
from matplotlib.figure import Figure
from tables import write_all

PHASES = {"dense": COLOURS[0], "sparse": COLOURS[1]}


def by_task(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Finished rows by task, in order."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    groups = {t: [r for r in rows if r["task"] == t and r["num_seeds"]] for t in tasks}
    return {task: group for task, group in groups.items() if group}


def panels_of(rows: list[dict[str, Any]], words: str, draw: Callable[..., None]) -> Figure:
    """A panel a task, with a place a row for each attention; `draw(axes, rows)` fills it."""
    groups = by_task(rows)
    if not groups:
        figure = Figure(figsize=(8, 2))
        figure.text(0.5, 0.5, "No run is finished.", ha="center", va="center")
        return figure
    num_columns = min(3, len(groups))
    num_rows = -(-len(groups) // num_columns)
    most = max(map(len, groups.values()))
    figure = Figure(
        figsize=(3.4 * num_columns + 0.6, (1.1 + 0.27 * most) * num_rows + 0.5),
        layout="constrained",
    )
    panels = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in panels.flat[len(groups) :]:
        axes.set_axis_off()
    for axes, (task, group) in zip(panels.flat, groups.items(), strict=False):
        axes.set_title(f"{task} ({group[0]['data']} data)", loc="left")
        axes.set_yticks(range(len(group)), [row["attention"] for row in group])
        axes.set_ylim(len(group) - 0.5, -0.5)
        axes.set_xlabel(words)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes, group)
    return figure


def draw_summary(
    rows: list[dict[str, Any]], runs: dict[str, dict[str, Any]], config: dict[str, Any]
) -> Figure:
    """Test accuracy: a ring a seed, a point and a line for mean and 95 % interval."""

    def draw(axes: matplotlib.axes.Axes, group: list[dict[str, Any]]) -> None:
        for place, row in enumerate(group):
            colour = look(row["attention"], config)["color"]
            seeds = [
                100 * run["test"]["accuracy"]
                for run in runs.values()
                if (run["task"], run["attention"]) == (row["task"], row["attention"])
            ]
            axes.scatter(
                seeds, [place] * len(seeds), s=30, facecolors="none", edgecolors=colour, zorder=2
            )
            mean, low = row["test_accuracy_mean_percent"], row["test_accuracy_95_low_percent"]
            axes.plot([mean], [place], marker="|", markersize=13, markeredgewidth=2, color=colour)
            if low is not None:
                ends = (low, row["test_accuracy_95_high_percent"])
                axes.plot(ends, (place, place), color=colour, linewidth=2, alpha=0.6)
        chance, baseline = group[0]["chance_percent"], group[0]["baseline_percent"] or 0
        axes.axvline(max(chance, baseline), color="#555555", linestyle=":", linewidth=1.5)
        if baseline > chance:
            axes.set_xlabel("test accuracy (%); dotted: root operator alone", fontsize="small")

    return panels_of(rows, "test accuracy (%); dotted: chance", draw)


def draw_phases(rows: list[dict[str, Any]], column: str, words: str) -> Figure:
    """Bars of a column of the table, `<phase>_<column>`."""

    def draw(axes: matplotlib.axes.Axes, group: list[dict[str, Any]]) -> None:
        for offset, (phase, colour) in zip((-0.18, 0.18), PHASES.items(), strict=True):
            values = [row[f"{phase}_{column}"] or 0 for row in group]
            axes.barh(np.arange(len(group)) + offset, values, 0.34, color=colour, label=phase)

    figure = panels_of(rows, words, draw)
    if figure.axes:
        lines = figure.axes[0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside lower center", ncols=2)
    return figure


def draw_preparation(rows: list[dict[str, Any]], run: str) -> Figure:
    """Seconds and peak memory of the steps before the trainings."""
    figure = Figure(figsize=(8, 1.2 + 0.3 * max(1, len(rows))), layout="constrained")
    if not rows:
        figure.text(0.5, 0.5, "No step was measured by Snakemake.", ha="center", va="center")
        return figure
    figure.suptitle(f"run {run}: steps before the trainings", fontsize=11)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, column, words in zip(
        panels, ("seconds", "peak_memory_mib"), ("seconds", "peak memory (MiB)"), strict=True
    ):
        axes.barh(range(len(rows)), [row[column] or 0 for row in rows], 0.7, color=COLOURS[0])
        axes.set_xlabel(words)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    panels[0].set_yticks(range(len(rows)), [row["step"] for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure


def draw_figures(
    config: dict[str, Any], runs: dict[str, dict[str, Any]], benchmarks: Path
) -> dict[str, str | bytes]:
    """File name -> content."""
    rows = build_table(runs, config)
    with matplotlib.rc_context(STYLE):
        figures = {
            "summary": draw_summary(rows, runs, config),
            "speed": draw_phases(rows, "ms_per_step_median", "ms a training step"),
            "memory": draw_phases(rows, "peak_memory_max_mib", "peak memory (MiB)"),
            "preparation": draw_preparation(preparation_rows(benchmarks), config["run"]),
        }
        figures["summary"].suptitle(" ".join(caption(rows, config["run"])[:1]), fontsize=11)
        return both(figures)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument("--benchmarks", type=Path, required=True, help="results/<run>/benchmarks")
    parser.add_argument("--output-dir", type=Path, required=True, help="results/<run>/figures")
    args = parser.parse_args(argv)
    try:
        config, runs, _ = read_arguments(args)
        files = draw_figures(config, runs, args.benchmarks)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_all({args.output_dir / name: content for name, content in files.items()})
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"written: {args.output_dir}/{', '.join(files)}")


if __name__ == "__main__":
    main()
