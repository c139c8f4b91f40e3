"""The CPU kernels as programs of their own: under sanitizers, with 16 lanes, on old processors, on arm64.

tests/sanitizers/cpu_kernels.cpp calls them with tensors of exactly the size they need, tests/emulation/
check.cpp compares them with loops in double. What a machine without AVX-512 cannot run, its
instructions, is left out: there the code of AVX-512, 16 lanes, is compiled to AVX2. On x86-64 the
library also runs on older processors than this one, and the kernels of arm64 on one of those, in an
emulator, where it and a compiler are installed:

    apt-get install g++-aarch64-linux-gnu qemu-user-static
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZE = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = "-mavx512f"
CASES = [(64, 32, 16), (64, 64, 16), (128, 32, 32), (128, 64, 64), (96, 40, 32), (64, 16, 16)]


def is_there(flag: str) -> bool:
    return f" {flag} " in Path("/proc/cpuinfo").read_text().replace("\n", " ")


def compile_programs(folder, compiler, sets, flags, library_flags=()):
    """cpu_kernels and check, linked with the kernels for sets: name -> (lanes, flags)."""
    compiler = [*compiler.split(), "-std=c++17", "-Wno-psabi", "-fopenmp", *flags]

    def compile_object(name, source, flags):
        command = [*compiler, *flags, "-c", ROOT / source, "-o", folder / f"{name}.o"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return folder / f"{name}.o"

    sources = [
        ("cpu_kernels", "tests/sanitizers/cpu_kernels.cpp", []),
        ("check", "tests/emulation/check.cpp", []),
        ("library", "csrc/cpu/library.cpp", library_flags),
    ]
    for name, (lanes, set_flags) in sets.items():
        macros = [f"-DSAT_SET={name}", f"-DSAT_LANES={lanes}"]
        for part in ("attention", "layer"):
            sources.append((f"{name}_{part}", f"csrc/cpu/{part}.cpp", [*macros, *set_flags]))
    with ThreadPoolExecutor(2) as pool:
        *mains, library = pool.map(lambda arguments: compile_object(*arguments), sources[:3])
        kernels = list(pool.map(lambda arguments: compile_object(*arguments), sources[3:]))
    for main in mains:
        program = main.with_suffix("")
        subprocess.run([*compiler, main, library, *kernels, "-o", program], check=True)


def run(*command):
    # A runtime of OpenMP keeps its threads until the end, which is no leak.
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "OMP_WAIT_POLICY": "passive"}
    environment.pop("LD_PRELOAD", None)
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    if platform.machine() != "x86_64":
        pytest.skip("the sets are those of x86-64")
    if not all(map(is_there, ("avx2", "fma"))):
        pytest.skip("no AVX2 here")
    folder = tmp_path_factory.mktemp("sanitized")
    wide = [AVX512] if is_there("avx512f") else []
    sets = {"baseline": (4, []), "avx2": (8, AVX2), "avx512": (16, [*AVX2, *wide])}
    compiler = os.environ.get("CXX") or shutil.which("c++")
    # The library is told that the machine has what the sets were compiled to.
    told = ["-D__builtin_cpu_supports(x)=true"]
    compile_programs(folder, compiler, sets, SANITIZE, told)
    return folder


def test_no_access_outside_a_tensor_and_no_undefined_behaviour(sanitized):
    assert run(sanitized / "cpu_kernels").split() == ["baseline", "avx2", "avx512"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_number_of_lanes_gives_the_numbers_of_double_precision(sanitized, name, case):
    assert "largest error" in run(sanitized / "check", *case, name)


@pytest.mark.parametrize(
    ("processor", "name"),
    [("core2duo", "baseline"), ("SandyBridge", "baseline"), ("Haswell", "avx2")],
)
def test_the_library_built_here_runs_on_an_older_processor(kernels_dir, tmp_path, processor, name):
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if platform.machine() != "x86_64" or not emulator:
        pytest.skip("no x86-64, or no emulator of it, see above")
    program = tmp_path / "check"
    sources = [ROOT / "tests/emulation/check.cpp", kernels_dir / "libsat_cpu.so"]
    compiler = os.environ.get("CXX") or shutil.which("c++")
    options = ["-std=c++17", f"-Wl,-rpath,{kernels_dir}", "-o", program]
    subprocess.run([compiler, *sources, *options], check=True)
    assert f"{name}, largest error" in run(emulator, "-cpu", processor, program, *CASES[2], "auto")


@pytest.fixture(scope="module")
def arm64(tmp_path_factory):
    if platform.machine() in ("aarch64", "arm64"):
        pytest.skip("test_attention_cpu.py runs them natively")
    compiler = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("no compiler or no emulator of arm64, see above")
    folder = tmp_path_factory.mktemp("arm64")
    compile_programs(folder, compiler, {"baseline": (4, [])}, ["-O3", "-static"])
    return emulator, folder


def test_arm64_gives_the_numbers_of_double_precision(arm64):
    emulator, folder = arm64
    assert run(emulator, folder / "cpu_kernels").split() == ["neon"]
    for case in CASES:
        assert "largest error" in run(emulator, folder / "check", *case, "neon")
