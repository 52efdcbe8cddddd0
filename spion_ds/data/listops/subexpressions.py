"""The loss of naming the values inside ListOps expressions: supervision of every level.

An input says all that its label depends on, so the value of each of its sub-expressions is known
too (``levels.subexpression_values``). Shape suffixes: B batch, L tokens, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from spion_ds.data.listops.levels import NO_VALUE, first_fault, subexpression_values
from spion_ds.data.listops.task import is_readable
from spion_ds.data.listops.trees import UNKNOWN_ID
from spion_ds.data.storage.cache import Dataset, Split
from spion_ds.data.task import TokenTargets
from spion_ds.errors import ConfigError, DataError


def check_readable(dataset: Dataset, used: Mapping[str, tuple[Any, Any]]) -> None:
    """Read the training split once, if anything in the run reads ListOps expressions.

    Args:
        dataset: the task's data.
        used: of each key that reads expressions its value, and the value that turns it off.

    Raises:
        ConfigError: the data are of another vocabulary than ours.
        DataError: a sample is no expression.
    """
    found = next(((key, *pair) for key, pair in used.items() if pair[0]), None)
    if found is None:
        return
    key, value, off = found
    train = dataset.train
    readable = is_readable(Split(train.input_ids[:20], train.lengths[:20], train.labels[:20]))
    for start in range(0, len(train), 1024):
        ids = train.input_ids[start : start + 1024]
        if not readable or (ids >= UNKNOWN_ID).any():
            raise ConfigError(
                f"{key} is {value}, but data.source has ListOps in another vocabulary than ours; "
                f"set {key} to {off}, or data.source to 'generate'"
            )
        if (fault := first_fault(ids)) is not None:
            raise DataError(
                f"{dataset.folder}: training sample {start + fault[0]} is {fault[1]}, which "
                f"{key} {value} cannot read; delete the folder and run again: if files of yours "
                "are the cause, the line is named"
            )


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


TARGETS = TokenTargets(subexpression_values, subexpression_loss)
