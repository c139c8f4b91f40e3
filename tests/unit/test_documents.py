"""README and docs: links that lead somewhere, numbers that stand in a file, two languages in the same order."""

import json
import re

import benchmark_report
import pandas as pd
import pytest
from compare import read_published

from sat import cost_benchmark, step_benchmark
from sat.config import ROOT

READMES = ["README.md", "README.zh-CN.md"]
PAGES = [
    *READMES,
    "CONTRIBUTING.md",
    *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]


def cells(line):
    return [cell.strip().strip("*") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def rows_of(text, num_columns):
    return [
        c
        for line in text.splitlines()
        if line.startswith("|") and len(c := cells(line)) == num_columns
    ]


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_project_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.split("#")[0]).exists(), f"{page}: {target}"


COLUMNS = {
    "test accuracy (%)": 1,  # digits behind the point
    "chance (%)": 1,
    "switch at step": 0,
    "density": 2,
    "ms a step": 0,
    "steps × batch": 0,
}


def figures(text):
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))]


@pytest.mark.parametrize("page", READMES)
@pytest.mark.parametrize(
    ("source", "columns"),
    [("docs/demo", list(COLUMNS)[:-1]), ("results/reference", list(COLUMNS))],
)
def test_tables_of_the_readme_are_those_of_the_runs(page, source, columns):
    """The README rounds what table.md says."""
    head, _, *lines = [
        cells(x) for x in (ROOT / source / "table.md").read_text().splitlines() if x[:1] == "|"
    ]
    table = {(line[0], line[1]): dict(zip(head, line, strict=True)) for line in lines}
    rows = rows_of((ROOT / page).read_text(), 2 + len(columns))
    shown = [row for row in rows if (row[0], row[1]) in table]
    assert {(row[0], row[1]) for row in shown} == set(table)
    for task, attention, *values in shown:
        for column, value in zip(columns, values, strict=True):
            exact = figures(table[task, attention][column])
            assert figures(value) == pytest.approx(exact, abs=0.5001 * 10 ** -COLUMNS[column]), (
                f"{page}: {column} of {task}, {attention}"
            )


@pytest.mark.parametrize("page", READMES)
def test_findings_on_listops_are_those_of_the_metrics(page):
    runs = {}
    for path in sorted((ROOT / "results/reference/runs/listops").glob("*/*/metrics.json")):
        metrics = json.loads(path.read_text())
        runs.setdefault(metrics["attention"], []).append(metrics)
    text = (ROOT / page).read_text()
    (part,) = re.findall(r"\*\*[^*]*ListOps[^*]*\*\*(.*?)\*\*Pathfinder\*\*", text, flags=re.S)
    said = figures(part)

    def claim(values, digits):
        for value in (min(values), max(values)):
            near = [x for x in said if abs(x - value) <= 0.5001 * 10**-digits]
            assert near, f"{page} does not say {value:.{digits}f}"

    for attention, group in runs.items():
        claim([100 * m["test"]["accuracy"] for m in group], 1)
        claim([100 * m["test"]["baseline"] for m in group], 1)
        if attention != "softmax":
            claim([m["transition"]["step"] for m in group], 0)
            claim([100 * m["switch"][k]["accuracy"] for m in group for k in m["switch"]], 1)
            claim([rows for m in group for rows in m["pattern"]["empty_rows"]], 0)
            for key in ("mass", "best_mass", "random_mass"):
                claim([100 * share for m in group for share in m["pattern"][key]], 0)


@pytest.mark.parametrize("page", READMES)
def test_the_demo_took_what_was_measured(page):
    minutes, seconds = divmod(json.loads((ROOT / "docs/demo/time.json").read_text())["seconds"], 60)
    assert re.search(rf"\b{minutes} (?:min|分) {seconds} (?:s|秒)", (ROOT / page).read_text())


@pytest.mark.parametrize(
    ("page", "source", "table"),
    [
        ("kernels.md", "attention.csv", lambda f: benchmark_report.speed_tables(pd.read_csv(f))),
        ("training.md", "step.json", lambda f: step_benchmark.table(json.loads(f.read_text()))),
        ("scaling.md", "cost.json", lambda f: cost_benchmark.table(json.loads(f.read_text()))),
    ],
)
def test_measured_tables_are_those_of_their_measurements(page, source, table):
    shown = (ROOT / "docs" / page).read_text()
    rows = [line for line in table(ROOT / "docs/benchmark" / source) if line.startswith("|")]
    assert len(rows) > 10
    for row in rows:
        assert row in shown, f"docs/{page} lacks what docs/benchmark/{source} gives: {row}"


@pytest.mark.parametrize("page", READMES)
def test_published_figures_are_those_of_the_file(page):
    published = {
        (row["system"], row["task"]): row["value"]
        for row in read_published(ROOT / "config/published.csv")
        if row["metric"] == "accuracy"
    }
    (line,) = [r for r in rows_of((ROOT / page).read_text(), 6) if "ListOps / image" in r[0]]
    found = [tuple(map(float, re.findall(r"\d+\.\d+", cell))) for cell in line[1:5]]
    systems = ("LRA Transformer", "Skyformer", "SAT logs", "S4")
    assert found == [(published[s, "listops"], published[s, "image"]) for s in systems]


def test_both_languages_have_the_same_parts():
    english, chinese = ((ROOT / page).read_text() for page in READMES)
    parts = [re.findall(r"^## ", text, flags=re.M) for text in (english, chinese)]
    assert len(parts[0]) == len(parts[1]) > 5
    # Commands and file names are the same in the same order.
    commands = [
        re.findall(r"^    (?:make|snakemake|python)[^#\n]*", text, flags=re.M)
        for text in (english, chinese)
    ]
    assert [c.strip() for c in commands[0]] == [c.strip() for c in commands[1]]
    for column in (
        "\n|",
        "](docs/",
        "```mermaid",
        " -->",
        "--resources gpu=4",
        "tensorboard --logdir",
    ):
        assert english.count(column) == chinese.count(column)


def test_targets_of_the_readme_are_targets():
    rules = "".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    rules += (ROOT / "Snakefile").read_text()
    for target in (
        "all",
        "data",
        "kernels",
        "table",
        "table_so_far",
        "figures",
        "report",
        "models",
        "benchmark",
    ):
        assert f"| `{target}`" in (ROOT / "README.md").read_text()
        assert re.search(rf"^\s*rule {target}:", rules, flags=re.M), target
