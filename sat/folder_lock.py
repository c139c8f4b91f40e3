"""One training a run folder: a lock that ends with the process that holds it, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from sat.config import ConfigError
from sat.gpu_lock import try_lock

FILE = "training.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # of a file system without


@contextlib.contextmanager
def held(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, no other training writes into `folder`; `say` is told where the file system has no locks.

    Raises ConfigError when another one does.
    """
    path = folder / FILE
    try:
        descriptor = try_lock(path)
        while descriptor is not None and not _is_still(path, descriptor):
            os.close(descriptor)
            descriptor = try_lock(path)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        say(f"{folder}: no locks there ({error.strerror}); nothing keeps a second training out")
        yield
        return
    if descriptor is None:
        raise ConfigError(
            f"{folder}: process {path.read_text().strip()} is training there already: wait for it, end it, or name "
            "another folder with --output-dir"
        )
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether others find the locked file by its name: the process that had it before removes it at its end."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
