"""What reruns after which change: Snakemake's plan over a finished project with stub environments."""

import os
import shutil
from pathlib import Path

import pytest

TRAININGS = {
    f"train {task} {attention} 1001"
    for task in ("listops", "image")
    for attention in ("softmax", "sat")
}
LISTOPS_TRAININGS = {name for name in TRAININGS if " listops " in name}
SUMMARIES = {"collect", "compare", "draw_summary", "write_report"}
LISTOPS_RESULTS = SUMMARIES | {
    "draw_figures listops",
    "export_model listops softmax",
    "export_model listops sat",
}
RESULTS = LISTOPS_RESULTS | {name.replace("listops", "image") for name in LISTOPS_RESULTS}
PREPROCESSING = {"prepare_cifar10", "preprocess listops", "preprocess image"}
DOWNLOADS = {"download lra_release.gz", "download cifar-10-binary.tar.gz"}
EVERYTHING = DOWNLOADS | {"extract"} | PREPROCESSING | {"compile_kernels"} | TRAININGS | RESULTS


def nothing(project):
    pass


def touch_everything(project):
    for folder in ("config", "csrc", "envs", "profiles", "sat", "workflow"):
        for path in [*(project.root / folder).rglob("*"), project.root / "Snakefile"]:
            os.utime(path)


def learning_rate_of_listops(project):
    project.configure(settings={"listops": {"training": {"learning_rate": 0.001}}})


def learning_rate_in_the_task_file(project):
    path = project.root / "config/tasks/listops.yaml"
    text = path.read_text()
    assert "learning_rate: 8.0e-4" in text
    path.write_text(text.replace("learning_rate: 8.0e-4", "learning_rate: 1.0e-3"))


def one_more_seed(project):
    project.configure(seeds=[1001, 1002])


def edit_in_sat(project):
    project.append("sat/model.py")


def edit_in_csrc(project):
    path = next(path for path in (project.root / "csrc").rglob("*") if path.suffix == ".cpp")
    project.append(str(path.relative_to(project.root)), "\n// edited\n")


def other_torch_environment(project):
    project.append("envs/torch.yaml", "      - added==1.0\n")


def other_tf_environment(project):
    project.append("envs/tf.yaml", "      - added==1.0\n")


def other_report_environment(project):
    project.append("envs/report.yaml", "      - added==1.0\n")


def edit_of_preprocessing(project):
    project.append("workflow/scripts/preprocess.py")


def edit_of_download(project):
    project.append("workflow/scripts/download.py")


def cap_of_one_task(project):
    project.configure(settings={"listops": {"dataset": {"train": 10}}})


def edit_of_a_caption(project):
    project.append("workflow/report/accuracy.rst", "Edited.\n")


def table_deleted(project):
    for path in (project.root / "results/tiny").glob("table.*"):
        path.unlink()


CHANGES = {
    nothing: set(),
    touch_everything: set(),
    learning_rate_of_listops: LISTOPS_TRAININGS | LISTOPS_RESULTS,
    learning_rate_in_the_task_file: LISTOPS_TRAININGS | LISTOPS_RESULTS,
    one_more_seed: {name.replace("1001", "1002") for name in TRAININGS} | RESULTS,
    edit_in_sat: TRAININGS | RESULTS,
    edit_in_csrc: {"compile_kernels"} | TRAININGS | RESULTS,
    other_torch_environment: {"compile_kernels"} | TRAININGS | RESULTS,
    other_tf_environment: PREPROCESSING | TRAININGS | RESULTS,
    other_report_environment: RESULTS,
    edit_of_preprocessing: {"preprocess listops", "preprocess image"} | TRAININGS | RESULTS,
    edit_of_download: set(),
    edit_of_a_caption: {"write_report"},
    cap_of_one_task: {"preprocess listops"} | LISTOPS_TRAININGS | LISTOPS_RESULTS,
}


def test_everything_runs_from_nothing(fresh):
    assert fresh.planned("all") == EVERYTHING


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_rerun(finished, change):
    change(finished)
    assert finished.planned("all") == CHANGES[change]


def test_an_edit_of_ones_own_attention_trains_it_again(finished):
    finished.append("own.py", "class Attention: pass\n")
    finished.append("config/attentions/own.yaml", 'model: {attention: "own:Attention"}\n')
    finished.configure(attentions=["softmax", "sat", "own"])
    own = {f"{job} own" for job in ("export_model listops", "export_model image")}
    own |= {"train listops own 1001", "train image own 1001"}
    own |= {job for job in RESULTS if not job.startswith("export_model")}
    assert finished.planned("all") == own
    finished.run("all")
    assert finished.planned("all") == set()
    finished.append("own.py")
    assert finished.planned("all") == own


