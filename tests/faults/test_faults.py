"""Faults that happen to runs: every one ends in the right result of the next run, or in a clear error.

    python -m pytest tests/faults --faults 200 --fault-seed 1

Each fault has a seed, which is the number in its test's name and decides its kind and all that is random in it (kills
fall where the machine is by then). The same fault again: --faults 1 --fault-seed NUMBER.
"""

import random
import shutil

import kinds
import pytest
from world import Wrong

NAMES = [name for name, _ in kinds.kinds("")]


def pytest_generate_tests(metafunc):
    if "seed" in metafunc.fixturenames:
        first = metafunc.config.getoption("fault_seed")
        seeds = range(first, first + metafunc.config.getoption("faults"))
        names = [f"{NAMES[seed % len(NAMES)].replace(' ', '-')}-{seed}" for seed in seeds]
        metafunc.parametrize("seed", seeds, ids=names)


def test_fault(world, server, seed):
    name, fault = kinds.kinds(server.url)[seed % len(NAMES)]
    counts = kinds.TALLY[name]
    print(f"{name}: --faults 1 --fault-seed {seed}")  # pytest shows it when the test fails
    folder = world.root / f"fault{seed}"
    folder.mkdir()
    outcome = "wrong"
    try:
        outcome = fault(world, folder, random.Random(seed))
    except pytest.skip.Exception:
        outcome = "skipped"
        raise
    except Wrong as wrong:
        pytest.fail(f"{name}, seed {seed}: {wrong}", pytrace=False)
    finally:
        counts[outcome] += 1
        shutil.rmtree(folder)
        for log in world.root.glob(f"fault{seed}.*"):
            log.unlink()
