"""The results table: what its rows say, their order, the three forms, and what is refused."""

import csv
import io
import json
import math
import random

import collect
import numpy as np
import pytest
import tables
from made_up_runs import make_config, make_metrics, write_metrics

from sat import seal


def table_of(tmp_path, all_metrics, config, allow_missing=False):
    """The rows that the files of `all_metrics`, in random order, give."""
    paths = [write_metrics(tmp_path, metrics) for metrics in all_metrics]
    random.shuffle(paths)
    runs = collect.read_runs(paths, config, tmp_path / "runs", allow_missing)
    return collect.build_table(runs, config)


def only_row(tmp_path, all_metrics, **kwargs):
    config = make_config(
        tasks=[all_metrics[0]["task"]],
        attentions=[all_metrics[0]["attention"]],
        seeds=[metrics["seed"] for metrics in all_metrics],
    )
    (row,) = table_of(tmp_path, all_metrics, config, **kwargs)
    return row


def run_main(output_dir, config, paths, *options):
    collect.main(
        ["--output-dir", str(output_dir), "--config", json.dumps(config), *options]
        + ["--runs-dir", str(output_dir / "runs")]
        + [str(path) for path in paths]
    )


def test_mean_and_standard_deviation_over_seeds(tmp_path):
    runs = [make_metrics(seed=s, accuracy=a) for s, a in ((1, 0.40), (2, 0.42), (3, 0.50))]
    row = only_row(tmp_path, runs)
    assert row["num_seeds"] == 3
    assert row["status"] == "complete"
    assert row["test_accuracy_mean_percent"] == pytest.approx(44.0)
    assert row["test_accuracy_sd_percent"] == pytest.approx(math.sqrt((16 + 4 + 36) / 2))
    assert row["dev_accuracy_mean_percent"] == pytest.approx(45.0)
    assert row["chance_percent"] == 12.5
    assert collect.accuracy_text(row) == "44.00 ± 5.29"


def test_one_seed_has_no_standard_deviation(tmp_path):
    row = only_row(tmp_path, [make_metrics(accuracy=0.4)])
    assert row["test_accuracy_sd_percent"] is None
    assert collect.accuracy_text(row) == "40.00"
    assert ",40.0000,,,,12.5000," in collect.to_csv([row])


def test_sparse_runs_give_density_speed_up_and_memory(tmp_path):
    runs = [
        make_metrics(attention="sat", seed=1, switch=(120, "rule"), dense_ms=80, sparse_ms=20),
        make_metrics(attention="sat", seed=2, switch=(180, "rule"), dense_ms=90, sparse_ms=30),
    ]
    row = only_row(tmp_path, runs)
    assert row["density_mean"] == pytest.approx(0.1875)
    assert row["dense_ms_per_step_median"] == 85
    assert row["sparse_ms_per_step_median"] == 25
    assert row["speed_up_median"] == pytest.approx(3.5)  # of the ratios 4 and 3 of each run
    assert row["dense_peak_memory_max_mib"] == 512
    assert row["sparse_peak_memory_max_mib"] == 256
    assert row["transition_step_mean"] == 150
    assert row["transition_steps"] == "120 180"
    assert collect.switch_text(row) == "150 (120–180)"


@pytest.mark.parametrize(
    ("switches", "made_by", "steps"),
    [
        ([(120, "rule"), (120, "rule")], "rule", "120"),
        ([(200, "limit")], "limit", "200"),
        ([(120, "rule"), (200, "limit"), (100, "rule")], "rule 2, limit 1", "140 (100–200)"),
        ([(120, "rule"), None], "rule 1, never 1", "120"),
        ([None, None], "never", "never"),
    ],
)
def test_what_made_the_switch(tmp_path, switches, made_by, steps):
    runs = [make_metrics(attention="sat", seed=i, switch=s) for i, s in enumerate(switches)]
    row = only_row(tmp_path, runs)
    assert row["transition_made_by"] == made_by
    assert collect.switch_text(row) == steps


def test_a_run_that_never_switched_has_no_sparse_figures(tmp_path):
    row = only_row(tmp_path, [make_metrics(attention="sat")])
    empty = [column for column, value in row.items() if value is None]
    assert empty == [
        "failures",
        "test_accuracy_sd_percent",
        "test_accuracy_95_low_percent",
        "test_accuracy_95_high_percent",
        "baseline_percent",
        "transition_step_mean",
        "density_mean",
        "batch_size",
        "sparse_ms_per_step_median",
        "speed_up_median",
        "sparse_peak_memory_max_mib",
    ]


