"""The state of an unfinished training, in its run's folder: training goes on from it after a kill.

`checkpoint` is a safetensors file with a JSON record in its header, followed by the sha256 of all that;
`checkpoint.old` is the one before, for when the newest is broken. Snakemake knows neither, so it keeps both between two
attempts. A checkpoint is used only by a training of the same identity: settings, data, code, kernels, an attention of
one's own, precision and versions of packages. Settings that change no result do not count: a training that ran out of
memory goes on with another limit. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from sat import runtime
from sat.attention import kernels
from sat.config import ROOT, SCHEMA, digest, merge
from sat.efficient import source_file

NEWEST, OLDER = "checkpoint", "checkpoint.old"
# Settings that say how a training fits its machine, and change no result but for the rounding of sums.
WITHOUT_EFFECT = (
    ("model", "batch_size"),
    ("model", "memory_limit_gb"),
    ("training", "checkpoint_seconds"),
)
DIGEST_BYTES = hashlib.sha256().digest_size


class CheckpointBroken(ValueError):
    """A file that is no whole checkpoint; the message says what is wrong with it."""


def identity(settings: Mapping, data_sha256: str, precision: str) -> dict[str, str]:
    """What a state belongs to, by name: hashes, the precision as resolved for the device, versions of packages."""
    that_count = merge(settings)
    for block, key in WITHOUT_EFFECT:
        that_count.get(block, {}).pop(key, None)
    parts = {"settings": digest(that_count), "data": data_sha256, "code": code_digest()}
    if own := source_file(settings["model"]["attention"]):
        parts[f"source of the attention ({own.name})"] = hashlib.sha256(
            own.read_bytes()
        ).hexdigest()
    return parts | {"precision": precision} | runtime.versions()


def code_digest() -> str:
    """sha256 over the Python code, the schema and the kernel libraries in use."""
    whole = hashlib.sha256()
    for path in [*sorted((ROOT / "sat").rglob("*.py")), ROOT / SCHEMA]:
        whole.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    folder = kernels.kernels_folder()
    for path in sorted(folder.glob("libsat_*.so")) if folder else []:
        whole.update(path.read_bytes())
    return whole.hexdigest()


def save(folder: Path, tensors: Mapping[str, torch.Tensor], record: Mapping) -> None:
    """Write the state; the one before stays as `checkpoint.old`. A kill at any moment leaves a whole one."""
    copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    content = safetensors.torch.save(copies, {"record": json.dumps(record)})
    partial, newest = folder / f"{NEWEST}.partial", folder / NEWEST
    with open(partial, "wb") as file:
        file.write(content)
        file.write(hashlib.sha256(content).digest())
        file.flush()
        os.fsync(file.fileno())
    if newest.exists():
        os.replace(newest, folder / OLDER)
    os.replace(partial, newest)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def load(
    folder: Path, identity: Mapping[str, str], say: Callable[[str], None]
) -> tuple[dict[str, torch.Tensor], dict] | None:
    """(tensors, record) of the newest whole checkpoint of this identity, or None; `say` is told what is left out."""
    for name in (NEWEST, OLDER):
        path = folder / name
        if not path.is_file():
            continue
        try:
            tensors, record = read(path)
        except CheckpointBroken as error:
            say(f"{path} is not used: {error}")
            continue
        found = record.get("identity", {})
        other = [
            _named(part, found.get(part), value)
            for part, value in identity.items()
            if found.get(part) != value
        ]
        if other:
            say(f"{path} is not used: it was made with other {' and '.join(other)}")
            continue
        return tensors, record
    return None


def _named(part: str, there: str | None, here: str) -> str:
    """A part of an identity in words, with its two values where they are no hashes."""
    return part if there is None or len(here) == 64 else f"{part} ({there}; here it is {here})"


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors, record) of a file. Raises CheckpointBroken."""
    content = path.read_bytes()
    content, stored = content[:-DIGEST_BYTES], content[-DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != stored:
        raise CheckpointBroken("it is cut short or changed (its checksum differs)")
    try:
        tensors = safetensors.torch.load(content)
        length = int.from_bytes(content[:8], "little")
        record = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["record"])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointBroken(f"it holds no state ({error!r})") from None
    return tensors, record


def remove(folder: Path) -> None:
    """Forget the state of a training that has finished."""
    for name in (NEWEST, OLDER, f"{NEWEST}.partial"):
        (folder / name).unlink(missing_ok=True)


# ---------------------------------------------------------------- flat names for nested state


def flatten(prefix: str, state) -> tuple[dict[str, torch.Tensor], object]:
    """Nested dicts and lists -> (tensors by path, the same structure with {"tensor": path} in their places)."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}, {"tensor": prefix}
    if isinstance(state, Mapping):
        parts = {key: flatten(f"{prefix}/{key}", value) for key, value in state.items()}
        tensors = {name: tensor for part, _ in parts.values() for name, tensor in part.items()}
        return tensors, {"dict": [[key, skeleton] for key, (_, skeleton) in parts.items()]}
    if isinstance(state, list | tuple):
        parts = [flatten(f"{prefix}/{index}", value) for index, value in enumerate(state)]
        tensors = {name: tensor for part, _ in parts for name, tensor in part.items()}
        kind = "list" if isinstance(state, list) else "tuple"
        return tensors, {kind: [skeleton for _, skeleton in parts]}
    return {}, {"value": state}


def unflatten(skeleton: Mapping, tensors: Mapping[str, torch.Tensor]):
    """The state that `flatten` took apart."""
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(part, tensors) for key, part in content}
    if kind in ("list", "tuple"):
        parts = [unflatten(part, tensors) for part in content]
        return parts if kind == "list" else tuple(parts)
    return content
