"""PNGs decoded in bulk agree with Pillow; broken and hostile ones are refused."""

import io
import struct
import zlib

import numpy as np
import pytest
from lra import png
from PIL import Image

SIDE = 12


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
def test_every_filter_as_pillow_undoes_it(colour, channels):
    rng = np.random.default_rng(1)
    files = [
        plain(colour, rows_of(rng, channels, rng.integers(0, 5, SIDE).tolist()), cuts=1 + n % 3)
        for n in range(200)
    ]
    files += [plain(colour, rows_of(rng, channels, [kind] * SIDE)) for kind in range(5)]
    images, good, faults = png.decode_pngs(files, SIDE)
    assert not faults and good.tolist() == list(range(205))
    assert (images == np.stack([png.decode_with_pillow(data, SIDE) for data in files])).all()
    for data in files:
        assert png.inflate(data, SIDE * (1 + SIDE * channels))  # and not by Pillow


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "RGBA", "LA", "1", "I;16"])
def test_every_mode_of_pillow(mode):
    pixels = np.random.default_rng(2).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image = (
        Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    )
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    images, good, faults = png.decode_pngs([buffer.getvalue()], SIDE)
    assert not faults and images.shape == (1, SIDE, SIDE)
    if mode in ("L", "RGB", "RGBA", "LA"):
        assert (images[0] == pixels).all()


def test_broken_files_are_named_and_the_others_decoded():
    rng = np.random.default_rng(3)
    rows = rows_of(rng, 1, [0] * SIDE)
    good = plain(0, rows)
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    bomb = pack([header(), (b"IDAT", zlib.compress(bytes(1 << 26))), (b"IEND", b"")])
    huge = pack([header(60_000, 60_000), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")])
    broken = {
        "empty": b"",
        "no PNG": b"GIF89a" + bytes(50),
        "cut": good[:60],
        "flipped": bytes(flipped),
        "too few rows": plain(0, rows[:-20]),
        "unknown filter": plain(0, bytes([9]) + rows[1:]),
        "size": huge,
    }
    files = [good, *broken.values(), bomb, good]
    images, kept, faults = png.decode_pngs(files, SIDE)
    assert sorted(faults) == list(range(1, 1 + len(broken)))
    assert [n for n in kept.tolist() if n not in (8,)] == [0, 9]
    expected = np.frombuffer(rows, np.uint8).reshape(SIDE, SIDE + 1)[:, 1:]
    assert (images[0] == expected).all() and (images[-1] == expected).all()
    assert faults[7] == f"image of 60000x60000, expected {SIDE}x{SIDE}"
    assert all("broken PNG" in faults[n] for n in range(1, 7))


def test_nothing_to_decode():
    images, good, faults = png.decode_pngs([], SIDE)
    assert (images.shape, good.size, faults) == ((0, SIDE, SIDE), 0, {})
