"""Attention maps and block masks as pictures for TensorBoard."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_SIDE = 384
# Dark blue over teal to light yellow: lightness rises evenly, so it also reads in grey.
_RAMP = np.array(
    [[13, 8, 60], [40, 62, 132], [32, 128, 141], [108, 196, 110], [250, 240, 160]], dtype=np.float64
)


def map_picture(attention: Tensor) -> np.ndarray:
    """Return a map (L, L) as (side, side, 3) uint8; the square root makes weak entries visible."""
    side = min(_SIDE, attention.shape[-1])
    # Where the map is: its picture is a small part of it.
    values = F.adaptive_avg_pool2d(attention.detach().float()[None, None], side)[0, 0].sqrt().cpu()
    return _enlarge(_colour((values / values.max().clamp(min=1e-12)).numpy()))


def mask_picture(mask: Tensor) -> np.ndarray:
    """Return a block mask as (side, side, 3) uint8; kept blocks are light.

    Args:
        mask: (n, n) bool, or (heads, n, n): then lightness is the share of heads that keep it.
    """
    share = mask.detach().to("cpu", torch.float64)
    return _enlarge(_colour((share.mean(dim=0) if share.dim() == 3 else share).numpy()))


def _colour(values: np.ndarray) -> np.ndarray:
    """Return values of 0 to 1 as RGB, uint8."""
    place = np.clip(values, 0.0, 1.0) * (len(_RAMP) - 1)
    channels = [np.interp(place, np.arange(len(_RAMP)), _RAMP[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _enlarge(picture: np.ndarray) -> np.ndarray:
    factor = max(1, _SIDE // picture.shape[0])
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)
