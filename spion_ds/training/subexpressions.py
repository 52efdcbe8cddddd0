"""The values inside ListOps expressions, and the loss of naming them: supervision of every level.

An input says all that its label depends on, so the value of each of its sub-expressions is known
too. Everything runs on the device, in whole numbers. Shape suffixes: B batch, L tokens, C classes.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spion_ds.data import Dataset, Split
from spion_ds.data.listops import is_readable
from spion_ds.data.listops_trees import (
    CLOSE_ID,
    MAX_ID,
    MED_ID,
    MIN_ID,
    NUM_CLASSES,
    PAD_ID,
    is_operator,
)
from spion_ds.errors import ConfigError

# The target of a token that is no operator.
NO_VALUE = -1


def check_readable(dataset: Dataset, key: str, value: object, off: object) -> None:
    """Raise ConfigError if the data are ListOps of another vocabulary than ours.

    Args:
        dataset: of ListOps.
        key, value: of the setting that needs to read expressions.
        off: the value of ``key`` that does not.
    """
    if not is_readable(dataset.train):
        raise ConfigError(
            f"{key} is {value}, but data.source has ListOps in another vocabulary than ours; set "
            f"{key} to {off}, or data.source to 'generate'"
        )


def deepest_node(split: Split) -> int:
    """Return an upper bound of the depth of all nodes: one below the deepest operator.

    It is counted, as files need not keep to data.max_depth, which says how trees are drawn.
    """
    depth = 1
    for start in range(0, len(split), 1024):
        ids = split.input_ids[start : start + 1024]
        steps = is_operator(ids).astype(np.int8) - (ids == CLOSE_ID)
        depth = max(depth, int(steps.cumsum(axis=1, dtype=np.int16).max()) + 1)
    return depth


def depths_and_parents(ids_BL: Tensor, max_depth: int) -> tuple[Tensor, Tensor]:
    """Return the depth of each token, and where the operator stands that it belongs to.

    A closing bracket has its operator's depth and belongs to it; the root, of depth 1, and the
    padding belong to place 0.

    Args:
        ids_BL: (B, L) int64, whole expressions, padded at the end.
        max_depth: of the deepest node; the root has depth 1.

    Returns:
        Two tensors (B, L) int64.
    """
    opens = is_operator(ids_BL)
    closes = ids_BL == CLOSE_ID
    place = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
    level = (opens.int() - closes.int()).cumsum(1)  # operators that are open after the token
    around = level - opens.int() + closes.int()  # of the operator that it belongs to
    parent = torch.zeros_like(place)
    for depth in range(1, max_depth):
        last_open = torch.where(opens & (level == depth), place, 0).cummax(1).values
        parent = torch.where((around == depth) & (ids_BL != PAD_ID), last_open, parent)
    return around + (~closes).int(), parent


def subexpression_values(ids_BL: Tensor, max_depth: int) -> Tensor:
    """Return the value of each operator's sub-expression at the operator, else ``NO_VALUE``.

    Args:
        ids_BL: (B, L) int64, whole expressions, padded at the end.
        max_depth: of the deepest node; the root has depth 1.

    Returns:
        (B, L) int64, 0 to 9 where the token is an operator. At place 0 it is the label.
    """
    depth, parent = depths_and_parents(ids_BL, max_depth)
    operators = is_operator(ids_BL)
    nodes = (ids_BL != PAD_ID) & (ids_BL != CLOSE_ID)
    value = (ids_BL - 1).clamp(0, NUM_CLASSES - 1)  # a digit's; an operator's come below
    counts = torch.zeros(
        len(ids_BL), ids_BL.shape[1] * NUM_CLASSES, dtype=torch.int32, device=ids_BL.device
    )
    for level in range(max_depth, 1, -1):  # from the deepest up: an operator needs its operands
        operands = (nodes & (depth == level)).int()
        counts.scatter_add_(1, parent * NUM_CLASSES + value, operands)
        found = _apply(ids_BL, counts.unflatten(1, (-1, NUM_CLASSES)))
        value = torch.where(operators & (depth == level - 1), found, value)
    return torch.where(operators, value, NO_VALUE)


def _apply(ids_BL: Tensor, counts_BLC: Tensor) -> Tensor:
    """Return the (B, L) values of operators, given how many operands have each value."""
    up_to = counts_BLC.cumsum(2)  # operands of at most each value
    number = up_to[:, :, -1:]

    def ordered(rank: Tensor) -> Tensor:
        """Return the operand of a rank, from 0: so many values have too few operands up to them."""
        return (up_to <= rank).sum(2)

    lower, upper = ordered((number - 1) // 2), ordered(number // 2)
    digits = torch.arange(NUM_CLASSES, device=ids_BL.device)
    value = (counts_BLC * digits).sum(2) % 10
    value = torch.where(ids_BL == MED_ID, (lower + upper) // 2, value)
    value = torch.where(ids_BL == MAX_ID, ordered(number - 1), value)
    return torch.where(ids_BL == MIN_ID, ordered(torch.zeros_like(number)), value)


def subexpression_loss(logits_BLC: Tensor, values_BL: Tensor) -> Tensor:
    """Return the cross-entropy () of the operators' values, in nats.

    The mean over samples of the mean over a sample's operators, so that it does not depend on how
    a batch is split.
    """
    each = F.cross_entropy(
        logits_BLC.float().flatten(0, 1),
        values_BL.flatten(),
        ignore_index=NO_VALUE,
        reduction="none",
    )
    operators = (values_BL != NO_VALUE).to(each.dtype)
    return (each.view_as(operators).sum(1) / operators.sum(1).clamp(min=1.0)).mean()
