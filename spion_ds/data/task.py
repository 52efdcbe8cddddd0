"""What the trainer knows of a task: its configuration, its vocabulary, its data, its own losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from spion_ds.data.storage.cache import Dataset, Split

# ``(input_ids (B, L), keys (B,) int32)`` → ids of the same shape and dtype; keys as from
# ``sample_keys``.
Augmentation = Callable[[np.ndarray, Tensor], np.ndarray]


@dataclass(frozen=True)
class TokenTargets:
    """Targets of single tokens, beside a sample's label.

    Attributes:
        values: ``(input_ids (B, L))`` returns the targets (B, L), -1 where a token has none.
        loss: ``(logits (B, L, C), values (B, L))`` returns the loss () in nats.
    """

    values: Callable[[np.ndarray], np.ndarray]
    loss: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as recipes and the command line call it.
        config_class: dataclass of the task's ``data.*`` keys; its defaults are the published set.
        vocab_size: token ids are below it.
        num_classes: labels are below it.
        prepare: ``(config, root, verify=True)`` returns the Dataset, made under ``root`` if new;
            ``verify`` hashes the user's files and the cache's, for which one rank is enough.
        check_source: ``(config)`` raises DataError if files of the user's are missing, truncated
            or of another format; quick, and writes nothing.
        baselines: ``(train, split)`` returns accuracies in [0, 1] of trivial readers, by name.
        documents: sequences of a sample, 1 or 2.
        padded: whether inputs may be shorter than the model's length; pixels always fill it.
        brackets: the first and the last token id that opens a bracket, and the one that closes it;
            None where there are none.
        encode: ``(text, config)`` returns the token ids of one input, cut where the task's data
            is; raises DataError. None: inputs come as token ids alone.
        augmentation: ``(config)`` returns what ``training.augment`` does to inputs; None where
            there is nothing that keeps the label.
        token_targets: what ``model.subexpression_loss`` learns from, None where there is nothing.
        check_samples: ``(dataset, used)`` raises unless the training split can be read as the keys
            in ``used`` need it; each key of the run has its value and the value that turns it off.
    """

    name: str
    config_class: type[Any]
    vocab_size: int
    num_classes: int
    prepare: Callable[..., Dataset]
    check_source: Callable[[Any], None]
    baselines: Callable[[Split, Split], dict[str, float]]
    documents: int = 1
    padded: bool = True
    brackets: tuple[int, int, int] | None = None
    encode: Callable[[str, Any], np.ndarray] | None = None
    augmentation: Callable[[Any], Augmentation] | None = None
    token_targets: TokenTargets | None = None
    check_samples: Callable[[Dataset, Mapping[str, tuple[Any, Any]]], None] | None = None
