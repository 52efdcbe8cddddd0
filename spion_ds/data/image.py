"""The image task of the Long Range Arena: CIFAR-10 in grey, pixel by pixel; 10 classes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO

import numpy as np

from spion_ds.data.storage.archives import DOWNLOAD, Archive, open_tar
from spion_ds.data.storage.cache import Dataset, create_split, prepare_cache
from spion_ds.data.storage.restricted_pickle import load_pickle, whole_numbers
from spion_ds.data.storage.skyformer import Pickles
from spion_ds.errors import DataError
from spion_ds.settings import require

NUM_CLASSES = 10
VOCAB_SIZE = 256  # grey levels: the token is the pixel
PIXELS = 32 * 32
ARCHIVE = Archive(
    "cifar-10-python.tar.gz",
    "c58f30108f718f92721af3b95e74349a",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
PICKLES = Pickles("image", "lra-image", VOCAB_SIZE, NUM_CLASSES, padded=False)
# Red, green, blue: what the Long Range Arena's converter to grey uses.
GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)
_TRAIN_FILES = [f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)]
_TEST_FILE = "cifar-10-batches-py/test_batch"
# Part of the cache's name: raise it when the same archive gives other tokens.
_VERSION = 1


@dataclass(frozen=True)
class ImageConfig:
    """What the data is made of.

    Attributes:
        source: ``"download"``, or a folder with cifar-10-python.tar.gz or Skyformer's pickles.
        train: the first images of the archive's 50 000 for training.
        validation: the last of them for validation; the test split is the archive's own.
    """

    source: str = DOWNLOAD
    train: int = 45_000
    validation: int = 5_000

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample: its pixels, row by row."""
        return PIXELS

    def validate(self) -> None:
        """Raise ConfigError for the first value that is not allowed."""
        require(bool(self.source), "data.source", self.source, f"{DOWNLOAD!r} or a folder")
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            require(value >= 1, f"data.{field.name}", value, "a whole number from 1 up")
        total = self.train + self.validation
        require(total <= 50_000, "data.train + data.validation", total, "at most 50000")


def prepare(config: ImageConfig, root: Path, verify: bool = True) -> Dataset:
    """Return the data of ``config``, converting it under ``root`` if it is new.

    Raises:
        ConfigError: a value of ``config`` is not allowed.
        DataError: the archive or the cache is missing, damaged or of another format.
    """
    config.validate()
    if paths := PICKLES.paths(config.source):
        return PICKLES.prepare(paths, PIXELS, root, verify)
    parameters = {
        "source": ARCHIVE.name,
        "md5": ARCHIVE.md5,
        "train": config.train,
        "validation": config.validation,
        "version": _VERSION,
    }
    return prepare_cache(
        root,
        "image",
        parameters,
        lambda folder: _convert(config, ARCHIVE.find(config.source, root), folder),
        verify,
    )


def check_source(config: ImageConfig) -> None:
    """Look for the user's files; write nothing. Raises DataError if they are not there."""
    if config.source != DOWNLOAD and not PICKLES.paths(config.source):
        ARCHIVE.in_folder(config.source)


def to_grey(planes: np.ndarray) -> np.ndarray:
    """Return (N, pixels) uint8 of (N, 3 · pixels) uint8 planes R, G, B, rounded down."""
    channels = planes.reshape(len(planes), 3, -1).astype(np.float64)
    # Rounded first: three products of whole numbers must not fall short by a last bit.
    grey = np.einsum("ncp,c->np", channels, np.array(GREY_WEIGHTS))
    return np.floor(np.round(grey, 6)).astype(np.uint8)


def _convert(config: ImageConfig, archive: Path, folder: Path) -> None:
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    with open_tar(archive) as members:
        for name, file in members:
            if name in (*_TRAIN_FILES, _TEST_FILE):
                found[name] = _read_batch(file, f"{archive}: {name}")
    for name in (*_TRAIN_FILES, _TEST_FILE):
        if name not in found:
            raise DataError(f"{archive} has no {name}; get it from {ARCHIVE.address} again")
    images, labels = (
        np.concatenate(arrays)
        for arrays in zip(*(found[name] for name in _TRAIN_FILES), strict=True)
    )
    if config.train + config.validation > len(images):
        raise DataError(f"{archive} has {len(images)} training images; lower data.train")
    _write(folder, "train", images[: config.train], labels[: config.train])
    _write(folder, "validation", images[-config.validation :], labels[-config.validation :])
    _write(folder, "test", *found[_TEST_FILE])


def _read_batch(file: IO[bytes], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return (N, pixels) grey levels and (N,) labels of one batch file."""
    batch = load_pickle(file, where)
    try:
        planes, labels = batch[b"data"], whole_numbers(batch[b"labels"])
        if labels is None or labels.ndim != 1 or not len(labels):
            raise ValueError("labels that are no list of whole numbers")
        if planes.dtype != np.uint8 or planes.shape != (len(labels), 3 * PIXELS):
            raise ValueError(f"images of {planes.dtype} and shape {planes.shape}")
        if not 0 <= labels.min() <= labels.max() < NUM_CLASSES:
            raise ValueError(f"labels from {labels.min()} to {labels.max()}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where} is not a batch of CIFAR-10 ({error!r})") from error
    return to_grey(planes), labels.astype(np.uint8)


def _write(folder: Path, name: str, images: np.ndarray, labels: np.ndarray) -> None:
    split = create_split(folder, name, len(images), PIXELS)
    split.input_ids[:], split.labels[:] = images, labels
    split.lengths[:] = PIXELS
