"""The benchmark of attention, its report, and the start with allocator settings."""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sat import benchmark, cost_benchmark, launch, step_benchmark
from sat.attention import block_sparse_attention
from sat.model import Classifier, num_parameters

ROOT = Path(__file__).resolve().parents[2]


def quick(what, folder, *options):
    """The file of a quick benchmark, of one round."""
    before, file = torch.get_num_threads(), folder / f"{what}.json"
    try:
        benchmark.main([what, "--json", str(file), "--quick", "--rounds", "1", *options])
    finally:
        torch.set_num_threads(before)
    return file


def test_quick_benchmark_and_report(kernels_dir, tmp_path):
    file = quick("attention", tmp_path, "--no-flex")
    record = json.loads(file.read_text())
    assert {row["implementation"] for row in record["results"]} >= {"sdpa", "sat", "gather + bmm"}
    assert all(row["seconds"] > 0 for row in record["results"])
    if not all(importlib.util.find_spec(name) for name in ("pandas", "matplotlib")):
        pytest.skip("no pandas and matplotlib here for the report")
    script = ROOT / "workflow/scripts/benchmark_report.py"
    folder = tmp_path / "report"
    # Two parts of a benchmark: the second one with another batch.
    other = tmp_path / "other.json"
    other.write_text(file.read_text().replace('"batch": 2,', '"batch": 3,'))
    command = [sys.executable, script, file, other, "--output-dir", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    names = {"attention.csv", "attention.md", "speedup.svg", "time.svg", "memory.svg"}
    assert {path.name for path in folder.iterdir()} == names
    text = (folder / "attention.md").read_text()
    assert text.count("\n| 2 | 256 |") == text.count("\n| 3 | 256 |") == 3
    assert "mathdefault" not in (folder / "speedup.svg").read_text()  # plain numbers at the axes


def test_gather_and_bmm_is_zero_logit_attention():
    q, k, v = torch.randn(3, 2, 2, 64, 8, generator=torch.Generator().manual_seed(0))
    mask = benchmark.random_mask(4, 0.3, torch.Generator().manual_seed(0))
    assert mask.sum() == 5
    expected = block_sparse_attention(q, k, v, mask, block_size=16, backend="reference")
    torch.testing.assert_close(benchmark.gather_bmm(mask, 16)(q, k, v), expected)


PROGRAM = """
import os, sys
sys.path.insert(0, sys.argv[1])
from sat.launch import with_allocator_settings
with_allocator_settings()
print(os.environ.get("GLIBC_TUNABLES"), sys.argv[2], os.getpid())
sys.exit(3)
"""


@pytest.mark.parametrize("already", [None, "glibc.malloc.check=0"])
def test_a_program_starts_anew_with_allocator_settings(tmp_path, already):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    environment = {key: x for key, x in os.environ.items() if key != "GLIBC_TUNABLES"}
    if already:
        environment["GLIBC_TUNABLES"] = already
    process = subprocess.Popen(
        [sys.executable, script, str(ROOT), "a b"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    settings, first, second, pid = process.communicate()[0].split()
    assert process.returncode == 3
    assert (first, second) == ("a", "b")
    assert int(pid) == process.pid  # signals reach it
    if already:
        assert settings == already
    elif platform.libc_ver()[0] == "glibc":
        assert all(f"glibc.malloc.{name}=" in settings for name in launch.TUNABLES)


def test_quick_benchmark_of_steps(kernels_dir, tmp_path, capsys):
    file = quick("step", tmp_path)
    record = json.loads(file.read_text())
    (result,) = record["results"]
    assert set(result["seconds"]) == set(step_benchmark.WAYS)
    (parts,) = record["outside"]
    for phase, names in (
        ("dense", {"loading", "statistics", "logging"}),
        ("sparse", {"loading", "logging"}),
    ):
        assert set(parts["shares"][phase]) == names
        for name, share in parts["shares"][phase].items():
            assert share == parts["seconds"][name] / result["seconds"][phase] > 0
    times, figures = capsys.readouterr().out.split("\n\n")
    assert [line.count("|") for line in times.splitlines()] == [len(step_benchmark.WAYS) + 2] * 3
    figures = figures.splitlines()
    assert len(figures) == 2 + len(step_benchmark.BARS) + 5
    assert all(line.count("|") == 7 for line in figures)
    share = 100 * parts["shares"]["dense"]["statistics"]
    assert f"| statistics of the maps, share of a dense step | image | {share:.1f} % | 5 % |" in (
        "\n".join(figures)
    )


def test_quick_benchmark_of_costs(kernels_dir, tmp_path, capsys):
    file = quick("cost", tmp_path)
    phases = [list(row["seconds_a_sequence"]) for row in json.loads(file.read_text())["results"]]
    assert phases == [
        ["dense", "dense score"],
        ["dense", "dense score", "sparse", "sparse score"],
    ]
    softmax, sat = capsys.readouterr().out.splitlines()[2:]
    assert softmax.startswith("| softmax |") and sat.startswith("| sat |")


def test_the_cost_of_a_training_is_the_sum_of_its_parts():
    # image: 1,000 dense and 9,000 sparse steps of 256, dev (5,000) after every 500, test (10,000)
    config = step_benchmark.settings("image")
    seconds = {"dense": 7.0, "dense score": 5.0, "sparse": 3.0, "sparse score": 2.0}
    expected = 256 * (1_000 * 7 + 9_000 * 3) + 5_000 * (2 * 5 + 18 * 2) + 10_000 * 2
    assert cost_benchmark.hours(config, "image", seconds) == pytest.approx(expected / 3600)


def test_the_plain_model_of_the_benchmark_is_the_same_model():
    config = step_benchmark.settings("image")
    ours = Classifier(config.model, 1, learned_pattern=True).eval()
    plain = step_benchmark.plain_model(config, materialised=True).eval()
    assert num_parameters(plain) == num_parameters(ours)
    names = {"attention_norm": "norms.0", "mlp_norm": "norms.1", "attention.": ""}
    weights = {}
    for name, value in ours.state_dict().items():
        name = name.removeprefix("encoder.")
        for old, new in names.items():
            name = name.replace(old, new)
        weights[name] = value
    plain.load_state_dict(weights)
    batch = step_benchmark.random_batch(config, 2)
    torch.testing.assert_close(plain(batch)[0], ours(batch)[0], rtol=1e-4, atol=1e-5)