def test_the_configuration_that_is_written_is_the_one_that_ran(finished):
    """The report's commands take it: with it nothing is to be done."""
    assert finished.planned("all", configfile="results/tiny/config.json") == set()


def test_what_is_measured_later_gets_into_the_report(finished):
    for name in ("benchmark/time.svg", "llama/summary.md"):
        path = finished.root / "results/tiny" / name
        path.parent.mkdir()
        path.write_text("measured\n")
        assert finished.planned("all") == {"write_report"}
    finished.run("all")
    assert finished.planned("all") == set()


def test_what_is_finished_has_tables_figures_and_a_report(finished):
    results = finished.root / "results/tiny"
    (results / "runs/listops/sat/seed1001/metrics.json").unlink()
    finished.run("table_so_far")
    made = {str(path.relative_to(results / "so-far")) for path in (results / "so-far").rglob("*.*")}
    expected = {"table.md", "tables/cost.md", "report.html", "figures/summary.svg"}
    assert expected | {f"figures/{task}/loss.svg" for task in ("listops", "image")} <= made


def test_snakemake_s_own_report(finished):
    arguments = ["all", "--configfile", "config/tiny.yaml", "--report", "own.html"]
    done = finished.snakemake(*arguments)
    assert done.returncode == 0, done.stdout
    text = (finished.root / "own.html").read_text()
    for words in ("Tables", "Summary", "accuracy over steps", "beside published figures"):
        assert words in text, words


def test_switching_to_conda_reruns_nothing(finished, conda):
    assert finished.planned("all", "--use-conda", path=conda) == set()


def test_deleted_table_is_made_from_what_is_there(finished):
    """And without the environments of the steps before it: an environment that is not needed is not made."""
    table_deleted(finished)
    for name in ("tf", "torch", "llama"):
        shutil.rmtree(finished.root / ".venvs" / name)
    shutil.rmtree(finished.root / "results/tiny/tables")
    assert finished.planned("table") == {"collect", "compare"}
    calls = len(finished.calls())
    printed = finished.run("table")
    steps = sorted(call["step"] for call in finished.calls()[calls:])
    assert steps == ["collect.py", "compare.py"]
    assert {path.name for path in (finished.root / ".venvs").iterdir() if path.is_dir()} == {
        "report"
    }
    assert "Making the environment" not in printed
    assert "Table: results/tiny/table.{csv,md,tex}, tables/" in printed


def test_a_rerun_leaves_nothing_to_do(finished):
    cap_of_one_task(finished)
    edit_in_csrc(finished)
    one_more_seed_and_rate = {"listops": {"dataset": {"train": 10}, "training": {"warmup": 10}}}
    finished.configure(seeds=[1001, 1002], settings=one_more_seed_and_rate)
    finished.run("all")
    assert finished.planned("all") == set()


@pytest.mark.parametrize(
    "text, expected",
    [
        ("sedes: [1]", ["'sedes'", "did you mean 'seeds'", "allowed here: run, data, tasks"]),
        ("seeds: '1001'", ["'seeds'", "'1001'", "array"]),
        ("caps: {train: many}", ["'caps.train'", "'many'", "integer or null"]),
        (
            "settings: {image: {training: {learningrate: 1}}}",
            ["'settings.image.training.learningrate'", "'learning_rate'", "batch_size, learning_r"],
        ),
    ],
    ids=["unknown key", "wrong type", "cap", "unknown key of a task"],
)
def test_wrong_configuration_runs_nothing(fresh, text, expected):
    (fresh.root / "config/wrong.yaml").write_text(f"{text}\n")
    before = files(fresh.root)
    done = fresh.snakemake("all", "--cores", "1", "--configfile", "config/wrong.yaml")
    assert done.returncode != 0
    for words in expected:
        assert words in done.stdout
    assert "Traceback" not in done.stdout
    assert files(fresh.root) == before


def test_wrong_task_file_is_named(fresh):
    fresh.append("config/tasks/listops.yaml", "models: {num_layers: 1}\n")
    done = fresh.snakemake("--dry-run", "all")
    assert done.returncode != 0
    assert "config/tasks/listops.yaml: unknown key 'models' (did you mean 'model'?)" in done.stdout
    assert "Traceback" not in done.stdout


def files(root: Path) -> set[str]:
    """Files of the project, without what Snakemake and Python keep for themselves."""
    own = {".home", ".snakemake", "__pycache__"}
    paths = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(path) for path in paths if not own & set(path.parts)}
