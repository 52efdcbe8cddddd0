"""Synthetic layouts with the shape of SPION's: a diagonal, a few hot columns, random rest."""

from __future__ import annotations

import torch
from torch import Tensor

HOT_COLUMNS = 4


def spion_like_mask(blocks: int, density: float, *, seed: int = 0) -> Tensor:
    """Return an (n, n) bool mask of ``density`` (more only if the diagonal alone is more).

    The diagonal, its neighbours where they take less than a third of the density, HOT_COLUMNS key
    blocks that every query block keeps (fewer entries of one, where the density allows no more),
    and random blocks up to the density.

    Args:
        blocks: n.
        density: share of blocks to keep.
        seed: of the hot columns and the random rest.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.arange(blocks)
    wanted = int(density * blocks * blocks)
    width = 1 if 3 * blocks <= wanted / 3 else 0
    mask = (index[:, None] - index[None, :]).abs() <= width
    hot = torch.zeros_like(mask)
    hot_columns = min(HOT_COLUMNS, max(1, wanted // (3 * blocks)))
    hot[:, torch.randperm(blocks, generator=generator)[:hot_columns]] = True
    for candidates in (hot, torch.ones_like(mask)):
        free = (candidates & ~mask).flatten().nonzero()[:, 0]
        missing = max(0, wanted - int(mask.sum()))
        mask.view(-1)[free[torch.randperm(len(free), generator=generator)[:missing]]] = True
    return mask
