"""Trainings that are killed and go on: each attempt a forked process, so that torch is imported once.

    python interrupted_training.py CASE.json

CASE: settings, data, output, kills: a list of [part of an uninterrupted training's time, signal]. Attempts follow one
another until one ends by itself or the kills are used up; then one more is left alone. The uninterrupted training comes
first, in this process with one thread, so that the attempts find all loaded and checked. Prints, as JSON, how each
attempt ended.
"""

import json
import os
import sys
import time
from pathlib import Path

from sat import training
from sat.interruption import Interrupted


def attempt(case: dict, output: Path) -> int:
    """Train in a forked process; -> its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        training.train(case["settings"], Path(case["data"]), output, device="cpu", threads=1)
        code = 0
    except Interrupted as interruption:
        code = 128 + interruption.number
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    case = json.loads(Path(sys.argv[1]).read_text())
    output = Path(case["output"])
    for _ in range(2):  # the first pays for what is loaded late
        before = time.perf_counter()
        training.train(
            case["settings"], Path(case["data"]), output / "whole", device="cpu", threads=1
        )
        whole = time.perf_counter() - before
    ends = []
    for part, number in case["kills"]:
        child = attempt(case, output / "killed")
        time.sleep(part * whole)
        os.kill(child, number)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if ends[-1] == 0:
            break
    else:
        ends.append(os.waitstatus_to_exitcode(os.waitpid(attempt(case, output / "killed"), 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
