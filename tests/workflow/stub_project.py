"""A copy of the project whose jobs take no time: real Snakefile, rules and downloads, stub interpreters.

`make` copies the project and gives it config/tiny.yaml (two tasks, two attentions, one seed; its sources are small
local archives in the real layout, so download.py and extract.py run for real). `Project` runs Snakemake in it.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import environments
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PARTS = ["Snakefile", "workflow", "config", "envs", "sat", "csrc", "profiles", "requirements.txt"]
ENVIRONMENTS = ["tf", "torch", "report", "llama"]  # those with packages; the fourth is bare Python
LISTOPS = "Source\tTarget\n[MAX 1 2 ]\t2\n"
PAIR = "1\t7\t8\tone text\tanother text\n"
MEMBERS = (
    {f"listops-1000/basic_{split}.tsv": LISTOPS for split in ("train", "val", "test")}
    | {f"tsv_data/new_aan_pairs.{split}.tsv": PAIR for split in ("train", "eval", "test")}
    | {
        "pathfinder32/curv_contour_length_14/imgs/1/sample_0.png": "pixels",
        "pathfinder32/curv_contour_length_14/metadata/1.npy": "imgs/1 sample_0.png 0 1\n",
    }
)


@dataclass(frozen=True)
class Job:
    """A job of a dry run: its rule with the values of its wildcards, the files it reads and those it writes."""

    name: str
    reads: list[str]
    writes: list[str]


@dataclass(frozen=True)
class Project:
    root: Path

    def snakemake(
        self, *arguments: str, path: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run Snakemake in the project; `path` is a folder of programs that come first. stdout holds both streams."""
        home = self.root / ".home"
        surroundings = os.environ | {
            "HOME": str(home),
            "XDG_CACHE_HOME": str(home / "cache"),
            "PIP_NO_INDEX": "1",
        }
        if path:
            surroundings["PATH"] = f"{path}{os.pathsep}{os.environ['PATH']}"
        surroundings.pop("SNAKEMAKE_PROFILE", None)
        return subprocess.run(
            [sys.executable, "-m", "snakemake", *arguments],
            cwd=self.root,
            env=surroundings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, path: Path | None = None) -> str:
        """Run the workflow with config/tiny.yaml; returns what Snakemake printed."""
        command = ["--cores", "2", *arguments, "--configfile", "config/tiny.yaml"]
        done = self.snakemake(*command, path=path)
        assert done.returncode == 0, done.stdout
        return done.stdout

    def jobs(
        self,
        *targets: str,
        configfile: str | None = "config/tiny.yaml",
        path: Path | None = None,
    ) -> list[Job]:
        """The jobs that a dry run plans, without the target rules, which run nothing."""
        overlay = ["--configfile", configfile] if configfile else []
        done = self.snakemake("--dry-run", *targets, *overlay, path=path)
        assert done.returncode == 0, done.stdout
        return parse_jobs(done.stdout)

    def planned(self, *targets: str, **options) -> set[str]:
        """The names of the planned jobs, for example {'train listops sat 1001', 'collect'}."""
        return {job.name for job in self.jobs(*targets, **options)}

    def calls(self) -> list[dict]:
        """The calls of stub interpreters so far."""
        return [json.loads(line) for line in (self.root / "calls.jsonl").read_text().splitlines()]

    def configure(self, **changes) -> None:
        """Change keys of config/tiny.yaml."""
        path = self.root / "config/tiny.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))

    def append(self, path: str, text: str = "\n# edited\n") -> None:
        with open(self.root / path, "a") as file:
            file.write(text)

    def copy(self, root: Path) -> Project:
        """The project with its state, somewhere else."""
        return Project(shutil.copytree(self.root, root, dirs_exist_ok=True))


def parse_jobs(text: str) -> list[Job]:
    """The jobs that Snakemake printed, without target rules: those write nothing."""
    jobs = []
    for rule, body in re.findall(r"^rule (\w+):\n((?:    .*\n)*)", text, flags=re.MULTILINE):
        fields = dict(re.findall(r"^    (\w+): (.*)$", body, flags=re.MULTILINE))
        if "output" not in fields:
            continue
        wildcards = re.findall(r"\w+=([^,]+)", fields.get("wildcards", ""))
        reads, *writes = (
            fields[key].split(", ") if key in fields else []
            for key in ("input", "output", "log", "benchmark")
        )
        jobs.append(Job(" ".join([rule, *wildcards]), reads, sum(writes, [])))
    return jobs


def make(root: Path) -> Project:
    """A fresh copy in the folder `root`, with finished stub environments in .venvs."""
    root.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "build")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, root / part, ignore=ignore)
        else:
            shutil.copy2(source, root / part)
    for name in ENVIRONMENTS:
        install_python(root / environments.interpreter(name))
        _, packages = environments.requirements(root / f"envs/{name}.yaml")
        marker = root / environments.FOLDER / name / environments.MARKER
        marker.write_text(environments.digest(packages))
    urls = make_archives(root / "sources")
    overlay = {
        "run": "tiny",
        "tasks": ["listops", "image"],
        "seeds": [1001],
        "threads": {"train": 1, "kernels": 1},
        "sources": {
            name: {"urls": [url], "sha256": None, "bytes": None} for name, url in urls.items()
        },
        "llama": {
            "version": "1.0",
            "sources": [make_llama_archive(root / "sources")],
            "sha256": None,
            "commit": None,
        },
    }
    (root / "config/tiny.yaml").write_text(yaml.safe_dump(overlay))
    return Project(root)


def make_archives(folder: Path) -> dict[str, str]:
    """Small archives of the released data; returns the URL of each source."""
    folder.mkdir()
    with tarfile.open(folder / "lra_release.gz", "w:gz") as tar:
        for name, text in MEMBERS.items():
            member = tarfile.TarInfo(f"lra_release/lra_release/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    (folder / "cifar10").write_text("images")
    (folder / "imdb_reviews").write_text("reviews")
    files = {"lra_release": "lra_release.gz", "cifar10": "cifar10", "imdb_reviews": "imdb_reviews"}
    return {name: (folder / file).as_uri() for name, file in files.items()}


def make_llama_archive(folder: Path) -> str:
    """The URL of an archive that looks like the tree of llama.cpp."""
    with tarfile.open(folder / "llama.cpp.tar.gz", "w:gz") as tar:
        for name in ("CMakeLists.txt", "ggml/CMakeLists.txt"):
            tar.addfile(tarfile.TarInfo(f"llama.cpp-1.0/{name}"))
    return (folder / "llama.cpp.tar.gz").as_uri()


def install_python(path: Path) -> None:
    """Write the stub interpreter to `path`."""
    install(HERE / "stub_python.py", path)


def install_conda(base: Path) -> Path:
    """A stand-in conda installation in the folder `base`; returns the folder to put on PATH."""
    install(HERE / "stub_conda.py", base / "bin/conda")
    install_python(base / "stub_python")
    (base / "bin/activate").write_text('export PATH="$1/bin:$PATH"\n')
    return base / "bin"


def install(script: Path, path: Path) -> None:
    """Make `path` an executable of the script. To sh it is one exec line, to Python that line is a string."""
    path.parent.mkdir(parents=True, exist_ok=True)
    start = f"""#!/bin/sh\n'''exec' "{sys.executable}" "$0" "$@"\n'''\n"""
    path.write_text(start + script.read_text())
    path.chmod(0o755)
