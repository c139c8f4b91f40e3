"""The tables beside the main one: published figures, ablations, cost, and what came before."""

import csv
import json
import re
import shutil
import subprocess

import collect
import compare
import pytest
import tables
from made_up_runs import make_config, make_metrics, seal_run, write_run

from sat import config as settings
from sat import seal
from sat.config import ROOT

PUBLISHED = compare.read_published(ROOT / "config/published.csv")


def write_benchmark(path, seconds="12.5", cpu="20.0", memory="300.0"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"s\th:m:s\tmax_rss\tcpu_time\n{seconds}\t0:00:12\t{memory}\t{cpu}\n")


def made(tmp_path, all_metrics, config, allow_missing=False):
    """What compare makes of run folders with these metrics, by name."""
    paths = [write_run(tmp_path, metrics) / "metrics.json" for metrics in all_metrics]
    runs = collect.read_runs(paths, config, tmp_path / "runs", allow_missing)
    failures = collect.read_failures(config, tmp_path / "runs")
    return compare.make_tables(config, runs, failures, PUBLISHED, tmp_path / "benchmarks")


def seeds_of(attention, accuracies, **changes):
    return [
        make_metrics(attention=attention, seed=seed, accuracy=a, **changes)
        for seed, a in enumerate(accuracies, 1001)
    ]


CONFIG = make_config(seeds=[1001, 1002, 1003])
RUNS = [
    *seeds_of("softmax", (0.40, 0.41, 0.42)),
    *seeds_of("sat", (0.38, 0.41, 0.40), switch=(120, "rule")),
]


def test_generated_data_are_ranked_with_nobody(tmp_path):
    shown, rows, _ = made(tmp_path, RUNS, CONFIG)["published"]
    assert [("ours" if row["ours"] else "published") for row in rows if row["data"] == "generated"]
    for row in rows:
        assert (row["data"] == "generated") == (row["ours"] == "ours")
    released, generated = shown
    assert not any("(ours)" in cell for line in released.cells for cell in line)
    assert all("(ours)" in line[2] for line in generated.cells)
    assert "not to be ranked" in generated.title


def test_released_runs_are_ranked_with_the_published_ones(tmp_path):
    runs = [metrics | {"data": "released", "options": ["no brackets"]} for metrics in RUNS]
    runs = [metrics | {"test": metrics["test"] | {"baseline": 0.2}} for metrics in runs]
    (shown,), rows, _ = made(tmp_path, runs, CONFIG)["published"]
    listops = [r for r in rows if r["task"] == "listops" and r["metric"] == "accuracy"]
    values = [row["value"] for row in listops]
    assert values == sorted(values, reverse=True)
    (sat,) = [row for row in listops if row["system"] == "sat"]
    caveat = "no brackets; root operator alone 20.00 %"
    assert (sat["n"], sat["caveat"], sat["source"]) == (3, caveat, "run demo")
    (logs,) = [row for row in listops if row["system"] == "SAT logs"]
    assert "a dense checkpoint tested sparse" in logs["caveat"] and logs["sd"] == 0.71
    place = next(i for i, line in enumerate(shown.cells) if line[2] == "sat (ours)")
    assert (place, 2) in shown.bold


def test_every_published_figure_has_a_source_and_every_task_some():
    assert all(row["source"] for row in PUBLISHED)
    tasks = {row["task"] for row in PUBLISHED if row["metric"] == "accuracy"}
    assert tasks == set(collect.LRA_TASKS)


@pytest.mark.parametrize("row", [r for r in PUBLISHED if r["metric"] == "accuracy"], ids=str)
def test_what_is_known_to_differ_is_said_in_every_row(row):
    """sat.md 7.6 and how each project treats ListOps, dev of text and the last batch (the table at README's end)."""
    port = row["system"].startswith(("Skyformer", "SAT"))
    if row["task"] == "listops":
        assert f"ListOps {'without' if port else 'with'} brackets" in row["note"]
        assert ("root operator alone" in row["note"]) == port
    if row["task"] == "text":
        known = port or row["system"].startswith("LRA")
        assert ("dev = test" in row["note"]) == known
    assert ("test drops the last batch" in row["note"]) == port


