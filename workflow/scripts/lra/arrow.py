"""Arrow files of one split: written in batches of one size, filtered, keyed and described."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from .order import content_key

# Arrow's own pool keeps freed memory for itself: 25 MB more at the peak beside TensorFlow.
pa.set_memory_pool(pa.system_memory_pool())

# Every file is cut into batches of this many rows, however its rows arrived: the bytes then do not
# depend on the size of a read, and a reader needs memory for one batch only.
ROWS_PER_BATCH = 1024


def rebatch(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of ROWS_PER_BATCH, the last one shorter."""
    pending: list[pa.RecordBatch] = []
    num_rows = 0
    for batch in batches:
        if not pending and batch.num_rows == ROWS_PER_BATCH:
            yield batch
            continue
        pending.append(batch)
        num_rows += batch.num_rows
        if num_rows >= ROWS_PER_BATCH:
            table = pa.Table.from_batches(pending).combine_chunks()
            full = num_rows - num_rows % ROWS_PER_BATCH
            yield from table.slice(0, full).to_batches(max_chunksize=ROWS_PER_BATCH)
            pending = table.slice(full).to_batches()
            num_rows -= full
    if num_rows:
        yield from pa.Table.from_batches(pending).combine_chunks().to_batches()


def tight(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The same batch in buffers of exactly its size: Arrow would write what lies behind a slice too."""
    columns = []
    for column in batch.columns:
        buffers = [buffer for buffer in column.buffers() if buffer is not None]
        if column.nbytes == sum(buffer.size for buffer in buffers):
            columns.append(column)
            continue
        if not pa.types.is_nested(column.type):
            columns.append(pa.array(column.to_numpy().copy()))
            continue
        values, offsets = values_and_offsets(column)
        values = pa.array(values.copy())
        if pa.types.is_fixed_size_list(column.type):
            columns.append(pa.FixedSizeListArray.from_arrays(values, column.type.list_size))
        else:
            columns.append(pa.ListArray.from_arrays(pa.array(offsets.copy()), values))
    return pa.record_batch(columns, schema=batch.schema)


def write_arrow(
    path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch], num_classes: int
) -> dict:
    """Write an Arrow IPC file; returns its rows, label counts and lengths, for the manifest."""
    counts = np.zeros(num_classes, np.int64)
    num_rows, shortest, longest, total, num_inputs = 0, None, 0, 0, 0
    with pa.ipc.new_file(path, schema) as writer:
        for batch in rebatch(batches):
            writer.write_batch(tight(batch))
            num_rows += batch.num_rows
            counts += np.bincount(batch["label"].to_numpy(), minlength=num_classes)
            for name in input_columns(schema):
                lengths = np.diff(values_and_offsets(batch[name])[1])
                least = int(lengths.min())
                shortest = least if shortest is None else min(shortest, least)
                longest = max(longest, int(lengths.max()))
                total += int(lengths.sum())
                num_inputs += len(lengths)
    return {
        "rows": num_rows,
        "label_counts": {str(label): int(count) for label, count in enumerate(counts)},
        "length": {"min": shortest, "max": longest, "mean": total / max(num_inputs, 1)},
    }


def read_arrow(path: Path) -> Iterator[pa.RecordBatch]:
    """The record batches of an Arrow IPC file, read one at a time."""
    with pa.OSFile(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def values_and_offsets(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """All values of a list column in one piece, and where each row starts and ends in it [n + 1]."""
    values = column.flatten().to_numpy()
    if pa.types.is_fixed_size_list(column.type):
        return values, np.arange(len(column) + 1) * column.type.list_size
    offsets = column.offsets.to_numpy()
    return values, offsets - offsets[0]


def row_keys(path: Path, salt: str) -> tuple[np.ndarray, np.ndarray]:
    """The label (uint8) and the content key (uint64) of every row of a file."""
    labels, keys = [np.zeros(0, np.uint8)], []
    for batch in read_arrow(path):
        labels.append(batch["label"].to_numpy())
        columns = []
        for name in input_columns(batch.schema):
            values, offsets = values_and_offsets(batch[name])
            data, width = memoryview(values).cast("B"), values.itemsize
            columns.append([bytes(data[a * width : b * width]) for a, b in pairs(offsets)])
        for row in zip(*columns, strict=True):
            keys.append(content_key(salt, b"".join(len(p).to_bytes(4, "big") + p for p in row)))
    return np.concatenate(labels), np.array(keys, np.uint64)


def pairs(offsets: np.ndarray) -> Iterable[tuple[int, int]]:
    return zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)


def keep_rows(path: Path, keep: np.ndarray, output: Path, num_classes: int) -> dict:
    """Write the rows of `path` where `keep` (bool [rows]) holds to `output`, in their order.

    Returns what write_arrow does. `output` may be `path` itself.
    """

    def kept() -> Iterator[pa.RecordBatch]:
        start = 0
        for batch in read_arrow(path):
            yield batch.filter(pa.array(keep[start : start + batch.num_rows]))
            start += batch.num_rows

    with pa.OSFile(str(path)) as file:
        schema = pa.ipc.open_file(file).schema
    temporary = output.with_name(f"{output.name}.kept")
    facts = write_arrow(temporary, schema, kept(), num_classes)
    os.replace(temporary, output)
    return facts


def input_columns(schema: pa.Schema) -> list[str]:
    return [name for name in schema.names if name.startswith("input_ids_")]
