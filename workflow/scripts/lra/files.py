"""Files the data scripts share: hashes, atomic writes, scratch folders, errors in one line.

Standard library only, so that downloads and the extraction run with any Python 3.11.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def run_script(main: Callable[[], None]) -> None:
    """Run `main`; what a user can mend (ValueError, OSError) ends as one line on stderr, exit 1.

    SIGTERM leaves by SystemExit, so that clean-up code runs when a scheduler stops the job.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        sys.exit(f"error: {error}{': make room on the disk and run this again' if full else ''}")


def parse_json(text: str, option: str) -> dict:
    """The JSON object given to a command-line option; ValueError names the option."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{option} must be a JSON object, not {type(value).__name__}")
    return value


def sha256_file(path: Path) -> str:
    """The sha256 of a file, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: object) -> None:
    """Write JSON with sorted keys under a temporary name, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> dict:
    """Read a JSON file that an earlier step wrote; ValueError names the file."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run the step that makes it first") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): delete it and make it again") from None


def require(path: Path, step: str) -> Path:
    """The path, if it exists; ValueError says which step makes it."""
    if not path.exists():
        raise ValueError(f"{path} is missing: {step} makes it")
    return path


@contextlib.contextmanager
def locked(path: Path, doing: str) -> Iterator[int]:
    """Hold the lock file `path`, which is gone afterwards; yields its descriptor, for children that hold it too.

    ValueError when another process, which is `doing` something, has it. The kernel takes it from a process that ends,
    however it does. On a file system without locks there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"another process is {doing} (it holds {path}): wait until it has ended, or end it"
            ) from None
        except OSError:
            break
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                break
        os.close(descriptor)  # its holder has just removed it
    try:
        yield descriptor
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder at `path` that is gone afterwards, whatever happens.

    The name is fixed, so that what a killed attempt left there is removed by the next one. ValueError when another
    process works there.
    """
    with locked(path.with_name(f"{path.name}.lock"), f"at work in {path}"):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def folder_members(folder: Path) -> Iterator[tuple[tarfile.TarInfo, Path]]:
    """The files below a folder as the members of a tar, sorted by name, free of dates and owners."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(files):
            path = Path(root, name)
            info = tarfile.TarInfo((Path(folder.name) / path.relative_to(folder)).as_posix())
            info.size = path.stat().st_size
            yield info, path


@contextlib.contextmanager
def progress(name: str, unit: str) -> Iterator[Callable[[int], None]]:
    """A function to call with every few things done: it says on stderr how many there are by now.

    On a terminal one line renews itself; a log gets a line every 15 seconds, and one at the end.
    """
    terminal = sys.stderr.isatty()
    total, reported = 0, time.monotonic()

    def show(end: str) -> None:
        start = "\r" if terminal else ""
        print(f"{start}{name}: {total:,} {unit}", end=end, file=sys.stderr, flush=True)

    def add(count: int) -> None:
        nonlocal total, reported
        total += count
        if time.monotonic() - reported > (0.2 if terminal else 15):
            reported = time.monotonic()
            show("" if terminal else "\n")

    try:
        yield add
    except BaseException:
        if terminal:
            print(file=sys.stderr)  # the message of the error gets a line of its own
        raise
    show("\n")
