"""What the data scripts share: progress on a terminal and in a log."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lra import files


class Terminal:
    """stderr that is a terminal, or not."""

    def __init__(self, terminal: bool):
        self.terminal, self.text = terminal, ""

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def shown(monkeypatch, terminal: bool, seconds: float, fails: bool = False) -> str:
    """What is written while three times 1,000 things are done, `seconds` apart."""
    stream = Terminal(terminal)
    now = iter(seconds * n for n in range(20))
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(files.time, "monotonic", lambda: next(now))
    try:
        with files.progress("set", "rows") as add:
            for _ in range(3):
                add(1000)
            if fails:
                raise ValueError
    except ValueError:
        pass
    monkeypatch.undo()
    return stream.text


def test_terminal_has_one_line_that_renews_itself(monkeypatch):
    text = shown(monkeypatch, True, 1)
    assert text.startswith("\rset: 1,000 rows\r") and text.endswith("\rset: 3,000 rows\n")
    assert text.count("\n") == 1


def test_log_has_a_line_now_and_then(monkeypatch):
    assert shown(monkeypatch, False, 1) == "set: 3,000 rows\n"
    lines = shown(monkeypatch, False, 16).splitlines()
    assert lines[0] == "set: 1,000 rows" and lines[-1] == "set: 3,000 rows"
    assert "\r" not in shown(monkeypatch, False, 16)


@pytest.mark.parametrize("terminal", [True, False])
def test_error_has_a_line_of_its_own(monkeypatch, terminal):
    text = shown(monkeypatch, terminal, 0.1, fails=True)
    assert text.endswith("\n") == terminal


HOLDER = """
import sys, time
from pathlib import Path
from lra.files import locked
with locked(Path(sys.argv[1]), "holding it"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_keeps_others_out_until_its_process_ends(tmp_path):
    path = tmp_path / "some/.lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, path],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(files.__file__).parents[1])},
    ) as process:
        assert process.stdout.readline() == b"held\n"
        with (
            pytest.raises(ValueError, match=f"another process is trying .it holds {path}"),
            files.locked(path, "trying"),
        ):
            pytest.fail("two hold the lock")
        process.kill()
    with files.locked(path, "trying"):
        assert path.is_file()
    assert not path.exists()


def test_full_disk_is_one_line_with_the_next_step():
    def write():
        with open("/dev/full", "w", buffering=1) as file:
            file.write("a line\n")

    with pytest.raises(SystemExit) as stopped:
        files.run_script(write)
    reason = os.strerror(28)
    assert (
        stopped.value.code
        == f"error: [Errno 28] {reason}: make room on the disk and run this again"
    )