def test_the_dense_baseline_has_no_switch_to_miss(tmp_path):
    row = only_row(tmp_path, [make_metrics()])
    assert row["transition_made_by"] is None
    assert collect.switch_text(row) == "–"


def test_a_run_that_is_sparse_from_the_start_has_no_dense_figures(tmp_path):
    runs = [make_metrics(attention="local", seed=i, switch=(0, "start")) for i in (1, 2)]
    row = only_row(tmp_path, runs)
    assert (row["transition_steps"], row["transition_made_by"]) == ("0 0", "start")
    assert row["dense_ms_per_step_median"] == row["speed_up_median"] is None
    assert row["sparse_ms_per_step_median"] == 20
    broken = make_metrics(attention="local", seed=1, switch=(0, "start"))
    broken["phases"]["dense"] = broken["phases"]["sparse"]
    with pytest.raises(ValueError, match="phases.dense"):
        only_row(tmp_path / "broken", [broken])


def test_rows_come_in_the_order_of_lra_then_by_name(tmp_path):
    tasks = ["zebra", "pathfinder", "image", "apple", "listops", "text", "retrieval"]
    config = make_config(tasks=tasks, attentions=["sat", "softmax"], seeds=[1])
    runs = [make_metrics(t, a, 1) for t in tasks for a in ("softmax", "sat")]
    rows = table_of(tmp_path, runs, config)
    assert [row["task"] for row in rows[::2]] == [
        *("listops", "text", "retrieval", "image", "pathfinder"),
        *("apple", "zebra"),
    ]
    assert [row["attention"] for row in rows[:2]] == ["sat", "softmax"]


def test_a_diverged_loss_is_shown(tmp_path):
    diverged = make_metrics(seed=2)
    diverged["test"]["loss"] = math.nan
    row = only_row(tmp_path, [make_metrics(seed=1), diverged])
    assert next(csv.DictReader(io.StringIO(collect.to_csv([row]))))["test_loss_mean"] == "nan"


def test_only_times_and_memory_may_differ_and_come_last(tmp_path):
    first, second = make_metrics(accuracy=1 / 3), make_metrics(accuracy=1 / 3)
    second["phases"]["dense"] |= {"ms_per_step": 99.0, "seconds": 99.0, "peak_memory_bytes": 10**9}
    second["training_seconds"] = 99.0
    lines = []
    for name, metrics in (("a", first), ("b", second)):
        text = collect.to_csv([only_row(tmp_path / name, [metrics])])
        lines.append(list(csv.reader(io.StringIO(text))))
    num_stable = len(collect.STABLE_COLUMNS)
    assert lines[0][0][num_stable:] == list(collect.VOLATILE_COLUMNS)
    assert [line[:num_stable] for line in lines[0]] == [line[:num_stable] for line in lines[1]]
    assert lines[0] != lines[1]


def test_the_order_of_the_files_does_not_matter(tmp_path):
    config = make_config()
    runs = [
        make_metrics("listops", a, s, accuracy=0.1 * s % 1)
        for a in config["attentions"]
        for s in config["seeds"]
    ]
    paths = [write_metrics(tmp_path, metrics) for metrics in runs]
    outputs = []
    for order in (paths, paths[::-1]):
        run_main(tmp_path, config, order)
        outputs.append([(tmp_path / f"table.{e}").read_bytes() for e in ("csv", "md", "tex")])
    assert outputs[0] == outputs[1]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["runs", "table.csv", "table.md", "table.tex", "table_short.tex"]


def test_missing_runs_are_named_with_the_command(tmp_path, capsys):
    path = write_metrics(tmp_path, make_metrics())
    with pytest.raises(SystemExit) as stop:
        run_main(tmp_path, make_config(), [path, tmp_path / "nowhere.json"])
    message = str(stop.value)
    assert message.startswith("error: ") and "\n" not in message
    assert str(tmp_path / "runs/listops/softmax/seed1002/metrics.json") in message
    assert "snakemake --cores all listops" in message and "--allow-missing" in message
    assert not list(tmp_path.glob("table*"))
    assert capsys.readouterr().out == ""


