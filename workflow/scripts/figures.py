"""Draw the figures of a task, each as SVG and PNG.

    python workflow/scripts/figures.py --task listops --output-dir results/demo/figures/listops \\
        --config '{"run": "demo", "tasks": ["listops"], "attentions": ["softmax", "sat"],
                   "seeds": [1001, 1002]}' \\
        results/demo/runs/listops/*/*

    accuracy, loss   on dev over steps: mean and band over the seeds, switches marked
    time             accuracy on dev over seconds of training
    statistics       what the switch is decided by, a layer, with its thresholds
    pattern          the mean attention map at the switch beside the blocks that were kept
    mass             share of that map in the blocks kept, in the best ones and in random ones

A run folder must hold config.json, metrics.json, history.jsonl and pattern.safetensors. The same runs
give the same bytes, whatever the order of the folders.
"""

import argparse
import io
import json
import math
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import matplotlib.ticker
import numpy as np
from collect import (
    COUNT,
    NUMBER,
    SHARE,
    TEXT,
    chance_of,
    check,
    describe_switches,
    parse_config,
    read_metrics,
    read_settings,
    run_name,
)
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


SHOWN = ("config.json", "history.jsonl", "pattern.safetensors")  # what figures are drawn from
STATISTICS = ("skewness", "distance", "change")
MOST_POINTS = 150  # of a line: thousands of steps are shown as medians of so many stretches


class History(NamedTuple):
    """What history.jsonl tells, in the order of training."""

    accuracy: list[tuple[int, float]]  # (step, percent) of every evaluation on dev
    loss: list[tuple[int, float]]  # (step, nats) of the same
    seconds: dict[int, float]  # step -> seconds of training so far, evaluations left out
    statistics: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> steps [n], values [n, layers]


class Run(NamedTuple):
    """What the figures show of one run."""

    metrics: dict[str, Any]
    settings: dict[str, Any]
    history: History
    pattern: list[np.ndarray]  # a layer: bool [nb, nb], row = block of queries; [] if never sparse
    pooled: list[np.ndarray]  # a layer: the pooled mean attention map at the switch; [] if none


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


def read_run_history(path: Path) -> History:
    """ValueError for a file without evaluations, or whose steps go backwards."""
    accuracy, loss, seconds, elapsed = [], [], {}, 0.0
    statistics: dict[str, list[tuple[int, list[float]]]] = {name: [] for name in STATISTICS}
    for event in read_history(path):
        if event["event"] == "train":
            elapsed += event.get("ms", 0.0) / 1000
            seconds[event["step"]] = elapsed
            for name, values in statistics.items():
                if event.get(name) is not None:
                    layers = [math.nan if v is None else v for v in event[name]]
                    values.append((event["step"], layers))
        elif event["event"] == "eval" and event["split"] == "dev":
            accuracy.append((event["step"], 100 * event["accuracy"]))
            loss.append((event["step"], event["loss"]))
    steps = [step for step, _ in accuracy]
    if not steps:
        raise ValueError(f"{path}: expected evaluations on dev, found none")
    if steps != sorted(steps):
        raise ValueError(f"{path}: the steps of the evaluations go backwards")
    return History(
        accuracy,
        loss,
        seconds,
        {
            name: (np.array([step for step, _ in values]), np.array([v for _, v in values]))
            for name, values in statistics.items()
            if values
        },
    )