def test_failed_runs_are_rows_in_every_table(tmp_path):
    failed = tmp_path / "runs/listops/sat-pooled/seed1001/failed.json"
    failed.parent.mkdir(parents=True)
    failure = {"task": "listops", "attention": "sat-pooled", "seed": 1001, "message": "no room"}
    failed.write_text(json.dumps(seal.add(failure | {"kind": "out of memory", "step": 7})))
    config = make_config(attentions=["softmax", "sat", "sat-pooled"], seeds=[1001, 1002, 1003])
    tables_made = made(tmp_path, RUNS, config, True)
    words = "0 (seed 1001: out of memory at step 7)"
    for name, value in (("published", 3), ("ablation", None), ("cost", None)):
        (*_, table), rows, columns = tables_made[name]
        (line,) = [line for line in table.cells if any("sat-pooled" in cell for cell in line)]
        assert words in line, name
        if value:
            assert line[value] == "out of memory"
        assert "out of memory at step 7" in tables.to_csv(rows, columns)
    (table,), _, _ = tables_made["ablation"]
    assert "Failed: listops sat-pooled (seed 1001: out of memory at step 7)." in table.title
    row = table.headings.index("transition rule")
    assert not any(i == len(table.cells) - 1 and j == row for i, j in table.bold)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("system,task\n", "expected the columns"),
        ("{head}\na,listops,accuracy,high,,1,%,s,\n", "line 2: value, std or n is not a number"),
        ("{head}\na,listops,accuracy,1,,1,%,,\n", "line 2: a published figure needs its source"),
        ("{head}\na,listops,accuracy,1,,1,%,s,one, two\n", "line 2: more values than columns"),
    ],
)
def test_a_wrong_published_figure_is_named(tmp_path, text, words):
    path = tmp_path / "published.csv"
    path.write_text(text.replace("{head}", ",".join(compare.PUBLISHED)))
    with pytest.raises(ValueError, match=words):
        compare.read_published(path)


def test_ablation_says_what_sets_a_run_apart(tmp_path):
    (table,), rows, _ = made(tmp_path, RUNS, CONFIG)["ablation"]
    softmax, sat = rows
    assert (sat["transition_rule"], sat["denominator"]) == ("settled", "zero_logits")
    assert (sat["pattern_source"], sat["learning_rate_after"]) == ("parameter", "constant")
    assert (softmax["transition_rule"], softmax["pattern_source"]) == ("never", "–")
    assert softmax["difference_percent"] == pytest.approx((2 + 0 + 2) / 3)
    half = 4.3027 * (4 / 3) ** 0.5 / 3**0.5
    assert softmax["difference_95_low_percent"] == pytest.approx(4 / 3 - half, abs=1e-3)
    assert sat["difference_percent"] is None and sat["base"] == "sat"
    assert "sat (base)" in table.cells[1]
    assert (0, list(table.headings).index("transition rule")) in table.bold


def test_sat_continue_is_sat_with_another_learning_rate_after_the_switch():
    demo = settings.load("demo")
    sat, other = (settings.resolve(demo, "listops", a, 1) for a in ("sat", "sat-continue"))
    assert other["transition"] == sat["transition"] | {"learning_rate": "continue"}
    assert all(other[block] == sat[block] for block in ("pattern", "model", "training"))


def test_ablation_finds_settings_nobody_foresaw(tmp_path):
    """Of a dense attention, those that a switch reads do not count."""
    config = make_config(attentions=["softmax", "sat", "odd"], seeds=[1001])
    paths = []
    for attention in config["attentions"]:
        switch = None if attention == "softmax" else (120, "rule")
        folder = write_run(tmp_path, make_metrics(attention=attention, switch=switch))
        paths.append(folder / "metrics.json")
        settings = json.loads((folder / "config.json").read_text())
        if attention != "sat":
            settings["training"] |= {"skewness": 9.5, "warmup": 7}
        (folder / "config.json").write_text(json.dumps(settings))
        seal_run(folder)
    found = collect.read_runs(paths, config, tmp_path / "runs", False)
    softmax, sat, odd = compare.ablation_rows(found, collect.build_table(found, config), config)
    assert sat["other_differences"] is None
    assert (
        odd["other_differences"] == "training.warmup 7 (base 100); training.skewness 9.5 (base 1.7)"
    )
    assert softmax["other_differences"] == "training.warmup 7 (base 100)"


