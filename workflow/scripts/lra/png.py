"""Decode small PNGs with OpenCV, to what tf.io.decode_png makes of them."""

import struct
from collections.abc import Sequence

import numpy as np

from .encode import to_gray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB, PALETTE = 0, 2, 3  # PNG colour types; the others have transparency
EMPTY = "image is empty"
TRANSPARENT = "PNG with transparency, expected gray or RGB"


def decode_pngs(files: Sequence[bytes], side: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Gray pixels of PNG files without transparency, colours turned to gray as TensorFlow does.

    Returns the images that could be read, uint8 [m, side, side], their positions in `files` [m], and why the
    others could not, by position. No file makes more than its side * side pixels of memory.
    """
    import cv2

    images = np.zeros((len(files), side, side), np.uint8)
    colours = np.zeros((len(files), side, side, 3), np.uint8)
    coloured: list[int] = []
    faults: dict[int, str] = {}
    for position, data in enumerate(files):
        # The header first: a few bytes can claim to be gigabytes of pixels.
        if fault := header_fault(data, side):
            faults[position] = fault
            continue
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.shape[:2] != (side, side):
            faults[position] = "broken PNG"
            continue
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        if pixels.ndim == 2:
            images[position] = pixels
        elif pixels.shape[2] != 3:
            faults[position] = TRANSPARENT
        else:
            colours[len(coloured)] = pixels
            coloured.append(position)
    # OpenCV has blue first.
    images[coloured] = to_gray(colours[: len(coloured), ..., ::-1])
    good = np.setdiff1d(np.arange(len(files)), list(faults))
    return (images[good] if faults else images), good, faults


def header_fault(data: bytes, side: int) -> str | None:
    """What is wrong with the header of a PNG that should have side * side pixels, gray, RGB or of a palette."""
    if not data:
        return EMPTY
    if len(data) < 33 or data[:8] != SIGNATURE or data[12:16] != b"IHDR":
        return "broken PNG: no header"
    width, height, _, colour = struct.unpack_from(">IIBB", data, 16)
    if (width, height) != (side, side):
        return f"image of {width}x{height}, expected {side}x{side}"
    return None if colour in (GRAY, RGB, PALETTE) else TRANSPARENT
