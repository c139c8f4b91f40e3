"""Write the report of a run set: one HTML file with everything in it, which opens without network.

    python workflow/scripts/report.py --output results/demo/report.html --results results/demo \\
        --published config/published.csv \\
        --config '{"run": "demo", "tasks": ["listops"], "attentions": ["softmax", "sat"],
                   "seeds": [1001, 1002]}'

The answer first (main table and one figure), then each task, ablations, cost, where everything comes
from, and the command that makes each number again. Figures are taken from <results>/figures as they
are; one that is not there is left out. The same results give the same bytes.
"""

import argparse
import base64
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import jinja2
import markdown
import tables
from collect import (
    accuracy_text,
    add_run_arguments,
    best_rows,
    build_table,
    caption,
    describe_device,
    display,
    ordered_tasks,
    read_arguments,
)
from compare import make_tables, read_published
from tables import write_all

TEMPLATE = Path(__file__).resolve().parent.parent / "report" / "report.html.j2"
CAPTIONS = TEMPLATE.parent
OF_TASK = ("accuracy", "loss", "time", "statistics", "pattern", "mass")
BENCHMARK = {
    "time": "Time of attention over sequence length, beside PyTorch's.",
    "memory": "Memory of attention over sequence length, beside PyTorch's.",
    "speedup": "Speed-up of block-sparse attention over density.",
}


def slim(svg: str) -> str:
    """The same picture in less: lines to a hundredth of a point, no prolog, metadata or indentation."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<= d=")[^"]*', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d[0]), svg)
    return re.sub(r"\s+", " ", svg).replace("> <", "><")


def figure(path: Path, caption: str, alt: str) -> dict[str, str] | None:
    """What the template shows of an SVG; None where there is no such file."""
    if not path.is_file():
        return None
    data = base64.b64encode(slim(path.read_text(encoding="utf-8")).encode()).decode("ascii")
    return {"src": f"data:image/svg+xml;base64,{data}", "caption": caption, "alt": alt}


def known(figures: list[dict[str, str] | None]) -> list[dict[str, str]]:
    return [shown for shown in figures if shown is not None]


def caption_of(name: str) -> str:
    """The caption that Snakemake's own report has for the figure."""
    return (CAPTIONS / f"{name}.rst").read_text(encoding="utf-8").strip()


