"""Fixtures that several test modules use."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("no times", deadline=None)  # a slow machine is no failure
hypothesis.settings.load_profile("no times")

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    group = parser.getgroup("faults")
    group.addoption("--faults", type=int, default=30, help="how many faults to try (default: 30)")
    group.addoption(
        "--fault-seed", type=int, default=1, help="seed of the first fault, the others follow"
    )


@pytest.fixture(scope="session")
def kernels_dir(tmp_path_factory):
    """Folder with libsat_cpu.so; $SAT_KERNELS names it while the tests run. Kept until a source changes."""
    script = ROOT / "workflow" / "scripts" / "build_kernels.py"
    sources = [script, *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    folder = ROOT / ".venvs/test-kernels" / digest[:16]
    if not folder.is_dir():
        built = tmp_path_factory.mktemp("kernels") / "built"
        arguments = ["--source", ROOT / "csrc", "--output-dir", built, "--cuda", "none"]
        done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shutil.copytree(built, partial := folder.with_suffix(f".{os.getpid()}"))
        with contextlib.suppress(OSError):  # another session was quicker
            partial.rename(folder)
        shutil.rmtree(partial, ignore_errors=True)
    before = os.environ.get("SAT_KERNELS")
    os.environ["SAT_KERNELS"] = str(folder)

    from sat.attention import kernels, selection

    for chosen_before in (selection._choose, kernels.load_library):
        chosen_before.cache_clear()
    yield folder
    if before is None:
        del os.environ["SAT_KERNELS"]
    else:
        os.environ["SAT_KERNELS"] = before


@pytest.fixture(scope="session")
def tf_python():
    """The interpreter of the TensorFlow environment, for scripts run as a subprocess; $SAT_TF_PYTHON names another."""
    python = Path(os.environ.get("SAT_TF_PYTHON", ROOT / ".venvs/tf/bin/python"))
    if not python.exists():
        pytest.skip(f"no TensorFlow environment: {python} does not exist (make test makes it)")
    return python


# Runs programs one after the other: lines [program, data] come in, lines [its `result`, traceback] go out.
PROGRAMS = """
import json, sys, traceback
replies, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    program, data = json.loads(line)
    names = {"data": data}
    try:
        exec(program, names)
        reply = [names["result"], None]
    except Exception:
        reply = [None, traceback.format_exc()]
    print(json.dumps(reply), file=replies, flush=True)
"""


@pytest.fixture(scope="session")
def in_tensorflow(tf_python):
    """A function (program, data) -> what the program leaves in `result`.

    The programs run in one process of the TensorFlow environment, which takes seconds to start; `data` and `result` are
    what JSON can hold, and `import preprocess` finds the scripts.
    """
    scripts = str(ROOT / "workflow" / "scripts")
    with subprocess.Popen(
        [tf_python, "-c", PROGRAMS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": scripts},
    ) as process:

        def run(program: str, data: object = None) -> object:
            print(json.dumps([program, data]), file=process.stdin, flush=True)
            result, error = json.loads(process.stdout.readline())
            assert error is None, error
            return result

        yield run
        process.stdin.close()
