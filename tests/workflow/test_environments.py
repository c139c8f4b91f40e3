"""environments.py: environments made with pip from a list, finished or made anew.

Only the first test lets pip install (a wheel made here, no index); the others put a stub in the place of venv.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import environments
import pytest

SCRIPT = Path(environments.__file__).resolve()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory, without a package index."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path


@pytest.fixture
def stub_venv(folder, monkeypatch):
    """venv.create makes an interpreter that does what the file `pip` says; returns that file and the calls so far."""
    behaviour = folder / "pip"
    behaviour.write_text("exit 0\n")
    made = []

    def create(path, with_pip):
        made.append(path)
        python = Path(path, "bin/python")
        python.parent.mkdir(parents=True)
        site = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        Path(path, site).mkdir(parents=True)
        python.write_text(f"#!/bin/sh\n. {behaviour}\n")
        python.chmod(0o755)

    monkeypatch.setattr(environments.venv, "create", create)
    return behaviour, made


def marker(name: str) -> Path:
    return environments.FOLDER / name / environments.MARKER


def make_wheel(folder: Path) -> Path:
    """A package `tiny` of one module."""
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "ANSWER = 42\n")
        archive.writestr(
            "tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"
        )
        archive.writestr(
            "tiny-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    return wheel


def test_two_callers_make_an_environment_once(folder):
    wheel = make_wheel(folder)
    python = f"python={sys.version_info.major}.{sys.version_info.minor}"
    (folder / "envs").mkdir()
    (folder / "envs/tiny.yaml").write_text(
        f"dependencies: [{python}, pip, {{pip: ['tiny @ {wheel.as_uri()}']}}]\n"
    )
    callers = [
        subprocess.Popen([sys.executable, SCRIPT, "tiny"], stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [caller.communicate()[1] for caller in callers]
    assert [caller.returncode for caller in callers] == [0, 0], printed
    assert "".join(printed).count("Making the environment") == 1
    answer = subprocess.run(
        [environments.interpreter("tiny"), "-c", "import tiny; print(tiny.ANSWER)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout == "42\n"


def test_finished_environment_is_left_alone(stub_venv):
    _, made = stub_venv
    for _ in range(2):
        environments.build("tiny", ["tiny==1.0"])
    assert len(made) == 1
    assert marker("tiny").read_text() == environments.digest(["tiny==1.0"])


def test_pip_gets_the_list_before_the_marker_is_written(stub_venv):
    behaviour, _ = stub_venv
    behaviour.write_text(
        f'for last; do :; done\ncp "$last" seen\ntest ! -e {marker("tiny")} || touch too_early\n'
    )
    environments.build("tiny", ["tiny==1.0", "other==2.0"])
    assert Path("seen").read_text() == "tiny==1.0\nother==2.0\n"
    assert not Path("too_early").exists()
    assert marker("tiny").exists()


def test_changed_list_makes_it_anew(stub_venv):
    _, made = stub_venv
    environments.build("tiny", ["tiny==1.0"])
    leftover = environments.FOLDER / "tiny/leftover"
    leftover.touch()
    environments.build("tiny", ["tiny==2.0"])
    assert len(made) == 2
    assert not leftover.exists()
    assert marker("tiny").read_text() == environments.digest(["tiny==2.0"])


def test_unfinished_environment_is_made_anew(stub_venv):
    _, made = stub_venv
    leftover = environments.FOLDER / "tiny/bin/leftover"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    environments.build("tiny", ["tiny==1.0"])
    assert len(made) == 1
    assert not leftover.exists()


def test_failed_installation(stub_venv):
    behaviour, made = stub_venv
    behaviour.write_text("for n in $(seq 1 40); do echo line $n; done\nexit 1\n")
    with pytest.raises(environments.EnvironmentFailed) as failure:
        environments.build("tiny", ["tiny==1.0"])
    message = str(failure.value)
    assert "'tiny'" in message
    assert ".venvs/tiny.log" in message
    assert message.endswith("line 39\nline 40")
    assert "line 1\n" not in message
    assert not marker("tiny").exists()

    behaviour.write_text("exit 0\n")
    environments.build("tiny", ["tiny==1.0"])
    assert len(made) == 2
    assert marker("tiny").exists()


def test_environment_that_sees_others(stub_venv):
    environments.build("base", ["tiny==1.0"])
    environments.build("test", ["other==1.0"], also=["base"])
    (listed,) = environments.FOLDER.glob("test/lib/python*/site-packages/base.pth")
    (site,) = environments.FOLDER.glob("base/lib/python*/site-packages")
    assert listed.read_text() == f"{site.resolve()}\n"


def test_definition_for_another_python(folder):
    (folder / "envs").mkdir()
    (folder / "envs/tiny.yaml").write_text("dependencies: [python=3.1, pip, {pip: [tiny==1.0]}]\n")
    with pytest.raises(
        environments.EnvironmentFailed, match=r"tiny\.yaml.*Python 3\.1,.*--use-conda"
    ):
        environments.ensure("tiny")
    assert not environments.FOLDER.exists()
