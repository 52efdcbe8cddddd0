"""The tasks: for each its configuration, its vocabulary, and how its data is prepared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from spion_ds.data import image, listops, pathfinder, retrieval, text
from spion_ds.data.baselines import majority_only
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
        prepare: ``(config, root, verify=True)`` returns the Dataset, made under ``root`` if new.
        check_source: ``(config)`` raises DataError if files of the user's are missing, truncated
            or of another format; quick, and writes nothing.
        baselines: ``(train, split)`` returns accuracies in [0, 1] of trivial readers, by name.
        documents: sequences of a sample, 1 or 2.
        padded: whether inputs may be shorter than the model's length; pixels always fill it.
        brackets: the first and the last token id that opens a bracket, and the one that closes it;
            None where there are none.
        encode: ``(text, config)`` returns the token ids of one input, cut where the task's data
            is; raises DataError. None: inputs come as token ids alone.
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


def _task(
    name: str,
    module: Any,
    config_class: type[Any],
    baselines: Callable[[Split, Split], dict[str, float]] = majority_only,
    documents: int = 1,
    padded: bool = True,
) -> Task:
    return Task(
        name=name,
        config_class=config_class,
        vocab_size=module.VOCAB_SIZE,
        num_classes=module.NUM_CLASSES,
        prepare=module.prepare,
        check_source=module.check_source,
        baselines=baselines,
        documents=documents,
        padded=padded,
        brackets=getattr(module, "BRACKETS", None),
        encode=getattr(module, "encode", None),
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task("listops", listops, listops.ListOpsConfig, listops.trivial_baselines),
        _task("image", image, image.ImageConfig, padded=False),
        _task("text", text, text.TextConfig),
        _task("retrieval", retrieval, retrieval.RetrievalConfig, documents=retrieval.DOCUMENTS),
        _task("pathfinder32", pathfinder, pathfinder.PathfinderConfig, padded=False),
        _task("pathfinder128", pathfinder, pathfinder.PathXConfig, padded=False),
    )
}


def get_task(name: str) -> Task:
    """Return the task called ``name``.

    Raises:
        ConfigError: there is none; it lists the known ones.
    """
    if name not in TASKS:
        raise ConfigError(unknown_name("task", name, TASKS))
    return TASKS[name]
