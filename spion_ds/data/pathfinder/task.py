"""The Pathfinder tasks of the Long Range Arena: are the two discs on the same dashed path?

Generates images of 32×32 or 128×128 (Path-X) pixels, or reads the official ones.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np
from tqdm import tqdm

from spion_ds.data.pathfinder.official import (
    check_official,
    official_images,
    official_metadata,
    read_image,
)
from spion_ds.data.pathfinder.snakes import Scene, draw_images
from spion_ds.data.pathfinder.strokes import Strokes, make_strokes
from spion_ds.data.storage.cache import (
    SPLITS,
    Dataset,
    cache_folder,
    create_split,
    prepare_cache,
    temporary_path,
)
from spion_ds.data.storage.processes import map_in_processes
from spion_ds.data.storage.skyformer import Pickles
from spion_ds.data.storage.sources import prepare_from_files
from spion_ds.data.storage.threads import map_in_threads
from spion_ds.errors import ConfigError, DataError
from spion_ds.settings import require

GENERATE = "generate"
NUM_CLASSES = 2
VOCAB_SIZE = 256  # grey levels: the token is the pixel
# Part of the cache's name: raise it when the same configuration gives other images.
GENERATOR_VERSION = 2
# The same of official files: raise it when the same files give other tokens.
OFFICIAL_VERSION = 1
# Of strokes to discs; more would not fit into the 32 bits that images are painted in.
MAX_CONTRAST = 100
# Images of a shard: what one random stream makes, and what an interruption loses at most of a core.
SHARD_IMAGES = 250
# Shares of the official images, which come in one piece.
OFFICIAL_SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


@dataclass(frozen=True)
class PathfinderConfig:
    """What the data is made of; the defaults are the published 32×32 set.

    Attributes:
        source: ``"generate"``, or a folder with the official images or Skyformer's pickles.
        image_size: pixels on a side; a sample has their square of tokens.
        train: generated images of the training split; files bring their own number.
        validation: the same for the validation split.
        test: the same for the test split.
        seed: where the generator's random streams start.
        padding: pixels at the edge that stay empty.
        margins: clear distances between strokes, one of them for each image.
        paddle_length: pixels of a stroke.
        paddle_thickness: its width in pixels.
        antialias: how much finer strokes and discs are drawn; times the thickness a whole number.
        seed_distance: pixels between the first ends of the two snakes.
        marker_radius: of the discs, in pixels.
        contour_length: strokes of each of the two snakes.
        train_contour_lengths: instead of it in the training split, one after the other, shard by
            shard of generated images: short contours teach what a contour is. Empty: none. Files
            bring their own, whatever it says.
        continuity: how straight snakes go on, from 1 up: a turn of 90°/continuity is the sharpest.
        distractors: short snakes beside the two.
        distractor_length: strokes of one.
        contrast: brightness of the two snakes' strokes, above 0; discs have 1, and the brightest
            pixel of an image becomes 255.
        distractor_contrast: the same of the short snakes.
    """

    source: str = GENERATE
    image_size: int = 32
    train: int = 160_000
    validation: int = 20_000
    test: int = 20_000
    seed: int = 0
    padding: int = 1
    margins: tuple[int, ...] = (1,)
    paddle_length: int = 2
    paddle_thickness: float = 0.5
    antialias: int = 2
    seed_distance: int = 7
    marker_radius: float = 1.5
    contour_length: int = 14
    train_contour_lengths: tuple[int, ...] = ()
    continuity: float = 1.0
    distractors: int = 5
    distractor_length: int = 4
    contrast: float = 1.5
    distractor_contrast: float = 2.0

    task: ClassVar[str] = "pathfinder32"

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample: its pixels, row by row."""
        return self.image_size**2

    def validate(self) -> None:
        """Raise ConfigError for the first value that is not allowed."""
        require(bool(self.source), "data.source", self.source, f"{GENERATE!r} or a folder")
        lowest = {"seed": 0, "distractors": 0, "contour_length": 2}
        for field in fields(self):
            value, low = getattr(self, field.name), lowest.get(field.name, 1)
            if field.type == "int":
                require(value >= low, f"data.{field.name}", value, f"a whole number from {low} up")
        require(
            len(self.margins) > 0 and min(self.margins) >= 1,
            "data.margins",
            self.margins,
            "whole numbers from 1 up",
        )
        require(
            min(self.train_contour_lengths, default=2) >= 2,
            "data.train_contour_lengths",
            self.train_contour_lengths,
            "whole numbers from 2 up, or [] for data.contour_length alone",
        )
        thick = self.paddle_thickness * self.antialias
        require(
            thick == round(thick) >= 1,
            "data.paddle_thickness",
            self.paddle_thickness,
            f"a whole multiple of 1/data.antialias = {1 / self.antialias:g}",
        )
        require(self.marker_radius > 0, "data.marker_radius", self.marker_radius, "above 0")
        require(self.continuity >= 1, "data.continuity", self.continuity, "from 1 up")
        for name in ("contrast", "distractor_contrast"):
            value = getattr(self, name)
            require(
                0 < value <= MAX_CONTRAST, f"data.{name}", value, f"above 0, up to {MAX_CONTRAST}"
            )
        least = 4 * self.seed_distance + self.paddle_length + 1
        require(
            self.source != GENERATE or self.image_size >= least,
            "data.image_size",
            self.image_size,
            f"from 4 · data.seed_distance + data.paddle_length + 1 = {least} up",
        )


