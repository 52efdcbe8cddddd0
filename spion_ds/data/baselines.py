"""Accuracies that need no model: what every result is to be compared with."""

from __future__ import annotations

import numpy as np

from spion_ds.data.storage.cache import Split


def majority_baseline(train: Split, split: Split) -> float:
    """Return the accuracy in [0, 1] of always predicting the most frequent label of ``train``."""
    return float((split.labels == np.bincount(train.labels).argmax()).mean())


def majority_only(train: Split, split: Split) -> dict[str, float]:
    """Return the baselines of a task for which no better trivial reader is known, by name."""
    return {"majority class": majority_baseline(train, split)}
