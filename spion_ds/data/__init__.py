"""The tasks: for each its configuration, its vocabulary, and how its data is prepared."""

from spion_ds.data.storage.cache import Dataset, Split
from spion_ds.data.task import Task
from spion_ds.data.tasks import TASKS, get_task

__all__ = ["TASKS", "Dataset", "Split", "Task", "get_task"]
