"""Changes of the training inputs that keep the label: a function of seed, step and sample.

NumPy does them where the samples are read, on a GPU's host ahead of use. Shape suffixes: B batch,
L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spion_ds.attention.dropout import combine
from spion_ds.data import listops_levels

# ``(input_ids (B, L), keys (B,) int32)`` → ids of the same shape and dtype; keys as from
# ``sample_keys``.
Augmentation = Callable[[np.ndarray, Tensor], np.ndarray]
AUGMENTED_TASKS = ("listops", "pathfinder32", "pathfinder128")


def make_augmentation(task: str, data: Any) -> Augmentation:
    """Return the augmentation of one of ``AUGMENTED_TASKS``, given its configuration."""
    if task == "listops":
        return shuffle_operands
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


def shuffle_operands(ids_BL: np.ndarray, keys: Tensor) -> np.ndarray:
    """Return ListOps expressions with the operands of every operator in another order.

    Args:
        ids_BL: (B, L) uint8, whole expressions, padded at the end.
        keys: (B,) int32.
    """

    def draw(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        bits = combine(keys[torch.from_numpy(row)], torch.from_numpy(column))
        return (bits.long() & 0x7FFFFFFF).numpy()

    return listops_levels.shuffle_operands(ids_BL, draw)
