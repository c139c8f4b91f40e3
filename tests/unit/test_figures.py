"""The figures of a task: what they show, the same bytes twice, and what is refused."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import figures
import matplotlib
import numpy as np
import pytest
import summary_figures
from made_up_runs import MASKS, make_config, make_metrics, seal_run, write_run

SCRIPT = Path(figures.__file__)
FILES = sorted(f"{name}.{form}" for name in figures.DRAWINGS for form in ("svg", "png"))


@pytest.fixture
def run_dirs(tmp_path):
    """Two seeds of softmax and two of sat; the first sat run never switched."""
    runs = [
        make_metrics(attention="softmax", seed=1001, accuracy=0.4),
        make_metrics(attention="softmax", seed=1002, accuracy=0.5),
        make_metrics(attention="sat", seed=1001, accuracy=0.45),
        make_metrics(attention="sat", seed=1002, accuracy=0.55, switch=(150, "limit")),
    ]
    return [write_run(tmp_path / "demo", metrics) for metrics in runs]


def draw(run_dirs, config):
    return figures.draw_figures(figures.read_runs(run_dirs, "listops", config), config)


def svg_of(name, run_dirs, config=None):
    """One figure: the others need not be drawn for it."""
    with matplotlib.rc_context(figures.STYLE):
        return figures.to_svg(draw_one(name, run_dirs, config))


def texts(svg):
    """All text of an SVG, one string a text element."""
    tag = "{http://www.w3.org/2000/svg}text"
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(tag)]


def test_accuracy_figure_says_what_it_shows(run_dirs):
    found = texts(svg_of("accuracy", run_dirs))
    for text in (
        "listops, run demo (generated data)",
        "training step",
        "dev accuracy (%)",
        "softmax: mean ± sd of 2 seeds",
        "sat: mean ± sd of 2 seeds",
        "sat: switch to sparse (limit)",
        "chance (12.5 %)",
    ):
        assert text in found


@pytest.mark.parametrize(
    ("baseline", "words"), [(0.2, "root operator alone (20.0 %)"), (0.1, "chance (14.0 %)")]
)
def test_the_larger_of_chance_and_the_root_operator_is_drawn(tmp_path, baseline, words):
    metrics = make_metrics()
    metrics["test"]["baseline"] = baseline
    metrics["dev"] |= {"chance": 0.14, "baseline": baseline}
    dirs = [write_run(tmp_path, metrics)]
    for name in ("accuracy", "time"):
        assert words in texts(svg_of(name, dirs))
    config = make_config()
    runs = {"listops/softmax/seed1001": metrics | {"settings": {}}}
    summary = summary_figures.draw_figures(config, runs, tmp_path)["summary.svg"]
    label = next(t for t in texts(summary) if t.startswith("test accuracy"))
    assert ("root operator alone" in label) == (baseline == 0.2)


def test_finished_runs_of_a_task_are_drawn_alone(run_dirs, tmp_path, capsys):
    (run_dirs[0] / "metrics.json").unlink()
    arguments = ["--config", json.dumps(make_config(tasks=["listops", "text"])), "--allow-missing"]
    arguments += ["--runs-dir", str(run_dirs[0].parents[2]), "--output-dir", str(tmp_path / "out")]
    figures.main([*arguments, "--task", "text"])
    assert "text: no run is finished" in capsys.readouterr().out and not (tmp_path / "out").exists()
    figures.main([*arguments, "--task", "listops"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == FILES


def test_one_seed_has_no_mean(run_dirs):
    found = texts(svg_of("accuracy", run_dirs[1::2]))
    assert "softmax" in found and "sat" in found
    assert not any("mean" in text for text in found)


def test_pattern_figure_shows_the_first_seed_that_switched(run_dirs):
    found = texts(svg_of("pattern", run_dirs))
    assert "sat, seed 1002, from step 150, blocks of 32 × 32" in found
    for text in ("layer 1: density 0.125,", "3 of 4 rows empty"):
        assert text in found
    for text in ("layer 2: density 0.250,", "0 of 4 rows empty"):
        assert text in found
    assert not any("softmax" in text for text in found)


def test_pattern_figure_has_a_row_an_attention(tmp_path):
    config = make_config(attentions=["sat", "local"], seeds=[1])
    dirs = [
        write_run(tmp_path, make_metrics(attention=name, seed=1, switch=(150, "rule")))
        for name in config["attentions"]
    ]
    found = texts(svg_of("pattern", dirs, config))
    assert sum(text.startswith(("sat, seed 1,", "local, seed 1,")) for text in found) == 2


def test_without_a_switch_the_pattern_figure_says_so(run_dirs):
    found = texts(svg_of("pattern", run_dirs[:3]))
    assert "No run switched to sparse attention: there is no pattern to show." in found


@pytest.mark.parametrize("mask", [np.zeros((4, 4), bool), np.ones((4, 4), bool), MASKS[0] != 0])
def test_any_mask_is_drawn_as_it_is(mask):
    axes = figures.Figure().add_subplot()
    figures.draw_mask(axes, mask)
    drawn = np.asarray(axes.images[0].get_array())
    np.testing.assert_array_equal((drawn == drawn[mask][:1]).all(-1) if mask.any() else mask, mask)
    empty = ~mask.any(axis=1)
    assert (drawn[empty] == 228).all() and (drawn[~empty][~mask[~empty]] == 255).all()
    assert axes.get_ylim() == (4, 0)  # row 0 on top


def test_mean_curve_takes_the_later_evaluation_of_a_step_and_common_steps_only():
    curves = [[(50, 10.0), (100, 30.0), (100, 12.0)], [(100, 16.0), (150, 20.0)]]
    steps, mean, sd = figures.mean_curve(curves)
    assert steps.tolist() == [100]
    assert mean.tolist() == [14.0]
    assert sd.tolist() == pytest.approx([8**0.5])


def test_the_drop_at_the_switch_is_in_the_curve(run_dirs):
    curve = figures.read_run_history(run_dirs[3] / "history.jsonl").accuracy
    assert [accuracy for step, accuracy in curve if step == 150] == pytest.approx([27.5, 12.5])


def test_same_bytes_twice_whatever_order_and_hash_seed(run_dirs, tmp_path):
    outputs = []
    for hash_seed, order in (("0", run_dirs), ("1", run_dirs[::-1])):
        output_dir = tmp_path / hash_seed
        arguments = ["--task", "listops", "--output-dir", output_dir]
        arguments += ["--config", json.dumps(make_config()), *order]
        subprocess.run(
            [sys.executable, SCRIPT, *arguments],
            check=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
        )
        assert sorted(p.name for p in output_dir.iterdir()) == FILES
        outputs.append({p.name: p.read_bytes() for p in output_dir.iterdir()})
    assert outputs[0] == outputs[1]
    assert not any(b"<dc:date>" in content for content in outputs[0].values())
    assert all(c.startswith(b"\x89PNG") for n, c in outputs[0].items() if n.endswith(".png"))


def test_names_are_shown_as_they_are(tmp_path):
    name = "a_task $x_1$ & <b>"
    config = make_config(tasks=[name], attentions=["sat"], seeds=[1])
    run_dir = write_run(tmp_path, make_metrics(name, "sat", 1))
    assert f"{name}, run demo (generated data)" in texts(svg_of("accuracy", [run_dir], config))


def cut_off(figure):
    """The texts of a figure that leave its edges."""
    with matplotlib.rc_context(figures.STYLE):
        figure.draw_without_rendering()
    left, right = figure.bbox.padded(1).intervalx
    ticks = [axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)]
    ticks = {label for axis in ticks for label in axis.get_ticklabels(which="both")}
    found = {
        text.get_text(): text.get_window_extent()
        for text in figure.findobj(matplotlib.text.Text)
        if text.get_text() and text not in ticks  # ticks beyond the limits are not drawn
    }
    assert found
    return [words for words, box in found.items() if box.x0 < left or box.x1 > right]


@pytest.mark.parametrize("name", figures.DRAWINGS)
@pytest.mark.parametrize("attentions", [["softmax"], ["sat"]])
def test_no_text_is_cut_off(name, attentions, tmp_path):
    """One layer makes the narrowest figure of patterns; the names are longer than one line of it."""
    task = "customer_tickets_of_the_second_half_of_the_year"
    config = make_config(tasks=[task], attentions=attentions, seeds=[1], run="first_comparison")
    metrics = make_metrics(
        task, attentions[0], 1, switch=(150, "rule") if attentions == ["sat"] else None
    )
    metrics["run"] = config["run"]
    run_dir = write_run(tmp_path, metrics)
    runs = [one_layer(run) for run in figures.read_runs([run_dir], task, config)]
    with matplotlib.rc_context(figures.STYLE):
        figure = figures.DRAWINGS[name](runs, config)
    assert cut_off(figure) == []


def one_layer(run):
    return run._replace(pattern=run.pattern[:1], pooled=run.pooled[:1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"event": "eval", "sp', "not JSON"),
        ("", "not JSON"),
        ("[1]", "content: expected an object"),
        ('{"event": "pause"}', "event: expected one of train, eval, transition, found 'pause'"),
        ('{"event": "train", "step": 1, "phase": "dense"}', "loss is missing"),
        (
            '{"event": "eval", "split": "dev", "step": 1, "phase": "dense", "loss": 1, '
            '"accuracy": 50}',
            "accuracy: expected a number from 0 to 1, found 50",
        ),
    ],
)
def test_a_malformed_line_is_named(run_dirs, line, message):
    path = run_dirs[0] / "history.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    seal_run(run_dirs[0])
    with pytest.raises(ValueError) as error:
        draw(run_dirs, make_config())
    assert str(error.value).startswith(f"{path}: line 3: {message}")


@pytest.mark.parametrize(
    ("lines", "message"),
    [(slice(0), "found none"), (slice(None, None, -1), "go backwards")],
)
def test_a_history_that_cannot_be_drawn_is_refused(run_dirs, lines, message):
    path = run_dirs[0] / "history.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[lines]))
    seal_run(run_dirs[0])
    with pytest.raises(ValueError, match=message):
        draw(run_dirs, make_config())


def test_a_pattern_that_is_not_the_runs_is_refused(run_dirs):
    path = run_dirs[3] / "pattern.safetensors"
    path.write_bytes((run_dirs[2] / "pattern.safetensors").read_bytes())
    seal_run(run_dirs[3])
    with pytest.raises(ValueError, match=r"layer_0: expected shape \(4, 4\), found nothing"):
        draw(run_dirs, make_config())
    path.write_bytes(b"no tensors")
    seal_run(run_dirs[3])
    with pytest.raises(ValueError, match="not a safetensors file"):
        draw(run_dirs, make_config())


def test_a_user_error_is_one_line_and_leaves_nothing(run_dirs, tmp_path):
    config = json.dumps(make_config(tasks=["text"]))
    arguments = ["--task", "text", "--output-dir", str(tmp_path / "out"), "--config", config]
    with pytest.raises(SystemExit) as stop:
        figures.main(arguments + [str(run_dirs[0])])
    assert str(stop.value).startswith("error: ") and "\n" not in str(stop.value)
    assert "listops/softmax/seed1001: not among the runs" in str(stop.value)
    assert not (tmp_path / "out").exists()


def draw_one(name, run_dirs, config=None):
    config = config or make_config()
    runs = figures.read_runs(run_dirs, config["tasks"][0], config)
    with matplotlib.rc_context(figures.STYLE):
        return figures.DRAWINGS[name](runs, config)


def test_statistics_show_every_layer_and_both_thresholds(run_dirs):
    figure = draw_one("statistics", run_dirs)
    skewness, distance, change = figure.axes
    labels = [line.get_label() for line in skewness.lines]
    assert labels == ["layer 1", "layer 2", "threshold"]  # the first sat run never switched
    assert skewness.lines[2].get_ydata()[0] == 1.7 and change.lines[-1].get_ydata()[0] == 1.3
    assert len(distance.lines) == 2 and change.get_yscale() == "log"
    assert skewness.get_ylabel() == "sat, seed 1001"


def test_statistics_of_thousands_of_steps_are_medians(tmp_path):
    config = make_config(attentions=["sat"], seeds=[1])
    metrics = make_metrics(attention="sat", seed=1, switch=(4000, "rule"))
    run_dir = write_run(tmp_path, metrics, num_steps=6000)
    figure = draw_one("statistics", [run_dir], config)
    steps, values = figure.axes[0].lines[0].get_data()
    assert len(steps) == figures.MOST_POINTS and steps[-1] > 3900
    np.testing.assert_allclose(values, 1 + np.array(steps) / 6000)
    assert len(figures.to_svg(figure)) < 120_000


def test_one_step_below_the_threshold_is_seen_among_thousands(tmp_path):
    config = make_config(attentions=["sat"], seeds=[1])
    run_dir = write_run(
        tmp_path, make_metrics(attention="sat", seed=1, switch=(4000, "rule")), num_steps=6000
    )
    lines = [json.loads(line) for line in (run_dir / "history.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("change"):
            line["change"] = [1.04 if line["step"] == 3000 else 50.0, None]
    (run_dir / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seal_run(run_dir)
    change = draw_one("statistics", [run_dir], config).axes[2]
    (band, _), line = change.collections, change.lines[0]
    assert min(line.get_ydata()) == 50 and band.get_paths()[0].vertices[:, 1].min() == 1.04


def test_time_counts_training_alone(run_dirs):
    figure = draw_one("time", run_dirs[3:], make_config())
    seconds = figure.axes[0].lines[0].get_xdata()
    # 50 to 150 dense at 80 ms a recorded step, then sparse at 20 ms; the history has every 50th step.
    np.testing.assert_allclose(seconds, [0.08, 0.16, 0.24, 0.24, 0.26, 0.28, 0.30])


def test_pattern_stands_beside_the_map_it_was_chosen_from(run_dirs):
    figure = draw_one("pattern", run_dirs)
    titles = [axes.get_title() for sub in figure.subfigs for axes in sub.axes]
    assert titles[0] == "layer 1: map" and titles[1].startswith("layer 1: density")
    assert [len(axes.images) for sub in figure.subfigs for axes in sub.axes] == [1, 1, 1, 1]


def test_a_run_sparse_from_the_start_has_a_pattern_and_no_map(tmp_path):
    config = make_config(attentions=["local"], seeds=[1])
    metrics = make_metrics(attention="local", seed=1, switch=(0, "start"))
    metrics["phases"]["dense"] = None
    run_dir = write_run(tmp_path, metrics, pooled=False)
    assert "No run gathered statistics" in " ".join(texts(svg_of("statistics", [run_dir], config)))
    assert not any("switch" in text for text in texts(svg_of("accuracy", [run_dir], config)))
    (sub,) = draw_one("pattern", [run_dir], config).subfigs
    assert [axes.get_title().split(":")[0] for axes in sub.axes] == ["layer 1", "layer 2"]


def test_mass_is_the_mean_over_seeds(tmp_path):
    config = make_config(attentions=["sat"], seeds=[1, 2])
    dirs = []
    for seed, mass in ((1, 0.1), (2, 0.3)):
        metrics = make_metrics(attention="sat", seed=seed, switch=(150, "rule"))
        metrics["pattern"] |= {
            "mass": [mass, 0.5],
            "best_mass": [0.6] * 2,
            "random_mass": [0.1] * 2,
        }
        dirs.append(write_run(tmp_path, metrics))
    axes = draw_one("mass", dirs, config).axes[0]
    heights = [[bar.get_height() for bar in container] for container in axes.containers]
    np.testing.assert_allclose(heights, [[60, 60], [20, 50], [10, 10]])


def test_the_whole_run_set_has_its_figures(run_dirs, tmp_path):
    benchmark = tmp_path / "demo/benchmarks/preprocess/listops.tsv"
    benchmark.parent.mkdir(parents=True)
    benchmark.write_text("s\th:m:s\tmax_rss\tcpu_time\n12.5\t0:00:12\t300.0\t20.0\n")
    arguments = ["--config", json.dumps(make_config()), "--runs-dir", str(tmp_path / "demo/runs")]
    arguments += ["--benchmarks", str(tmp_path / "demo/benchmarks")]
    for folder in ("one", "two"):
        summary_figures.main([*arguments, "--output-dir", str(tmp_path / folder)])
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}
    names = ("summary", "speed", "memory", "preparation")
    assert set(files) == {f"{name}.{form}" for name in names for form in ("svg", "png")}
    assert "listops (generated data)" in texts(files["summary.svg"])
    assert "preprocess listops" in texts(files["preparation.svg"])
    assert {"dense", "sparse"} <= set(texts(files["memory.svg"]))


def test_a_run_set_without_a_finished_run_still_has_figures(tmp_path):
    files = summary_figures.draw_figures(make_config(), {}, tmp_path)
    assert "No run is finished." in texts(files["summary.svg"])
    assert "No step was measured by Snakemake." in texts(files["preparation.svg"])


@pytest.mark.parametrize("tasks", [["listops"], ["listops", "text", "image"]])
def test_no_text_of_the_whole_run_set_is_cut_off(tasks, tmp_path, monkeypatch):
    config = make_config(tasks=tasks, attentions=["softmax"], seeds=[1], run="first_comparison")
    runs = {f"{t}/softmax/seed1": make_metrics(t, "softmax", 1, run=config["run"]) for t in tasks}
    drawn = {}
    monkeypatch.setattr(summary_figures, "both", drawn.update)
    summary_figures.draw_figures(config, runs, tmp_path)
    assert "summary" in drawn
    assert {name: cut_off(figure) for name, figure in drawn.items()} == dict.fromkeys(drawn, [])
