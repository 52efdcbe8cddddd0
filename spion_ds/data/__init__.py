"""The tasks: for each its configuration, its vocabulary, and how its data is prepared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from spion_ds.data import listops
from spion_ds.data.cache import Dataset, Split
from spion_ds.errors import ConfigError, unknown_name

__all__ = ["TASKS", "Dataset", "Split", "Task", "get_task"]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: as recipes and the command line call it.
        config_class: dataclass of the task's ``data.*`` keys; its defaults are the published set.
        vocab_size: token ids are below it.
        num_classes: labels are below it.
        pad_id: the token id after a sequence's end.
        prepare: ``(config, root, verify=True)`` returns the Dataset, made under ``root`` if new.
        check_source: ``(config)`` raises DataError if files of the user's are missing, truncated
            or of another format; quick, and writes nothing.
        baselines: ``(train, split)`` returns accuracies in [0, 1] of trivial readers, by name.
        documents: sequences of a sample, 1 or 2.
        encode: ``(text)`` returns the token ids of one input; raises DataError. None: inputs come
            as token ids alone.
    """

    name: str
    config_class: type[Any]
    vocab_size: int
    num_classes: int
    pad_id: int
    prepare: Callable[..., Dataset]
    check_source: Callable[[Any], None]
    baselines: Callable[[Split, Split], dict[str, float]]
    documents: int = 1
    encode: Callable[[str], np.ndarray] | None = None


TASKS: dict[str, Task] = {
    "listops": Task(
        name="listops",
        config_class=listops.ListOpsConfig,
        vocab_size=listops.VOCAB_SIZE,
        num_classes=listops.NUM_CLASSES,
        pad_id=listops.PAD_ID,
        prepare=listops.prepare,
        check_source=listops.check_source,
        baselines=listops.trivial_baselines,
        encode=listops.encode,
    ),
}


def get_task(name: str) -> Task:
    """Return the task called ``name``.

    Raises:
        ConfigError: there is none; it lists the known ones.
    """
    if name not in TASKS:
        raise ConfigError(unknown_name("task", name, TASKS))
    return TASKS[name]
