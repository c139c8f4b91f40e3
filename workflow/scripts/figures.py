"""Draw the two figures of a task: accuracy.svg (dev accuracy over steps) and pattern.svg.

    python workflow/scripts/figures.py --task listops --output-dir results/demo/figures/listops \\
        --config '{"run": "demo", "tasks": ["listops"], "attentions": ["softmax", "sat"],
                   "seeds": [1001, 1002]}' \\
        results/demo/runs/listops/*/*

A run folder must hold metrics.json, history.jsonl and pattern.safetensors. The same runs give the
same SVG bytes, whatever the order of the folders.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from collect import (
    COUNT,
    NUMBER,
    SHARE,
    TEXT,
    check,
    describe_switches,
    parse_config,
    read_metrics,
    run_name,
)
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from safetensors import SafetensorError
from safetensors.numpy import load_file
from tables import write_all

# Okabe and Ito's palette: told apart with any colour vision, and in grey by line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", (0, (6, 1.5)), (0, (4, 1.5, 1, 1.5)))
STYLE = {
    "svg.hashsalt": "sat",  # ids in the file from its content, not from a random number
    "svg.fonttype": "none",  # text stays text: searchable, and independent of font versions
    "text.parse_math": False,  # a "$" in a name is a "$"
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.fontsize": 10,
    "legend.frameon": False,
}
EVENTS = {
    "train": {"step": COUNT, "phase": TEXT, "loss": NUMBER},
    "eval": {"split": TEXT, "step": COUNT, "phase": TEXT, "loss": NUMBER, "accuracy": SHARE},
    "transition": {"step": COUNT, "reason": TEXT},
}


class Run(NamedTuple):
    """What the figures show of one run."""

    metrics: dict[str, Any]
    curve: list[tuple[int, float]]  # (step, dev accuracy in percent), in the order of training
    pattern: list[np.ndarray]  # a layer: bool [nb, nb], row = block of queries; [] if never sparse


def read_history(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a history.jsonl; ValueError names the file and the line."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}: line {number}"
            try:
                event = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON: {error}") from error
            check(event, {"event": TEXT}, where)
            if event["event"] not in EVENTS:
                raise ValueError(
                    f"{where}: event: expected one of {', '.join(EVENTS)}, found {event['event']!r}"
                )
            check(event, EVENTS[event["event"]], where)
            yield event


def read_curve(path: Path) -> list[tuple[int, float]]:
    """(step, dev accuracy in percent) of every evaluation on dev."""
    curve = [
        (event["step"], 100 * event["accuracy"])
        for event in read_history(path)
        if event["event"] == "eval" and event["split"] == "dev"
    ]
    steps = [step for step, _ in curve]
    if not steps:
        raise ValueError(f"{path}: expected evaluations on dev, found none")
    if steps != sorted(steps):
        raise ValueError(f"{path}: the steps of the evaluations go backwards")
    return curve


def read_pattern(path: Path, metrics: dict[str, Any]) -> list[np.ndarray]:
    """Masks of the layers, bool [nb, nb]; ValueError if they are not those of `metrics`."""
    if metrics["pattern"] is None:
        return []
    num_layers, nb = len(metrics["pattern"]["density"]), metrics["pattern"]["num_blocks"]
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error
    masks = []
    for layer in range(num_layers):
        mask = tensors.get(f"layer_{layer}")
        if mask is None or mask.shape != (nb, nb):
            found = "nothing" if mask is None else f"shape {mask.shape}"
            raise ValueError(f"{path}: layer_{layer}: expected shape ({nb}, {nb}), found {found}")
        masks.append(mask != 0)
    return masks


def read_runs(run_dirs: list[Path], task: str, config: dict[str, Any]) -> list[Run]:
    """The runs in the order of `config`; ValueError for a run of another task or run set."""
    runs = {}
    order = [f"{task}/{a}/seed{seed}" for a in config["attentions"] for seed in config["seeds"]]
    for run_dir in run_dirs:
        metrics = read_metrics(run_dir / "metrics.json")
        name = run_name(metrics)
        if metrics["run"] != config["run"] or name not in order:
            raise ValueError(
                f"{run_dir / 'metrics.json'}: run {metrics['run']!r}, {name}: "
                f"not among the runs of --config for task {task!r}"
            )
        runs[name] = Run(
            metrics,
            read_curve(run_dir / "history.jsonl"),
            read_pattern(run_dir / "pattern.safetensors", metrics),
        )
    if not runs:
        raise ValueError(f"no run folder given for task {task!r}")
    if len({run.metrics["data_sha256"] for run in runs.values()}) > 1:
        raise ValueError(f"runs of task {task!r} are on different data: train them again")
    return [runs[name] for name in order if name in runs]


def by_attention(runs: list[Run], config: dict[str, Any]) -> dict[str, list[Run]]:
    groups = {a: [r for r in runs if r.metrics["attention"] == a] for a in config["attentions"]}
    return {attention: group for attention, group in groups.items() if group}


def title(runs: list[Run]) -> str:
    metrics = runs[0].metrics
    return f"{metrics['task']}, run {metrics['run']} ({metrics['data']} data)"


def mean_curve(curves: list[list[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all seeds were evaluated at, mean and standard deviation (n - 1) there.

    Of two evaluations at one step, before and after a switch, the later one counts.
    """
    last = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in last)))
    values = np.array([[curve[step] for step in steps] for curve in last])  # [seeds, steps]
    return np.array(steps), values.mean(axis=0), values.std(axis=0, ddof=1)


