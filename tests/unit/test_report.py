"""The report: one file with everything in it, whatever is missing, small enough, and readable in a browser."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import figures
import pytest
import report
import summary_figures
from made_up_runs import make_config, make_metrics, make_phase, seal_run, write_run

from sat import seal
from sat.config import ROOT

ATTENTIONS = [
    *("softmax", "sat", "sat-pooled", "sat-renormalised", "local", "bigbird", "random"),
    *("nystromformer", "linformer", "performer"),
]
TASKS = ["listops", "text", "retrieval", "image", "pathfinder", "agnews", "yelp", "my_task"]


def draw_all(folder, config):
    """The figures that the workflow draws before the report."""
    for task in config["tasks"]:
        dirs = sorted((folder / "runs" / task).glob("*/seed*"))
        if not dirs:
            continue
        (folder / "figures" / task).mkdir(parents=True)
        runs = figures.read_runs(dirs, task, config)
        for name, draw in figures.DRAWINGS.items():
            with figures.matplotlib.rc_context(figures.STYLE):
                svg = figures.to_svg(draw(runs, config))
            (folder / "figures" / task / f"{name}.svg").write_text(svg)
    arguments = ["--config", json.dumps(config), "--runs-dir", str(folder / "runs")]
    arguments += ["--allow-missing", "--benchmarks", str(folder / "benchmarks")]
    summary_figures.main([*arguments, "--output-dir", str(folder / "figures")])


def write(folder, config, *options):
    output = folder / "report.html"
    report.main(
        ["--config", json.dumps(config), "--runs-dir", str(folder / "runs"), *options]
        + ["--published", str(ROOT / "config/published.csv")]
        + ["--results", str(folder), "--output", str(output)]
    )
    return output


def made_up(folder, config, num_blocks=4, num_layers=2, num_steps=300):
    for task in config["tasks"]:
        for attention in config["attentions"]:
            static = attention in ("local", "bigbird", "random")
            learned = attention.startswith("sat")
            for seed in config["seeds"]:
                switch = (0, "start") if static else (num_steps // 2, "rule") if learned else None
                metrics = make_metrics(
                    task, attention, seed, accuracy=0.3 + 0.01 * (seed % 7), switch=switch
                )
                metrics["transition_rule"] = (
                    "start" if static else "settled" if learned else "never"
                )
                if static:
                    metrics["phases"] = {"dense": None, "sparse": make_phase(20, 200)}
                if switch:
                    shares = {
                        "mass": [0.1, 0.2],
                        "best_mass": [0.3, 0.4],
                        "random_mass": [0.05] * 2,
                    }
                    metrics["pattern"] |= {"num_blocks": num_blocks} | (shares if learned else {})
                metrics["sources"] = [
                    {"name": "lra_release", "sha256": "a" * 64, "data": "generated"}
                ]
                metrics["versions"] = {"torch": "2.13.0"}
                write_run(folder, metrics, num_steps=num_steps, pooled=learned)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A run set of two tasks, one of them a user's, with figures and a report."""
    folder = tmp_path_factory.mktemp("report") / "demo"
    config = make_config(
        tasks=["listops", "my_task|<b>&"], attentions=["softmax", "sat", "local"], seeds=[1, 2, 3]
    )
    made_up(folder, config)
    draw_all(folder, config)
    (folder / "llama").mkdir()
    (folder / "llama/summary.md").write_text("| step | loss |\n|---|---|\n| 1 | 2.5 |\n")
    return write(folder, config), config


class Page(html.parser.HTMLParser):
    """Tags that are open, ids, links and images of a page."""

    EMPTY = {"meta", "link", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.images, self.headings = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in self.EMPTY:
            self.open.append(tag)
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes[k] for k in ("href", "src") if k in attributes]
        if tag == "img":
            self.images.append(attributes)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def test_the_answer_comes_first_and_all_parts_are_there(small):
    text = small[0].read_text()
    page = Page(text)
    assert page.open == [] and len(set(page.ids)) == len(page.ids)
    assert page.headings == [
        *("The answer", "Beside published figures", "listops", "my_task|<b>&"),
        *("Ablations", "Cost", "llama.cpp", "Where it comes from", "How to reproduce"),
    ]
    assert len(page.images) == 2 * len(report.OF_TASK) + 4
    assert all(image["alt"] for image in page.images)
    for words in ("a" * 64, "torch 2.13.0", "0" * 40, "Test CPU (cpu, 2 threads)", "S4 paper"):
        assert words in text
    assert "<td>2.5</td>" in text  # the summary of the llama.cpp runs


def test_it_needs_no_network_and_no_script(small):
    text = small[0].read_text()
    for link in Page(text).links:
        assert link.startswith(("#", "data:")), link
    assert "<script" not in text and "@import" not in text and "url(" not in text
    for target in (link[1:] for link in Page(text).links if link.startswith("#")):
        assert target in Page(text).ids


def test_every_number_has_its_command(small):
    text = small[0].read_text()
    assert "runs/listops/sat/seed3/metrics.json --configfile" in text
    assert "python -m sat --mode eval --run demo --task listops --name sat --random 3" in text
    assert "snakemake --cores all all --configfile" in text


def test_the_same_results_give_the_same_bytes(small):
    before = small[0].read_bytes()
    assert write(small[0].parent, small[1]).read_bytes() == before


