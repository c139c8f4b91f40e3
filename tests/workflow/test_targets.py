"""The targets that a person types, the demo's plan, and the answers to mistakes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import stub_project

TASKS = ["listops", "text", "retrieval", "image", "pathfinder"]
ATTENTIONS = ["softmax", "sat"]
SEEDS = [1001, 1002, 1003]
LRA = {"download lra_release.gz", "extract"}
SOURCES = {
    "listops": LRA,
    "retrieval": LRA,
    "pathfinder": LRA,
    "text": {"download aclImdb_v1.tar.gz", "prepare_imdb_reviews"},
    "image": {"download cifar-10-binary.tar.gz", "prepare_cifar10"},
}


# By the first word of the rule's name.
ENVIRONMENTS_OF_RULE = {
    "download": [],
    "extract": [],
    "prepare": ["tf"],
    "preprocess": ["tf"],
    "compile": ["torch"],
    "train": ["torch"],
    "collect": ["report"],
    "compare": ["report"],
    "draw": ["report"],
    "get": [],
    "build": ["llama"],
    "run": ["llama"],
    "export": ["report"],
    "write": ["report"],
}


def data_of(*tasks):
    return {job for task in tasks for job in SOURCES[task] | {f"preprocess {task}"}}


def trainings_of(*tasks, seeds=SEEDS):
    return {f"train {t} {a} {s}" for t in tasks for a in ATTENTIONS for s in seeds}


def runs_of(*tasks):
    return data_of(*tasks) | {"compile_kernels"} | trainings_of(*tasks)


def figures_of(*tasks):
    return {f"draw_figures {task}" for task in tasks}


def models_of(*tasks):
    return {f"export_model {t} {a}" for t in tasks for a in ATTENTIONS}


TABLES = {"collect", "compare"}
SUMMARIES = TABLES | {"draw_summary", "write_report"}


# None: no target is named.
TARGETS = {
    None: runs_of(*TASKS) | figures_of(*TASKS) | SUMMARIES | models_of(*TASKS),
    "models": runs_of(*TASKS) | models_of(*TASKS),
    "data": data_of(*TASKS),
    "kernels": {"compile_kernels"},
    "llama": {"get_llama", "build_llama", "run_llama"},
    "table": runs_of(*TASKS) | TABLES,
    "figures": runs_of(*TASKS) | figures_of(*TASKS) | {"draw_summary"},
    "report": runs_of(*TASKS) | figures_of(*TASKS) | SUMMARIES,
    "cifar10": runs_of("image") | figures_of("image"),
} | {task: runs_of(task) | figures_of(task) for task in TASKS}


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """The jobs that each target plans with the real configuration; two dry runs at a time."""
    project = stub_project.make(tmp_path_factory.mktemp("targets") / "my project")

    def plan(target):
        return project.jobs(*filter(None, [target]), configfile=None)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TARGETS, pool.map(plan, TARGETS), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_target(plans, target):
    assert {job.name for job in plans[target]} == TARGETS[target]


def test_jobs_name_their_environments(plans):
    """The file of the environment is an input: an edit of it reruns the job, and the job gets the environment made."""
    for job in plans[None] + plans["llama"]:
        rule = job.name.split()[0].partition("_")[0]
        environments = [path for path in job.reads if path.startswith("envs/")]
        assert environments == [f"envs/{name}.yaml" for name in ENVIRONMENTS_OF_RULE[rule]], job


def test_demo_stays_in_its_folders(fresh):
    jobs = fresh.jobs("all", configfile="config/demo.yaml")
    assert {job.name for job in jobs} == (
        {"demo_archives", "extract", "compile_kernels"}
        | SUMMARIES
        | {f"preprocess {task}" for task in TASKS}
        | trainings_of(*TASKS, seeds=[1001])
        | figures_of(*TASKS)
        | models_of(*TASKS)
    )
    for job in jobs:
        for path in job.writes:
            assert path.startswith(("data/demo/", "results/demo/")), f"{job.name} writes {path}"


@pytest.mark.parametrize("configfile", ["config/config.yaml", "config/demo.yaml"])
def test_lint_finds_nothing(fresh, configfile):
    done = fresh.snakemake("--lint", "--configfile", configfile)
    assert done.returncode == 0, done.stdout
    assert "Congratulations, your workflow is in a good condition!" in done.stdout


@pytest.mark.parametrize(
    "tasks, expected",
    [
        ("[listop]", "unknown task 'listop' (did you mean 'listops'?)"),
        ("[cifar]", "unknown task 'cifar' (did you mean 'cifar10'?)"),
    ],
)
def test_wrong_task(fresh, tasks, expected):
    (fresh.root / "config/wrong.yaml").write_text(f"tasks: {tasks}\n")
    done = fresh.snakemake("all", "--cores", "1", "--configfile", "config/wrong.yaml")
    assert done.returncode != 0
    assert expected in done.stdout
    assert "Traceback" not in done.stdout
    assert not (fresh.root / "results").exists()


def test_aliases_of_tasks(fresh):
    """Names that LRA's and SAT's users type, in the configuration too."""
    fresh.configure(tasks=["lra-listops", "cifar10"])
    planned = fresh.planned("data")
    assert {job for job in planned if job.startswith("preprocess")} == {
        "preprocess listops",
        "preprocess image",
    }


def test_environment_for_another_python_is_refused(fresh):
    definition = fresh.root / "envs/tf.yaml"
    definition.write_text(definition.read_text().replace("python=3.11", "python=3.1"))
    done = fresh.snakemake("data", "--cores", "1", "--configfile", "config/tiny.yaml")
    assert done.returncode != 0
    assert "envs/tf.yaml is made for Python 3.1" in done.stdout
    assert "--use-conda" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (fresh.root / "data").exists()


def test_lists_and_mappings_on_the_command_line(fresh):
    change = "settings={listops: {training: {num_train_steps: 60, warmup: 10}}}"
    planned = fresh.planned("table", "--config", "seeds=[1, 2]", "tasks=[listops]", change)
    trainings = {job for job in planned if job.startswith("train ")}
    assert trainings == trainings_of("listops", seeds=[1, 2])


@pytest.mark.parametrize("limit", [4, 1])
def test_a_training_shares_its_batches_over_gpus_per_run(fresh, tmp_path, limit):
    driver = tmp_path / "nvidia-smi"
    driver.write_text("#!/bin/sh\n")
    driver.chmod(0o755)
    (fresh.root / "config/shared.yaml").write_text("gpus_per_run: 2\n")
    target = "results/lra/runs/image/sat/seed1001/metrics.json"
    options = ["--cores", "1", "--resources", f"gpu={limit}", "--configfile", "config/shared.yaml"]
    done = fresh.snakemake("-n", "-p", target, *options, path=tmp_path)
    if limit == 1:
        assert done.returncode != 0
        assert "gpus_per_run is 2, but the resource gpu is limited to 1" in done.stdout
        return
    assert done.returncode == 0, done.stdout
    assert "--processes 2 " in done.stdout