def read_pattern(path: Path, metrics: dict[str, Any]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(masks bool [nb, nb], pooled maps [nb, nb]) of the layers; ValueError if not those of `metrics`.

    No pooled maps where the run was sparse from the start.
    """
    if metrics["pattern"] is None:
        return [], []
    num_layers, nb = len(metrics["pattern"]["density"]), metrics["pattern"]["num_blocks"]
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file: {error}") from error

    def layers(name: str) -> list[np.ndarray]:
        found = []
        for layer in range(num_layers):
            tensor = tensors.get(f"{name}_{layer}")
            if tensor is None or tensor.shape != (nb, nb):
                shape = "nothing" if tensor is None else f"shape {tensor.shape}"
                raise ValueError(
                    f"{path}: {name}_{layer}: expected shape ({nb}, {nb}), found {shape}"
                )
            found.append(tensor)
        return found

    masks = [mask != 0 for mask in layers("layer")]
    return masks, layers("pooled_layer") if "pooled_layer_0" in tensors else []


def names_of(task: str, config: dict[str, Any]) -> list[str]:
    return [f"{task}/{a}/seed{seed}" for a in config["attentions"] for seed in config["seeds"]]


def read_runs(run_dirs: list[Path], task: str, config: dict[str, Any]) -> list[Run]:
    """The runs in the order of `config`; ValueError for a run of another task or run set."""
    runs = {}
    order = names_of(task, config)
    for run_dir in run_dirs:
        metrics = read_metrics(run_dir / "metrics.json", SHOWN)
        name = run_name(metrics)
        if metrics["run"] != config["run"] or name not in order:
            raise ValueError(
                f"{run_dir / 'metrics.json'}: run {metrics['run']!r}, {name}: "
                f"not among the runs of --config for task {task!r}"
            )
        runs[name] = Run(
            metrics,
            read_settings(run_dir / "config.json"),
            read_run_history(run_dir / "history.jsonl"),
            *read_pattern(run_dir / "pattern.safetensors", metrics),
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


def fit(figure: Figure, text: str) -> str:
    """The text with lines that a figure of this width holds, at 11 points: matplotlib cuts longer ones off."""
    width = int(12.5 * figure.get_figwidth())
    return "\n".join(textwrap.fill(line, width) for line in text.split("\n"))


def head(figure: Figure, text: str) -> None:
    figure.suptitle(fit(figure, text), fontsize=11)


def mean_curve(curves: list[list[tuple[int, float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps that all seeds were evaluated at, mean and standard deviation (n - 1) there.

    Of two evaluations at one step, before and after a switch, the later one counts.
    """
    last = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*(set(curve) for curve in last)))
    values = np.array([[curve[step] for step in steps] for curve in last])  # [seeds, steps]
    return np.array(steps), values.mean(axis=0), values.std(axis=0, ddof=1)


def look(attention: str, config: dict[str, Any]) -> dict[str, Any]:
    """Colour and line style of an attention, the same in every figure."""
    index = config["attentions"].index(attention)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
    }


def thin(
    x: np.ndarray, y: np.ndarray, middle: Callable[..., np.ndarray] = np.median
) -> tuple[np.ndarray, np.ndarray]:
    """At most MOST_POINTS points of a line x [n], y [n, ...]: `middle`s of y over stretches of equal length."""
    if len(x) <= MOST_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MOST_POINTS + 1).astype(int)
    parts = list(zip(edges[:-1], edges[1:], strict=True))
    return (
        np.array([np.median(x[a:b]) for a, b in parts]),
        np.array([middle(y[a:b], axis=0) for a, b in parts]),
    )


def draw_curves(
    axes: matplotlib.axes.Axes,
    runs: list[Run],
    config: dict[str, Any],
    curve_of: Callable[[Run], list[tuple[int, float]]],
) -> None:
    """A value over steps: a colour an attention, every seed, mean and band, switches."""
    for attention, group in by_attention(runs, config).items():
        style = look(attention, config)
        curves = [curve_of(run) for run in group]
        several = len(curves) > 1
        for curve in curves:
            axes.plot(
                *thin(*map(np.array, zip(*curve, strict=True))),
                **style,
                linewidth=0.8 if several else 2,
                alpha=0.5 if several else 1,
                marker="" if several else ".",
                label=None if several else attention,
            )
        if several:
            steps, mean, sd = mean_curve(curves)
            label = f"{attention}: mean ± sd of {len(curves)} seeds"
            axes.plot(*thin(steps, mean), **style, linewidth=2, label=label)
            band = thin(steps, np.stack([mean - sd, mean + sd], axis=1))
            axes.fill_between(band[0], *band[1].T, color=style["color"], alpha=0.15, linewidth=0)
        switched = [run for run in group if run.metrics["transition"]["step"]]
        reasons = describe_switches([run.metrics for run in switched])
        for i, run in enumerate(switched):
            axes.axvline(
                run.metrics["transition"]["step"],
                color=style["color"],
                linestyle=(0, (2, 2)),
                linewidth=1.2,
                label=None if i else f"{attention}: switch to sparse ({reasons})",
            )
    axes.set_xlim(left=0)
    axes.set_xlabel("training step")


