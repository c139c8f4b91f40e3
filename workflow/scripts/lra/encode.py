"""Encodings of the five tasks, and back: what becomes which id.

Text-like inputs have ids from 1, 0 is padding; image-like inputs are pixel values 0 to 255, no padding.
The ids of texts are 1 to 256: their Arrow files hold the bytes, and the manifest says id_offset 1.
"""

import numpy as np
import pyarrow as pa

ID_OFFSET = 1

# Ids 1 to 15 in this order. Parentheses only group, and are dropped.
SYMBOLS = ("[MIN", "[MAX", "[MED", "[SM", "]", *"0123456789")
CLOSE = SYMBOLS.index("]") + 1

# What can be wrong with a row of ListOps, by code; 0 is a good row.
LISTOPS_FAULTS = (
    "",
    "expected two fields, Source<TAB>Target",
    "unknown symbol",
    "label is not a digit 0-9",
    "longer than max_length",
    "no symbols",
)

_BLANK, _PARENTHESIS, _NEWLINE, _RETURN, _TAB, _UNKNOWN = 0, 128, 252, 253, 254, 255


def _listops_table() -> np.ndarray:
    """uint8 [256]: the code of a byte, the four operators being written as the bytes 1 to 4."""
    table = np.full(256, _UNKNOWN, np.uint8)
    table[[1, 2, 3, 4]] = [1, 2, 3, 4]
    for byte, code in {" ": _BLANK, "\t": _TAB, "\r": _RETURN, "\n": _NEWLINE}.items():
        table[ord(byte)] = code
    for symbol in "()":
        table[ord(symbol)] = _PARENTHESIS
    for symbol in SYMBOLS[4:]:
        table[ord(symbol)] = SYMBOLS.index(symbol) + 1
    return table


_LISTOPS_TABLE = _listops_table()
# The letters that are left of [MIN, [MAX, [MED and [SM are I, A, E and S.
_LETTER_TABLE = bytes.maketrans(
    b"IAES\t\n" + "".join(SYMBOLS[4:]).encode(),
    bytes([1, 2, 3, 4, _TAB, _NEWLINE, *range(CLOSE, len(SYMBOLS) + 1)]),
)
_HIDE_OPERATOR_BYTES = bytes.maketrans(b"\1\2\3\4", b"????")


Rows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def encode_listops(lines: bytes, max_length: int, brackets: bool = True) -> Rows:
    """Encode whole lines `Source<TAB>Target`, each ending in a newline.

    Returns the ids of all good rows in one piece (uint8), and for every line its length in ids, its
    label (uint8) and its fault (an index of LISTOPS_FAULTS); a row with a fault has length 0.
    `brackets=False` drops "]" too, as an alphanumeric tokenizer does: the tree is then lost.
    """
    return encode_faultless_listops(lines, max_length, brackets) or encode_any_listops(
        lines, max_length, brackets
    )


def encode_faultless_listops(lines: bytes, max_length: int, brackets: bool) -> Rows | None:
    """The same for lines that are all good; None when one is not, or might not be.

    Five times as fast: bytes.translate drops what a symbol can be told without ([MIN becomes I, and so on), and
    counts over the whole piece show that nothing else was dropped.
    """
    raw = np.frombuffer(lines, np.uint8)
    # Every letter stands right behind another byte of its operator, and no other two bytes stand together.
    letters = (raw - ord("A")) < 26
    num_letters = np.count_nonzero(letters)
    solid = raw > ord(" ")
    if (
        np.count_nonzero(letters[1:] & (raw[:-1] > ord(")"))) != num_letters
        or np.count_nonzero(solid[1:] & solid[:-1]) != num_letters
    ):
        return None
    # Every line ends in a tab, a digit and a newline, perhaps with a carriage return before it.
    tabs = np.flatnonzero(raw == ord("\t"))
    ends = np.flatnonzero(raw == ord("\n"))
    if (
        not len(ends)
        or len(tabs) != len(ends)
        or (ends - tabs < 2).any()
        or (ends - tabs > 3).any()
    ):
        return None
    returns = ends - tabs == 3
    labels = raw[tabs + 1] - ord("0")
    if (
        np.count_nonzero(raw == ord("\r")) != returns.sum()
        or (raw[ends[returns] - 1] != ord("\r")).any()
        or (labels > 9).any()
    ):
        return None
    # Whatever is left without blanks and parentheses is an operator, a digit, a bracket or the end of a line.
    packed = lines.translate(None, b"() \r")
    rest = np.frombuffer(packed, np.uint8)
    is_m = rest == ord("M")
    opened = rest == ord("[")
    after = opened[:-2] & is_m[1:-1]
    second, third = rest[2:-1], rest[3:]
    long_names = after[:-1] & (
        ((second == ord("I")) & (third == ord("N")))
        | ((second == ord("A")) & (third == ord("X")))
        | ((second == ord("E")) & (third == ord("D")))
    )
    num_long = np.count_nonzero(long_names)
    num_short = np.count_nonzero(opened[:-2] & (rest[1:-1] == ord("S")) & is_m[2:])
    num_digits = np.count_nonzero((rest - ord("0")) < 10)
    num_closed = np.count_nonzero(rest == ord("]"))
    if (
        3 * num_long + 2 * num_short != num_letters
        or num_long + num_short != np.count_nonzero(opened)
        or num_letters + num_long + num_short + num_digits + num_closed + 2 * len(ends) != len(rest)
    ):
        return None
    ids = packed.translate(_LETTER_TABLE, b"[MNXD" if brackets else b"[MNXD]")
    ends = np.flatnonzero(np.frombuffer(ids, np.uint8) == _NEWLINE)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - 2 - starts
    if not 0 < lengths.min() <= lengths.max() <= max_length:
        return None
    rows = zip(starts.tolist(), (ends - 2).tolist(), strict=True)
    ids = np.frombuffer(b"".join([ids[start:end] for start, end in rows]), np.uint8)
    return ids, lengths, labels, np.zeros(len(ends), np.uint8)