def test_allow_missing_counts_what_is_there(tmp_path, capsys):
    path = write_metrics(tmp_path, make_metrics(accuracy=0.25))
    run_main(tmp_path, make_config(), [path], "--allow-missing")
    dense, sparse = csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))
    assert (dense["status"], dense["num_seeds"]) == ("1 of 2 seeds", "1")
    assert (sparse["status"], sparse["num_seeds"]) == ("no finished run", "0")
    assert sparse["test_accuracy_mean_percent"] == ""
    printed = capsys.readouterr().out
    assert printed.startswith((tmp_path / "table.md").read_text())
    assert "no finished run" in printed and "1 of 2" in printed
    assert printed.endswith("table.csv, table.md, table.tex, table_short.tex\n")
    assert "**" not in printed  # nothing to be better than


def test_the_best_accuracy_of_a_task_is_bold(tmp_path):
    config = make_config(tasks=["listops", "text"], seeds=[1])
    runs = [
        make_metrics("listops", "softmax", 1, accuracy=0.4),
        make_metrics("listops", "sat", 1, accuracy=0.5),
        make_metrics("text", "softmax", 1, accuracy=0.70001),
        make_metrics("text", "sat", 1, accuracy=0.7),
    ]
    rows = table_of(tmp_path, runs, config)
    assert collect.best_rows(rows) == {1, 2, 3}  # equal as shown: both
    assert "**50.00**" in collect.to_markdown(rows, "demo")
    assert r"\textbf{50.00}" in collect.to_latex(rows, "demo")
    short = collect.short_latex(rows, "demo")
    assert r"\textbf{50.00}" in short and r"\begin{tabular}{llrrrr}" in short
    assert "resizebox{" not in short and "resizebox{" in collect.to_latex(rows, "demo")


@pytest.mark.parametrize(
    ("kinds", "sentence"),
    [
        (("generated", "generated"), "Generated data: these are not the released"),
        (("released", "released"), "Released data."),
        (("released", "generated"), "Released data: listops. Generated data: text; the two are"),
    ],
)
def test_the_caption_says_run_data_and_hardware(tmp_path, kinds, sentence):
    config = make_config(tasks=["listops", "text"], attentions=["softmax"], seeds=[1])
    tasks = zip(config["tasks"], kinds, strict=True)
    runs = [make_metrics(task, seed=1, data=kind) for task, kind in tasks]
    rows = table_of(tmp_path, runs, config)
    for text in (collect.to_markdown(rows, "demo"), collect.to_latex(rows, "demo")):
        assert "Run demo." in text
        assert sentence in text
        assert "Hardware: Test CPU (cpu, 2 threads)." in text


def test_names_are_escaped(tmp_path):
    name = r"my_task|50%&$x^2~#{a}\b"
    config = make_config(tasks=[name], attentions=["softmax"], seeds=[1])
    runs = {f"{name}/softmax/seed1": make_metrics(name, seed=1, options=["no_brackets"])}
    rows = collect.build_table(runs, config)
    assert r"my\_task\|50%&$x^2~#{a}\\b (no\_brackets)" in collect.to_markdown(rows, "my_run")
    latex = collect.to_latex(rows, "my_run")
    assert (
        r"my\_task\textbar{}50\%\&\$x\textasciicircum{}2\textasciitilde{}\#\{a\}"
        r"\textbackslash{}b (no\_brackets) & softmax &"
    ) in latex
    assert r"\caption{Run my\_run." in latex
    assert r"\toprule" in latex and r"\bottomrule" in latex
    assert "–" not in latex and "±" not in latex
    rows_of_cells = latex.split(r"\midrule")[1].split(r"\bottomrule")[0].replace(r"\&", "")
    assert rows_of_cells.count("&") == len(collect.DISPLAY) - 1


def test_every_line_of_the_markdown_table_has_the_same_width(tmp_path):
    row = only_row(tmp_path, [make_metrics("a_task", "sat", 1, switch=(120, "rule"))])
    lines = [x for x in collect.to_markdown([row], "demo").splitlines() if x.startswith("|")]
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1


