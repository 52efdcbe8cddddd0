"""Rotary positions: queries and keys are turned by angles that grow with their position.

Shape suffixes: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Of the slowest and the fastest angle: the usual constant (arXiv 2104.09864).
_BASE = 10_000.0


def rotations(length: int, head_dim: int, device: torch.device) -> Tensor:
    """Return cosines and sines (2, L, D/2) float32 of position · base^(−2i/D), i = 0 … D/2 − 1."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    position = torch.arange(length, dtype=torch.float32, device=device)
    angle = position[:, None] * _BASE**-exponent
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x_BHLD: Tensor, rotation: Tensor) -> Tensor:
    """Return x with its pairs (i, i + D/2) turned by the angles of ``rotations``.

    The product of a turned query and a turned key depends on the distance of their positions.
    """
    cosine, sine = rotation.to(x_BHLD.dtype)
    first, second = x_BHLD.chunk(2, dim=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.cat(turned, dim=-1)
