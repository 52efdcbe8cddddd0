"""Draws Pathfinder images in batches, by rejection: two long snakes, distractors, two discs.

The procedure is the public generator's (github.com/drewlinsley/pathfinder), on a whole batch at
once and with all strokes precomputed. Shapes: N snakes or images at a time, M maps of a board, K
strokes of a snake.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spion_ds.data.pathfinder.strokes import (
    CLASH,
    FIRST_DIRECTIONS,
    OCCUPIED,
    WEIGHT_ONE,
    Stamp,
    Strokes,
    disc_stamp,
)
from spion_ds.errors import ConfigError

# Places tried for a stroke that follows, and for a distractor as a whole.
STROKE_TRIALS = 3
DISTRACTOR_TRIALS = 5
# Random places at which a distractor's first stroke is tried, in one trial.
PLACES = 64
# Below this sum of weights (1.0 = one free step straight on) a snake has nowhere to go.
LEAST_WEIGHT = int(1e-4 * WEIGHT_ONE * 255)
# Bytes of a board: small enough for the caches, large enough for NumPy to be busy.
BOARD_BYTES = 2**23
# Fixed point of brightness: what a full pixel (255) of contrast 1 has, by 255.
LIGHT_ONE = 2**16
# Pairs drawn without one that fits before a configuration counts as impossible.
BARREN_PAIRS = 2**18


@dataclass(frozen=True)
class Scene:
    """What is drawn, beside the strokes themselves.

    Attributes:
        seed_distance: pixels between the first tips of the two snakes.
        contour_length: strokes of a snake.
        distractors: short snakes.
        distractor_length: strokes of one.
        marker_radius: of the discs, in pixels.
        antialias: how much finer a disc is drawn.
        contrast: brightness of the strokes of the two snakes; discs have 1.
        distractor_contrast: of the distractors' strokes.
    """

    seed_distance: int
    contour_length: int
    distractors: int
    distractor_length: int
    marker_radius: float
    antialias: int
    contrast: float
    distractor_contrast: float


@dataclass
class Images:
    """A batch of images with what they were made from.

    Attributes:
        pixels: (N, size, size) uint8, from 0 to 255.
        labels: (N,) uint8, 1 = both discs on the same snake.
        discs: (N, 2, 2) int64 row and column of the two discs.
        tips: (N, 2, K, 2) int64 row and column of every stroke's tip, snake by snake, in order:
            the first and the last are the snake's ends.
    """

    pixels: np.ndarray
    labels: np.ndarray
    discs: np.ndarray
    tips: np.ndarray


class _Board:
    """Which pixels are taken, for M images: (M · width²) uint8 masks of the strokes so far."""

    def __init__(self, strokes: Strokes, maps: int) -> None:
        self.strokes, self.area = strokes, strokes.width**2
        pad, width = strokes.pad + strokes.ring, strokes.width
        # Free but for the image's edge and all beyond it.
        self._empty = np.full((width, width), 255, np.uint8)
        self._empty[pad:-pad, pad:-pad] = 0
        self.maps = np.empty((maps, self.area), np.uint8)
        self.occupied = self.maps.reshape(-1)
        self.clear()

    def clear(self) -> None:
        """Take all strokes off the board."""
        self.maps[:] = self._empty.ravel()

    def add(self, places: np.ndarray, directions: np.ndarray) -> None:
        """Take the pixels of one stroke each; ``places``: (N,) its tip in the flat maps."""
        _draw(self.occupied, self.strokes.mask, places, directions)


@dataclass
class _Snakes:
    """N growing snakes. All places are indices into the board's flat maps.

    Attributes:
        pivot: (N,) int64 where the last stroke turned from.
        place: (N, K) int64 tip of each stroke.
        direction: (N, K) int64 its direction.
        length: strokes so far.
    """

    pivot: np.ndarray
    place: np.ndarray
    direction: np.ndarray
    length: int = 1

    def grow(self, board: _Board, alive: np.ndarray, random: np.random.BitGenerator) -> np.ndarray:
        """Add a stroke to the snakes ``alive`` (indices); return those that found a place."""
        strokes, last = board.strokes, self.length - 1
        direction = self.direction[alive, last]
        pivot = self.pivot[alive] + strokes.advance[direction]
        tips = strokes.tips[direction] + pivot[:, None]  # (N, C)
        # The pixels first: NumPy's maximum over a first axis is many times faster than over a last.
        clearance = strokes.clearance[:, None, None] + tips  # (P, N, C)
        taken = board.occupied.take(clearance).max(axis=0)
        heaped = np.cumsum(strokes.weights[direction] * (255 - taken), axis=1)
        total = heaped[:, -1]
        waiting = np.flatnonzero(total >= LEAST_WEIGHT)
        step = np.full(len(alive), -1)
        for _ in range(STROKE_TRIALS):
            drawn = _below(total[waiting], random)
            choice = (heaped[waiting] > drawn[:, None]).argmax(axis=1)
            turn = strokes.turns[direction[waiting], choice]
            core = strokes.core.offsets[turn] + tips[waiting, choice][:, None]
            sums = board.occupied.take(core).astype(np.int16) + strokes.core.values[turn]
            fits = sums.max(axis=1, initial=0) < CLASH
            step[waiting[fits]] = choice[fits]
            waiting = waiting[~fits]
        found = np.flatnonzero(step >= 0)
        grown, step = alive[found], step[found]
        # The last stroke joins the board only now: its successor may touch it.
        board.add(self.place[grown, last], direction[found])
        self.pivot[grown] = pivot[found]
        self.place[grown, last + 1] = tips[found, step]
        self.direction[grown, last + 1] = strokes.turns[direction[found], step]
        return grown


def draw_images(
    strokes: Strokes, scene: Scene, count: int, random: np.random.BitGenerator
) -> Images:
    """Return ``count`` images, a function of the arguments alone.

    Raises:
        ConfigError: the two snakes never fit.
    """
    maps = max(1, BOARD_BYTES // strokes.width**2)
    board = _Board(strokes, maps)
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    found = barren = 0
    while found < count:
        pairs.append(_draw_pairs(board, scene, random))
        new = len(pairs[-1][0])
        found, barren = found + new, 0 if new else barren + maps
        if barren > BARREN_PAIRS:
            raise ConfigError(
                f"two snakes of data.contour_length {scene.contour_length} do not fit into images "
                f"of data.image_size {strokes.size}: none in {barren} tries; allow larger images, "
                "shorter contours or smaller margins"
            )
    place, direction = (np.concatenate(arrays)[:count] for arrays in zip(*pairs, strict=True))
    parts = [
        _finish(strokes, scene, place[i : i + maps], direction[i : i + maps], random)
        for i in range(0, count, maps)
    ]
    return Images(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _draw_pairs(
    board: _Board, scene: Scene, random: np.random.BitGenerator
) -> tuple[np.ndarray, np.ndarray]:
    """Try a pair of snakes on each of the board's maps.

    Returns:
        Those that fit: (N, 2, K) places within one padded map, (N, 2, K) directions.
    """
    board.clear()
    alive, snakes = _seed_pairs(board.strokes, scene, len(board.maps), random)
    for length in range(1, scene.contour_length):
        for snake in snakes:
            snake.length = length
            alive = snake.grow(board, alive, random)
    base = (alive * board.area)[:, None, None]
    place = np.stack([snake.place[alive] for snake in snakes], axis=1) - base
    return place, np.stack([snake.direction[alive] for snake in snakes], axis=1)


def _seed_pairs(
    strokes: Strokes, scene: Scene, maps: int, random: np.random.BitGenerator
) -> tuple[np.ndarray, list[_Snakes]]:
    """Draw the first strokes of pairs; return those inside the image and all snakes."""
    # The first snake starts in the middle, so that the second has room around it: any direction,
    # then any place that its stroke allows.
    low, side = 2 * scene.seed_distance, strokes.size - 4 * scene.seed_distance
    first = _below(FIRST_DIRECTIONS, random, maps)
    start = low - strokes.room.min(axis=1)[first]  # (M, 2)
    places = low + side - strokes.room.max(axis=1)[first] - start
    fits = strokes.starts[first] & (places > 0).all(axis=1)
    places = np.maximum(places, 1).ravel()
    tip = start + _below(places, random).reshape(maps, 2)
    head = tip + strokes.head[first]
    fits &= strokes.inside(head)

    bearing = np.deg2rad(_below(FIRST_DIRECTIONS, random, maps))
    shift = scene.seed_distance * np.stack([np.sin(bearing), np.cos(bearing)], axis=1)
    other = tip + np.round(np.round(shift, 9)).astype(np.int64)
    second = _below(FIRST_DIRECTIONS, random, maps)
    other_head = other + strokes.head[second]
    fits &= strokes.inside(other_head)

    base = np.arange(maps) * strokes.width**2
    snakes = []
    for tips, direction in ((tip, first), (other, second)):
        place = base + strokes.flat(tips[:, 0], tips[:, 1])
        snakes.append(_start(strokes, place, direction, scene.contour_length))
    return np.flatnonzero(fits), snakes


def _start(strokes: Strokes, place: np.ndarray, direction: np.ndarray, length: int) -> _Snakes:
    """Return snakes of one stroke each, with room for ``length``."""
    shape = (len(place), length)
    pivot = place + strokes.behind[direction]
    snakes = _Snakes(pivot, np.zeros(shape, np.int64), np.zeros(shape, np.int64))
    snakes.place[:, 0], snakes.direction[:, 0] = place, direction
    return snakes


def _finish(
    strokes: Strokes,
    scene: Scene,
    place: np.ndarray,
    direction: np.ndarray,
    random: np.random.BitGenerator,
) -> tuple[np.ndarray, ...]:
    """Add distractors and discs to pairs of snakes, and paint; return the arrays of Images."""
    count, area = len(place), strokes.width**2
    board = _Board(strokes, count)
    base = np.arange(count) * area
    picture = np.zeros(count * area, np.int32)
    for snake in range(2):
        for stroke in range(scene.contour_length):
            at = base + place[:, snake, stroke]
            # As published: the last stroke of the first snake keeps no distance.
            if (snake, stroke) != (0, scene.contour_length - 1):
                board.add(at, direction[:, snake, stroke])
            _paint(picture, strokes.light, at, direction[:, snake, stroke], scene.contrast)
    for _ in range(scene.distractors):
        _add_distractors(picture, board, scene, random)

    labels = _below(2, random, count)
    start = _below(2, random, count)
    end = np.where(labels == 1, start, 1 - start)
    every = np.arange(count)
    disc = disc_stamp(scene.marker_radius, scene.antialias, strokes.width)
    marks = np.stack([place[every, start, 0], place[every, end, -1]], axis=1)
    for mark in range(2):
        _paint(picture, disc, base + marks[:, mark], np.zeros(count, np.int64), 1.0)
    pixels = picture.reshape(count, strokes.width, strokes.width)
    pixels = pixels[:, strokes.pad : -strokes.pad, strokes.pad : -strokes.pad]
    tips = np.stack(np.divmod(place, strokes.width), axis=-1) - strokes.pad
    discs = np.stack(np.divmod(marks, strokes.width), axis=-1) - strokes.pad
    return _stretch(pixels), labels.astype(np.uint8), discs, tips


def _add_distractors(
    picture: np.ndarray, board: _Board, scene: Scene, random: np.random.BitGenerator
) -> None:
    """Draw one short snake into each image in which one is found."""
    strokes = board.strokes
    waiting = np.arange(len(picture) // board.area)
    for _ in range(DISTRACTOR_TRIALS):
        rows, place, direction = _free_places(board, waiting, random)
        saved = board.maps[rows]
        snakes = _start(strokes, place, direction, scene.distractor_length)
        alive = np.arange(len(rows))
        for length in range(1, scene.distractor_length):
            snakes.length = length
            alive = snakes.grow(board, alive, random)
        board.add(snakes.place[alive, -1], snakes.direction[alive, -1])
        for stroke in range(scene.distractor_length):
            at, heading = snakes.place[alive, stroke], snakes.direction[alive, stroke]
            _paint(picture, strokes.light, at, heading, scene.distractor_contrast)
        failed = np.setdiff1d(np.arange(len(rows)), alive)
        board.maps[rows[failed]] = saved[failed]
        waiting = np.setdiff1d(waiting, rows[alive])
        if not len(waiting):
            return


def _free_places(
    board: _Board, rows: np.ndarray, random: np.random.BitGenerator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw a direction for each of ``rows`` and a place at which a first stroke of it fits.

    Returns:
        The rows that have one, the place in the flat maps, the direction; (N,) each.
    """
    strokes, shape = board.strokes, (len(rows), PLACES)
    direction = _below(FIRST_DIRECTIONS, random, len(rows))
    row = _below(strokes.size, random, len(rows) * PLACES).reshape(shape)
    column = _below(strokes.size, random, len(rows) * PLACES).reshape(shape)
    starts = strokes.starts[direction]
    rows, direction = rows[starts], direction[starts]
    tip = np.stack([row[starts], column[starts]], axis=-1)  # (N, places, 2)
    place = strokes.flat(tip[..., 0], tip[..., 1]) + (rows * board.area)[:, None]
    room = strokes.room[direction] @ np.array([strokes.width, 1])
    # One pixel first: most places are taken there already.
    left, which = np.nonzero(board.occupied.take(place + room[:, :1]) <= OCCUPIED)
    taken = board.occupied.take(room[left] + place[left, which][:, None])
    fits = np.zeros(place.shape, bool)
    fits[left, which] = taken.max(axis=1) <= OCCUPIED
    fits &= strokes.inside(tip + strokes.head[direction][:, None])
    chosen = fits.argmax(axis=1)
    some = np.flatnonzero(fits.any(axis=1))
    return rows[some], place[some, chosen[some]], direction[some]


