"""Snakemake's own --use-conda code, run to the end over a stand-in for conda; the environment files."""

import json
import re
import shutil

import environments
import pytest
import stub_project
import yaml

ENVIRONMENT_OF_STEP = {
    "download.py": "python",
    "extract.py": "python",
    "prepare_tfds.py": "tf",
    "preprocess.py": "tf",
    "build_kernels.py": "torch",
    "sat": "torch",
    "collect.py": "report",
    "compare.py": "report",
    "figures.py": "report",
    "summary_figures.py": "report",
    "report.py": "report",
    "model_card.py": "report",
}
FILES = sorted((stub_project.ROOT / "envs").glob("*.yaml"))


@pytest.fixture
def made_with_conda(fresh, conda):
    """A project without .venvs in which everything has run with --use-conda."""
    shutil.rmtree(fresh.root / ".venvs")
    fresh.run("all", "--use-conda", path=conda)
    return fresh


def environments_made(conda):
    """{prefix: name} of the environments that conda made, by the text of their definitions."""
    names = {path.read_text(): path.stem for path in FILES}
    log = (conda.parent / "environments.jsonl").read_text().splitlines()
    return {made["prefix"]: names[made["definition"]] for made in map(json.loads, log)}


def test_run_with_conda(made_with_conda, conda):
    project = made_with_conda
    made = environments_made(conda)
    assert sorted(made.values()) == ["python", "report", "tf", "torch"]
    assert not (project.root / ".venvs").exists()
    used = {
        (call["step"], made[call["python"].removesuffix("/bin/python")]) for call in project.calls()
    }
    assert used == set(ENVIRONMENT_OF_STEP.items())
    roots = {call["PYTHONPATH"] for call in project.calls() if call["step"] == "sat"}
    assert roots == {str(project.root)}

    assert project.planned("all", "--use-conda", path=conda) == set()
    assert project.planned("all") == set(), "switching back"


def test_a_container_holds_every_environment(fresh, conda):
    done = fresh.snakemake("--containerize", path=conda)
    assert done.returncode == 0, done.stdout
    assert "FROM condaforge/miniforge3" in done.stdout
    for path in FILES:
        assert f"COPY envs/{path.name} /conda-envs/" in done.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_environment_file(path):
    """Snakemake copies the file elsewhere before conda reads it: nothing in it may lean on its place."""
    definition = yaml.safe_load(path.read_text())
    assert definition.keys() == {"channels", "dependencies"}
    assert definition["channels"] == ["conda-forge"]
    python, pip, *rest = definition["dependencies"]
    assert (python, pip) == ("python=3.11", "pip")
    if path.stem == "python":
        assert rest == []
        return
    ((key, packages),) = rest[0].items()
    assert (len(rest), key) == (1, "pip")
    for package in packages:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+]*", package), package
    names = [bare_name(package) for package in packages]
    assert len(set(names)) == len(names)


def test_environment_files_are_all_known():
    assert {path.stem for path in FILES} == {"python", *stub_project.ENVIRONMENTS}


def test_environments_agree_on_shared_packages():
    """One version writes and reads what crosses from one environment to another; the tests see two of them at once."""
    versions: dict[str, set[str]] = {}
    for name in stub_project.ENVIRONMENTS:
        _, packages = environments.requirements(stub_project.ROOT / f"envs/{name}.yaml")
        for package in packages:
            versions.setdefault(bare_name(package), set()).add(package.split("==")[1])
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


def bare_name(package: str) -> str:
    """The name of a requirement as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", package.split("==")[0]).lower()