def answers(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence a task: which attention is best, and whether that says anything."""
    sentences = []
    best = best_rows(rows)
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [(i, row) for i, row in enumerate(rows) if row["task"] == task]
        finished = [row for _, row in of_task if row["num_seeds"]]
        winners = [row for i, row in of_task if i in best]
        if not finished:
            sentences.append(f"{task}: no finished run.")
        elif winners:
            names = " and ".join(f"{row['attention']} ({accuracy_text(row)} %)" for row in winners)
            others = [row for row in finished if row not in winners]
            sentences.append(
                f"{task}: {names}, the highest of {len(finished)} attentions; {certainty(winners, others)}."
                if others
                else f"{task}: {names}, equal."
            )
        elif all(row["above_chance"] == "no" for row in finished):
            sentences.append(f"{task}: no attention is above chance.")
        else:
            names = ", ".join(f"{row['attention']} ({accuracy_text(row)} %)" for row in finished)
            sentences.append(f"{task}: {names}.")
    return sentences


def certainty(winners: list[dict[str, Any]], others: list[dict[str, Any]]) -> str:
    """What the seeds say about the lead of `winners`: rows of the table, all with finished runs."""
    rows = [*winners, *others]
    if any(row["test_accuracy_95_low_percent"] is None for row in rows):
        fewest = min(row["num_seeds"] for row in rows)
        return f"{'one seed' if fewest == 1 else 'fewer than three seeds'}: no interval"
    lowest = min(row["test_accuracy_95_low_percent"] for row in winners)
    close = [r["attention"] for r in others if r["test_accuracy_95_high_percent"] >= lowest]
    if close:
        return f"95 % intervals overlap (with {', '.join(close)})"
    return "95 % intervals do not overlap"


def provenance(runs: dict[str, dict[str, Any]]) -> list[tables.Table]:
    """Sources with their hashes, then versions, code and devices."""
    sources: dict[tuple, set[str]] = {}
    for run in runs.values():
        for source in run.get("sources") or []:
            name = source.get("name") or source.get("file") or "?"
            key = (name, source.get("sha256") or "–", source.get("data") or run["data"])
            sources.setdefault(key, set()).add(run["task"])
    columns = {
        "source": ("l", lambda s: s[0][0]),
        "sha256": ("l", lambda s: s[0][1]),
        "data": ("l", lambda s: s[0][2]),
        "tasks": ("l", lambda s: ", ".join(ordered_tasks(s[1]))),
    }
    facts: dict[tuple[str, str], list[str]] = {}
    for name, run in runs.items():
        backend = run.get("backend")
        if isinstance(backend, dict):
            backend = ", ".join(f"{phase} {used}" for phase, used in backend.items())
        entries = {
            "device": describe_device(run["device"]),
            "attention computed by": backend or "–",
            "commit": run.get("git_commit") or "not in a repository",
            "versions": ", ".join(f"{k} {v}" for k, v in (run.get("versions") or {}).items()),
            f"data of {run['task']}": f"sha256 {run['data_sha256']}",
        }
        for item in entries.items():
            facts.setdefault(item, []).append(name)
    fact_columns = {
        "what": ("l", lambda f: f[0][0]),
        "value": ("l", lambda f: f[0][1]),
        "runs": ("r", lambda f: "all" if len(f[1]) == len(runs) else str(len(f[1]))),
    }
    ordered = sorted(facts.items(), key=lambda f: list(entries_order(f[0][0])))
    return [
        tables.make_table("Sources", columns, sorted(sources.items())),
        tables.make_table("Code, versions, devices", fact_columns, ordered),
    ]


def entries_order(what: str) -> tuple[int, str]:
    names = ("commit", "device", "attention computed by", "versions")
    return (names.index(what), "") if what in names else (len(names), what)


def commands(
    config: dict[str, Any], runs: dict[str, dict[str, Any]], results: Path
) -> tables.Table:
    """A row a run: its number, the command that trains it and the one that scores its weights again."""
    settings = shlex.quote(f"{results}/config.json")

    def train(item: tuple[str, dict[str, Any]]) -> str:
        path = shlex.quote(f"{results}/runs/{item[0]}/metrics.json")
        return f"snakemake --cores all {path} --configfile {settings}"

    def score(item: tuple[str, dict[str, Any]]) -> str:
        run = item[1]
        return (
            f"python -m sat --mode eval --run {shlex.quote(config['run'])} --task {shlex.quote(run['task'])} "
            f"--name {shlex.quote(run['attention'])} --random {run['seed']}"
        )

    columns = {
        "run": ("l", lambda item: item[0]),
        "test accuracy (%)": ("r", lambda item: f"{100 * item[1]['test']['accuracy']:.2f}"),
        "train it": ("l", train),
        "score its weights": ("l", score),
    }
    return tables.make_table("Every run", columns, list(runs.items()))


def make_report(
    config: dict[str, Any],
    runs: dict[str, dict[str, Any]],
    failures: dict[str, dict[str, Any]],
    published: list[dict[str, Any]],
    results: Path,
    drawn: Path,
) -> str:
    """The HTML text; `drawn` is the folder of the figures."""
    rows = build_table(runs, config, failures)
    run = config["run"]
    made = make_tables(config, runs, failures, published, results / "benchmarks")
    sections = []
    for task in ordered_tasks(config["tasks"]):
        shown = display([row for row in rows if row["task"] == task], run)
        shown = shown._replace(title=f"{task}: test", notes=())
        figures = known(
            [
                figure(
                    drawn / task / f"{name}.svg", caption_of(name), f"{task}: {caption_of(name)}"
                )
                for name in OF_TASK
            ]
        )
        sections.append({"task": task, "table": shown, "figures": figures})
    summaries = {
        name: figure(drawn / f"{name}.svg", caption_of(name), caption_of(name))
        for name in ("summary", "speed", "memory", "preparation")
    }
    benchmark = known(
        [
            figure(results / "benchmark" / f"{name}.svg", words, words)
            for name, words in BENCHMARK.items()
        ]
    )
    llama = results / "llama" / "summary.md"
    configuration = results / "config.json"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(TEMPLATE.name).render(
        run=run,
        caption=caption(rows, run),
        answers=answers(rows),
        main=display(rows, run)._replace(title="Test accuracy, switch, speed and memory"),
        summary=summaries["summary"],
        published=made["published"][0],
        sections=sections,
        ablation=made["ablation"][0][0],
        cost=made["cost"][0][0],
        preparation=made["preparation"][0][0],
        cost_figures=known([summaries[name] for name in ("speed", "memory", "preparation")])
        + benchmark,
        measured=bool(benchmark),
        configfile=shlex.quote(str(configuration)),
        llama=markdown.markdown(llama.read_text("utf-8"), extensions=["tables", "fenced_code"])
        if llama.is_file()
        else None,
        provenance=provenance(runs),
        settings={
            task: json.dumps(of_task["settings"], indent=1, sort_keys=True)
            for task in ordered_tasks(config["tasks"])
            if (of_task := last_run(runs, task)) and of_task["settings"]
        },
        configuration=configuration.read_text("utf-8") if configuration.is_file() else None,
        everything=f"snakemake --cores all all --configfile {shlex.quote(str(configuration))}",
        commands=commands(config, runs, results),
    )


def last_run(runs: dict[str, dict[str, Any]], task: str) -> dict[str, Any] | None:
    of_task = [run for run in runs.values() if run["task"] == task]
    return of_task[-1] if of_task else None


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_arguments(parser)
    parser.add_argument("--published", type=Path, required=True, help="config/published.csv")
    parser.add_argument("--results", type=Path, required=True, help="results/<run>")
    parser.add_argument("--figures", type=Path, help="default: figures/ of --results")
    parser.add_argument("--output", type=Path, required=True, help="results/<run>/report.html")
    args = parser.parse_args(argv)
    try:
        config, runs, failures = read_arguments(args)
        published = read_published(args.published)
        drawn = args.figures or args.results / "figures"
        html = make_report(config, runs, failures, published, args.results, drawn)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_all({args.output: html})
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"written: {args.output} ({len(html.encode()) / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