def new_figure(runs: list[Run]) -> tuple[Figure, matplotlib.axes.Axes]:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(fit(figure, title(runs)), loc="left")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def mark_chance(axes: matplotlib.axes.Axes, runs: list[Run]) -> None:
    words, level = chance_of(runs[0].metrics["dev"])
    axes.axhline(
        level, color="#555555", linestyle=":", linewidth=1.5, label=f"{words} ({level:.1f} %)"
    )


def draw_accuracy(runs: list[Run], config: dict[str, Any]) -> Figure:
    figure, axes = new_figure(runs)
    draw_curves(axes, runs, config, lambda run: run.history.accuracy)
    mark_chance(axes, runs)
    axes.set_ylabel("dev accuracy (%)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_loss(runs: list[Run], config: dict[str, Any]) -> Figure:
    figure, axes = new_figure(runs)
    draw_curves(axes, runs, config, lambda run: run.history.loss)
    axes.set_ylabel("dev loss (nats)")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def draw_time(runs: list[Run], config: dict[str, Any]) -> Figure:
    """Dev accuracy over the seconds that training took until then, a line a seed."""
    figure, axes = new_figure(runs)
    for attention, group in by_attention(runs, config).items():
        for i, run in enumerate(group):
            known = [(run.history.seconds.get(s), a) for s, a in run.history.accuracy]
            points = [(seconds, a) for seconds, a in known if seconds is not None]
            if not points:
                continue
            axes.plot(
                *thin(*map(np.array, zip(*points, strict=True))),
                **look(attention, config),
                linewidth=1.5,
                label=None if i else attention,
            )
    mark_chance(axes, runs)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training (evaluations left out)")
    axes.set_ylabel("dev accuracy (%)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def notice(runs: list[Run], text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = Figure(figsize=(8, 2))
    figure.text(0.5, 0.5, fit(figure, f"{title(runs)}\n\n{text}"), ha="center", va="center")
    return figure


def first_seeds(runs: list[Run], config: dict[str, Any], wanted: Callable[[Run], Any]) -> list[Run]:
    """Of every attention the first seed that has what is wanted."""
    found = []
    for group in by_attention(runs, config).values():
        found += [run for run in group if wanted(run)][:1]
    return found


def draw_statistics(runs: list[Run], config: dict[str, Any]) -> Figure:
    """Skewness, distance and its change over dense steps, a line a layer; a row an attention."""
    shown = first_seeds(runs, config, lambda run: run.history.statistics)
    if not shown:
        return notice(runs, "No run gathered statistics of its attention maps.")
    figure = Figure(figsize=(10, 0.6 + 2.8 * len(shown)), layout="constrained")
    head(figure, f"{title(runs)}: what the switch is decided by")
    panels = figure.subplots(len(shown), 3, squeeze=False)
    for row, run in zip(panels, shown, strict=True):
        training = run.settings["training"]
        thresholds = {"skewness": training["skewness"], "change": training["distance"]}
        for axes, name in zip(row, STATISTICS, strict=True):
            if name in run.history.statistics:
                steps, values = thin(*run.history.statistics[name])
                for layer in range(values.shape[1]):
                    axes.plot(
                        steps,
                        values[:, layer],
                        color=COLOURS[layer % len(COLOURS)],
                        linestyle=LINE_STYLES[layer % len(LINE_STYLES)],
                        linewidth=1.2,
                        label=f"layer {layer + 1}",
                    )
                if name == "change":  # one step below the threshold is enough for the switch
                    ends = [
                        thin(*run.history.statistics[name], end)[1]
                        for end in (np.fmin.reduce, np.fmax.reduce)
                    ]
                    for layer, (low, high) in enumerate(zip(*(e.T for e in ends), strict=True)):
                        colour = COLOURS[layer % len(COLOURS)]
                        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
                if name == "change" and np.nanmax(values, initial=0) > 0:
                    axes.set_yscale("log")
                    axes.yaxis.set_major_formatter("{x:g}")  # 10^-1 would need parsed math
                    axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            if name in thresholds:
                axes.axhline(thresholds[name], color="#555555", linestyle=":", label="threshold")
            if run.metrics["transition"]["step"]:
                axes.axvline(
                    run.metrics["transition"]["step"],
                    color="#000000",
                    linestyle=(0, (2, 2)),
                    label="switch",
                )
            axes.set_xlabel("training step")
        for axes, words in zip(
            row, ("skewness", "distance", "change of distance (%)"), strict=True
        ):
            axes.set_title(words, loc="left")
        row[0].set_ylabel(f"{run.metrics['attention']}, seed {run.metrics['seed']}")
    lines = {
        text: line
        for axes in panels.flat
        for line, text in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=6)
    return figure


def draw_pattern(runs: list[Run], config: dict[str, Any]) -> Figure:
    """The pooled map and the selected blocks of each layer; a row an attention: its first seed that switched."""
    shown = first_seeds(runs, config, lambda run: run.pattern)
    if not shown:
        return notice(runs, "No run switched to sparse attention: there is no pattern to show.")
    num_columns = max(len(run.pattern) + len(run.pooled) for run in shown)
    size = 3 if num_columns < 5 else 2.2
    figure = Figure(
        figsize=(max(6, size * num_columns), 0.6 + (size + 0.9) * len(shown)), layout="constrained"
    )
    head(
        figure,
        f"{title(runs)}\nmean attention map at the switch and selected blocks\n"
        "logarithmic shades, dark is much; grey rows select no block",
    )
    for subfigure, run in zip(np.atleast_1d(figure.subfigures(len(shown))), shown, strict=True):
        metrics = run.metrics
        size = metrics["pattern"]["block_size"]
        words = (
            f"{metrics['attention']}, seed {metrics['seed']}, from step "
            f"{metrics['transition']['step']}, blocks of {size} × {size}"
        )
        subfigure.suptitle(fit(figure, words), fontsize=11)
        panels = iter(subfigure.subplots(1, num_columns, squeeze=False)[0])
        for layer, mask in enumerate(run.pattern):
            if run.pooled:
                axes = next(panels)
                draw_map(axes, run.pooled[layer])
                axes.set_title(f"layer {layer + 1}: map", fontsize=10)
                axes.set_xlabel("block of keys")
            axes = next(panels)
            draw_mask(axes, mask)
            axes.set_title(mask_title(layer, mask), fontsize=10)
            axes.set_xlabel("block of keys")
        for axes in panels:
            axes.set_axis_off()
        subfigure.axes[0].set_ylabel("block of queries")
    return figure


def draw_mass(runs: list[Run], config: dict[str, Any]) -> Figure:
    """Share of the attention map in the blocks kept, the best and random ones: mean over seeds, a group a layer."""
    shown = {
        attention: [run for run in group if (run.metrics["pattern"] or {}).get("mass")]
        for attention, group in by_attention(runs, config).items()
    }
    shown = {attention: group for attention, group in shown.items() if group}
    if not shown:
        return notice(
            runs, "No run with a dense phase switched: there is no map to hold a share of."
        )
    figure = Figure(figsize=(8, 0.9 + 2.4 * len(shown)), layout="constrained")
    head(figure, f"{title(runs)}: share of the attention map in the blocks kept")
    bars = {
        "best_mass": ("as many best blocks", COLOURS[4]),
        "mass": ("the blocks kept", COLOURS[0]),
        "random_mass": ("as many random blocks", "#999999"),
    }
    panels = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    for axes, (attention, group) in zip(panels, shown.items(), strict=True):
        for offset, (key, (words, colour)) in enumerate(bars.items()):
            values = 100 * np.mean([run.metrics["pattern"][key] for run in group], axis=0)
            drawn = axes.bar(
                np.arange(len(values)) + 0.27 * (offset - 1),
                values,
                width=0.25,
                color=colour,
                label=words,
            )
            axes.bar_label(drawn, fmt="%.1f", fontsize=9)
        layers = len(group[0].metrics["pattern"]["mass"])
        axes.set_xticks(range(layers), [f"layer {layer + 1}" for layer in range(layers)])
        axes.set_title(
            f"{attention} ({len(group)} seed{'s' if len(group) > 1 else ''})", loc="left"
        )
        axes.set_ylabel("share (%)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def mask_title(layer: int, mask: np.ndarray) -> str:
    empty = int((~mask.any(axis=1)).sum())
    return f"layer {layer + 1}: density {mask.mean():.3f},\n{empty} of {len(mask)} rows empty"


def draw_mask(axes: matplotlib.axes.Axes, mask: np.ndarray) -> None:
    """Selected blocks, row 0 on top: one pixel a block, so that a figure of many patterns stays small."""
    colours = np.array([(255, 255, 255), matplotlib.colors.to_rgb(COLOURS[0]), (228, 228, 228)])
    colours[1] *= 255
    kinds = np.where(mask, 1, np.where(mask.any(axis=1)[:, None], 0, 2))
    draw_blocks(axes, colours.astype(np.uint8)[kinds])


def draw_map(axes: matplotlib.axes.Axes, pooled: np.ndarray) -> None:
    """A pooled attention map in shades of one colour, on a logarithmic scale."""
    smallest = pooled[pooled > 0].min(initial=np.inf)
    logs = np.log(np.maximum(pooled, smallest if np.isfinite(smallest) else 1))
    shades = (logs - logs.min()) / max(logs.max() - logs.min(), 1e-12)
    colours = matplotlib.colormaps["Blues"](shades)[..., :3]
    draw_blocks(axes, (255 * colours).astype(np.uint8))


def draw_blocks(axes: matplotlib.axes.Axes, pixels: np.ndarray) -> None:
    nb = len(pixels)
    axes.imshow(pixels, extent=(0, nb, nb, 0), interpolation="none")
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


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def both(figures: dict[str, Figure]) -> dict[str, str | bytes]:
    """File name -> content, SVG and PNG of each figure."""
    files = {f"{name}.svg": to_svg(figure) for name, figure in figures.items()}
    return files | {f"{name}.png": to_png(figure) for name, figure in figures.items()}


DRAWINGS = {
    "accuracy": draw_accuracy,
    "loss": draw_loss,
    "time": draw_time,
    "statistics": draw_statistics,
    "pattern": draw_pattern,
    "mass": draw_mass,
}


def draw_figures(runs: list[Run], config: dict[str, Any]) -> dict[str, str | bytes]:
    """File name -> content of the figures of one task."""
    with matplotlib.rc_context(STYLE):
        return both({name: draw(runs, config) for name, draw in DRAWINGS.items()})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", nargs="*", type=Path, help="run folders of the task")
    parser.add_argument("--runs-dir", type=Path, help="where those of --config are looked for")
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="draw the runs of --runs-dir that are finished; nothing where none is",
    )
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
        run_dirs = args.run_dirs
        if args.runs_dir:
            run_dirs = [args.runs_dir / name for name in names_of(args.task, config)]
        if args.allow_missing:
            run_dirs = [folder for folder in run_dirs if (folder / "metrics.json").is_file()]
            if not run_dirs:
                print(f"{args.task}: no run is finished, nothing is drawn")
                return
        figures = draw_figures(read_runs(run_dirs, args.task, config), config)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_all({args.output_dir / name: content for name, content in figures.items()})
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"written: {args.output_dir}/{', '.join(figures)}")


if __name__ == "__main__":
    main()
