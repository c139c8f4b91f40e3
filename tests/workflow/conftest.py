"""Copies of the project over stub environments (stub_project.py)."""

import pytest
import stub_project


@pytest.fixture
def fresh(tmp_path):
    """A project in which nothing has run."""
    return stub_project.make(tmp_path / "my project")


@pytest.fixture(scope="session")
def finished_once(tmp_path_factory):
    """A project in which everything has run. Not to be changed: take `finished`."""
    project = stub_project.make(tmp_path_factory.mktemp("finished") / "my project")
    project.run("all")
    return project


@pytest.fixture
def finished(finished_once, tmp_path):
    """A project in which everything has run, for one test to change."""
    return finished_once.copy(tmp_path / "my project")


@pytest.fixture
def conda(tmp_path):
    """Folder for PATH that holds a stand-in for conda."""
    return stub_project.install_conda(tmp_path / "conda")