def encode_any_listops(lines: bytes, max_length: int, brackets: bool) -> Rows:
    """The same for any lines."""
    text = lines.translate(_HIDE_OPERATOR_BYTES)
    for code, operator in enumerate(SYMBOLS[:4], 1):
        text = text.replace(operator.encode(), bytes([code]))
    # Every symbol is one byte now, so two neighbours that are no blanks make an unknown symbol.
    codes = _LISTOPS_TABLE[np.frombuffer(text, np.uint8)]
    ends = np.flatnonzero(codes == _NEWLINE)
    starts = np.concatenate(([0], ends[:-1] + 1))
    faults = np.zeros(len(ends), np.uint8)

    tabs = np.flatnonzero(codes == _TAB)
    num_tabs = np.diff(np.searchsorted(tabs, np.append(starts, len(codes))))
    faults[num_tabs != 1] = 1
    tab = ends.copy()
    line_of_tab = np.searchsorted(ends, tabs)
    alone = num_tabs[line_of_tab] == 1
    tab[line_of_tab[alone]] = tabs[alone]

    label_end = ends - (codes[np.maximum(ends - 1, 0)] == _RETURN)
    labels = codes[np.minimum(tab + 1, len(codes) - 1)] - (CLOSE + 1)
    bad_label = (label_end - tab != 2) | (labels > 9)
    faults[(faults == 0) & bad_label] = 3

    # Blank the targets out: what is left between two blanks is a symbol of a source.
    edges = np.zeros(len(codes), np.int8)
    edges[starts] += 1
    edges[tab] -= 1
    source = np.cumsum(edges, dtype=np.int8).view(bool)
    symbol = source & (codes != _BLANK)
    unknown = symbol & (codes > _PARENTHESIS)
    unknown[1:] |= symbol[1:] & symbol[:-1]
    bad_lines = np.searchsorted(ends, np.flatnonzero(unknown))
    faults[bad_lines[faults[bad_lines] == 0]] = 2

    keep = symbol & (codes < _PARENTHESIS)
    if not brackets:
        keep &= codes != CLOSE
    kept_before = np.concatenate(([0], np.cumsum(keep, dtype=np.int64)))
    lengths = kept_before[tab] - kept_before[starts]
    faults[(faults == 0) & (lengths > max_length)] = 4
    faults[(faults == 0) & (lengths == 0)] = 5
    for line in np.flatnonzero(faults):
        keep[starts[line] : ends[line]] = False
    lengths[faults > 0] = 0
    return codes[keep], lengths, labels, faults


def decode_listops(ids: np.ndarray) -> str:
    """The symbols of a row, separated by blanks (parentheses are not kept)."""
    return " ".join(SYMBOLS[index - 1] for index in ids)


def encode_text(texts: list[bytes], max_length: int) -> pa.ListArray:
    """The first `max_length` bytes of each text, list<uint8>: the ids less ID_OFFSET, in half the space."""
    texts = [text[:max_length] for text in texts]
    values = np.frombuffer(b"".join(texts), np.uint8)
    return to_lists(values, np.fromiter(map(len, texts), np.int64, len(texts)))


def decode_text(values: np.ndarray) -> bytes:
    """The bytes of a row of a text-like task, as the Arrow file holds it."""
    return np.asarray(values, np.uint8).tobytes()


def encode_images(images: np.ndarray) -> pa.FixedSizeListArray:
    """Pixels of gray images, row by row: uint8 [n, h, w] to fixed_size_list<uint8>[h * w]."""
    size = images.shape[1] * images.shape[2]
    return pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), size)


# What a channel of each value adds to a gray, float32 [3, 256].
_GRAY_PARTS = np.outer(
    np.array([0.2989, 0.587, 0.114], np.float32),
    np.arange(256, dtype=np.float32) * np.float32(1 / 255),
)


def to_gray(images: np.ndarray) -> np.ndarray:
    """RGB to gray, uint8 [..., 3] to uint8 [...], with the rounding of tf.image.rgb_to_grayscale.

    Sums of looked-up parts, not a matrix product: how a product rounds depends on the machine.
    """
    gray = _GRAY_PARTS[0][images[..., 0]]
    gray += _GRAY_PARTS[1][images[..., 1]]
    gray += _GRAY_PARTS[2][images[..., 2]]
    gray *= np.float32(255.5)
    return gray.astype(np.uint8)


def to_lists(values: np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Rows of the given lengths out of the values of all rows in one piece."""
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
