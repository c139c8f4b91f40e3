"""Pathfinder images: are the two discs on one dashed contour, or on two?

Two target snakes of dashes ("paddles") are grown with slowly changing direction; two discs mark both ends
of one snake (label 1) or one end of each (label 0). Shorter snakes and single paddles distract. Paddles of
different snakes keep a distance that is larger than the gap within a snake. The task is that of Kim et
al., ICLR 2020 (J. Linsley et al. 2018); lengths are in pixels. All images of a batch grow in step, so
that NumPy does the work.
"""

from collections.abc import Iterator

import numpy as np

PADDLE_LENGTH = 2.0
PADDLE_GAP = 1.0
PADDLE_THICKNESS = 1.0
PADDLE_BRIGHTNESS = 0.75
MARKER_RADIUS = 1.5
BORDER = 1.2
# Least distance of centre lines: of different snakes, and of a disc to what it does not mark.
CLEARANCE = 3.0
MARKER_CLEARANCE = 3.3
MARKER_DISTANCE = 5.0
TURN = 0.3
LOOK_AHEAD = np.array([2.0, 4.0])
NUM_CANDIDATES = 8
NUM_ATTEMPTS = 8
BATCH = 256
# Density of distractors in a window of 32x32: paddles in snakes, and paddles on their own.
DISTRACTOR_PADDLES = 20
SINGLE_PADDLES = 8
FAR = 1e4
# Points lie on a grid, so that the last bit of a sine decides nothing and distances are exact.
GRID = 64


def generate_images(
    num_images: int,
    rng: np.random.Generator,
    image_size: int,
    contour_length: int,
    distractor_length: int,
) -> Iterator[tuple[np.ndarray, int]]:
    """Images (uint8 [image_size, image_size]) and labels, exactly half of them (rounded up) 1.

    LRA's hard level has image_size 32, contour_length 14 and distractor_length 4. A distractor_length
    of 0 leaves every distractor out.
    """
    labels = rng.permutation(np.arange(num_images) % 2 == 0)
    done = tries = 0
    while done < num_images:
        paddles, ends = _grow_targets(rng, image_size, contour_length)
        tries += BATCH
        if tries > 40 * (done + BATCH):
            raise ValueError(
                f"pathfinder: two contours of {contour_length} paddles do not fit into "
                f"{image_size}x{image_size} pixels: make contours shorter or images larger"
            )
        wanted = labels[done : done + len(paddles)].copy()
        paddles, ends = paddles[: len(wanted)], ends[: len(wanted)]
        markers, good = _choose_markers(rng, paddles, ends, wanted)
        # Labels of images that found no place for their discs are taken by later ones.
        order = np.concatenate((np.flatnonzero(good), np.flatnonzero(~good)))
        labels[done : done + len(wanted)] = wanted[order]
        if not good.any():
            continue
        paddles, markers = paddles[good], markers[good]
        paddles = _add_distractors(rng, paddles, markers, image_size, distractor_length)
        yield from zip(draw(paddles, markers, image_size), wanted[good].astype(int), strict=True)
        done += len(paddles)


