"""Decode small PNGs with OpenCV."""

import struct
from collections.abc import Sequence

import numpy as np

from .encode import to_gray

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GRAY, RGB = 0, 2  # PNG colour types


def decode_pngs(files: Sequence[bytes], side: int) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Gray pixels of PNG files of 8 bits a channel, RGB turned to gray as TensorFlow does.

    Returns the images that could be read, uint8 [m, side, side], their positions in `files` [m], and why the
    others could not, by position. No file makes more than its side * side pixels of memory.
    """
    import cv2

    images = np.zeros((len(files), side, side), np.uint8)
    colours: list[tuple[int, np.ndarray]] = []
    faults: dict[int, str] = {}
    for position, data in enumerate(files):
        # The header first: a few bytes can claim to be gigabytes of pixels.
        if fault := header_fault(data, side):
            faults[position] = fault
            continue
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if pixels is None or pixels.shape[:2] != (side, side):
            faults[position] = "broken PNG"
        elif pixels.ndim == 2:
            images[position] = pixels
        else:
            colours.append((position, pixels[..., 2::-1]))  # OpenCV has blue first
    if colours:
        positions, pixels = zip(*colours, strict=True)
        images[list(positions)] = to_gray(np.stack(pixels))
    good = np.setdiff1d(np.arange(len(files)), list(faults))
    return (images[good] if faults else images), good, faults


def header_fault(data: bytes, side: int) -> str | None:
    """What is wrong with the header of a PNG that should have side * side pixels, gray or RGB."""
    if len(data) < 33 or data[:8] != SIGNATURE or data[12:16] != b"IHDR":
        return "broken PNG: no header"
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    if (width, height) != (side, side):
        return f"image of {width}x{height}, expected {side}x{side}"
    if depth != 8 or colour not in (GRAY, RGB):
        return f"PNG of {depth} bits and colour type {colour}, expected 8 bits, gray or RGB"
    return None
