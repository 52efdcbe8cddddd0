"""Inputs to predict, one a line: a task's own text, or token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from spion_ds.data.task import Task
from spion_ds.errors import DataError

_IDS = re.compile(r"[\d\s,]+")


@dataclass(frozen=True)
class Sample:
    """One input.

    Attributes:
        line: its number, from 1.
        documents: the token ids (tokens,) int64 of each document, without padding.
    """

    line: int
    documents: tuple[np.ndarray, ...]


def read_samples(
    lines: Iterable[str], task: Task, data: Any, sequence_length: int, name: str
) -> Iterator[Sample]:
    """Yield the input of each line; blank lines are passed over.

    A line of whole numbers, with spaces or commas between them, is token ids; any other is text
    in the task's own notation. Where a sample is two documents, a tab stands between them.

    Args:
        lines: the text.
        task: what the inputs are of.
        data: the task's configuration, with which the model was trained.
        sequence_length: the most tokens that the model takes; of images the only number.
        name: of the text, for messages.

    Raises:
        DataError: a line is no input of the task; it names the line.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            parts = line.split("\t", 1) if task.documents == 2 else [line]
            if len(parts) < task.documents:
                raise DataError("one document; allowed: two, with a tab between them")
            sample = Sample(
                number, tuple(_read(part, task, data, sequence_length) for part in parts)
            )
        except DataError as error:
            raise DataError(f"{name}, line {number}: {error}") from None
        yield sample


def _read(text: str, task: Task, data: Any, sequence_length: int) -> np.ndarray:
    """Return the token ids (tokens,) int64 of one document."""
    ids = _encode(text, task, data)
    if not len(ids):
        raise DataError("there is nothing in it")
    if len(ids) > sequence_length:
        raise DataError(
            f"{len(ids)} tokens; allowed: up to {sequence_length}, what the model was trained with"
        )
    if not task.padded and len(ids) != sequence_length:
        raise DataError(f"{len(ids)} tokens; allowed: {sequence_length}, all pixels of an image")
    return ids


def _encode(line: str, task: Task, data: Any) -> np.ndarray:
    if _IDS.fullmatch(line):
        try:
            numbers = [int(word) for word in re.split(r"[\s,]+", line) if word]
        except ValueError:  # Python's limit to the digits of a number
            raise DataError("a number with thousands of digits is no token id") from None
        if max(numbers, default=0) >= task.vocab_size:
            raise DataError(
                f"token id {max(numbers)} is not in the vocabulary of {task.name}; allowed: 0 to "
                f"{task.vocab_size - 1}"
            )
        return np.array(numbers, np.int64)
    if task.encode is None:
        shown = repr(line.strip()[:40])
        raise DataError(
            f"{shown} is not a list of token ids; the task {task.name} takes whole numbers from 0 "
            f"to {task.vocab_size - 1}, with spaces or commas between them"
        )
    return task.encode(line, data).astype(np.int64)
