"""What a Pathfinder stroke looks like and where the next may go, tabulated by direction.

A direction is an index: 0 to 359 are the degrees of a snake's first stroke, the rest are the steps
from a pivot to the next stroke's tip. Everything is integer, so that images are the same bits on
every machine. Shapes: D directions, C candidate steps, P pixels of a stamp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

FIRST_DIRECTIONS = 360
# Fixed point of step weights: 1.0 is this much.
WEIGHT_ONE = 2**16
# A stroke must keep clear of pixels that are occupied more than this; two strokes' masks may add
# up to 1.8 in a pixel, as published, where 1.0 is 255.
OCCUPIED = round(0.3 * 255)
CLASH = math.ceil(1.8 * 255)


@dataclass(frozen=True)
class Stamp:
    """Pixels to draw, for each direction.

    Attributes:
        offsets: (D, P) int64 offset from the stroke's tip in a padded flat map; a direction with
            fewer pixels repeats its first.
        values: (D, P) uint8, 255 = full.
    """

    offsets: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Strokes:
    """Tables of one stroke shape with one margin.

    Attributes:
        size: pixels on a side of the image.
        pad: pixels around it in a padded map.
        ring: width of the image's edge that no stroke may touch.
        light: what a stroke adds to the picture, at a contrast of 1.
        mask: what it occupies, the stroke grown by the margin.
        core: the part of the mask that can clash with another.
        head: (360, 2) int64 rows and columns from a first stroke's tip to its other end.
        room: (360, P, 2) int64 rows and columns, from its tip, of pixels that must be free for it.
        starts: (360,) bool, the directions that a first stroke may have.
        behind: (360,) int64 offset from a first stroke's tip to its pivot, a margin behind it.
        advance: (D,) int64 offset from a pivot to the next.
        tips: (D, C) int64 offset from a pivot to the tips that can follow a stroke.
        turns: (D, C) int64 the direction of the stroke that ends there.
        weights: (D, C) int64 the step's weight.
        clearance: (P,) int64 offsets around a tip that must be free.
    """

    size: int
    pad: int
    ring: int
    light: Stamp
    mask: Stamp
    core: Stamp
    head: np.ndarray
    room: np.ndarray
    starts: np.ndarray
    behind: np.ndarray
    advance: np.ndarray
    tips: np.ndarray
    turns: np.ndarray
    weights: np.ndarray
    clearance: np.ndarray

    @property
    def width(self) -> int:
        """Pixels on a side of a padded map."""
        return self.size + 2 * self.pad

    def flat(self, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """Return the index in a padded flat map of an image's pixel."""
        return (row + self.pad) * self.width + column + self.pad

    def inside(self, points: np.ndarray) -> np.ndarray:
        """Return (…) bool, whether (…, 2) rows and columns are in the image."""
        inside = (points >= 0) & (points < self.size)
        return inside[..., 0] & inside[..., 1]


def make_strokes(
    size: int,
    ring: int,
    margin: int,
    length: int,
    thickness: float,
    antialias: int,
    continuity: float,
) -> Strokes:
    """Return the tables of strokes ``length`` pixels long and ``thickness`` wide.

    The next stroke's weight is cos²(min(continuity·δ, π/2)) for a turn of δ; the picture is drawn
    ``antialias`` times finer and scaled down with a Lanczos filter.
    """
    reach = length + math.ceil(thickness) + margin
    pad = reach + length + 2 * margin + 2
    width = size + 2 * pad
    steps = _circle(length + margin)
    turns = np.arctan2(steps[:, 0], steps[:, 1])
    degrees = np.deg2rad(np.arange(FIRST_DIRECTIONS) - 180)
    # A first stroke is drawn from its tail forward, a later one from its tip back.
    drawn = np.concatenate([degrees, turns + np.pi])
    heading = np.concatenate([degrees, turns])

    lines = [_line(angle, length, thickness, reach, antialias) for angle in drawn]
    disc = _disc(margin * antialias)
    light = np.stack([_shrink(line, 2 * reach + 1) for line in lines])
    mask = np.stack([_shrink(_dilate(line, disc), 2 * reach + 1) for line in lines])

    clearance = np.argwhere(_disc(margin)) - margin
    head = _rounded_up(degrees, length)
    room = _room(mask[:FIRST_DIRECTIONS], length + margin)
    behind = head + _rounded_up(degrees + np.pi, length + margin)
    choice, weights = _choices(heading, turns, continuity)
    return Strokes(
        size=size,
        pad=pad,
        ring=ring,
        light=_stamp(light, width),
        mask=_stamp(mask, width),
        core=_stamp(np.where(mask.astype(np.int64) + 255 >= CLASH, mask, 0), width),
        head=head,
        room=room,
        starts=_starts(room),
        behind=_offset(behind, width),
        advance=_offset(_rounded_up(heading, length + 2 * margin), width),
        tips=_offset(steps, width)[choice],
        turns=FIRST_DIRECTIONS + choice,
        weights=weights,
        clearance=_offset(clearance, width),
    )


