"""Tables and figures of a benchmark of attention (python -m sat.benchmark attention --json FILE).

    python workflow/scripts/benchmark_report.py attention.json --output-dir results/lra/benchmark

Several files are parts of one benchmark; the speed-ups of each are over the reference in it. It
writes attention.csv (every measurement), attention.md (speed-ups with marks for what they should
reach) and the figures speedup.svg, time.svg, memory.svg.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import matplotlib
import pandas as pd
from figures import COLOURS, STYLE
from matplotlib.figure import Figure
from tables import write_all

KEY = ["batch", "length"]
CALL = ["implementation", "pass", *KEY, "block_size", "density"]
# Least and wanted (speed-up over dense SDPA) * density, for densities from the first number on.
BARS = {
    "forward+backward": [(1.0, 1.0, 1.5), (0.1, 1.0, 1.4), (0.05, 0.9, 1.3), (0.0, 0.65, 1.1)],
    "forward": [(0.1, 0.9, 1.3), (0.05, 0.8, 1.15), (0.0, 0.6, 1.0)],
}
PASSES = ("forward+backward", "forward")


def mark(value: float, least: float, wanted: float) -> str:
    """The value with ** where it reaches what is wanted, * the least, ! where it reaches neither."""
    return f"{value:.2f}" + ("**" if value >= wanted else "*" if value >= least else "!")


def with_speedups(results: list[dict]) -> pd.DataFrame:
    """The measurements with the column `speedup` over SDPA of the same pass."""
    frame = pd.DataFrame(results)
    sdpa = frame[frame.implementation == "sdpa"].set_index([*KEY, "pass"]).seconds
    frame["speedup"] = [
        sdpa[row["batch"], row["length"], row["pass"]] / row["seconds"]
        for row in frame.to_dict("records")
    ]
    return frame


def markdown(record: dict, frame: pd.DataFrame) -> str:
    machine = record["machine"]
    lines = [
        "# Attention on the CPU",
        "",
        f"{machine['name']}, {machine['threads']} thread(s), {record['clock']}, median of "
        f"{record['rounds']} interleaved rounds, load average up to {record['load']:.1f}, "
        f"torch {record['torch']}, backend {record['backend']} ({record['instruction_set']}), "
        f"allocator {'as set by sat.launch' if record['allocator'] else 'default'}. "
        "Speed-ups are over torch's dense SDPA, times density; `**` reaches what we aim for, `*` "
        "what we ask for, `!` neither.",
        "",
        *speed_tables(frame),
    ]
    return "\n".join(lines) + "\n"


def speed_tables(frame: pd.DataFrame) -> list[str]:
    """Lines of Markdown: the sparse calls, then the dense ones, with marks for what they reach."""
    lines = [
        "| batch | length | block | density | forward+backward | forward | over gather + bmm, "
        "forward+backward | over FlexAttention, forward | half padded, time | largest error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    indexed = frame.set_index(CALL)
    times, speedups, errors = indexed.seconds, indexed.speedup, indexed.largest_error
    ours = frame[(frame.implementation == "sat") & (frame["pass"] == "forward")]
    for row in ours.to_dict("records"):
        place = (*(row[key] for key in KEY), row["block_size"], row["density"])
        cells = [str(x) for x in (*place[:2], int(place[2]), place[3])]
        for kind in PASSES:
            bars = next(bars for bars in BARS[kind] if row["density"] >= bars[0])
            cells.append(mark(speedups["sat", kind, *place] * row["selected"], *bars[1:]))
        for other, kind, least, wanted in (
            ("gather + bmm", "forward+backward", 1.5, 2.3),
            ("flex", "forward", 1.5, 2.5),
        ):
            theirs = times.get((other, kind, *place))
            ratio = theirs and theirs / times["sat", kind, *place]
            cells.append(mark(ratio, least, wanted) if ratio else "-")
        padded, whole = (
            times[name, "forward+backward", *place] for name in ("sat half padded", "sat")
        )
        cells.append(f"{padded / whole:.2f}{'*' if padded / whole <= 0.65 else '!'}")
        error = errors["sat", "forward+backward", *place]
        cells.append(f"{error:.1e}{'**' if error <= 4e-6 else '*' if error <= 1e-5 else '!'}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| batch | length | dense, forward+backward | dense + mean map, time over SDPA's forward | "
        "half padded, time | the same with the map and padded queries counted |",
        "|---|---|---|---|---|---|",
    ]
    dense = frame.set_index(["implementation", "pass", *KEY])
    for batch, length in frame[KEY].drop_duplicates().itertuples(index=False):

        def cell(name, kind, column="speedup", place=(batch, length)):
            return dense.loc[(name, kind, *place), column]

        with_map = 1 / cell("sat dense with map", "forward")
        padded = cell("sat dense half padded", "forward+backward", "seconds")
        padded /= cell("sat dense", "forward+backward", "seconds")
        counted = "-"
        if ("sat dense half padded, counted", "forward+backward", batch, length) in dense.index:
            counted = cell("sat dense half padded, counted", "forward+backward", "seconds")
            counted = f"{counted / cell('sat dense with map', 'forward+backward', 'seconds'):.2f}"
        lines.append(
            f"| {batch} | {length} | {mark(cell('sat dense', 'forward+backward'), 1.0, 1.5)} | "
            f"{with_map:.2f}{'**' if with_map <= 0.9 else '*' if with_map <= 1.5 else '!'} | "
            f"{padded:.2f}{'*' if padded <= 0.45 else '!'} | {counted} |"
        )
    return lines


def svg(figure: Figure) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return file.getvalue()


def new_axes(xlabel: str, ylabel: str):
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.add_subplot(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    return figure, axes


def speedup_figure(frame: pd.DataFrame) -> Figure:
    """Speed-up of a sparse forward and backward over density, with the line 1 / density."""
    figure, axes = new_axes("density", "speed-up over dense SDPA, forward+backward")
    ours = frame[(frame.implementation == "sat") & (frame["pass"] == "forward+backward")]
    groups = ours.groupby([*KEY, "block_size"])
    for number, ((batch, length, block), rows) in enumerate(groups):
        rows = rows.sort_values("selected")
        axes.plot(
            rows.selected,
            rows.speedup,
            marker="os^vDP"[number // len(COLOURS) % 6],
            color=COLOURS[number % len(COLOURS)],
            label=f"B={batch}, N={length}, block {block:.0f}",
        )
    densities = sorted(ours.selected.unique())
    axes.plot(densities, [1 / x for x in densities], "k--", label="1 / density")
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)
    return figure


def growth_figure(frame: pd.DataFrame, column: str, ylabel: str, scale: float) -> Figure:
    """A column over the length, for one batch and block size and every density."""
    figure, axes = new_axes("length", ylabel)
    batch = frame.batch.min()
    rows = frame[(frame["pass"] == "forward+backward") & (frame.batch == batch)]
    rows = rows[rows.block_size.isna() | (rows.block_size == frame.block_size.min())]
    names = rows.implementation.where(
        rows.density.isna(), rows.implementation + ", density " + rows.density.astype(str)
    )
    shown = ~rows.implementation.str.contains("padded|gather")
    for number, (name, line) in enumerate(rows[shown].groupby(names[shown], sort=False)):
        line = line.sort_values("length")
        axes.plot(
            line.length,
            line[column] * scale,
            marker="os^vDP"[number // len(COLOURS) % 6],
            color=COLOURS[number % len(COLOURS)],
            label=name,
        )
    axes.set_title(f"batch {batch}, forward+backward")
    axes.legend(fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", type=Path, nargs="+")
    parser.add_argument("--output-dir", type=Path, required=True)
    options = parser.parse_args()
    records, frames = [], []
    for path in options.json:
        try:
            records.append(json.loads(path.read_text(encoding="utf-8")))
            frames.append(with_speedups(records[-1]["results"]))
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"error: {path}: expected a file of sat.benchmark, got {error!r}")
    frame = pd.concat(frames, ignore_index=True).drop_duplicates(CALL)
    record = records[0] | {
        "load": max(x["load"] for x in records),
        "rounds": min(x["rounds"] for x in records),
    }
    with matplotlib.rc_context(STYLE):
        contents = {
            "attention.csv": frame.to_csv(index=False, float_format="%.6g"),
            "attention.md": markdown(record, frame),
            "speedup.svg": svg(speedup_figure(frame)),
            "time.svg": svg(growth_figure(frame, "seconds", "milliseconds", 1e3)),
            "memory.svg": svg(growth_figure(frame, "extra_bytes", "extra memory, MB", 1e-6)),
        }
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_all({options.output_dir / name: text for name, text in contents.items()})


if __name__ == "__main__":
    main()
