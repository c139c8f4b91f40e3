"""Predictions of a finished run on new inputs, encoded as the preprocessing encodes them.

    python -m sat.predict results/demo/models/text/sat reviews.txt       a text a line
    echo "[MAX 2 9 [MIN 4 7 ] ]" | python -m sat.predict results/demo/models/listops/sat -
    python -m sat.predict results/demo/models/image/sat one.png two.png

or, in Python, `sat.load("results/demo/models/text/sat").predict(["a fine film"])`.

RUN is a folder below results/<run>/models/ or results/<run>/runs/. What an input is depends on the task:

    listops               an expression a line (what stands behind a tab, as in LRA's files, is left out)
    text, agnews, yelp    a text a line
    retrieval             two texts a line, a tab between them
    image, pathfinder     PNG files (gray or RGB, of the task's size) or .npy arrays uint8 [h, w], [n, h, w] or
                          [n, h, w, 3]; `-`: their names, one a line

Prints one JSON object an input: label, probability of it, probabilities of all classes.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sat import runtime
from sat.config import ROOT
from sat.data import Batch, DataError
from sat.evaluation import batch_size, load_run, read_metrics
from sat.launch import with_allocator_settings

# The one piece of code that encodes: the scripts that preprocess use it too.
sys.path.append(str(ROOT / "workflow/scripts"))
from lra import encode  # noqa: E402
from lra.png import header_fault  # noqa: E402


class Predictor:
    """A trained classifier in the phase in which its run ended, and the encoding of its task."""

    def __init__(self, folder: Path, device: str | None = None, threads: int | None = None):
        folder = Path(folder)
        use_kernels_of(folder)
        self.device = runtime.make_accelerator(device, threads).device
        self.config, self.model, self.masks = load_run(folder, self.device)
        self.model.eval()
        metrics = read_metrics(folder)
        self.num_inputs = metrics["num_inputs"]
        self.input = metrics.get("input") or {}
        if self.input.get("input_type") not in ("text", "image"):
            raise DataError(
                f"{folder}/metrics.json does not say how inputs are encoded ('input'): train the run again"
            )

    @property
    def kind(self) -> str:
        """'image', 'listops', 'pair' or 'text'."""
        if self.input["input_type"] == "image":
            return "image"
        if self.input.get("symbols"):
            return "listops"
        return "pair" if self.num_inputs == 2 else "text"

    def predict(self, inputs: Sequence[Any]) -> list[dict]:
        """[{label, probability, probabilities}] of inputs, in their order; with `class` where classes have names.

        inputs: texts or bytes; pairs of them (retrieval); images, uint8 arrays [h, w] or [h, w, 3] or paths of PNG
        files. Raises ValueError that names the place of an input that cannot be encoded.
        """
        size, found = batch_size(self.config), []
        for start in range(0, len(inputs), size):
            batch = self.encode(inputs[start : start + size], start).to(self.device)
            with torch.inference_mode():
                logits, _ = self.model(batch, self.masks)
            found += logits.float().softmax(dim=1).tolist()
        return [self._describe(probabilities) for probabilities in found]

    def _describe(self, probabilities: list[float]) -> dict:
        label = max(range(len(probabilities)), key=probabilities.__getitem__)
        result = {"label": label, "probability": probabilities[label]}
        if self.input.get("classes"):
            result["class"] = self.input["classes"][label]
        return result | {"probabilities": probabilities}

    def encode(self, inputs: Sequence[Any], first: int = 0) -> Batch:
        """The batch that the model sees; `first`: the place of the first input, for messages."""
        parts = list(zip(*inputs, strict=True)) if self.kind == "pair" else [inputs]
        if len(parts) != self.num_inputs:
            raise ValueError(f"expected {self.num_inputs} texts an input, found {len(parts)}")
        rows_of = {"image": self._image, "listops": self._listops}.get(self.kind, self._text)
        S = self.config.model.sequence_length
        ids, lengths = [], []
        for part in parts:
            rows = []
            for place, value in enumerate(part, first + 1):
                try:
                    rows.append(rows_of(value))
                except (ValueError, OSError) as error:
                    raise ValueError(f"input {place}: {error}") from error
            padded = np.zeros((len(rows), S), dtype=np.int64)
            for row, values in zip(padded, rows, strict=True):
                row[: len(values)] = values.astype(np.int64) + (self.input["id_offset"] or 0)
            full = self.kind == "image" and len(rows[0]) == S
            ids.append(torch.from_numpy(padded))
            lengths.append(None if full else torch.tensor([len(values) for values in rows]))
        return Batch(ids, lengths, torch.zeros(len(inputs), dtype=torch.int64))

    def _text(self, text: str | bytes) -> np.ndarray:
        if not isinstance(text, (str, bytes)):
            raise ValueError(f"expected a text, found {type(text).__name__}")
        data = text.encode() if isinstance(text, str) else text
        return encode.encode_text([data], self.input["max_length"]).values.to_numpy()

    def _listops(self, text: str | bytes) -> np.ndarray:
        if not isinstance(text, (str, bytes)):
            raise ValueError(f"expected an expression, found {type(text).__name__}")
        data = text.encode() if isinstance(text, str) else text
        source = data.split(b"\t")[0].replace(b"\n", b" ")
        ids, _, _, faults = encode.encode_listops(
            source + b"\t0\n", self.input["max_length"], self.input["options"].get("brackets", True)
        )
        if faults[0]:
            words = encode.LISTOPS_FAULTS[faults[0]]
            raise ValueError(
                f"{words}; symbols are {' '.join(encode.SYMBOLS)}, blanks between them"
            )
        return ids

    def _image(self, image: np.ndarray | str | os.PathLike) -> np.ndarray:
        side = math.isqrt(self.input["max_length"])
        if isinstance(image, (str, os.PathLike)):
            image = read_png(Path(image), side)
        pixels = np.asarray(image)
        if pixels.dtype != np.uint8 or pixels.shape not in ((side, side), (side, side, 3)):
            raise ValueError(
                f"expected uint8 [{side}, {side}] or [{side}, {side}, 3], found {pixels.dtype} "
                f"{list(pixels.shape)}"
            )
        return (encode.to_gray(pixels) if pixels.ndim == 3 else pixels).reshape(-1)


def read_png(path: Path, side: int) -> np.ndarray:
    """uint8 [side, side], or [side, side, 3] of an RGB image. Raises ValueError that names the file."""
    from PIL import Image, UnidentifiedImageError

    data = path.read_bytes()
    if fault := header_fault(data, side):
        raise ValueError(f"{path}: {fault}")
    try:
        return np.asarray(Image.open(io.BytesIO(data)))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: broken PNG ({error})") from error


def use_kernels_of(folder: Path) -> None:
    """Take the kernels of the run set that the folder belongs to, unless others are named already."""
    for parent in folder.resolve().parents:
        if (parent / "kernels/kernels.json").is_file():
            os.environ.setdefault("SAT_KERNELS", str(parent / "kernels"))
            return


def read_inputs(kind: str, files: list[str]) -> Iterator[Any]:
    """The inputs that the command line names. Raises ValueError, OSError."""
    if kind == "image":
        for name in sys.stdin.read().splitlines() if files == ["-"] else files:
            if name.endswith(".npy"):
                images = np.load(name, allow_pickle=False)
                yield from images if images.ndim > 2 else [images]
            else:
                yield Path(name)
        return
    for name in files:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        for number, line in enumerate(data.splitlines(), 1):
            if kind != "pair":
                yield line
                continue
            texts = line.split(b"\t")
            if len(texts) != 2:
                raise ValueError(
                    f"{name}: line {number}: expected two texts with a tab between them, found {len(texts)}"
                )
            yield texts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sat.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run or a model")
    parser.add_argument("files", nargs="*", default=["-"], metavar="FILE", help="- is stdin")
    parser.add_argument("--device", choices=["cpu"], help="cpu: do not use a GPU")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    options = parser.parse_args(arguments)
    try:
        predictor = Predictor(options.run, options.device, options.threads)
        inputs = list(read_inputs(predictor.kind, options.files))
        for prediction in predictor.predict(inputs):
            print(json.dumps(prediction))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with_allocator_settings()
    sys.exit(main())
