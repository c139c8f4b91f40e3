"""Compiles CUDA sources as plain C++ over tests/emulation, for the tests of csrc/cuda."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests/emulation"
SOURCE = ROOT / "csrc/cuda/attention.cu"
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")  # of nvcc: #pragma unroll


def compile_emulated(sources, output, *options) -> None:
    """Compiles .cu and .cpp files with g++; skips the test where there is none."""
    compiler = shutil.which("g++")
    if compiler is None or platform.system() != "Linux":
        pytest.skip("no g++ on Linux here, which compiles the CUDA kernels as C++")
    command = [compiler, "-std=c++17", "-O2", "-g1", "-ffp-contract=off", f"-I{EMULATION}"]
    command += [*WARNINGS, *options, "-x", "c++", *map(str, sources), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and any(f"-l{name}" in done.stderr for name in ("asan", "ubsan", "tsan")):
        pytest.skip("the compiler has no library for its sanitizers")
    assert done.returncode == 0, done.stderr
