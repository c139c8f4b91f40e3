"""SIGTERM and SIGINT while a training runs: it saves its state between two steps and ends.

with watching() as stop:
    ...                                # a step: a signal is remembered
    if stop.agreed(): ...
    with stop.at_once():
        scored = evaluate(..., check=stop.check)    # changes nothing, may take minutes: a signal ends it here

Of several processes each hears a signal at its own time, or only one does: they end at the same `agreed` or `check`,
else one would wait for ever for what the other no longer sends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A signal asked the training to end. number: of the signal; a shell sees 128 + number."""

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


class Stop:
    """Whether a signal has come. A second one of the same kind ends the process without ceremony.

    agree: (the signal of this process or 0) -> the largest of the processes'; None when there is one process.
    """

    def __init__(self, agree: Callable[[int], float] | None = None) -> None:
        self.requested: int | None = None
        self._agree = agree
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
        """Inside, a signal raises Interrupted: for work that changes nothing.

        Of several processes none is ended here, only by `check`.
        """
        self._at_once = self._agree is None
        try:
            if self._at_once and self.requested is not None:
                raise Interrupted(self.requested)
            yield
        finally:
            self._at_once = False

    def agreed(self) -> int:
        """The signal that has come to any of the processes, or 0; all of them ask, and get the same answer."""
        requested = self.requested or 0
        return requested if self._agree is None else int(self._agree(requested))

    def check(self) -> None:
        """Raises Interrupted, in all processes or in none, when a signal has come to any; all of them call it."""
        if number := self.agreed():
            raise Interrupted(number)


@contextlib.contextmanager
def watching(agree: Callable[[int], float] | None = None):
    """A Stop that hears the signals of this process; in a thread that is not the main one it never does."""
    stop = Stop(agree)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop._handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
