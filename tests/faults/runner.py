"""Runs programs of the pipeline, each in a process of its own, forked from one that has loaded what they import.

    python runner.py            reads requests from stdin, a JSON object a line, and answers each with one

{"argv", "cwd", "env", "log", "clock"} starts a program in a session of its own, as `python ARGV` would with both
streams in the file `log`; the answer is its process id. clock: seconds that time.time() is off, or null. {"wait",
"seconds"} waits for a process; the answer is its exit code, as subprocess has it, or null when it goes on.
"""

import json
import os
import runpy
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "workflow/scripts")]


def load() -> None:
    """Import what takes time; start no thread."""
    import collect  # noqa: F401
    import compare  # noqa: F401
    import preprocess  # noqa: F401
    import torch.utils.tensorboard  # noqa: F401

    from sat import evaluation, training  # noqa: F401


def run(request: dict) -> int:
    """Run the program in this process; -> its exit code."""
    os.setsid()
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    if request["clock"]:
        real = time.time
        time.time = lambda: real() + request["clock"]
    sys.stdin = open(os.devnull)
    sys.argv = request["argv"]
    try:
        if sys.argv[0] == "-m":
            sys.argv = sys.argv[1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def wait(process: int, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.005)


def main() -> None:
    load()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["seconds"])
        else:
            answer = os.fork()
            if not answer:
                code = 1
                try:
                    code = run(request)
                    sys.stdout.flush()
                    sys.stderr.flush()
                finally:
                    os._exit(code)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