@dataclass(frozen=True)
class PathXConfig(PathfinderConfig):
    """The same with the published values of 128×128, called Path-X."""

    image_size: int = 128
    margins: tuple[int, ...] = (2, 3)
    paddle_length: int = 5
    paddle_thickness: float = 1.5
    seed_distance: int = 20
    marker_radius: float = 3.0
    continuity: float = 1.8
    distractors: int = 8
    contrast: float = 0.9
    distractor_contrast: float = 0.9

    task: ClassVar[str] = "pathfinder128"


def prepare(config: PathfinderConfig, root: Path, verify: bool = True) -> Dataset:
    """Return the data of ``config``, generating or converting it under ``root`` if it is new.

    A generation that is interrupted goes on from the shards that it had finished.

    Args:
        config: what the data is made of.
        root: the folder of all dataset caches.
        verify: read the user's files and compare the checksums of the cache; one rank of a run is
            enough, before the others.

    Raises:
        ConfigError: a value of ``config`` is not allowed, or allows no images.
        DataError: an official file or the cache is missing, damaged or of another format, or a
            process that draws images was ended from outside.
    """
    config.validate()
    if config.source == GENERATE:
        parameters = {**asdict(config), "margins": list(config.margins)}
        lengths = parameters.pop("train_contour_lengths")
        if lengths:  # without, the images are those of caches from before there was the key
            parameters["train_contour_lengths"] = list(lengths)
        parameters["generator_version"] = GENERATOR_VERSION
        folder = cache_folder(root, config.task, parameters)
        shards = folder.with_name(f"{folder.name}.shards")
        dataset = prepare_cache(
            root, config.task, parameters, lambda place: _generate(config, place, shards), verify
        )
        shutil.rmtree(shards, ignore_errors=True)  # they are in the cache now
        return dataset
    pickles = _pickles(config)
    if paths := pickles.paths(config.source):
        return pickles.prepare(paths, config.sequence_length, root, verify)
    metadata = official_metadata(config.source, config.image_size)
    images = official_images(metadata)
    folder = metadata[0].parent.parent
    files = [*metadata, *(path for path, _ in images)]
    return prepare_from_files(
        root,
        config.task,
        {os.path.relpath(path, folder): path for path in files},
        {"image_size": config.image_size, "version": OFFICIAL_VERSION},
        lambda place: _convert(config, images, place),
        verify,
    )


def check_source(config: PathfinderConfig) -> None:
    """Look at the user's files; write nothing.

    Raises:
        DataError: one is missing or of another format.
    """
    if config.source != GENERATE and not _pickles(config).paths(config.source):
        check_official(config.source, config.image_size)


