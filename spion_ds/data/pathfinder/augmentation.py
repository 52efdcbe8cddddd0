"""Pathfinder's augmentation: flips and turns, a function of seed, step and sample.

NumPy does it where the samples are read, on a GPU's host ahead of use. Shape suffixes: B batch,
L tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from spion_ds.data.task import Augmentation
from spion_ds.random_bits import combine


def augmentation(data: Any) -> Augmentation:
    """Return the augmentation of images of ``data.image_size``."""
    return lambda ids, keys: flip_and_turn(ids, keys, data.image_size)


def flip_and_turn(ids_BL: np.ndarray, keys: Tensor, side: int) -> np.ndarray:
    """Return square images, each in one of its eight flips and quarter turns."""
    images = ids_BL.reshape(-1, side, side)
    which = ((combine(keys, 0) >> 8) & 7).numpy()
    turned = np.empty_like(images)
    for view in range(8):
        seen = np.rot90(images[which == view], view % 4, axes=(1, 2))
        turned[which == view] = seen if view < 4 else seen.swapaxes(1, 2)
    return turned.reshape(ids_BL.shape)
