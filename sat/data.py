"""Reading the preprocessed Arrow files: memory-mapped, a batch at a time, in a fixed order.

A split is an Arrow IPC file with the columns `input_ids_0` (and `input_ids_1` for two texts) and `label`, beside a
`manifest.json` that says what the ids mean: those of texts are the stored bytes + `id_offset`.
Shapes: B sequences of a batch, S padded length.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from sat import seal
from sat.config import ConfigError, Model, RunConfig

SPLITS = ("train", "dev", "test")
BROKEN = (AttributeError, KeyError, NotImplementedError, OSError, TypeError, ValueError)


class DataError(ValueError):
    """Processed data are missing or not what their manifest says; the message names the next step."""


@dataclasses.dataclass
class Batch:
    """ids: one int64 tensor [B, S] an input; lengths: its real ids [B], None when there is no padding; labels [B].

    first: place of the first sequence in the whole batch of a step, of which this may be a part.
    """

    ids: list[torch.Tensor]
    lengths: list[torch.Tensor | None]
    labels: torch.Tensor
    first: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    def slice(self, start: int, stop: int) -> Batch:
        part = slice(start, stop)
        return Batch(
            [ids[part] for ids in self.ids],
            [None if lengths is None else lengths[part] for lengths in self.lengths],
            self.labels[part],
            self.first + start,
        )

    def to(self, device: torch.device) -> Batch:
        return Batch(
            [ids.to(device, non_blocking=True) for ids in self.ids],
            [
                None if lengths is None else lengths.to(device, non_blocking=True)
                for lengths in self.lengths
            ],
            self.labels.to(device, non_blocking=True),
            self.first,
        )

    def parts(self, size: int) -> Iterator[Batch]:
        """The batch in parts of `size` sequences, the last one as small as it comes."""
        for start in range(0, len(self), size):
            yield self.slice(start, start + size)


class Column:
    """A memory-mapped column of id lists, of fixed or varying length, in one or several chunks.

    The ids are the column's values + `id_offset`: bytes of a text are stored as they are, their ids are 1 to 256.
    """

    def __init__(self, column: pa.ChunkedArray, id_offset: int):
        self.id_offset = id_offset
        self.values, self.offsets = [], []
        for chunk in column.chunks:
            if pa.types.is_fixed_size_list(chunk.type):
                width = chunk.type.list_size
                offsets = (
                    np.arange(chunk.offset, chunk.offset + len(chunk) + 1, dtype=np.int64) * width
                )
            else:
                offsets = chunk.offsets.to_numpy()
            self.values.append(chunk.values.to_numpy(zero_copy_only=True))
            self.offsets.append(offsets)
        self.starts = np.cumsum([0] + [len(chunk) for chunk in column.chunks])

    def gather(self, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [B] -> (ids [B, length] int64, 0 behind the end; lengths [B]), without a loop over the rows."""
        ids = np.zeros((len(rows), length), dtype=np.int64)
        lengths = np.zeros(len(rows), dtype=np.int64)
        chunks = np.searchsorted(self.starts, rows, side="right") - 1
        for chunk in np.unique(chunks):
            here = np.flatnonzero(chunks == chunk)
            local = rows[here] - self.starts[chunk]
            begin = self.offsets[chunk][local].astype(np.int64)
            count = np.minimum(self.offsets[chunk][local + 1] - begin, length)
            inside = np.arange(length) < count[:, None]
            source = begin[:, None] + np.arange(length)
            part = np.zeros(inside.shape, dtype=np.int64)
            part[inside] = self.values[chunk][source[inside]]
            part[inside] += self.id_offset
            ids[here], lengths[here] = part, count
        return ids, lengths

    def first(self) -> np.ndarray:
        """The first id of every row; rows must not be empty."""
        return np.concatenate(
            [v[o[:-1].astype(np.int64)] for v, o in zip(self.values, self.offsets, strict=True)]
        )


def blank_batch(model: Model, num_inputs: int, size: int) -> Batch:
    """`size` sequences of full length, for measuring what they take."""
    ids = torch.zeros(size, model.sequence_length, dtype=torch.int64)
    lengths = torch.full((size,), model.max_seq_len)
    return Batch([ids] * num_inputs, [lengths] * num_inputs, ids[:, 0])


