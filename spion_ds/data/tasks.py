"""The tasks that recipes name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spion_ds.data import image, retrieval, text
from spion_ds.data.baselines import majority_only
from spion_ds.data.listops import augmentation as listops_augmentation
from spion_ds.data.listops import subexpressions
from spion_ds.data.listops import task as listops
from spion_ds.data.pathfinder import task as pathfinder
from spion_ds.data.pathfinder.augmentation import augmentation as flips_and_turns
from spion_ds.data.storage.cache import Split
from spion_ds.data.task import Task
from spion_ds.errors import ConfigError, unknown_name


def _task(
    name: str,
    module: Any,
    config_class: type[Any],
    baselines: Callable[[Split, Split], dict[str, float]] = majority_only,
    documents: int = 1,
    padded: bool = True,
    **own: Any,
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
        **own,
    )


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _task(
            "listops",
            listops,
            listops.ListOpsConfig,
            listops.trivial_baselines,
            augmentation=listops_augmentation.augmentation,
            token_targets=subexpressions.TARGETS,
            check_samples=subexpressions.check_readable,
        ),
        _task("image", image, image.ImageConfig, padded=False),
        _task("text", text, text.TextConfig),
        _task("retrieval", retrieval, retrieval.RetrievalConfig, documents=retrieval.DOCUMENTS),
        _task(
            "pathfinder32",
            pathfinder,
            pathfinder.PathfinderConfig,
            padded=False,
            augmentation=flips_and_turns,
        ),
        _task(
            "pathfinder128",
            pathfinder,
            pathfinder.PathXConfig,
            padded=False,
            augmentation=flips_and_turns,
        ),
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
