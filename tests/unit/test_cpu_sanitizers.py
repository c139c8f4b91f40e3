"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: tests/sanitizers/cpu_kernels.cpp."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SETS = {
    "baseline": (4, []),
    "avx2": (8, ["-mavx2", "-mfma"]),
    "avx512": (16, ["-mavx512f", "-mavx2", "-mfma"]),
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the sets are those of x86-64")
def test_no_access_outside_a_tensor_and_no_undefined_behaviour(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")

    def compile_object(name, source, flags):
        command = [*compiler.split(), *FLAGS, "-Wno-psabi", "-fopenmp", *flags]
        done = subprocess.run(
            [*command, "-c", source, "-o", tmp_path / f"{name}.o"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return tmp_path / f"{name}.o"

    sources = [
        ("library", ROOT / "csrc/cpu/library.cpp", []),
        ("main", ROOT / "tests/sanitizers/cpu_kernels.cpp", []),
    ] + [
        (
            f"{name}_{part}",
            ROOT / f"csrc/cpu/{part}.cpp",
            [f"-DSAT_SET={name}", f"-DSAT_LANES={lanes}", *flags],
        )
        for name, (lanes, flags) in SETS.items()
        for part in ("attention", "layer")
    ]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda arguments: compile_object(*arguments), sources))
    program = tmp_path / "kernels"
    subprocess.run([*compiler.split(), *FLAGS, "-fopenmp", *objects, "-o", program], check=True)
    # A runtime of OpenMP keeps its threads until the end, which is no leak.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "OMP_WAIT_POLICY": "passive"}
    environment.pop("LD_PRELOAD", None)
    done = subprocess.run([program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("baseline\n")
