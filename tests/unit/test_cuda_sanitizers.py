"""Sanitizers over the emulated CUDA kernels, and mistakes that the emulation must find.

ThreadSanitizer sees every CUDA thread as a thread: a missing barrier is a data race.
"""

import os
import subprocess

import pytest
from cuda_emulation import EMULATION, SOURCE, compile_emulated

ORDERS = ("forward", "reversed")
ADDRESS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-O1", "-fsanitize=thread")


def place(code):
    """planted.cu:LINE of the line with `code`."""
    lines = (EMULATION / "planted.cu").read_text().splitlines()
    (number,) = [n for n, line in enumerate(lines, 1) if code in line]
    return f"planted.cu:{number}"


WRITE, READ = place("memory->values[PLANTED"), place("float x = memory->values")


def run(program, *arguments, order="forward", **variables):
    # Leaks are not looked for: that needs rights that a container does not always give.
    variables |= {"SAT_EMULATION_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"}
    variables["TSAN_OPTIONS"] = "halt_on_error=1"
    done = subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **variables},
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run with this kernel's address randomisation")
    return done


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A function (mistake, options) -> program of planted.cu."""
    folder, made = tmp_path_factory.mktemp("planted"), {}

    def make(mistake, *options):
        if (mistake, options) not in made:
            path = folder / str(len(made))
            compile_emulated([EMULATION / "planted.cu"], path, f"-DPLANTED={mistake}", *options)
            made[mistake, options] = path
        return made[mistake, options]

    return make


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("options", [(), ("-DSAT_EMULATION_UCONTEXT",), ADDRESS, THREAD])
def test_a_kernel_without_a_mistake_passes(planted, options, order):
    done = run(planted(0, *options), order=order)
    assert done.returncode == 0 and not done.stderr


def test_a_missing_barrier_gives_wrong_numbers_in_both_orders_and_others(planted):
    """One warp reads what another has not written: which one depends on the order."""
    outputs = {run(planted(1), order=order).stdout for order in ORDERS}
    assert len(outputs) == 2 and all("nan" in output for output in outputs)


@pytest.mark.parametrize("order", ORDERS)
def test_a_missing_barrier_is_a_data_race(planted, order):
    done = run(planted(1, *THREAD), order=order)
    assert done.returncode == 66 and "ThreadSanitizer: data race" in done.stderr
    assert WRITE in done.stderr and READ in done.stderr


def test_a_write_past_shared_memory_is_found(planted):
    done = run(planted(2, *ADDRESS))
    assert done.returncode and "heap-buffer-overflow" in done.stderr
    assert WRITE in done.stderr


def test_a_barrier_that_some_threads_do_not_reach_is_a_deadlock(planted):
    done = run(planted(3))
    assert done.returncode and "CUDA emulation: deadlock" in done.stderr


def check_program(tmp_path_factory, name, options):
    program = tmp_path_factory.mktemp(name) / "check"
    compile_emulated([EMULATION / "check.cpp", SOURCE], program, *options)
    return program


@pytest.fixture(scope="module")
def address_program(tmp_path_factory):
    return check_program(tmp_path_factory, "address", ADDRESS)


@pytest.fixture(scope="module")
def thread_program(tmp_path_factory):
    return check_program(tmp_path_factory, "thread", THREAD)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "case", [(64, 32, 16), (96, 40, 32), (128, 64, 64), (48, 136, 16), (32, 72, 16)]
)
def test_no_address_is_wrong_in_the_kernels(address_program, case, order):
    done = run(address_program, *case, order=order)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", [(64, 32, 16), (64, 64, 64)])
def test_there_is_no_race_in_the_kernels(thread_program, case, order):
    done = run(thread_program, *case, order=order)
    assert done.returncode == 0, done.stdout + done.stderr


BARRIERS = [
    f"{file.name}:{number}"
    for file in sorted(SOURCE.parent.glob("*.hpp"))
    for number, line in enumerate(file.read_text().splitlines(), 1)
    if "__sync" in line
]


@pytest.mark.parametrize("barrier", BARRIERS)
def test_every_barrier_of_the_kernels_would_be_missed(thread_program, barrier):
    """So none is there in vain, and a kernel that loses one does not pass."""
    done = run(thread_program, 64, 32, 16, SAT_EMULATION_SKIP=barrier)
    assert done.returncode == 66 and "ThreadSanitizer: data race" in done.stderr
