"""The target `llama`: what reruns after which change, and, marked `llama_build`, the real build.

The real build takes its source from pip's package index, or from data/manual/ of this project, and many minutes:

    .venvs/test/bin/python -m pytest -m llama_build -s tests/workflow/test_llama_target.py
"""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
import stub_project
import yaml

ALL = {"get_llama", "build_llama", "run_llama"}


@pytest.fixture(scope="module")
def built_once(tmp_path_factory):
    project = stub_project.make(tmp_path_factory.mktemp("llama") / "my project")
    project.run("llama")
    return project


@pytest.fixture
def built(built_once, tmp_path):
    return built_once.copy(tmp_path / "my project")


def change(project, **keys):
    """Change keys of the block llama of config/tiny.yaml."""
    llama = yaml.safe_load((project.root / "config/tiny.yaml").read_text())["llama"]
    project.configure(llama=llama | keys)


def test_only_the_environment_of_llama_is_used(built_once):
    assert [call["step"] for call in built_once.calls()] == ["llama_build.py", "llama_run.py"]
    tree = built_once.root / "data/tiny/llama/source-1.0"
    assert (tree / "ggml/CMakeLists.txt").is_file()
    record = json.loads((tree.parent / "source.json").read_text())
    assert record["version"] == "1.0" and record["from"].startswith("file://")
    assert record["folder"] == "data/tiny/llama/source-1.0"


def test_only_what_is_there_is_named_at_the_end(fresh):
    said = fresh.run("llama").splitlines()
    (last,) = [line for line in said if "Logs: " in line]
    assert last == "llama.cpp: results/tiny/llama/   Logs: results/tiny/logs/"


def test_with_conda(fresh, conda):
    shutil.rmtree(fresh.root / ".venvs")
    fresh.run("llama", "--use-conda", path=conda)
    assert [call["step"] for call in fresh.calls()] == [
        "llama_source.py",
        "llama_build.py",
        "llama_run.py",
    ]
    assert fresh.planned("llama", "--use-conda", path=conda) == set()


def other_build_type(project):
    change(project, build_type="Release")


def other_version(project):
    change(project, version="1.1")


def own_model(project):
    (project.root / "own model.gguf").write_text("GGUF")
    change(project, model="own model.gguf")


def other_environment(project):
    project.append("envs/llama.yaml", "      - added==1.0\n")


def edit_of_the_run(project):
    project.append("workflow/scripts/llama_run.py")


def edit_of_the_build(project):
    project.append("workflow/scripts/llama_build.py")


def edit_of_the_source(project):
    project.append("workflow/scripts/llama_source.py")


def touch(project):
    for path in [*(project.root / "workflow").rglob("*"), *(project.root / "envs").iterdir()]:
        os.utime(path)


CHANGES = {
    touch: set(),
    other_build_type: {"build_llama", "run_llama"},
    other_version: ALL,
    own_model: {"run_llama"},
    other_environment: {"build_llama", "run_llama"},
    edit_of_the_run: {"run_llama"},
    edit_of_the_build: {"build_llama", "run_llama"},
    edit_of_the_source: set(),
}


@pytest.mark.parametrize("changed", CHANGES, ids=lambda changed: changed.__name__)
def test_rerun(built, changed):
    changed(built)
    assert built.planned("llama") == CHANGES[changed]


def test_the_rest_does_not_know_of_it(finished):
    change(finished, build_type="Release", version="1.1")
    assert finished.planned("all") == set()


def test_each_type_and_version_has_a_folder(fresh):
    changes = ["--config", "llama={build_type: Release, version: 2.5.1}"]
    done = fresh.snakemake("-n", "-p", "llama", "--configfile", "config/tiny.yaml", *changes)
    assert "--folder results/tiny/llama/build-Release-2.5.1 " in done.stdout
    assert "--folder data/tiny/llama/source-2.5.1 " in done.stdout


def test_a_model_that_is_not_there_is_named(fresh):
    change(fresh, model="no/such.gguf")
    done = fresh.snakemake("-n", "llama", "--configfile", "config/tiny.yaml")
    assert done.returncode != 0 and "no/such.gguf" in done.stdout


@pytest.mark.llama_build
def test_the_real_build(fresh):
    """All of it, from nothing to the table: the configured version, Debug."""
    shutil.rmtree(fresh.root / ".venvs")
    (fresh.root / ".venvs").mkdir()
    os.symlink(stub_project.ROOT / ".venvs/llama", fresh.root / ".venvs/llama")
    manual = str(stub_project.ROOT / "data/manual")
    (fresh.root / "config/real.yaml").write_text(f"run: real\nmanual_dir: {json.dumps(manual)}\n")
    # Not through Project.snakemake, which keeps pip from its index.
    command = [sys.executable, "-m", "snakemake", "llama", "--cores", "all"]
    command += ["--configfile", "config/real.yaml"]
    done = subprocess.run(command, cwd=fresh.root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = fresh.root / "results/real/llama"
    record = json.loads((folder / "build.json").read_text())
    assert record["build_type"] == "Debug" and "llama-bench" in record["programs"]
    print(f"built in {record['seconds']} s with {record['threads']} threads, {record['steps']}")
    assert record["steps"]["all"] > 100 and record["steps"]["earlier"] == 0
    assert record["compiler"]["version"]
    rows = list(csv.DictReader((folder / "bench.csv").open()))
    assert {(row["n_prompt"], row["n_gen"]) for row in rows} == {("64", "0"), ("0", "16")}
    assert "**llama.cpp 0.3.36**" in (folder / "summary.md").read_text()