def draw_accuracy(runs: list[Run], config: dict[str, Any]) -> Figure:
    """Dev accuracy over steps: a colour an attention, every seed, mean and band, switches."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for attention, group in by_attention(runs, config).items():
        index = config["attentions"].index(attention)
        colour = COLOURS[index % len(COLOURS)]
        style = LINE_STYLES[index % len(LINE_STYLES)]
        curves = [run.curve for run in group]
        several = len(curves) > 1
        for curve in curves:
            axes.plot(
                *zip(*curve, strict=True),
                color=colour,
                linestyle=style,
                linewidth=0.8 if several else 2,
                alpha=0.5 if several else 1,
                marker="" if several else ".",
                label=None if several else attention,
            )
        if several:
            steps, mean, sd = mean_curve(curves)
            label = f"{attention}: mean ± sd of {len(curves)} seeds"
            axes.plot(steps, mean, color=colour, linestyle=style, linewidth=2, label=label)
            axes.fill_between(steps, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
        switched = [run for run in group if run.pattern]
        reasons = describe_switches([run.metrics for run in switched])
        for i, run in enumerate(switched):
            axes.axvline(
                run.metrics["transition"]["step"],
                color=colour,
                linestyle=(0, (2, 2)),
                linewidth=1.2,
                label=None if i else f"{attention}: switch to sparse ({reasons})",
            )
    chance = 100 * runs[0].metrics["test"]["chance"]
    axes.axhline(
        chance, color="#555555", linestyle=":", linewidth=1.5, label=f"chance ({chance:.1f} %)"
    )
    axes.set_xlim(left=0)
    axes.set_xlabel("training step")
    axes.set_ylabel("dev accuracy (%)")
    axes.set_title(title(runs), loc="left")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_pattern(runs: list[Run], config: dict[str, Any]) -> Figure:
    """Selected blocks a layer, a row of panels an attention: its first seed that switched."""
    shown = []
    for group in by_attention(runs, config).values():
        shown += [run for run in group if run.pattern][:1]
    if not shown:
        figure = Figure(figsize=(8, 2))
        text = f"{title(runs)}\n\nNo run switched to sparse attention: there is no pattern to show."
        figure.text(0.5, 0.5, text, ha="center", va="center")
        return figure
    num_columns = max(len(run.pattern) for run in shown)
    figure = Figure(figsize=(max(6, 3 * num_columns), 0.6 + 3.7 * len(shown)), layout="constrained")
    figure.suptitle(
        f"{title(runs)}: selected blocks\nrows that select no block are grey", fontsize=11
    )
    for subfigure, run in zip(np.atleast_1d(figure.subfigures(len(shown))), shown, strict=True):
        metrics = run.metrics
        size = metrics["pattern"]["block_size"]
        subfigure.suptitle(
            f"{metrics['attention']}, seed {metrics['seed']}, from step "
            f"{metrics['transition']['step']}, blocks of {size} × {size}",
            fontsize=11,
        )
        panels = subfigure.subplots(1, num_columns, squeeze=False)[0]
        for layer, axes in enumerate(panels):
            if layer >= len(run.pattern):
                axes.set_axis_off()
                continue
            draw_mask(axes, run.pattern[layer])
            axes.set_title(mask_title(layer, run.pattern[layer]), fontsize=10)
            axes.set_xlabel("block of keys")
            if layer == 0:
                axes.set_ylabel("block of queries")
    return figure


def mask_title(layer: int, mask: np.ndarray) -> str:
    empty = int((~mask.any(axis=1)).sum())
    return f"layer {layer + 1}: density {mask.mean():.3f},\n{empty} of {len(mask)} rows empty"


def draw_mask(axes: matplotlib.axes.Axes, mask: np.ndarray) -> None:
    """Selected blocks as squares, row 0 on top; vector shapes stay sharp at any size."""
    nb = len(mask)
    for row in np.flatnonzero(~mask.any(axis=1)):
        axes.axhspan(row, row + 1, color="#e4e4e4", linewidth=0, antialiased=False)
    corners = np.array([(0, 0), (1, 0), (1, 1), (0, 1)])
    squares = np.argwhere(mask)[:, None, ::-1] + corners  # [selected, 4, (x, y)]
    axes.add_collection(
        PolyCollection(squares, facecolor=COLOURS[0], edgecolor="none", antialiased=False)
    )
    axes.set(xlim=(0, nb), ylim=(nb, 0), aspect="equal")
    ticks = sorted({0, nb // 4, nb // 2, 3 * nb // 4})
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)


def to_svg(figure: Figure) -> str:
    """The figure as SVG text without a date: equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().decode("utf-8")


def draw_figures(runs: list[Run], config: dict[str, Any]) -> dict[str, str]:
    """File name -> SVG text of the figures of one task."""
    with matplotlib.rc_context(STYLE):
        return {
            "accuracy.svg": to_svg(draw_accuracy(runs, config)),
            "pattern.svg": to_svg(draw_pattern(runs, config)),
        }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, help="run folders of the task")
    parser.add_argument("--task", required=True, help="the task to draw")
    parser.add_argument(
        "--output-dir", type=Path, required=True, help="results/<run>/figures/<task>"
    )
    parser.add_argument(
        "--config", required=True, help="JSON object with run, tasks, attentions and seeds"
    )
    args = parser.parse_args(argv)
    try:
        config = parse_config(args.config)
        figures = draw_figures(read_runs(args.run_dirs, args.task, config), config)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_all({args.output_dir / name: svg for name, svg in figures.items()})
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"written: {args.output_dir}/{', '.join(figures)}")


if __name__ == "__main__":
    main()
