"""SIGTERM and SIGINT while a training runs: it saves its state between two steps and ends.

with watching() as stop:
    ...                                # a step: a signal is remembered
    with stop.at_once():
        scored = evaluate(...)         # changes nothing, may take minutes: a signal ends it here
    if stop.requested: ...
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A signal asked the training to end. number: of the signal; a shell sees 128 + number."""

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


class Stop:
    """Whether a signal has come. A second one of the same kind ends the process without ceremony."""

    def __init__(self) -> None:
        self.requested: int | None = None
        self._at_once = False

    def _handle(self, number, frame) -> None:
        if "LOCAL_RANK" not in os.environ:  # a launcher passes on a signal that came to all already
            signal.signal(number, signal.SIG_DFL)
        self.requested = number
        if self._at_once:
            self._at_once = False
            raise Interrupted(number)

    @contextlib.contextmanager
    def at_once(self):
        """Inside, a signal raises Interrupted: for work that changes nothing."""
        self._at_once = True
        try:
            if self.requested is not None:
                raise Interrupted(self.requested)
            yield
        finally:
            self._at_once = False


@contextlib.contextmanager
def watching():
    """A Stop that hears the signals of this process; in a thread that is not the main one it never does."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop._handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
