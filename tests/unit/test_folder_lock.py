"""Two trainings never write into one run folder, and no lock outlives its process."""

import errno
import multiprocessing
import os
import signal

import pytest

from sat import folder_lock
from sat.config import ConfigError


def hold(folder, ready, done):
    with folder_lock.held(folder, print):
        ready.set()
        done.wait()


def holder(folder):
    """(a process that holds the folder, the event at which it gives it back)."""
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(folder, ready, done))
    process.start()
    assert ready.wait(60)
    return process, done


def test_the_second_is_refused_with_the_first_s_process(tmp_path):
    process, done = holder(tmp_path)
    with (
        pytest.raises(ConfigError, match=f"process {process.pid} is training there already"),
        folder_lock.held(tmp_path, print),
    ):
        pytest.fail("two hold it")
    done.set()
    process.join()
    with folder_lock.held(tmp_path, print):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_no_lock(tmp_path):
    process, _ = holder(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with folder_lock.held(tmp_path, print):
        pass
    assert not list(tmp_path.iterdir())


def test_a_file_that_the_one_before_removed_is_no_lock(tmp_path, monkeypatch):
    """Opened before the other process ended, locked after it."""
    real, calls = folder_lock.try_lock, []

    def late(path):
        descriptor = real(path)
        calls.append(path)
        if len(calls) == 1:
            path.unlink()
        return descriptor

    monkeypatch.setattr(folder_lock, "try_lock", late)
    with folder_lock.held(tmp_path, print):
        assert len(calls) == 2
        assert real(tmp_path / folder_lock.FILE) is None


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def none(path):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(folder_lock, "try_lock", none)
    said = []
    with folder_lock.held(tmp_path, said.append):
        pass
    assert f"{tmp_path}: no locks there" in said[0]
