"""The Slurm profile: what its jobs ask for, by dry runs."""

import json
import re
import shutil

import pytest
import yaml

PROFILE = ["--profile", "profiles/slurm"]
# Printed while Snakemake reads the Snakefile: the rules that become jobs of a cluster.
PRINT_RULES = """
print("RULES", json.dumps([r.name for r in workflow.rules if not (r.norun or r.name in workflow._localrules)]))
"""


def gpus(text):
    return re.findall(
        r"^rule train:\n(?:    .*\n)*?    resources: .*\bgpu=(\d+)", text, re.MULTILINE
    )


def test_a_training_asks_for_as_many_gpus_as_share_it(fresh):
    """On a login node without a GPU too."""
    fresh.configure(gpus_per_run=4)
    options = ["--dry-run", "table", "--configfile", "config/tiny.yaml", *PROFILE]
    done = fresh.snakemake(*options, "--resources", "gpu=4")
    assert done.returncode == 0, done.stdout
    assert gpus(done.stdout) == ["4"] * 4

    done = fresh.snakemake(*options)
    assert done.returncode != 0
    assert "gpus_per_run is 4, but the resource gpu is limited to 1" in done.stdout
    assert "--resources gpu=4" in done.stdout

    done = fresh.snakemake(*options, "--set-resources", "train:gpu=0")
    assert done.returncode == 0, done.stdout
    assert gpus(done.stdout) == ["0"] * 4


@pytest.mark.parametrize("configfile", ["config/config.yaml", "config/demo.yaml"])
def test_every_job_gets_more_memory_with_each_attempt(fresh, configfile):
    """A rule's own mem_mb comes before the profile's default, so the profile has to name each rule."""
    fresh.append("Snakefile", PRINT_RULES)
    done = fresh.snakemake("--dry-run", "data", "--configfile", configfile, *PROFILE)
    assert done.returncode == 0, done.stdout
    rules = json.loads(re.search("^RULES (.*)$", done.stdout, re.MULTILINE)[1])
    assert {"train", "preprocess_own", "measure_steps"} <= set(rules)
    asked = yaml.safe_load((fresh.root / "profiles/slurm/config.yaml").read_text())["set-resources"]
    assert [rule for rule in rules if "attempt" not in str(asked.get(rule, {}).get("mem_mb"))] == []
    assert "report_attention" not in rules, "small steps run where snakemake was called"


def test_data_may_lie_on_a_disk_of_its_own(fresh, tmp_path):
    """`data` as a link, and a copy of what it leads to in its place: what another node finds at the same path."""
    (tmp_path / "disk").mkdir()
    link = fresh.root / "data"
    link.symlink_to(tmp_path / "disk")
    fresh.run("data")
    assert (tmp_path / "disk/tiny/listops/train.arrow").is_file()

    shutil.copytree(tmp_path / "disk", tmp_path / "copy")
    link.unlink()
    link.symlink_to(tmp_path / "copy")
    assert fresh.planned("data") == set()
