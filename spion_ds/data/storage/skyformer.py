"""Skyformer's pickles, which the published SPION code reads: lra-<task>.{train,dev,test}.pickle.

Each is a list of {"input_ids_0": ids, "label": label}, with "input_ids_1" where a sample has two
documents. Ids are padded with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spion_ds.data.storage.archives import user_folder
from spion_ds.data.storage.cache import Dataset, create_split
from spion_ds.data.storage.restricted_pickle import load_pickle, whole_numbers
from spion_ds.data.storage.sources import prepare_from_files
from spion_ds.errors import DataError

_SPLITS = {"train": "train", "validation": "dev", "test": "test"}
# Part of the cache's name: raise it when the same files give other tokens.
_VERSION = 1


@dataclass(frozen=True)
class Pickles:
    """What the pickles of a task hold.

    Attributes:
        task: our name of the task.
        stem: their files' name, without split.
        vocab_size: ids are below it.
        num_classes: labels are below it.
        padded: whether zeros at the end are padding; false for pixels.
        documents: of a sample, 1 or 2.
    """

    task: str
    stem: str
    vocab_size: int
    num_classes: int
    padded: bool
    documents: int = 1

    def paths(self, source: str) -> dict[str, Path] | None:
        """Return the file of each split in the folder ``source``; None if the first is not there.

        Raises:
            DataError: another one is missing.
        """
        folder = user_folder(source)
        paths = {ours: folder / f"{self.stem}.{name}.pickle" for ours, name in _SPLITS.items()}
        if not paths["train"].is_file():
            return None
        for path in paths.values():
            if not path.is_file():
                raise DataError(f"data.source: {path} is missing; give the folder with all three")
        return paths

    def prepare(
        self, paths: dict[str, Path], sequence_length: int, root: Path, verify: bool
    ) -> Dataset:
        """Return the pickles' data, converted under ``root`` if it is new.

        Raises:
            DataError: a pickle or the cache is damaged or of another format.
        """

        def build(folder: Path) -> None:
            for split, path in paths.items():
                self._convert(folder, split, path, sequence_length)

        files = {path.name: path for path in paths.values()}
        parameters = {"sequence_length": sequence_length, "version": _VERSION}
        return prepare_from_files(root, self.task, files, parameters, build, verify)

    def _convert(self, folder: Path, name: str, path: Path, sequence_length: int) -> None:
        with path.open("rb") as file:
            samples = load_pickle(file, path)
        if not isinstance(samples, list) or not samples:
            raise DataError(f"{path} is not a list of samples; get the file again")
        split = create_split(
            folder,
            name,
            len(samples),
            sequence_length,
            documents=self.documents,
            dtype="uint8" if self.vocab_size <= 256 else "uint16",
        )
        ids = split.input_ids.reshape(len(samples), self.documents, sequence_length)
        lengths = split.lengths.reshape(len(samples), self.documents)
        for row, sample in enumerate(samples):
            where = f"{path}, sample {row}"
            for document in range(self.documents):
                tokens = self._tokens(sample, f"input_ids_{document}", where, sequence_length)
                ids[row, document, : len(tokens)] = tokens
                lengths[row, document] = len(tokens)
            label = _whole(sample, "label", where, self.num_classes)
            if label.size != 1:
                raise DataError(f"{where} has {label.size} labels; allowed: one")
            split.labels[row] = label.item()

    def _tokens(self, sample: Any, key: str, where: str, sequence_length: int) -> np.ndarray:
        tokens = _whole(sample, key, where, self.vocab_size).reshape(-1)
        if self.padded:
            tokens = tokens[: int(np.flatnonzero(tokens).max(initial=-1)) + 1]
        if len(tokens) > sequence_length:
            raise DataError(
                f"{where}: {len(tokens)} tokens do not fit data.sequence_length "
                f"{sequence_length}; raise it"
            )
        if not self.padded and len(tokens) != sequence_length:
            raise DataError(
                f"{where}: {len(tokens)} pixels; allowed: {sequence_length}, the whole image; the "
                "file belongs to another task"
            )
        return tokens


def _whole(sample: Any, key: str, where: str, bound: int) -> np.ndarray:
    """Return ``sample[key]`` as whole numbers from 0 to bound - 1."""
    value = None
    if isinstance(sample, dict):
        value = sample.get(key, sample.get(key.encode()))
    array = whole_numbers(value)
    if array is None:
        raise DataError(f"{where} has no whole numbers under {key!r}; this is another format")
    if array.size and not 0 <= array.min() <= array.max() < bound:
        raise DataError(
            f"{where}: {key} goes from {array.min()} to {array.max()}; allowed: 0 to {bound - 1}; "
            "the file belongs to another task"
        )
    return array