def draw_shard(config: PathfinderConfig, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the images of one shard, a function of the arguments alone.

    Returns:
        (SHARD_IMAGES, image_size²) uint8 pixels, (SHARD_IMAGES,) uint8 labels.
    """
    random = np.random.PCG64(np.random.SeedSequence(config.seed, spawn_key=(number,)))
    scene = Scene(
        config.seed_distance,
        _contour_length(config, number),
        config.distractors,
        config.distractor_length,
        config.marker_radius,
        config.antialias,
        config.contrast,
        config.distractor_contrast,
    )
    pixels = np.empty((SHARD_IMAGES, config.sequence_length), np.uint8)
    labels = np.empty(SHARD_IMAGES, np.uint8)
    words = np.asarray(random.random_raw(SHARD_IMAGES), np.uint64)
    margin_of = (words >> np.uint64(32)) % np.uint64(len(config.margins))
    for index in range(len(config.margins)):
        rows = np.flatnonzero(margin_of == index)
        if len(rows):
            images = draw_images(_strokes(config, index), scene, len(rows), random)
            pixels[rows] = images.pixels.reshape(len(rows), -1)
            labels[rows] = images.labels
    return pixels, labels


def _contour_length(config: PathfinderConfig, number: int) -> int:
    """Return the strokes of each of the two snakes in a shard."""
    lengths = config.train_contour_lengths
    only_training = number < config.train // SHARD_IMAGES
    return lengths[number % len(lengths)] if lengths and only_training else config.contour_length


@functools.lru_cache(maxsize=8)
def _strokes(config: PathfinderConfig, margin: int) -> Strokes:
    strokes = make_strokes(
        config.image_size,
        config.padding,
        config.margins[margin],
        config.paddle_length,
        config.paddle_thickness,
        config.antialias,
        config.continuity,
    )
    if not strokes.starts.any():
        raise ConfigError(
            f"no snake can start with strokes of data.paddle_length {config.paddle_length} and "
            f"data.paddle_thickness {config.paddle_thickness} at margin {config.margins[margin]}; "
            "allowed: longer or thicker ones, or data.margins from 2 up"
        )
    return strokes


def _generate(config: PathfinderConfig, folder: Path, shards: Path) -> None:
    for index in range(len(config.margins)):
        _strokes(config, index)  # what they refuse is said before work starts
    shards.mkdir(parents=True, exist_ok=True)
    sizes = {name: getattr(config, name) for name in SPLITS}
    splits = {
        name: create_split(folder, name, size, config.sequence_length)
        for name, size in sizes.items()
    }
    ids = [split.input_ids for split in splits.values()]
    labels = [split.labels for split in splits.values()]
    for split in splits.values():
        split.lengths[:] = config.sequence_length
    total = sum(sizes.values())
    numbers = range(math.ceil(total / SHARD_IMAGES))
    with tqdm(total=total, desc=f"generating {config.task}", unit=" images") as progress:
        work = functools.partial(_shard, config, shards)
        with contextlib.closing(map_in_processes(work, numbers)) as drawn:
            for number, (pixels, answers) in enumerate(drawn):
                first = number * SHARD_IMAGES
                _scatter(ids, first, pixels)
                _scatter(labels, first, answers)
                progress.update(min(SHARD_IMAGES, total - first))


def _scatter(arrays: list[np.ndarray], first: int, rows: np.ndarray) -> None:
    """Write ``rows`` from row ``first`` on into the arrays as if they were one; drop the rest."""
    for array in arrays:
        start, stop = min(first, len(array)), min(first + len(rows), len(array))
        array[start:stop] = rows[: stop - start]
        first, rows = max(0, first - len(array)), rows[stop - start :]


def _shard(config: PathfinderConfig, folder: Path, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a shard, from its file if an interrupted run left one."""
    path = folder / f"{number:06}.npz"
    kept = _read_shard(path, config.sequence_length)
    if kept is not None:
        return kept
    pixels, labels = draw_shard(config, number)
    temporary = Path(f"{temporary_path(folder.with_suffix(''))}.npz")
    try:
        np.savez_compressed(temporary, pixels=pixels, labels=labels)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    return pixels, labels


def _read_shard(path: Path, sequence_length: int) -> tuple[np.ndarray, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            pixels, labels = arrays["pixels"], arrays["labels"]
    except Exception:  # cut short when the machine went down: it is drawn again
        return None
    fits = pixels.shape == (SHARD_IMAGES, sequence_length) and labels.shape == (SHARD_IMAGES,)
    return (pixels, labels) if fits and pixels.dtype == labels.dtype == np.uint8 else None


def _pickles(config: PathfinderConfig) -> Pickles:
    stem = f"lra-{config.task}-curv_contour_length_14"
    return Pickles(config.task, stem, VOCAB_SIZE, NUM_CLASSES, padded=False)


def _convert(config: PathfinderConfig, images: list[tuple[Path, int]], folder: Path) -> None:
    if len(images) < 10:
        raise DataError(
            f"data.source: {config.source} has {len(images)} images, too few for three splits; "
            "unpack the official files again"
        )
    bounds = np.cumsum([0, *(round(share * len(images)) for share in OFFICIAL_SHARES.values())])
    bounds[-1] = len(images)
    for name, first, last in zip(OFFICIAL_SHARES, bounds, bounds[1:], strict=False):
        part = images[first:last]
        split = create_split(folder, name, len(part), config.sequence_length)
        split.lengths[:] = config.sequence_length
        split.labels[:] = [label for _, label in part]
        pixels = map_in_threads(lambda image: read_image(image[0], config.image_size), part)
        shown = tqdm(pixels, total=len(part), desc=f"reading {config.task} {name}", unit=" images")
        for row, image in enumerate(shown):
            split.input_ids[row] = image
