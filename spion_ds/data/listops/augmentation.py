"""ListOps' augmentation: operands in another order, a function of seed, step and sample.

NumPy does it where the samples are read, on a GPU's host ahead of use. Shape suffixes: B batch,
L tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from spion_ds.data.listops import levels
from spion_ds.data.task import Augmentation
from spion_ds.random_bits import combine


def augmentation(data: Any) -> Augmentation:
    """Return the augmentation, whatever the task's configuration."""
    return shuffle_operands


def shuffle_operands(ids_BL: np.ndarray, keys: Tensor) -> np.ndarray:
    """Return ListOps expressions with the operands of every operator in another order.

    Args:
        ids_BL: (B, L) uint8, whole expressions, padded at the end.
        keys: (B,) int32.
    """

    def draw(row: np.ndarray, column: np.ndarray) -> np.ndarray:
        bits = combine(keys[torch.from_numpy(row)], torch.from_numpy(column))
        return (bits.long() & 0x7FFFFFFF).numpy()

    return levels.shuffle_operands(ids_BL, draw)
