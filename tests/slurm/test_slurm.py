"""The demo's tiny configuration through a real Slurm of one node: profiles/slurm with what one machine needs.

One run of the workflow, in which the training of listops gets too little memory at first and that of retrieval too
little time: Slurm kills both, and the profile's retries bring them to their end.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cluster
import pytest
import stub_project
import yaml
from test_demo import tiny_configuration

# What a node must give at once for a training: less than the interpreter with torch needs.
TOO_LITTLE_MB = 350
ENOUGH_MB = 2500

# Changes to profiles/slurm. The default status command, sacct, needs a data base.
FOR_ONE_MACHINE = {
    "slurm-status-command": "squeue",
    "slurm-init-seconds-before-status-checks": 10,
    "slurm-keep-successful-logs": True,
    "latency-wait": 10,
    "jobs": 8,
}

# In place of the torch environment's Python. Its first training of retrieval stops when there is a checkpoint, like one
# on a node that hangs, so the limit of time meets it in the middle, however fast the machine is. (Slurm wakes a
# stopped process a moment before it sends SIGTERM: the training has more steps than go into that moment.)
SLOW_PYTHON = """#!{python}
import os, signal, subprocess, sys, time
from pathlib import Path
command = ["{real}", *sys.argv[1:]]
mark = Path(__file__).with_name("stopped-once")
if "--output-dir" not in command or "retrieval" not in " ".join(command) or mark.exists():
    os.execv(command[0], command)
mark.touch()
folder = Path(command[command.index("--output-dir") + 1])
training = subprocess.Popen(command)
signal.signal(signal.SIGTERM, lambda *_: training.send_signal(signal.SIGTERM))
while training.poll() is None and not list(folder.glob("checkpoint*")):
    time.sleep(0.05)
training.send_signal(signal.SIGSTOP)
sys.exit(training.wait())
"""


@pytest.fixture(scope="module")
def slurm():
    if reason := cluster.install():
        pytest.skip(f"no Slurm: {reason}")
    with cluster.running() as surroundings:
        if not cluster.memory_is_enforced(surroundings):
            pytest.skip(
                "nothing here lets Slurm enforce limits of memory (control groups, version 1)"
            )
        yield surroundings


@pytest.fixture(scope="module")
def project(tmp_path_factory, tf_python):
    project = stub_project.make(tmp_path_factory.mktemp("cluster") / "my project")
    environments = project.root / ".venvs"
    shutil.rmtree(environments)
    environments.mkdir()
    for name in stub_project.ENVIRONMENTS:
        (environments / name).symlink_to(stub_project.ROOT / ".venvs" / name)
    real = stub_project.ROOT / ".venvs/torch"
    (environments / "torch").unlink()
    (environments / "torch/bin").mkdir(parents=True)
    shutil.copy2(real / ".finished", environments / "torch")
    python = environments / "torch/bin/python"
    python.write_text(SLOW_PYTHON.format(python=sys.executable, real=real / "bin/python"))
    python.chmod(0o755)

    config = tiny_configuration() | {"tasks": ["listops", "retrieval"], "attentions": ["sat"]}
    config["threads"] = {"train": 1, "kernels": 2}
    config["settings"]["retrieval"]["training"] |= {"num_train_steps": 400, "eval_frequency": 200}
    (project.root / "config/tiny.yaml").write_text(yaml.safe_dump(config))
    return project


@pytest.fixture(scope="module")
def finished(slurm, project):
    """What Slurm knows of the jobs of one whole run, oldest first."""
    path = project.root / "profiles/slurm/config.yaml"
    profile = yaml.safe_load(path.read_text()) | FOR_ONE_MACHINE
    profile["default-resources"]["slurm_partition"] = "cpu"
    profile["set-resources"]["train"] |= {
        "slurm_partition": "gpu",
        "mem_mb": f"{TOO_LITTLE_MB} if wildcards.task == 'listops' and attempt == 1 else {ENOUGH_MB}",
        "runtime": "attempt",
    }
    path.write_text(yaml.safe_dump(profile))
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "table", "--profile", "profiles/slurm"]
        + ["--configfile", "config/tiny.yaml"],
        cwd=project.root,
        env=slurm | {"HOME": str(project.root / ".home")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout
    return cluster.jobs(slurm)


def of_rule(jobs, rule, task=""):
    return [job for job in jobs if rule in job["Comment"] and task in job["Comment"]]


def test_every_step_ran_under_slurm_with_what_it_asked_for(finished, project):
    for rule in ("demo_archives", "extract", "preprocess", "compile_kernels", "train"):
        assert of_rule(finished, rule), rule
    for job in of_rule(finished, "train"):
        assert job["Partition"] == "gpu"
        assert "gpu" in job["TresPerJob"]
    assert {job["Partition"] for job in of_rule(finished, "preprocess")} == {"cpu"}
    assert not of_rule(finished, "collect")  # it is small: where snakemake was called
    table = (project.root / "results/tiny/table.csv").read_text().splitlines()
    assert len(table) == 3


def test_a_training_killed_for_memory_is_retried_with_more(finished):
    first, second = of_rule(finished, "train", "listops")
    assert "oom-kill" in Path(first["StdOut"]).read_text()
    assert first["JobState"] in (
        "OUT_OF_MEMORY",
        "FAILED",
    )  # of the batch script, or of its step alone
    assert second["JobState"] == "COMPLETED"
    assert f"mem={TOO_LITTLE_MB}M" in first["TRES"] and f"mem={ENOUGH_MB}M" in second["TRES"]


def test_a_training_that_met_its_time_limit_went_on_from_its_checkpoint(finished, project):
    first, second = of_rule(finished, "train", "retrieval")
    assert (first["JobState"], second["JobState"]) == ("TIMEOUT", "COMPLETED")
    assert (first["TimeLimit"], second["TimeLimit"]) == ("00:01:00", "00:02:00")
    log = project.root / "results/tiny/logs/train/retrieval/sat/seed1001.log"
    assert "going on from step" in log.read_text()

    # The same training without an interruption, outside Slurm: the same weights and metrics.
    folder = project.root / "results/tiny/runs/retrieval/sat/seed1001"
    settings = json.loads((folder / "config.json").read_text())
    done = subprocess.run(
        [
            stub_project.ROOT / ".venvs/torch/bin/python",
            "-m",
            "sat",
            "--mode",
            "train",
            "--threads",
            "1",
        ]
        + ["--settings", json.dumps(settings), "--data-dir", "data/tiny/retrieval"]
        + ["--output-dir", "alone", "--kernels", "results/tiny/kernels"],
        cwd=project.root,
        env=os.environ | {"PYTHONPATH": str(project.root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    alone = project.root / "alone"
    assert filecmp.cmp(folder / "model.safetensors", alone / "model.safetensors", shallow=False)
    ours, theirs = (json.loads((path / "metrics.json").read_text()) for path in (folder, alone))
    for key in ("test", "dev", "transition", "pattern", "num_steps"):
        assert _without_times(ours[key]) == _without_times(theirs[key])


def _without_times(record):
    if not isinstance(record, dict):
        return record
    return {
        key: value
        for key, value in record.items()
        if "seconds" not in key and "ms" not in key and "memory" not in key
    }