def _grow_targets(
    rng: np.random.Generator, image_size: int, contour_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images with two snakes: paddles [n, 2 * length, 3, 2], ends [n, snake, end, 2].

    A paddle is three points (start, middle, end) in x and y.
    """
    paddles = np.empty((BATCH, 0, 3, 2))
    for _ in range(2):
        snakes = np.full((len(paddles), contour_length, 3, 2), FAR)
        missing = np.arange(len(paddles))
        for _ in range(NUM_ATTEMPTS):
            grown, whole = _grow_snake(
                rng, paddles[missing], paddles[missing, :0], image_size, contour_length
            )
            snakes[missing[whole]] = grown[whole, -contour_length:]
            missing = missing[~whole]
        complete = np.delete(np.arange(len(paddles)), missing)
        paddles = np.concatenate((paddles, snakes), axis=1)[complete]
    first, last = paddles[:, ::contour_length], paddles[:, contour_length - 1 :: contour_length]
    return paddles, np.stack((first[:, :, 0], last[:, :, 2]), axis=2)


def _grow_snake(
    rng: np.random.Generator,
    paddles: np.ndarray,
    obstacles: np.ndarray,
    image_size: int,
    length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Add a snake to each image; where one does not fit, its paddles lie far outside the image."""
    num_images = len(paddles)
    first = paddles.shape[1]
    alive = np.ones(num_images, bool)
    heading = np.zeros(num_images)
    turn = np.zeros(num_images)
    for step in range(length):
        shape = (num_images, NUM_CANDIDATES)
        if step == 0:
            start = rng.uniform(BORDER, image_size - BORDER, (*shape, 2))
            turns = np.zeros(shape)
            headings = rng.uniform(-np.pi, np.pi, shape)
        else:
            # Directions change slowly; the later candidates turn more, to get round an obstacle.
            spread = TURN * np.linspace(0.6, 2.2, NUM_CANDIDATES)
            turns = 0.6 * turn[:, None] + spread * rng.standard_normal(shape)
            turns = np.clip(turns, -0.8, 0.8)
            headings = heading[:, None] + turns
            bend = heading[:, None] + turns / 2
            start = paddles[:, -1, None, 2] + PADDLE_GAP * _direction(bend)
        along = np.array([0, 0.5, 1])[:, None] * PADDLE_LENGTH
        points = start[:, :, None] + along * _direction(headings)[:, :, None]
        points = np.round(points * GRID) / GRID
        # A paddle may be near the one before it, and near nothing else.
        others = np.concatenate((paddles[:, : first + max(step - 1, 0)], obstacles), axis=1)
        fits = _inside(points, image_size) & _clear(points, others, CLEARANCE)
        alive &= fits.any(1)
        if not alive.any():
            lost = np.full((num_images, length, 3, 2), FAR)
            return np.concatenate((paddles[:, :first], lost), axis=1), alive
        # Of those that fit, the first that does not head straight into something.
        ahead = points[:, :, 2:] + LOOK_AHEAD[:, None] * _direction(headings)[:, :, None]
        free = _inside(ahead, image_size) & _clear(ahead, others, CLEARANCE)
        choice = (fits * (1 + free)).argmax(1)
        rows = np.arange(num_images)
        heading, turn = headings[rows, choice], turns[rows, choice]
        paddles = np.concatenate((paddles, points[rows, choice][:, None]), axis=1)
    paddles[~alive, first:] = FAR
    return paddles, alive


def _direction(angle: np.ndarray) -> np.ndarray:
    return np.stack((np.cos(angle), np.sin(angle)), axis=-1)


def _inside(points: np.ndarray, image_size: int) -> np.ndarray:
    """bool [n, k]: are all points [n, k, p, 2] within the border?"""
    return ((points >= BORDER) & (points <= image_size - BORDER)).all((2, 3))


def _clear(points: np.ndarray, others: np.ndarray, clearance: float) -> np.ndarray:
    """bool [n, k]: are the points [n, k, p, 2] away from all paddles [n, m, 3, 2] of their image?"""
    num_images, num_candidates, num_points, _ = points.shape
    if not others.size:
        return np.ones((num_images, num_candidates), bool)
    mine = points.reshape(num_images, num_candidates * num_points, 2).astype(np.float32)
    theirs = others.reshape(num_images, others.shape[1] * others.shape[2], 2).astype(np.float32)
    squares = theirs @ (-2 * mine).swapaxes(1, 2)
    squares += (theirs**2).sum(2)[:, :, None]
    nearest = squares.min(1) + (mine**2).sum(2)
    far = nearest >= clearance**2
    return far.reshape(num_images, num_candidates, num_points).all(2)


def _choose_markers(
    rng: np.random.Generator, paddles: np.ndarray, ends: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Centres of the two discs [n, 2, 2], and where they are clear of what they do not mark [n]."""
    num_images, num_paddles = paddles.shape[:2]
    length = num_paddles // 2
    rows = np.arange(num_images)
    snake = rng.integers(0, 2, num_images)
    one, other = ends[rows, snake], ends[rows, 1 - snake]
    # Of the four pairs of ends on two snakes, the one whose distance is most like that of the two
    # ends of one snake: the distance of the discs must not give the label away.
    apart = np.linalg.norm(one[:, :, None] - other[:, None, :], axis=-1).reshape(num_images, 4)
    span = np.linalg.norm(one[:, 0] - one[:, 1], axis=-1)
    pair = np.abs(apart - span[:, None]).argmin(1)
    end = np.where(labels, 0, pair // 2)
    other_end = np.where(labels, 1, pair % 2)
    other_snake = np.where(labels, snake, 1 - snake)
    markers = np.stack((ends[rows, snake, end], ends[rows, other_snake, other_end]), axis=1)
    good = np.linalg.norm(markers[:, 0] - markers[:, 1], axis=1) >= MARKER_DISTANCE
    for marker, (which, at) in enumerate(((snake, end), (other_snake, other_end))):
        own = which * length + np.where(at, length - 1, 0)
        beside = own + np.where(at, -1, 1)
        others = paddles.copy()
        others[rows, own] = FAR
        others[rows, beside] = FAR
        good &= _clear(markers[:, marker, None, None], others, MARKER_CLEARANCE)[:, 0]
    return markers, good


def _add_distractors(
    rng: np.random.Generator,
    paddles: np.ndarray,
    markers: np.ndarray,
    image_size: int,
    distractor_length: int,
) -> np.ndarray:
    """Fill the images with short snakes and single paddles, as far as they find a place."""
    angles = np.arange(6).reshape(2, 3) * np.pi / 3
    rings = markers[:, :, None, None] + MARKER_RADIUS * _direction(angles)
    rings = rings.reshape(len(markers), 4, 3, 2)
    if distractor_length == 0:
        return paddles
    area = (image_size / 32) ** 2
    snakes = max(1, round(DISTRACTOR_PADDLES * area) // distractor_length)
    lengths = [distractor_length] * snakes + [1] * max(1, round(SINGLE_PADDLES * area))
    for length in lengths:
        paddles, _ = _grow_snake(rng, paddles, rings, image_size, length)
    return paddles


def draw(paddles: np.ndarray, markers: np.ndarray, image_size: int) -> np.ndarray:
    """Paint paddles [n, m, 3, 2] and discs [n, 2, 2], antialiased: uint8 [n, size, size]."""
    num_images = len(paddles)
    margin = 4
    side = image_size + 2 * margin
    canvas = np.zeros((num_images, side, side), np.float32)
    offsets = np.arange(-margin, margin + 1)
    rows = np.arange(num_images)[:, None, None]
    strokes = [
        (paddle[:, 0], paddle[:, 2], PADDLE_THICKNESS / 2, PADDLE_BRIGHTNESS)
        for paddle in paddles.swapaxes(0, 1)
    ] + [(marker, marker, MARKER_RADIUS, 1.0) for marker in markers.swapaxes(0, 1)]
    for start, end, half, brightness in strokes:
        visible = start[:, 0] < FAR / 2
        middle = np.where(visible[:, None], (start + end) / 2, 0)
        corner = np.floor(middle).astype(int)
        columns = corner[:, 0, None, None] + offsets[None, None, :] + 0 * offsets[None, :, None]
        lines = corner[:, 1, None, None] + offsets[None, :, None] + 0 * offsets[None, None, :]
        pixels = np.stack((columns, lines), axis=-1) + 0.5
        # Distance of each pixel's centre to the stroke from start to end.
        step = (end - start)[:, None, None]
        position = ((pixels - start[:, None, None]) * step).sum(-1)
        position = np.clip(position / np.maximum((step**2).sum(-1), 1e-9), 0, 1)
        nearest = start[:, None, None] + position[..., None] * step
        distance = np.sqrt(((pixels - nearest) ** 2).sum(-1))
        paint = brightness * np.clip(half + 0.5 - distance, 0, 1) * visible[:, None, None]
        where = (rows, np.clip(lines + margin, 0, side - 1), np.clip(columns + margin, 0, side - 1))
        canvas[where] = np.maximum(canvas[where], paint)
    inner = canvas[:, margin:-margin, margin:-margin]
    return np.round(inner * 255).astype(np.uint8)
