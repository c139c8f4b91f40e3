"""Started in several processes by a launcher: one process of them gets a signal in the middle of an evaluation.

    python -m torch.distributed.run ... signalled_evaluation.py RANK CALL SIGNAL <arguments of python -m sat>

Process RANK sends SIGNAL to itself in its CALL-th forward that is not a training step's (from 1); 0: never.
"""

import os
import signal
import sys

from sat.__main__ import main
from sat.model import Classifier


def signal_in_forward(rank: int, call: int, number: int) -> None:
    forward, calls = Classifier.forward, []

    def signalling(self, *arguments, **keywords):
        if not self.training:
            calls.append(1)
            if len(calls) == call and os.environ["RANK"] == str(rank):
                os.kill(os.getpid(), number)
        return forward(self, *arguments, **keywords)

    Classifier.forward = signalling


if __name__ == "__main__":
    rank, call, name = sys.argv[1:4]
    signal_in_forward(int(rank), int(call), getattr(signal, name))
    sys.exit(main(sys.argv[4:]))