class Split:
    """One split of a processed task, memory-mapped."""

    def __init__(self, path: Path, padded: bool, id_offset: int):
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
        self.columns = [
            Column(table[name], id_offset)
            for name in table.column_names
            if name.startswith("input_ids")
        ]
        if not pa.types.is_integer(table["label"].type):
            raise TypeError(f"labels are {table['label'].type}")
        self.labels = table["label"].to_numpy().astype(np.int64)
        self.padded = padded

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: np.ndarray, length: int) -> Batch:
        """The rows [B] padded with 0 to `length`."""
        ids, lengths = [], []
        for column in self.columns:
            column_ids, column_lengths = column.gather(rows, length)
            ids.append(torch.from_numpy(column_ids))
            full = not self.padded and bool((column_lengths == length).all())
            lengths.append(None if full else torch.from_numpy(column_lengths))
        return Batch(ids, lengths, torch.from_numpy(self.labels[rows]))

    def batches(
        self, size: int, length: int, limit: int | None = None, first: int = 0, stride: int = 1
    ) -> Iterator[Batch]:
        """Every row once, in order, the last batch as small as it comes; at most `limit` rows.

        first, stride: of these batches only number first, first + stride, ...
        """
        stop = len(self) if limit is None else min(limit, len(self))
        for start in range(first * size, stop, stride * size):
            yield self.batch(np.arange(start, min(start + size, stop)), length)


def training_rows(num_rows: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Rows [batch_size] of optimiser step `step` (from 0): the next of an endless chain of permutations.

    A function of its arguments alone, so that a run can go on at any step.
    """
    place, stop = step * batch_size, (step + 1) * batch_size
    parts = []
    while place < stop:
        epoch, position = divmod(place, num_rows)
        parts.append(_permutation(num_rows, seed, epoch)[position : position + stop - place])
        place += len(parts[-1])
    return np.concatenate(parts)


_permutations: dict[tuple[int, int, int], np.ndarray] = {}


def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    key = (num_rows, seed, epoch)
    if key not in _permutations:
        while len(_permutations) > 1:  # a batch touches two epochs at most unless the split is tiny
            _permutations.pop(next(iter(_permutations)))
        _permutations[key] = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return _permutations[key]


def load(folder: Path) -> tuple[dict, dict[str, Split]]:
    """(manifest, splits by name) of a processed task.

    Raises DataError when they are not there (naming the command that makes them) or not what the manifest says.
    """
    folder = Path(folder)
    try:
        manifest = seal.read(folder / "manifest.json", f"delete {folder} and preprocess again")
    except FileNotFoundError:
        run = folder.parent.name
        overlay = "" if run == "lra" else f" --configfile config/{run}.yaml"
        raise DataError(
            f"no processed data in {folder}; make them with: snakemake {folder}/manifest.json --cores 2{overlay}"
        ) from None
    except ValueError as error:
        raise DataError(str(error)) from None
    splits = {}
    try:
        padded, id_offset = manifest["padding_id"] is not None, manifest.get("id_offset", 0)
        for name in SPLITS:
            described = manifest["splits"][name]
            path = folder / described["file"]
            found = _identity(path)
            for what, value in found.items():
                if value != described[what]:
                    raise DataError(
                        f"{path} is not the file that its manifest describes ({what} {value}, expected "
                        f"{described[what]}); delete {folder} and preprocess again"
                    )
            try:
                splits[name] = Split(path, padded, id_offset)
            except (pa.ArrowException, *BROKEN) as error:
                raise DataError(
                    f"{path} is no Arrow file of a split ({error!r}); delete {folder} and preprocess again"
                ) from None
            if len(splits[name]) != described["rows"]:
                raise DataError(
                    f"{path} has {len(splits[name])} rows, its manifest says {described['rows']}; delete {folder} "
                    "and preprocess again"
                )
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename} is missing; delete {folder} and preprocess again"
        ) from None
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder}/manifest.json is no manifest ({error!r}); delete {folder} and preprocess again"
        ) from None
    return manifest, splits


def check_fits(config: RunConfig, manifest: dict) -> None:
    """Raises ConfigError when the model cannot take the data."""
    model = config.model
    if manifest["task"] != config.task:
        raise ConfigError(
            f"the data are those of task {manifest['task']}, the settings those of {config.task}"
        )
    if manifest["vocab_size"] > model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {model.vocab_size}, the data need {manifest['vocab_size']}"
        )
    if manifest["num_classes"] != model.num_classes:
        raise ConfigError(
            f"model.num_classes is {model.num_classes}, the data have {manifest['num_classes']}"
        )
    if manifest["max_length"] > model.max_seq_len:
        raise ConfigError(
            f"model.max_seq_len is {model.max_seq_len}, the data need {manifest['max_length']}"
        )


def _identity(path: Path) -> dict[str, int | str]:
    """Size and hash of a file: a flipped bit in the data would be a wrong number in the table."""
    return {"bytes": path.stat().st_size, "sha256": seal.file_sha256(path)}


def data_digest(manifest: dict) -> str:
    """sha256 over the splits' own hashes: what a training saw."""
    return hashlib.sha256(
        "".join(manifest["splits"][name]["sha256"] for name in SPLITS).encode()
    ).hexdigest()