def set_key(metrics, key, value):
    *parents, last = key.split(".")
    for parent in parents:
        metrics = metrics[parent]
    metrics[last] = value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema_version", 2),
        ("data", "real"),
        ("seed", "1001"),
        ("test.accuracy", 50.0),
        ("test.chance", None),
        ("dev.loss", "low"),
        ("transition.reason", "luck"),
        ("transition.reason", None),
        ("pattern", None),
        ("pattern.density", [0.1, 2]),
        ("pattern.density", []),
        ("phases.dense", None),
        ("phases.sparse.ms_per_step", 0),
        ("options", "none"),
        ("num_parameters", True),
    ],
)
def test_a_wrong_value_is_named(tmp_path, key, value):
    metrics = make_metrics(attention="sat", switch=(120, "rule"))
    set_key(metrics, key, value)
    path = write_metrics(tmp_path, metrics)
    with pytest.raises(ValueError) as error:
        collect.read_metrics(path)
    assert str(error.value).startswith(f"{path}: {key}")


def test_a_missing_key_is_named(tmp_path):
    metrics = make_metrics()
    del metrics["test"]["chance"]
    path = write_metrics(tmp_path, metrics)
    with pytest.raises(ValueError, match=r"metrics\.json: test\.chance is missing"):
        collect.read_metrics(path)


@pytest.mark.parametrize("content", [b"", b'{"schema_version": 1', b"\xff\xfe", b"[]"])
def test_a_broken_file_is_named_even_when_runs_may_be_missing(tmp_path, content):
    path = write_metrics(tmp_path, make_metrics())
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=f"^error: {path}: "):
        run_main(tmp_path, make_config(), [path], "--allow-missing")


def test_a_run_that_is_not_in_the_configuration_is_refused(tmp_path):
    config = make_config()
    for i, changes in enumerate(({"run": "lra"}, {"seed": 7}, {"task": "text"})):
        path = write_metrics(tmp_path / str(i), make_metrics() | changes)
        with pytest.raises(ValueError, match="not among the runs of --config"):
            collect.read_runs([path], config, tmp_path, allow_missing=True)


def test_the_same_run_twice_is_refused(tmp_path):
    paths = [write_metrics(tmp_path / name, make_metrics()) for name in ("a", "b")]
    with pytest.raises(ValueError, match="already given by"):
        collect.read_runs(paths, make_config(), tmp_path, allow_missing=True)


@pytest.mark.parametrize(
    ("key", "value"),
    [("data", "released"), ("data_sha256", "e"), ("options", ["x"]), ("num_parameters", 1)],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, key, value):
    config = make_config(attentions=["softmax"])
    runs = [make_metrics(seed=1001), make_metrics(seed=1002) | {key: value}]
    with pytest.raises(ValueError, match=f"^{key} of listops/softmax/seed1002 is"):
        table_of(tmp_path, runs, config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--config: not JSON"),
        ("[]", "--config: content: expected an object"),
        (json.dumps(make_config(seeds=["1"])), r"--config: seeds\[0\]: expected a whole number"),
        (json.dumps(make_config(extra=1)), "--config: unknown key 'extra'"),
    ],
)
def test_a_wrong_config_argument_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        collect.parse_config(text)


@pytest.mark.parametrize(("accuracy", "above"), [(0.10, "no"), (0.17, "no"), (0.18, "yes")])
def test_what_is_not_above_chance_is_said_and_never_bold(tmp_path, accuracy, above):
    """Chance .125 of 200 examples: two standard errors are 4.7 points."""
    config = make_config(tasks=["listops"], attentions=["softmax", "sat"], seeds=[1])
    runs = [make_metrics("listops", a, seed=1, accuracy=accuracy) for a in config["attentions"]]
    rows = table_of(tmp_path, runs, config)
    assert [row["above_chance"] for row in rows] == [above, above]
    text = collect.to_markdown(rows, "demo")
    assert ("12.50, not exceeded" in text) == (above == "no")
    assert ("**" in text) == (above == "yes")


def test_the_baseline_of_listops_counts_where_it_is_higher_than_chance(tmp_path):
    config = make_config(tasks=["listops"], attentions=["softmax"], seeds=[1])
    metrics = make_metrics("listops", seed=1, accuracy=0.3)
    metrics["test"]["baseline"] = 0.37
    rows = table_of(tmp_path, [metrics], config)
    assert rows[0]["above_chance"] == "no"
    assert "12.50 (root operator 37.00), not exceeded" in collect.to_markdown(rows, "demo")