def disc_stamp(radius: float, antialias: int, width: int) -> Stamp:
    """Return the stamp of a full disc (one direction) in padded maps ``width`` pixels wide."""
    # Beyond the disc there is room for the filter's ripples.
    reach = math.ceil(radius) + 4
    side = np.arange((2 * reach + 1) * antialias) - reach * antialias
    inside = side[:, None] ** 2 + side[None, :] ** 2 <= (radius * antialias) ** 2
    dot = np.where(inside, 255, 0).astype(np.uint8)
    return _stamp(_shrink(dot, 2 * reach + 1)[None], width)


def _room(mask: np.ndarray, reach: int) -> np.ndarray:
    """Return (D, P, 2) pixels that must be free for strokes with (D, side, side) masks.

    Those that a mask takes whole, no further than ``reach``, and, as in the public generator, all a
    pixel further down and to the right; one far up and left where a mask takes none whole.
    """
    centre = mask.shape[1] // 2 - 1
    found = [np.argwhere(picture == 255) - centre for picture in mask]
    found = [pixels[(np.abs(pixels) <= reach).all(axis=1)] for pixels in found]
    found = [pixels if len(pixels) else np.full((1, 2), -reach) for pixels in found]
    size = max(len(pixels) for pixels in found)
    return np.stack([np.resize(pixels, (size, 2)) for pixels in found])


def _starts(room: np.ndarray) -> np.ndarray:
    """Return (D,) bool, whether a first stroke's room reaches into all four quadrants.

    The public generator gives up other directions: at a corner of the image it asks pixels of which
    all are outside.
    """
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    # (D, quadrants, P, 2)
    return (room[:, None] * signs[:, None] >= 0).all(axis=3).any(axis=2).all(axis=1)


def _choices(
    heading: np.ndarray, turns: np.ndarray, continuity: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return (D, C) indices of the steps that can follow each direction, and their weights."""
    delta = np.abs(turns[None, :] - heading[:, None])
    delta = np.minimum(delta, 2 * np.pi - delta)
    cosine = np.cos(np.minimum(delta * continuity, np.pi / 2))
    weights = np.round(np.maximum(cosine, 0.0) ** 2 * WEIGHT_ONE).astype(np.int64)
    # The heaviest first, so that the impossible ones can be left out.
    choice = np.argsort(-weights, axis=1, kind="stable")[:, : int((weights > 0).sum(axis=1).max())]
    return choice, np.take_along_axis(weights, choice, axis=1)


def _line(angle: float, length: int, thickness: float, reach: int, antialias: int) -> np.ndarray:
    """Return a line from the centre outwards, 0 or 255, ``antialias`` times too large."""
    centre = reach * antialias
    row, column = centre + _rounded_up(np.array([angle]), length * antialias)[0]
    picture = Image.new("L", (2 * centre + 1, 2 * centre + 1))
    ends = [(centre, centre), (int(column), int(row))]
    ImageDraw.Draw(picture).line(ends, fill=255, width=round(thickness * antialias))
    return np.asarray(picture)


def _shrink(picture: np.ndarray, side: int) -> np.ndarray:
    """Return (side, side) uint8, scaled down with a Lanczos filter of three lobes."""
    shrunk = Image.fromarray(picture).resize((side, side), Image.Resampling.LANCZOS)
    return np.asarray(shrunk)


def _disc(radius: int) -> np.ndarray:
    """Return (2·radius + 1)² bool."""
    y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
    return x**2 + y**2 <= radius**2


def _dilate(picture: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Return the maximum over a neighbourhood of ``shape``, odd and symmetric."""
    radius = shape.shape[0] // 2
    padded = np.pad(picture, radius)
    grown = np.zeros_like(picture)
    for y, x in zip(*np.nonzero(shape), strict=True):
        np.maximum(grown, padded[y:, x:][: picture.shape[0], : picture.shape[1]], out=grown)
    return grown


def _circle(radius: int) -> np.ndarray:
    """Return (C, 2) distinct pixels on a circle, about one a pixel of its circumference."""
    angles = np.arange(0.0, 360.0, 360.0 / (2 * np.pi * radius)) * (np.pi / 180)
    points = radius * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    return np.unique(np.floor(np.round(points, 9)).astype(np.int64), axis=0)


def _rounded_up(angles: np.ndarray, distance: int) -> np.ndarray:
    """Return (D, 2) int64 rows and columns, rounded up as the public generator rounds."""
    points = distance * np.stack([np.sin(angles), np.cos(angles)], axis=1)
    return np.ceil(np.round(points, 9)).astype(np.int64)


def _offset(yx: np.ndarray, width: int) -> np.ndarray:
    return yx[:, 0] * width + yx[:, 1]


def _stamp(pictures: np.ndarray, width: int) -> Stamp:
    """Return the non-zero pixels of (D, side, side) pictures around their centres."""
    reach = pictures.shape[1] // 2
    pixels = max(1, int((pictures > 0).sum(axis=(1, 2)).max()))
    offsets = np.zeros((len(pictures), pixels), np.int64)
    values = np.zeros((len(pictures), pixels), np.uint8)
    for direction, picture in enumerate(pictures):
        y, x = np.nonzero(picture)
        place = (y - reach) * width + x - reach
        # Repeating a pixel draws it twice, alike: harmless.
        order = np.arange(pixels) % max(1, len(place))
        if len(place):
            offsets[direction], values[direction] = place[order], picture[y, x][order]
    return Stamp(offsets, values)
