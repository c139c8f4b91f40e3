"""Decode thousands of small PNGs at once.

Images of 8 bits a channel, gray or RGB and not interlaced (all that the archives hold) are inflated one by one
and unfiltered together, row by row, with NumPy; whatever else a PNG can be, Pillow decodes. Pillow also has the
last word on what is broken.
Source of the filters: PNG specification, third edition, section 9.
"""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np

from .encode import to_gray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3}  # by PNG colour type: gray, RGB
SUB, UP, AVERAGE, PAETH = 1, 2, 3, 4
PIECE = (
    1 << 22
)  # bytes of rows that are unfiltered together: enough images for NumPy, few enough for the cache


def decode_pngs(files: Sequence[bytes], side: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Gray pixels of PNG files, RGB turned to gray as TensorFlow does.

    Returns the images that could be read, uint8 [m, side, side], their positions in `files` [m], and why the
    others could not, by position. No file makes more than its side * side pixels of memory.
    """
    images = np.zeros((len(files), side, side), np.uint8)
    faults: dict[int, str] = {}
    plain: dict[int, tuple[list[int], list[bytes]]] = {1: ([], []), 3: ([], [])}
    starts = {first_bytes(side, kind): channels for kind, channels in CHANNELS.items()}
    for position, data in enumerate(files):
        channels = starts.get(data[:33])
        rows = channels and inflate(data, side * (1 + side * channels))
        if rows:
            plain[channels][0].append(position)
            plain[channels][1].append(rows)
            continue
        try:
            images[position] = decode_with_pillow(data, side)
        except ValueError as error:
            faults[position] = str(error)
    for channels, (positions, rows) in plain.items():
        per_piece = max(PIECE // (side * (1 + side * channels)), 1)
        for start in range(0, len(rows), per_piece):
            here, some = (part[start : start + per_piece] for part in (positions, rows))
            filtered = np.frombuffer(b"".join(some), np.uint8).reshape(len(some), side, -1)
            pixels = unfilter(filtered, channels)
            images[here] = pixels[..., 0] if channels == 1 else to_gray(pixels)
            for index in np.flatnonzero((filtered[:, :, 0] > PAETH).any(1)):
                faults[here[index]] = "broken PNG: unknown filter"
    good = np.setdiff1d(np.arange(len(files)), list(faults))
    return (images[good] if faults else images), good, faults


def first_bytes(side: int, colour: int) -> bytes:
    """Signature and header chunk of a plain PNG of this size, the first 33 bytes of its file."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, colour, 0, 0, 0)
    return SIGNATURE + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def inflate(data: bytes, size: int) -> bytes | None:
    """The `size` bytes of filtered rows in a PNG file; None when anything about it is unusual."""
    packed = []
    at = 33
    try:
        while True:
            length, kind = struct.unpack_from(">I4s", data, at)
            end = at + 8 + length
            if kind == b"IDAT":
                if struct.unpack_from(">I", data, end)[0] != zlib.crc32(data[at + 4 : end]):
                    return None
                packed.append(data[at + 8 : end])
            elif kind == b"IEND":
                break
            elif kind[:1].isupper() or kind == b"tRNS":
                return None
            at = end + 4
        stream = zlib.decompressobj()
        rows = stream.decompress(packed[0] if len(packed) == 1 else b"".join(packed), size + 1)
    except (struct.error, zlib.error):
        return None
    return rows if stream.eof and len(rows) == size else None


def unfilter(filtered: np.ndarray, channels: int) -> np.ndarray:
    """Pixels of images in one go, uint8 [n, h, 1 + w * channels] to uint8 [n, h, w, channels]."""
    n, height, width = filtered.shape
    width = (width - 1) // channels
    # Images last: the inner loops run over images, because a row depends on the one above it and a pixel on the
    # one to its left.
    lines = np.array(filtered.transpose(1, 2, 0), order="C")
    above = np.zeros((width, channels, n), np.uint8)
    for line in lines:
        kinds, row = line[0], line[1:].reshape(width, channels, n)
        ups = kinds == UP
        if ups.any():
            row += above * ups.view(np.uint8)
        for kind in (SUB, AVERAGE, PAETH):
            chosen = np.flatnonzero(kinds == kind)
            if len(chosen):
                row[:, :, chosen] = unfilter_rows(
                    kind, np.take(row, chosen, axis=2), np.take(above, chosen, axis=2)
                )
        above = row
    pixels = lines[:, 1:].reshape(height, width, channels, n)
    return np.ascontiguousarray(pixels.transpose(3, 0, 1, 2))


def unfilter_rows(kind: int, row: np.ndarray, above: np.ndarray) -> np.ndarray:
    """Undo SUB, AVERAGE or PAETH in place on a row of images, uint8 [w, channels, n]; sums are modulo 256."""
    if kind == SUB:
        return np.cumsum(row, axis=0, dtype=np.uint8)
    left = np.zeros(row.shape[1:], np.uint8)
    if kind == AVERAGE:
        for x, up in enumerate(above):
            row[x] += ((left.astype(np.uint16) + up) >> 1).astype(np.uint8)
            left = row[x]
        return row
    up = above.astype(np.int16)
    by_up = np.diff(up, axis=0, prepend=np.int16(0))  # how far left + up - corner is from left
    to_left = np.abs(by_up)
    left = np.zeros(row.shape[1:], np.int16)
    corner = left
    for x in range(len(row)):
        by_left = left - corner
        to_up, to_corner = np.abs(by_left), np.abs(by_left + by_up[x])
        # nearest = up if to_up <= to_corner else corner; then left if to_left <= both. A shifted sign is a mask of
        # all bits or none, several times as fast as np.where.
        nearest = up[x] - (by_up[x] & ((to_corner - to_up) >> 15))
        np.minimum(to_up, to_corner, out=to_up)
        nearest -= left
        nearest &= (to_up - to_left[x]) >> 15
        nearest += left
        row[x] += nearest.astype(np.uint8)
        left, corner = row[x].astype(np.int16), up[x]
    return row


def decode_with_pillow(data: bytes, side: int) -> np.ndarray:
    """Gray pixels of any PNG, uint8 [side, side]; ValueError when it is broken or of another size."""
    from PIL import PngImagePlugin

    try:
        with PngImagePlugin.PngImageFile(io.BytesIO(data)) as image:
            width, height = image.size
            # The size first: a few bytes can claim to be gigabytes of pixels.
            if (width, height) == (side, side):
                pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, zlib.error, ...
        raise ValueError(f"broken PNG: {error}") from None
    if (width, height) != (side, side):
        raise ValueError(f"image of {width}x{height}, expected {side}x{side}")
    return pixels if pixels.ndim == 2 else to_gray(pixels)
