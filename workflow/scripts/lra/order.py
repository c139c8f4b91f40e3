"""Orders and choices of rows that are the same in every process and on every machine."""

import hashlib
from collections.abc import Iterable

import numpy as np


def tfds_order(keys: Iterable[str | int], salt: str) -> np.ndarray:
    """The order in which TFDS writes examples with these keys: ascending md5(salt + key), int64 [n].

    Source: tensorflow_datasets/core/hashing.py and shuffle.py of TFDS 4.9.10; the salt is the name of
    the split.
    """
    start = hashlib.md5(salt.encode())
    digests = bytearray()
    for key in keys:
        digest = start.copy()
        digest.update(str(key).encode())
        digests += digest.digest()
    high, low = np.frombuffer(digests, ">u8").reshape(-1, 2).T
    return np.lexsort((low, high))


def content_key(salt: str, content: bytes) -> int:
    """64 bits that place a row by what it holds, so that no order of files matters."""
    digest = hashlib.blake2b(content, digest_size=8, key=salt.encode())
    return int.from_bytes(digest.digest(), "big")


def choose_holdout(keys: np.ndarray, share: float) -> np.ndarray:
    """bool [n]: the `share` of rows with the smallest keys (uint64 [n]), equal keys by row."""
    chosen = np.zeros(len(keys), bool)
    chosen[np.argsort(keys, kind="stable")[: round(len(keys) * share)]] = True
    return chosen


def choose_capped(labels: np.ndarray, keys: np.ndarray, cap: int) -> np.ndarray:
    """bool [n]: at most `cap` rows, every label with its share, the smallest keys of each label.

    Shares are rounded by largest remainder; among equal remainders the smaller label wins.
    """
    chosen = np.zeros(len(labels), bool)
    if cap >= len(labels):
        chosen[:] = True
        return chosen
    values, counts = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(counts * cap, len(labels))
    quotas[np.argsort(-remainders, kind="stable")[: cap - quotas.sum()]] += 1
    for value, quota in zip(values, quotas, strict=True):
        rows = np.flatnonzero(labels == value)
        chosen[rows[np.argsort(keys[rows], kind="stable")[:quota]]] = True
    return chosen