def test_mass_of_the_attention_map_is_shown_where_training_tells_it(tmp_path):
    runs = [make_metrics(attention="sat", seed=s, switch=(120, "rule")) for s in (1001, 1002)]
    for metrics, mass in zip(runs, (0.05, 0.07), strict=True):
        metrics["pattern"] |= {"mass": [mass] * 2, "best_mass": [0.3, 0.1], "random_mass": None}
    config = make_config(attentions=["sat"])
    (table,), rows, _ = made(tmp_path, runs, config)["ablation"]
    assert table.cells[0][table.headings.index("mass held (%)")] == "6.0 (20.0 / –)"


def test_cost_is_what_the_trainings_and_snakemake_measured(tmp_path):
    # The second was interrupted: the job that ended it is shorter than the training.
    for seed, seconds in ((1001, 34), (1002, 12.5), (1003, 36)):
        write_benchmark(tmp_path / f"benchmarks/train/listops/sat/seed{seed}.tsv", seconds)
    _, rows, _ = made(tmp_path, RUNS, CONFIG)["cost"]
    softmax, sat = rows
    assert sat["cpu_seconds_mean"] == 40 and sat["job_seconds_mean"] == 35  # 20 s a phase
    assert softmax["cpu_seconds_mean"] == 20 and softmax["job_seconds_mean"] is None
    assert sat["gpu_seconds_mean"] is softmax["gpu_seconds_mean"] is None
    assert sat["dense_steps_per_second"] == 12.5 and sat["sparse_steps_per_second"] == 50
    assert softmax["sparse_steps_per_second"] is None


def test_gpu_seconds_count_every_gpu(tmp_path):
    device = {"type": "cuda", "name": "Test GPU", "threads": 2, "processes": 4}
    runs = seeds_of("softmax", (0.40,), device=device)
    (table,), (row,), _ = made(tmp_path, runs, make_config(attentions=["softmax"], seeds=[1001]))[
        "cost"
    ]
    assert row["gpu_seconds_mean"] == 4 * 30
    assert "4 × Test GPU (cuda, 2 threads)" in table.title


def test_a_job_too_short_to_be_seen_has_no_memory(tmp_path):
    """Snakemake's first look finds the shell alone."""
    write_benchmark(tmp_path / "benchmarks/extract.tsv", 0.5, "0.0", "2.1")
    (row,) = compare.preparation_rows(tmp_path / "benchmarks")
    assert row == {"step": "extract", "seconds": 0.5, "cpu_seconds": None, "peak_memory_mib": None}


def test_every_table_of_generated_data_says_so(tmp_path):
    all_made = made(tmp_path, RUNS, CONFIG)
    for name in ("ablation", "cost"):
        assert "Generated data: these are not" in all_made[name][0][0].title


def test_a_speed_up_has_its_own_caveat(tmp_path):
    runs = seeds_of("sat", (0.4,), switch=(120, "rule"))
    runs[0]["test"]["baseline"] = 0.2
    _, rows, _ = made(tmp_path, runs, make_config(attentions=["sat"], seeds=[1001]))["published"]
    caveats = {row["metric"]: row["caveat"] for row in rows if row["ours"]}
    assert caveats == {
        compare.ACCURACY: "root operator alone 20.00 %",
        compare.SPEED_UP: "the dense step also gathers what the switch needs",
    }


