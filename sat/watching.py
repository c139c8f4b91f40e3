"""What a person can watch of a training: progress on the terminal, lines in a log, curves and images in TensorBoard.

    tensorboard --logdir results/lra/runs

Scalars: train/loss, accuracy, learning_rate, ms (of a step) and memory (bytes, the phase's peak so far), dev/loss and
dev/accuracy, and skewness, distance and change of every layer. Images: the mean attention map of every layer at the
evaluations of the dense phase and at the switch, and the pattern. All values of a step are one record, and a thread of
the writer's takes it to the disk.
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import PIL.Image  # noqa: F401  here, not at the first image: a library can no longer be loaded when memory is short
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from sat.launch import is_main

LOG_SECONDS = 60.0
LARGEST_IMAGE = 512  # pixels a side
LAYER_VALUES = ("skewness", "distance", "change")


def say(message: str) -> None:
    """A line for a person, above the progress bar; from one of several processes only."""
    if is_main():
        tqdm.write(message, file=sys.stderr)


def without_nan(line: dict) -> dict:
    """A line of the history with what JSON does not have, in the values of the layers, as null."""
    return line | {
        key: [value if math.isfinite(value) else None for value in line[key]]
        for key in LAYER_VALUES
        if line.get(key) is not None
    }


class Progress:
    """A bar with loss, accuracy, phase and step time on a terminal; in a log, a line a minute."""

    def __init__(self, total: int, done: int = 0):
        self.total, self.done = total, done
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="step",
            dynamic_ncols=True,
            disable=not (is_main() and sys.stderr.isatty()),
        )
        self.spoke = time.monotonic()

    def update(self, line: dict) -> None:
        self.done = line["step"]
        if not self.bar.disable:
            # tqdm draws ten times a second at most; set_postfix only where it will.
            self.bar.set_postfix_str(_in_words(line), refresh=False)
            self.bar.update()
        elif time.monotonic() - self.spoke >= LOG_SECONDS:
            self.say(f"step {self.done}/{self.total} {_in_words(line)}")

    def say(self, message: str) -> None:
        say(message)
        self.spoke = time.monotonic()

    def close(self) -> None:
        self.bar.close()


def _in_words(line: dict) -> str:
    return (
        f"{line['phase']}: loss {line['loss']:.4f}, accuracy {100 * line['accuracy']:.1f} %, "
        f"{line['ms']:.0f} ms"
    )


class Curves:
    """TensorBoard's events of a run in `folder`; what an earlier attempt wrote of later steps is left out.

    A context manager. In all processes but the main one it does nothing.
    """

    def __init__(self, folder: Path, first_step: int = 1):
        self.writer = SummaryWriter(str(folder), purge_step=first_step) if is_main() else None

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *_) -> None:
        if self.writer is not None:
            self.writer.close()

    def add(self, line: dict, memory_bytes: int | None = None) -> None:
        """The numbers of a line of the history: a train or an eval event."""
        if self.writer is None or line["event"] not in ("train", "eval"):
            return
        part = "train" if line["event"] == "train" else line.get("split", "dev")
        values = {
            f"{part}/{key}": line.get(key) for key in ("loss", "accuracy", "learning_rate", "ms")
        }
        values[f"{part}/memory"] = memory_bytes
        for key in LAYER_VALUES:
            for layer, value in enumerate(line.get(key) or []):
                values[f"{key}/layer_{layer}"] = value
        summary = Summary(
            value=[
                Summary.Value(tag=tag, simple_value=value)
                for tag, value in values.items()
                if value is not None and math.isfinite(value)
            ]
        )
        self.writer.file_writer.add_summary(summary, line["step"])

    def add_maps(self, maps: list[torch.Tensor], step: int) -> None:
        """The mean attention map [S, S] of every layer; bright is the root of the share of the largest pixel."""
        if self.writer is None:
            return
        for layer, a_SS in enumerate(maps):
            self.writer.add_image(f"attention/layer_{layer}", map_image(a_SS), step)

    def add_pattern(self, masks: list[torch.Tensor], step: int) -> None:
        """The block mask [n, n] of every layer; a kept block is white."""
        if self.writer is None:
            return
        for layer, mask_nn in enumerate(masks):
            self.writer.add_image(f"pattern/layer_{layer}", mask_image(mask_nn), step)


def map_image(a_SS: torch.Tensor) -> torch.Tensor:
    """[S, S] -> grey image [1, side, side] in [0, 1], averaged over tiles down to LARGEST_IMAGE.

    The root, for a softmax's few large values would leave the rest black.
    """
    tile = -(-len(a_SS) // LARGEST_IMAGE)
    image = torch.nn.functional.avg_pool2d(a_SS[None].float(), tile, ceil_mode=True)
    return (image / image.max().clamp(min=torch.finfo(torch.float32).tiny)).sqrt().cpu()


def mask_image(mask_nn: torch.Tensor) -> torch.Tensor:
    """[n, n] -> grey image [1, side, side], each block a square of pixels."""
    scale = max(1, LARGEST_IMAGE // (2 * len(mask_nn)))
    image = mask_nn.float().repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    return image[None].cpu()