def test_failed_and_missing_runs_are_said_to_be(tmp_path):
    config = make_config(tasks=["listops", "text"], seeds=[1])
    write_run(tmp_path, make_metrics(seed=1))
    failed = tmp_path / "runs/listops/sat/seed1/failed.json"
    failed.parent.mkdir(parents=True)
    failure = {"task": "listops", "attention": "sat", "seed": 1, "message": "no room"}
    failure |= {"kind": "out of memory", "step": 7}
    failed.write_text(json.dumps(seal.add(failure)))
    text = write(tmp_path, config, "--allow-missing").read_text()
    assert "seed 1: out of memory at step 7" in text
    assert "text: no finished run." in text
    assert Page(text).images == []


@pytest.mark.parametrize(
    ("sat", "num_seeds", "words"),
    [
        (0.6, 1, "one seed: no interval"),
        (0.6, 2, "fewer than three seeds: no interval"),
        (0.505, 3, "95 % intervals overlap (with softmax)"),
        (0.6, 3, "95 % intervals do not overlap"),
    ],
)
def test_the_answer_claims_what_the_seeds_show(sat, num_seeds, words):
    config = make_config(seeds=list(range(num_seeds)))
    runs = {}
    for attention, accuracy in (("softmax", 0.5), ("sat", sat)):
        for seed in config["seeds"]:
            metrics = make_metrics(attention=attention, seed=seed, accuracy=accuracy + 0.005 * seed)
            runs[f"listops/{attention}/seed{seed}"] = metrics
    (sentence,) = report.answers(report.build_table(runs, config))
    assert sentence.startswith("listops: sat (") and sentence.endswith(
        f"%), the highest of 2 attentions; {words}."
    )


def test_what_was_not_measured_is_said_and_what_was_is_shown(tmp_path):
    config = make_config(attentions=["softmax"], seeds=[1])
    write_run(tmp_path, make_metrics(seed=1))
    assert "over sequence length: not measured" in write(tmp_path, config).read_text()
    (tmp_path / "benchmark").mkdir()
    (tmp_path / "benchmark/time.svg").write_text("<svg></svg>")
    text = write(tmp_path, config).read_text()
    assert "not measured" not in text and len(Page(text).images) == 1


def test_no_run_at_all_is_a_report_too(tmp_path):
    text = write(tmp_path, make_config(), "--allow-missing").read_text()
    assert "listops: no finished run." in text and "There is nothing to show yet." in text


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """8 tasks, 10 attentions, 3 seeds, histories of thousands of steps, patterns of 64 x 64 blocks."""
    folder = tmp_path_factory.mktemp("large") / "lra"
    config = make_config(tasks=TASKS, attentions=ATTENTIONS, seeds=[1001])
    made_up(folder, config, num_blocks=64, num_steps=2400)
    # More seeds of the same: copies, so that the test takes seconds.
    config["seeds"] = [1001, 1002, 1003]
    for run in sorted(folder.glob("runs/*/*/seed1001")):
        metrics = json.loads((run / "metrics.json").read_text())
        for seed in config["seeds"][1:]:
            other = Path(shutil.copytree(run, run.with_name(f"seed{seed}")))
            changed = metrics | {"seed": seed}
            changed["test"] = metrics["test"] | {"accuracy": 0.2 + 0.1 * (seed % 7)}
            (other / "metrics.json").write_text(json.dumps(changed))
            seal_run(other)
    return folder, config


def test_the_full_run_set_is_under_five_megabytes(large):
    """One task is drawn and stands for all eight: its figures are the largest part."""
    folder, config = large
    draw_all(folder, config | {"tasks": ["listops"]})
    for task in TASKS[1:]:
        shutil.copytree(folder / "figures/listops", folder / "figures" / task)
    size = write(folder, config).stat().st_size
    assert 500_000 < size < 5_000_000


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if executable is None:
        pytest.skip("no Chromium: apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module", params=[390, 1280], ids=["phone", "desktop"])
def page(request, browser, small):
    """The report at a width, without network; every message of the console and failed request is kept."""
    context = browser.new_context(viewport={"width": request.param, "height": 800}, offline=True)
    page = context.new_page()
    page.problems = []
    page.on("console", lambda message: page.problems.append(message.text))
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("requestfailed", lambda asked: page.problems.append(asked.url))
    page.goto(small[0].as_uri())
    page.width = request.param
    yield page
    context.close()


def test_no_error_and_every_image_shows(page, tmp_path):
    picture = tmp_path / "report.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 20_000
    assert page.problems == []
    assert page.evaluate("[...document.images].every(image => image.naturalWidth > 100)")


def test_the_page_is_no_wider_than_the_screen(page):
    assert page.evaluate("document.documentElement.scrollWidth") <= page.width
    wide = page.evaluate(
        "[...document.querySelectorAll('.scroll')].some(e => e.scrollWidth > e.clientWidth)"
    )
    assert wide or page.width > 1000  # on a phone the tables scroll instead


def test_accessibility(page):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    found = axe.Axe().run(page).response["violations"]
    assert [(v["id"], v["nodes"][0]["html"][:200]) for v in found] == []


def test_it_prints(page, tmp_path):
    pdf = page.pdf(format="A4")
    num_pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert 3 <= num_pages <= 60
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.emulate_media(media="screen")
