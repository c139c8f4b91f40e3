"""PNGs decoded by OpenCV agree with Pillow and TensorFlow; broken, cut and hostile ones are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from lra import png
from lra.encode import to_gray
from PIL import Image

SIDE = 12

# OpenCV is in the TensorFlow environment only.
PROGRAM = """
import numpy as np
from lra.png import decode_pngs
files, side = data
images, good, faults = decode_pngs([file.encode("latin-1") for file in files], side)
assert images.dtype == np.uint8 and images.shape == (len(good), side, side)
result = images.tolist(), good.tolist(), list(faults.items())
"""


@pytest.fixture
def decode(in_tensorflow):
    """decode_pngs in a process of the TensorFlow environment."""

    def decode(files: list[bytes]) -> tuple[np.ndarray, list[int], dict[int, str]]:
        texts = [data.decode("latin-1") for data in files]
        images, good, faults = in_tensorflow(PROGRAM, [texts, SIDE])
        return np.array(images, np.uint8), good, dict(faults)

    return decode


def pack(chunks: list[tuple[bytes, bytes]]) -> bytes:
    parts = [png.SIGNATURE]
    for kind, data in chunks:
        sum = struct.pack(">I", zlib.crc32(kind + data))
        parts += [struct.pack(">I", len(data)), kind, data, sum]
    return b"".join(parts)


def header(width: int = SIDE, height: int = SIDE, depth: int = 8, colour: int = 0) -> tuple:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def rows_of(rng: np.random.Generator, channels: int, kinds: list[int]) -> bytes:
    return b"".join(bytes([k]) + rng.bytes(SIDE * channels) for k in kinds)


def plain(colour: int, rows: bytes, cuts: int = 1, extra: list | None = None) -> bytes:
    packed = zlib.compress(rows)
    pieces = [packed[n * len(packed) // cuts : (n + 1) * len(packed) // cuts] for n in range(cuts)]
    data = [(b"IDAT", piece) for piece in pieces]
    return pack([header(colour=colour), *(extra or []), *data, (b"IEND", b"")])


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_every_filter_as_pillow_undoes_it(decode, colour, channels):
    rng = np.random.default_rng(1)
    files = [
        plain(colour, rows_of(rng, channels, rng.integers(0, 5, SIDE).tolist()), cuts=1 + n % 3)
        for n in range(200)
    ]
    files += [plain(colour, rows_of(rng, channels, [kind] * SIDE)) for kind in range(5)]
    images, good, faults = decode(files)
    assert not faults and good == list(range(205))
    expected = np.stack([np.asarray(Image.open(io.BytesIO(data))) for data in files])
    assert (images == (expected if channels == 1 else to_gray(expected))).all()


# What TensorFlow makes of a file: its pixels, colours turned to gray.
BY_TENSORFLOW = """
import tensorflow as tf
result = []
for file in data:
    pixels = tf.io.decode_png(file.encode("latin-1"))
    gray = tf.image.rgb_to_grayscale(pixels) if pixels.shape[2] == 3 else pixels
    result.append(gray.numpy()[..., 0].tolist())
"""

KINDS = [*((depth, 0) for depth in (1, 2, 4, 8, 16)), (8, 2), (16, 2)]
KINDS += [(depth, 3) for depth in (1, 2, 4, 8)]


def of_kind(rng: np.random.Generator, depth: int, colour: int, extra: tuple = ()) -> bytes:
    """A PNG of random pixels with this bit depth and colour type."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    width = (SIDE * channels * depth + 7) // 8
    rows = b"".join(bytes([kind]) + rng.bytes(width) for kind in rng.integers(0, 5, SIDE).tolist())
    palette = [(b"PLTE", rng.bytes(3 << depth))] if colour == 3 else []
    pieces = [header(depth=depth, colour=colour), *palette, *extra]
    return pack([*pieces, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])


def test_depths_and_palettes_as_tensorflow_decodes_them(decode, in_tensorflow):
    rng = np.random.default_rng(2)
    files = [of_kind(rng, *kind) for kind in KINDS for _ in range(3)]
    images, good, faults = decode(files)
    assert not faults and len(good) == len(files)
    assert images.tolist() == in_tensorflow(BY_TENSORFLOW, [f.decode("latin-1") for f in files])


def test_transparency_is_refused(decode):
    rng = np.random.default_rng(2)
    files = [of_kind(rng, depth, colour) for depth in (8, 16) for colour in (4, 6)]
    files.append(of_kind(rng, 4, 3, ((b"tRNS", bytes(16)),)))
    _, good, faults = decode(files)
    assert not good and set(faults.values()) == {png.TRANSPARENT}


def test_broken_files_are_named_and_the_others_decoded(decode):
    rng = np.random.default_rng(3)
    rows = rows_of(rng, 1, [0] * SIDE)
    good = plain(0, rows)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    huge = pack([header(60_000, 60_000), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])
    broken = {
        "empty": b"",
        "no PNG": b"GIF89a" + bytes(50),
        "flipped": bytes(flipped),
        "too few rows": plain(0, rows[:-20]),
        "unknown filter": plain(0, bytes([9]) + rows[1:]),
        "size": huge,
    }
    images, kept, faults = decode([good, *broken.values(), good])
    assert list(faults) == list(range(1, 1 + len(broken)))
    assert kept == [0, 7]
    expected = np.frombuffer(rows, np.uint8).reshape(SIDE, SIDE + 1)[:, 1:]
    assert (images == expected).all()
    assert faults[6] == f"image of 60000x60000, expected {SIDE}x{SIDE}"
    assert faults[1] == "image is empty"
    assert all("broken PNG" in faults[n] for n in range(2, 6))


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3)])
def test_cut_files_are_refused_wherever_they_are_cut(decode, colour, channels):
    rows = rows_of(np.random.default_rng(4), channels, [0, 1, 2, 3, 4, 0] * 2)
    whole = plain(colour, rows, cuts=3)
    _, good, faults = decode([whole[:size] for size in range(len(whole))])
    assert not good and len(faults) == len(whole)


def test_more_rows_than_the_header_says_are_not_unpacked(decode):
    rows = bytes(SIDE * (SIDE + 1))
    bomb = pack([header(), (b"IDAT", zlib.compress(rows + bytes(1 << 26))), (b"IEND", b"")])
    images, good, faults = decode([bomb])
    assert faults or not images.any()


def test_nothing_to_decode(decode):
    images, good, faults = decode([])
    assert (images.size, good, faults) == (0, [], {})
