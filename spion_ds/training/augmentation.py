"""Changes of the training inputs that keep the label: a function of seed, step and sample.

Everything runs on the device, in whole numbers. Shape suffixes: B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spion_ds.attention.dropout import combine
from spion_ds.data import Dataset
from spion_ds.data.listops_trees import CLOSE_ID, PAD_ID
from spion_ds.training.subexpressions import check_readable, deepest_node, depths_and_parents

# ``(input_ids (B, L) int64, keys (B,) int32)`` → (B, L) int64; keys as from ``sample_keys``.
Augmentation = Callable[[Tensor, Tensor], Tensor]
AUGMENTED_TASKS = ("listops", "pathfinder32", "pathfinder128")


def make_augmentation(task: str, data: Any, dataset: Dataset) -> Augmentation:
    """Return the augmentation of one of ``AUGMENTED_TASKS``.

    Args:
        task: its name.
        data: its configuration.
        dataset: its data.

    Raises:
        ConfigError: the data are of another vocabulary.
    """
    if task == "listops":
        check_readable(dataset, "training.augment", "true", "false")
        depth = deepest_node(dataset.train)
        return lambda ids, keys: shuffle_operands(ids, keys, depth)
    return lambda ids, keys: flip_and_turn(ids, keys, data.image_size)


def flip_and_turn(ids_BL: Tensor, keys: Tensor, side: int) -> Tensor:
    """Return square images, each in one of its eight flips and quarter turns."""
    pixels = torch.arange(side * side, device=ids_BL.device).view(side, side)
    turns = [pixels.rot90(quarter) for quarter in range(4)]
    views = torch.stack([*turns, *(turn.T for turn in turns)]).flatten(1)  # (8, L)
    which = (combine(keys, 0) >> 8) & 7
    return ids_BL.gather(1, views[which.long()])


def shuffle_operands(ids_BL: Tensor, keys: Tensor, max_depth: int) -> Tensor:
    """Return ListOps expressions with the operands of every operator in another order.

    MIN, MAX, MED and SM do not depend on it. All orders are equally likely.

    Args:
        ids_BL: (B, L) int64, whole expressions, padded at the end.
        keys: (B,) int32.
        max_depth: of the deepest node; the root has depth 1.
    """
    closes = ids_BL == CLOSE_ID
    nodes = (ids_BL != PAD_ID) & ~closes  # an operator or a digit
    place = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
    depth, parent = depths_and_parents(ids_BL, max_depth)
    # From an operator to its bracket; what is none of either is one token.
    spans = torch.where(closes, place - parent + 1, 1)
    size = torch.ones_like(place).scatter_reduce(1, parent, spans, "amax")

    operands = nodes & (place > 0)  # the root is nobody's
    offset = _shuffled_offsets(operands, parent, size, combine(keys[:, None], place))
    new = torch.where(nodes, torch.zeros_like(place), place)
    for level in range(2, max_depth + 1):  # from the root down: a parent's place is known
        moved = new.gather(1, parent) + 1 + offset
        new = torch.where(nodes & (depth == level), moved, new)
    new = torch.where(closes, (new + size - 1).gather(1, parent), new)
    return torch.empty_like(ids_BL).scatter(1, new, ids_BL)


def _shuffled_offsets(operands: Tensor, parent: Tensor, size: Tensor, draws: Tensor) -> Tensor:
    """Return (B, L) how many tokens of its siblings come before an operand, in a random order."""
    # Sorted by parent, then by draw; what is no operand comes last.
    draw = draws.long() & 0x7FFFFFFF
    rank = torch.where(operands, (parent << 31) | draw, torch.iinfo(torch.int64).max)
    order = rank.argsort(dim=1, stable=True)
    sizes = size.gather(1, order)
    before = sizes.cumsum(1) - sizes
    parents = parent.gather(1, order)
    first = torch.ones_like(operands)
    first[:, 1:] = parents[:, 1:] != parents[:, :-1]
    offset = before - torch.where(first, before, 0).cummax(1).values
    return torch.empty_like(offset).scatter(1, order, offset)