def test_preparation_in_the_order_of_the_data(tmp_path):
    for name in ("preprocess/own", "preprocess/listops", "download/a.gz", "extract"):
        write_benchmark(tmp_path / f"benchmarks/{name}.tsv")
    _, rows, _ = made(tmp_path, RUNS, CONFIG)["preparation"]
    names = [row["step"] for row in rows]
    assert names == ["download a.gz", "extract", "preprocess listops", "preprocess own"]
    (tmp_path / "benchmarks/extract.tsv").write_text("nothing\n")
    with pytest.raises(ValueError, match="extract.tsv: expected a benchmark table"):
        compare.preparation_rows(tmp_path / "benchmarks")


def test_tables_survive_missing_runs_and_odd_names(tmp_path):
    """A task with no finished run, one seed only, a run that never switched, a task that nobody published."""
    config = make_config(
        tasks=["my_task|50%&", "text"], attentions=["softmax", "sat"], seeds=[1, 2]
    )
    runs = [make_metrics("my_task|50%&", "sat", 1), make_metrics("my_task|50%&", "softmax", 1)]
    for name, (shown, rows, columns) in made(tmp_path, runs, config, True).items():
        text = tables.to_csv(rows, columns)
        assert text.startswith(next(iter(columns))), name
        for table in shown:
            assert tables.to_markdown(table) and tables.to_latex(table)
    cost = made(tmp_path / "again", runs, config, True)["cost"][1]
    assert [(row["task"], row["num_seeds"]) for row in cost] == [
        *[("text", 0)] * 2,
        *[("my_task|50%&", 1)] * 2,
    ]


def test_main_writes_every_form(tmp_path):
    for metrics in RUNS:
        write_run(tmp_path, metrics)
    compare.main(
        ["--output-dir", str(tmp_path / "tables"), "--config", json.dumps(CONFIG)]
        + ["--runs-dir", str(tmp_path / "runs"), "--benchmarks", str(tmp_path / "benchmarks")]
        + ["--published", str(ROOT / "config/published.csv")]
    )
    names = ("published", "ablation", "cost", "preparation")
    forms = {f"{name}.{form}" for name in names for form in ("csv", "md", "tex")}
    assert {path.name for path in (tmp_path / "tables").iterdir()} == forms
    for page in (tmp_path / "tables").glob("*.md"):
        lines = [line for line in page.read_text().splitlines() if re.match(r"\| ?[:-]", line)]
        assert lines, page
        for cell in (cell for line in lines for cell in line.strip("|").split("|")):
            assert re.fullmatch(" :?-+:? ", cell), f"{page}: {cell!r} is no delimiter of a table"
    tex = (tmp_path / "tables/ablation.tex").read_text()
    assert r"\toprule" in tex and r"\textbf{never}" in tex
    with open(tmp_path / "tables/published.csv") as file:
        assert next(csv.DictReader(file))["task"] == "listops"


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no LaTeX: apt-get install texlive")
def test_latex_takes_every_table(tmp_path):
    """All tables of real run sets' shapes and of a task with an odd name, in one document."""
    odd = make_config(tasks=["my_task|50%&"], seeds=[1])
    odd_runs = [make_metrics("my_task|50%&", "sat", 1), make_metrics("my_task|50%&", "softmax", 1)]
    for name in ("usual", "odd"):
        write_benchmark(tmp_path / name / "benchmarks/download/a_file%.gz.tsv")
    pages = []
    for name, config, all_metrics in (("usual", CONFIG, RUNS), ("odd", odd, odd_runs)):
        for shown, _, _ in made(tmp_path / name, all_metrics, config, True).values():
            pages += map(tables.to_latex, shown)
        runs = {collect.run_name(metrics): metrics for metrics in all_metrics}
        rows = collect.build_table(runs, config)
        pages += [collect.to_latex(rows, "demo"), collect.short_latex(rows, "demo")]
    (tmp_path / "all.tex").write_text(
        "\\documentclass{article}\n\\usepackage{booktabs,graphicx}\n\\begin{document}\n"
        + "\n".join(pages)
        + "\\end{document}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"],
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    log = (tmp_path / "all.log").read_text(errors="replace")
    assert "Missing character" not in log