def test_a_run_with_other_settings_gets_no_row(tmp_path):
    config = make_config(tasks=["listops"], attentions=["softmax"], seeds=[1])
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(seal.add(make_metrics("listops", seed=1))))
    digests = {"listops/softmax/seed1": "c" * 64}
    assert collect.read_runs([path], config | {"digests": digests}, tmp_path, False)
    digests = {"listops/softmax/seed1": "d" * 64}
    with pytest.raises(ValueError, match=r"metrics.json: trained with other settings.*forcerun"):
        collect.read_runs([path], config | {"digests": digests}, tmp_path, False)


def test_interval_of_three_seeds(tmp_path):
    runs = [make_metrics(seed=s, accuracy=a) for s, a in ((1, 0.40), (2, 0.42), (3, 0.50))]
    row = only_row(tmp_path, runs)
    half = 4.3027 * math.sqrt(28) / math.sqrt(3)
    assert row["test_accuracy_95_low_percent"] == pytest.approx(44 - half, abs=1e-3)
    assert row["test_accuracy_95_high_percent"] == pytest.approx(44 + half, abs=1e-3)
    assert collect.interval_text(row) == "30.86 to 57.14"
    assert collect.interval_text(only_row(tmp_path / "two", runs[:2])) == "–"


@pytest.mark.parametrize("degrees", [1, 2, 5, 17, 30, 31, 60, 500])
def test_points_of_student_s_t(degrees):
    """The density of Student's t, integrated up to the point, leaves 2.5 % beyond it."""
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    scale = math.exp(log_scale) / math.sqrt(degrees * math.pi)
    x = np.linspace(0, tables.t_95(degrees), 20_001)
    density = scale * (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(0.475, abs=2e-5)


def write_failure(folder, task, attention, seed, kind="out of memory", step=120):
    path = folder / "runs" / task / attention / f"seed{seed}" / "failed.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    failure = {"task": task, "attention": attention, "seed": seed, "kind": kind, "step": step}
    path.write_text(json.dumps(seal.add(failure | {"message": "no room"})))
    return path


def test_failed_runs_are_rows(tmp_path, capsys):
    write_metrics(tmp_path, make_metrics(accuracy=0.25))
    write_failure(tmp_path, "listops", "softmax", 1002)
    write_failure(tmp_path, "listops", "sat", 1001, "loss not finite", None)
    run_main(tmp_path, make_config(), [], "--allow-missing")
    dense, sparse = csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text()))
    assert (dense["status"], dense["failures"]) == (
        "1 of 2 seeds",
        "seed 1002: out of memory at step 120",
    )
    assert (sparse["status"], sparse["failures"]) == (
        "loss not finite",
        "seed 1001: loss not finite",
    )
    printed = capsys.readouterr().out
    assert "1 of 2 (seed 1002: out of memory at step 120)" in printed
    assert "| loss not finite |" in printed.replace("  ", " ").replace("  ", " ")


def test_a_run_that_succeeded_after_a_failure_has_not_failed(tmp_path):
    write_metrics(tmp_path, make_metrics())
    write_failure(tmp_path, "listops", "softmax", 1001)
    assert collect.read_failures(make_config(), tmp_path / "runs") == {}


def test_a_broken_failure_is_named(tmp_path):
    path = write_failure(tmp_path, "listops", "sat", 1001, "bad luck")
    with pytest.raises(ValueError, match="failed.json: kind: expected one of"):
        collect.read_failures(make_config(), tmp_path / "runs")
    path.write_text("{")
    with pytest.raises(ValueError, match="failed.json: not JSON"):
        collect.read_failures(make_config(), tmp_path / "runs")


def test_a_run_sparse_from_the_start_has_no_dense_figures(tmp_path):
    metrics = make_metrics(attention="local", switch=(0, "start"))
    metrics["phases"]["dense"] = None
    row = only_row(tmp_path, [metrics])
    assert row["dense_ms_per_step_median"] is None and row["speed_up_median"] is None
    assert row["sparse_ms_per_step_median"] == 20
    assert (collect.switch_text(row), row["transition_made_by"]) == ("0", "start")
