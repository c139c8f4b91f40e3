"""Python environments of the jobs, made from envs/<name>.yaml without conda.

    python workflow/scripts/environments.py torch report

makes .venvs/torch and .venvs/report with pip from the pip section of the YAML, the same list that conda would
install. Snakemake does it in `onstart` for the environments that pending jobs name. An environment is finished when
its marker file, written last, holds the digest of the list; anything else there is made anew.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import shutil
import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

FOLDER = Path(".venvs")
MARKER = ".finished"


class EnvironmentFailed(RuntimeError):
    """pip could not install an environment; the message names the log."""


def interpreter(name: str) -> Path:
    return FOLDER / name / "bin" / "python"


def requirements(definition: Path) -> tuple[str, list[str]]:
    """(Python version, pip requirements) of a conda environment file."""
    dependencies = yaml.safe_load(definition.read_text())["dependencies"]
    python = next(
        d.split("=")[1] for d in dependencies if isinstance(d, str) and d.startswith("python=")
    )
    return python, next((d["pip"] for d in dependencies if isinstance(d, dict)), [])


def ensure(name: str) -> None:
    """Make .venvs/<name> unless it is there, finished and of the same list. Safe against a second caller.

    Raises EnvironmentFailed with the end of pip's log.
    """
    definition = Path("envs") / f"{name}.yaml"
    if not definition.is_file():
        raise EnvironmentFailed(f"unknown environment '{name}': there is no {definition}")
    python, packages = requirements(definition)
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if running != python:
        raise EnvironmentFailed(
            f"{definition} is made for Python {python}, this is Python {running}: start Snakemake with "
            f"python{python}, or add --use-conda"
        )
    build(name, packages)


def digest(packages: list[str], also: list[str] = ()) -> str:
    """What the marker of an environment with this list holds; another Python makes another environment."""
    return hashlib.sha256("\n".join([sys.version, *packages, *also]).encode()).hexdigest()


def build(name: str, packages: list[str], also: list[str] = ()) -> None:
    """Make .venvs/<name> with `packages`; it also sees the packages of the environments `also`."""
    folder, log = FOLDER / name, FOLDER / f"{name}.log"
    markers = [f"{other} {(FOLDER / other / MARKER).read_text()}" for other in also]
    identity = digest(packages, markers)
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        marker = folder / MARKER
        if marker.is_file() and marker.read_text() == identity:
            return
        print(
            f"Making the environment {folder} ({len(packages)} packages, log: {log})",
            file=sys.stderr,
        )
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        site = folder / f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        for other in also:
            # An absolute line in a .pth file adds that folder to the interpreter's path.
            (site / f"{other}.pth").write_text(
                f"{(FOLDER / other).resolve() / site.relative_to(folder)}\n"
            )
        listing = FOLDER / f"{name}.txt"
        listing.write_text("".join(f"{package}\n" for package in packages))
        command = [
            interpreter(name),
            "-m",
            "pip",
            "install",
            "--disable-pip-version-check",
            "--no-input",
        ]
        with open(log, "w") as output:
            done = subprocess.run(
                [*command, "-r", listing], stdout=output, stderr=subprocess.STDOUT
            )
        if done.returncode != 0:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise EnvironmentFailed(
                f"the environment '{name}' could not be installed; pip said (whole log: {log}):\n{tail}"
            )
        listing.unlink()
        partial = marker.with_suffix(".partial")
        partial.write_text(identity)
        partial.replace(marker)


def ensure_all(names: list[str]) -> None:
    """`ensure` for several environments at once."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(ensure, names))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="environments: the files envs/NAME.yaml"
    )
    try:
        ensure_all(parser.parse_args().names)
    except EnvironmentFailed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
