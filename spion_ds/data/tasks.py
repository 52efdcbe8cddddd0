"""The tasks that recipes name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from spion_ds.data import image, retrieval, text
from spion_ds.data.baselines import majority_only
from spion_ds.data.listops import augmentation as listops_augmentation
from spion_ds.data.listops import subexpressions
from spion_ds.data.listops import task as listops
from spion_ds.data.pathfinder import task as pathfinder
from spion_ds.data.pathfinder.augmentation import augmentation as flips_and_turns
from spion_ds.data.storage.cache import SPLITS, Dataset, Split
from spion_ds.data.task import Task
from spion_ds.errors import ConfigError, DataError, unknown_name


def _prepare(module: Any, documents: int) -> Callable[..., Dataset]:
    """Return the module's ``prepare``, which checks that the data are what the task says."""

    def prepare(config: Any, root: Path, verify: bool = True) -> Dataset:
        data: Dataset = module.prepare(config, root, verify)
        shape = (*([] if documents == 1 else [documents]), config.sequence_length)
        bounds = {
            "lengths": config.sequence_length + 1,
            "labels": module.NUM_CLASSES,
            "input_ids": module.VOCAB_SIZE,
        }
        for name, split in zip(SPLITS, (data.train, data.validation, data.test), strict=True):
            where = f"{data.folder}: the {name} split has"
            mend = "delete the folder and run again: it is made anew"
            found = split.input_ids.shape[1:]
            if found != shape:
                raise DataError(f"{where} samples of shape {found}, not {shape}; {mend}")
            for array, bound in bounds.items() if verify else ():
                values = getattr(split, array)
                # As unsigned numbers, so that negative ones are too large.
                if values.view(f"u{values.dtype.itemsize}").max() >= bound:
                    raise DataError(f"{where} {array} that are not from 0 to {bound - 1}; {mend}")
        return data

    return prepare


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
        prepare=_prepare(module, documents),
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