def _draw(maps: np.ndarray, stamp: Stamp, places: np.ndarray, directions: np.ndarray) -> None:
    """Brighten the flat ``maps`` by one stamp each: the maximum of both."""
    pixels = stamp.offsets[directions] + places[:, None]
    maps[pixels] = np.maximum(maps.take(pixels), stamp.values[directions])


def _paint(
    picture: np.ndarray, stamp: Stamp, places: np.ndarray, directions: np.ndarray, contrast: float
) -> None:
    """Do the same with the int32 ``picture``, in units of LIGHT_ONE."""
    values = stamp.values.astype(np.int32) * round(contrast * LIGHT_ONE)
    _draw(picture, Stamp(stamp.offsets, values), places, directions)


def _stretch(pixels: np.ndarray) -> np.ndarray:
    """Return each image with its darkest pixel at 0 and its brightest at 255."""
    values = pixels.astype(np.int64)
    low = values.min(axis=(1, 2), keepdims=True)
    span = np.maximum(values.max(axis=(1, 2), keepdims=True) - low, 1)
    return (((values - low) * 255 + span // 2) // span).astype(np.uint8)


def _below(
    bound: int | np.ndarray, random: np.random.BitGenerator, count: int | None = None
) -> np.ndarray:
    """Return int64 uniform in [0, bound), one for each bound; bounds are below 2^32.

    Taken raw from the bit generator, whose stream NumPy promises never to change.
    """
    number = len(bound) if isinstance(bound, np.ndarray) else count
    words = np.asarray(random.random_raw(number), dtype=np.uint64) >> np.uint64(32)
    product = words * np.asarray(bound, dtype=np.uint64)
    return (product >> np.uint64(32)).astype(np.int64)
