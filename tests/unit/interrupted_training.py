"""Trainings that are killed and go on: each attempt a forked process, so that torch is imported once.

    python interrupted_training.py CASE.json

CASE: settings, data, output, kills. Attempts follow one another until one ends by itself or the kills are used up; then
one more is left alone. A kill is one of

    {"signal": 9, "wait": 0.2}              after this part of an uninterrupted training's time
    {"signal": 9, "wait": 0.01, "step": 7}  so long after the history has its step 7, or a later one
    {"at": ["metrics.json", "before"]}      SIGKILL before or after a file gets its name, or when it was "removed"

The uninterrupted training comes first, in this process with one thread, so that the attempts find all loaded.
Prints, as JSON, how each attempt ended.
"""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

from sat import training
from sat.interruption import Interrupted


def attempt(case: dict, output: Path, at: list[str] | None = None) -> int:
    """Train in a forked process, which may kill itself `at` a file; -> its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if at is not None:
            die_at(*at)
        training.train(case["settings"], Path(case["data"]), output, device="cpu", threads=1)
        code = 0
    except Interrupted as interruption:
        code = 128 + interruption.number
    finally:
        sys.stderr.flush()
        os._exit(code)


def die_at(name: str, moment: str) -> None:
    """Let this process end by SIGKILL before or after a file gets the name, or when one of that name was removed."""
    replace, unlink = os.replace, Path.unlink

    def die(path, now):
        if Path(path).name == name and moment == now:
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_replace(source, target):
        die(target, "before")
        replace(source, target)
        die(target, "after")

    def dying_unlink(path, missing_ok=False):
        there = path.exists()
        unlink(path, missing_ok)
        if there:
            die(path, "removed")

    os.replace, Path.unlink = dying_replace, dying_unlink


def last_step(history: Path) -> int:
    steps = re.findall(r'"step": (\d+)', history.read_text()) if history.is_file() else []
    return int(steps[-1]) if steps else 0


def end_of(child: int, kill: dict, history: Path, whole: float) -> int:
    """Kill the child when it is time; -> how it ended."""
    while "step" in kill and last_step(history) < kill["step"]:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    if "signal" in kill:
        time.sleep(kill["wait"] * whole)
        os.kill(child, kill["signal"])
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    output = Path(case["output"])
    for _ in range(2):  # the first pays for what is loaded late
        before = time.perf_counter()
        training.train(
            case["settings"], Path(case["data"]), output / "whole", device="cpu", threads=1
        )
        whole = time.perf_counter() - before
    ends, killed = [], output / "killed"
    for kill in case["kills"]:
        child = attempt(case, killed, kill.get("at"))
        ends.append(end_of(child, kill, killed / "history.jsonl.partial", whole))
        if ends[-1] == 0:
            break
    else:
        ends.append(end_of(attempt(case, killed), {}, killed, whole))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
