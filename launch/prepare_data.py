"""Prepare a task's data and say what is in it: python launch/prepare_data.py --task listops.

Keys of the task's configuration follow as key=value, for instance train=6000 max_length=1000.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from spion_ds.data.storage.cache import Dataset
from spion_ds.data.task import Task
from spion_ds.data.tasks import TASKS, get_task
from spion_ds.distributed.standard_streams import mend_streams
from spion_ds.errors import ConfigError, SpionError, unknown_name
from spion_ds.settings import read_dataclass


def parse_overrides(task: Task, overrides: Sequence[str]) -> Any:
    """Return the task's configuration with ``key=value`` (or ``data.key=value``) overrides.

    Raises:
        ConfigError: no such key, or a value that is not of its type.
        DataError: the user's files are not there.
    """
    known = [field.name for field in fields(task.config_class)]
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.removeprefix("data.")
        if key not in known:
            raise ConfigError(unknown_name("key", f"data.{key}", [f"data.{k}" for k in known]))
        if not equals:
            raise ConfigError(f"data.{key} has no value; write {key}=value")
        try:
            values[key] = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # no such date; [[[[…
            raise ConfigError(f"the value of {override[:80]!r} is not YAML") from error
    config = read_dataclass(task.config_class, values, "data")
    config.validate()
    task.check_source(config)
    return config


def describe(task: Task, dataset: Dataset) -> str:
    """Return lines on where the data is, its sizes, class balance and trivial accuracies."""
    lines = [f"data: {dataset.folder}"]
    for name in ("train", "validation", "test"):
        split = getattr(dataset, name)
        shares = np.bincount(split.labels, minlength=task.num_classes) / len(split)
        balance = " ".join(f"{label}:{share:.1%}" for label, share in enumerate(shares))
        lines.append(
            f"{name}: {len(split)} sequences, lengths {split.lengths.min()} to "
            f"{split.lengths.max()}, mean {split.lengths.mean():.0f}; classes {balance}"
        )
    lines.append("test accuracy of readers that learn next to nothing:")
    for reader, accuracy in task.baselines(dataset.train, dataset.test).items():
        lines.append(f"  {reader:24} {accuracy:6.1%}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the data the command line asks for; return the exit code."""
    mend_streams()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="listops", help=", ".join(TASKS))
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="folder of all caches")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="a key of the task")
    options = parser.parse_args(arguments)

    try:
        task = get_task(options.task)
        config = parse_overrides(task, options.overrides)
        print(describe(task, task.prepare(config, options.data_dir)))
    except (SpionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as batch systems end a job
    sys.exit(main())
