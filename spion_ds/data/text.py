"""The text task of the Long Range Arena: IMDb reviews, byte by byte; positive or negative."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from spion_ds.data.storage.archives import DOWNLOAD, Archive, open_tar
from spion_ds.data.storage.cache import Dataset, create_split, prepare_cache
from spion_ds.data.storage.skyformer import Pickles
from spion_ds.errors import DataError
from spion_ds.settings import require

NUM_CLASSES = 2
VOCAB_SIZE = 257  # the byte + 1, and padding
ARCHIVE = Archive(
    "aclImdb_v1.tar.gz",
    "7c2ac02c03563afcf9b574c7e56c153a",
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
)
PICKLES = Pickles("text", "lra-text", VOCAB_SIZE, NUM_CLASSES, padded=True)
_MEMBER = re.compile(r"aclImdb/(train|test)/(pos|neg)/(\d+)_\d+\.txt")
# Part of the cache's name: raise it when the same archive gives other tokens.
_VERSION = 1


@dataclass(frozen=True)
class TextConfig:
    """What the data is made of.

    Attributes:
        source: ``"download"``, or a folder with aclImdb_v1.tar.gz or Skyformer's pickles.
        train: reviews for training, of the archive's 25 000.
        validation: others of them for validation; the test split is the archive's own.
        max_length: bytes of a review that are read.
        sequence_length: samples are padded to this many tokens.
        seed: of the order in which training and validation reviews are drawn.
    """

    source: str = DOWNLOAD
    train: int = 22_500
    validation: int = 2_500
    max_length: int = 4000
    sequence_length: int = 4096
    seed: int = 0

    def validate(self) -> None:
        """Raise ConfigError for the first value that is not allowed."""
        require(bool(self.source), "data.source", self.source, f"{DOWNLOAD!r} or a folder")
        for field in fields(self)[1:]:
            value, low = getattr(self, field.name), 0 if field.name == "seed" else 1
            require(value >= low, f"data.{field.name}", value, f"a whole number from {low} up")
        total = self.train + self.validation
        require(total <= 25_000, "data.train + data.validation", total, "at most 25000")
        require(
            self.max_length <= self.sequence_length,
            "data.max_length",
            self.max_length,
            f"at most data.sequence_length, {self.sequence_length}",
        )


def prepare(config: TextConfig, root: Path, verify: bool = True) -> Dataset:
    """Return the data of ``config``, converting it under ``root`` if it is new.

    Raises:
        ConfigError: a value of ``config`` is not allowed.
        DataError: the archive or the cache is missing, damaged or of another format.
    """
    config.validate()
    if paths := PICKLES.paths(config.source):
        return PICKLES.prepare(paths, config.sequence_length, root, verify)
    own = {field.name: getattr(config, field.name) for field in fields(config)[1:]}
    parameters = {"source": ARCHIVE.name, "md5": ARCHIVE.md5, "version": _VERSION, **own}
    return prepare_cache(
        root,
        "text",
        parameters,
        lambda folder: _convert(config, ARCHIVE.find(config.source, root), folder),
        verify,
    )


def check_source(config: TextConfig) -> None:
    """Look for the user's files; write nothing. Raises DataError if they are not there."""
    if config.source != DOWNLOAD and not PICKLES.paths(config.source):
        ARCHIVE.in_folder(config.source)


def byte_ids(text: bytes) -> np.ndarray:
    """Return (len(text),) uint16 token ids: the byte + 1."""
    return np.frombuffer(text, np.uint8).astype(np.uint16) + np.uint16(1)


def encode(text: str, config: Any) -> np.ndarray:
    """Return the token ids (bytes,) uint16 of one text: as much of it as training reads.

    Args:
        text: a review, or a document; its line's end is not part of it.
        config: the task's ``data`` configuration; ``max_length`` bytes are read.
    """
    return byte_ids(text.rstrip("\r\n").encode()[: config.max_length])


def _convert(config: TextConfig, archive: Path, folder: Path) -> None:
    reviews: dict[str, list[tuple[int, int, bytes]]] = {"train": [], "test": []}
    with open_tar(archive) as members:
        for path, file in members:
            if name := _MEMBER.fullmatch(path):
                split, kind, number = name.groups()
                text = file.read(config.max_length)
                reviews[split].append((int(number), int(kind == "pos"), text))
    for split, found in reviews.items():
        wanted = config.train + config.validation if split == "train" else 1
        if len(found) < wanted:
            raise DataError(
                f"{archive} has {len(found)} reviews under aclImdb/{split}/, {wanted} are needed; "
                f"get it from {ARCHIVE.address} again"
            )
        found.sort()  # whatever the archive's order
    # Raw words: NumPy promises never to change that stream.
    words = np.random.PCG64(config.seed).random_raw(len(reviews["train"]))
    order = [reviews["train"][row] for row in np.argsort(words, kind="stable")]
    _write(config, folder, "train", order[: config.train])
    _write(config, folder, "validation", order[-config.validation :])
    _write(config, folder, "test", reviews["test"])


def _write(
    config: TextConfig, folder: Path, name: str, reviews: list[tuple[int, int, bytes]]
) -> None:
    split = create_split(folder, name, len(reviews), config.sequence_length, dtype="uint16")
    for row, (_, label, text) in enumerate(reviews):
        split.input_ids[row, : len(text)] = byte_ids(text)
        split.lengths[row], split.labels[row] = len(text), label
