"""Attention maps and block masks as pictures for TensorBoard."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE = 384
# Of each, where a layer has a picture a head.
_HEAD_SIDE = 192
_GAP = 4
# Dark blue over teal to light yellow: lightness rises evenly, so it also reads in grey.
_RAMP = np.array(
    [[13, 8, 60], [40, 62, 132], [32, 128, 141], [108, 196, 110], [250, 240, 160]], dtype=np.float64
)


def map_picture(attention: Tensor) -> np.ndarray:
    """Return a map as RGB uint8; the square root makes weak entries visible.

    Args:
        attention: (L, L): a picture (side, side, 3). Or (heads, L, L): a picture a head, row by
            row, each with its own largest entry as the lightest.
    """
    if attention.dim() == 3:
        return _tile([_map(head, _HEAD_SIDE) for head in attention])
    return _map(attention, _SIDE)


def mask_picture(mask: Tensor) -> np.ndarray:
    """Return a block mask as RGB uint8; kept blocks are light.

    Args:
        mask: (n, n) bool: a picture (side, side, 3). Or (heads, n, n): a picture a head, row by
            row; with many blocks lightness is the share that is kept of a few.
    """
    values = mask.detach().to("cpu", torch.float64)
    if values.dim() == 3:
        side = min(_HEAD_SIDE, values.shape[-1])
        heads = F.adaptive_avg_pool2d(values[:, None], side)[:, 0]
        return _tile([_enlarge(colour(head.numpy()), _HEAD_SIDE) for head in heads])
    return _enlarge(colour(values.numpy()), _SIDE)


def colour(values: np.ndarray) -> np.ndarray:
    """Return values of 0 to 1 as RGB, uint8, with a last dimension of 3."""
    place = np.clip(values, 0.0, 1.0) * (len(_RAMP) - 1)
    channels = [np.interp(place, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _map(attention: Tensor, side: int) -> np.ndarray:
    pooled = min(side, attention.shape[-1])
    # Where the map is: its picture is a small part of it.
    values = F.adaptive_avg_pool2d(attention.detach().float()[None, None], pooled)[0, 0]
    values = values.sqrt().cpu()
    return _enlarge(colour((values / values.max().clamp(min=1e-12)).numpy()), side)


def _tile(pictures: list[np.ndarray]) -> np.ndarray:
    """Return square pictures of one size side by side, in about as many rows as columns."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows, side = -(-len(pictures) // columns), pictures[0].shape[0]
    step = side + _GAP
    whole = np.full((rows * step - _GAP, columns * step - _GAP, 3), 255, dtype=np.uint8)
    for number, picture in enumerate(pictures):
        top, left = step * (number // columns), step * (number % columns)
        whole[top : top + side, left : left + side] = picture
    return whole


def _enlarge(picture: np.ndarray, side: int) -> np.ndarray:
    factor = max(1, side // picture.shape[0])
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
