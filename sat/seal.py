"""JSON files that carry a checksum of their own content, and of files beside them.

A flipped bit often leaves valid JSON and valid weights: 41.3 becomes 51.3. What a number of a table comes from is
therefore sealed by the program that writes it and checked by those that read it. Imports the standard library alone:
programs of every environment use it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

KEY, FILES = "content_sha256", "files"


def content_sha256(content: Mapping) -> str:
    """sha256 of all keys but KEY, as JSON with sorted keys."""
    rest = {key: value for key, value in content.items() if key != KEY}
    written = json.loads(json.dumps(rest))  # as a reader finds it: keys are texts
    return hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path, size: int | None = None) -> str:
    """sha256 of a file, or of its first `size` bytes."""
    with open(path, "rb") as file:
        if size is not None:
            return hashlib.sha256(file.read(size)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


def add(content: dict, folder: Path | None = None, names: Iterable[str] = ()) -> dict:
    """Put the hashes of files of `folder` and then the seal into `content`; -> content."""
    if folder is not None:
        content[FILES] = {name: file_sha256(folder / name) for name in sorted(names)}
    content[KEY] = content_sha256(content)
    return content


def read(path: Path, again: str, names: Iterable[str] = ()) -> dict:
    """The content of a sealed file whose files `names` are checked too.

    again: how to make it anew, for the message. Raises ValueError when something is not what was written; a file that
    was not sealed is not looked at.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}; {again}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, found {content!r:.60}; {again}")
    if KEY not in content:
        raise ValueError(
            f"{path}: it lacks the checksum {KEY!r}: an older version wrote it, or it was changed; {again}"
        )
    if content[KEY] != content_sha256(content):
        raise ValueError(f"{path}: its checksum differs: it is not what was written; {again}")
    check_files(path.parent, content, names, again)
    return content


def check_files(folder: Path, content: Mapping, names: Iterable[str], again: str) -> None:
    """Raises ValueError, which names the file, when one of `names` is not the file that `content` was sealed with."""
    known = content.get(FILES, {})
    for name in names:
        path = folder / name
        if name not in known:
            continue
        if not path.is_file():
            raise ValueError(f"{path} is missing; {again}")
        if file_sha256(path) != known[name]:
            raise ValueError(
                f"{path} is not the file that was written: its checksum differs; {again}"
            )
