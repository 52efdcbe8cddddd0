"""The ListOps task of the Long Range Arena: nested MIN, MAX, MED and SM of digits; 10 classes.

Generates the published distribution or reads the official files, and scores trivial readers.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spion_ds.data.baselines import majority_baseline
from spion_ds.data.listops.official import (
    OFFICIAL_FILES,
    check_ends,
    encode,
    official_paths,
    parse_official,
)
from spion_ds.data.listops.trees import (
    CLOSE_ID,
    MIN_ID,
    NUM_CLASSES,
    PAD_ID,
    SM_ID,
    UNKNOWN_ID,
    VOCAB_SIZE,
    TreeShape,
    draw_trees,
    evaluate,
    truncated_value,
)
from spion_ds.data.storage.cache import (
    SPLITS,
    Dataset,
    Split,
    create_split,
    prepare_cache,
)
from spion_ds.data.storage.skyformer import Pickles
from spion_ds.data.storage.sources import prepare_from_files
from spion_ds.errors import ConfigError, DataError

__all__ = [
    "NUM_CLASSES",
    "PAD_ID",
    "VOCAB_SIZE",
    "ListOpsConfig",
    "check_source",
    "depth_baseline",
    "encode",
    "evaluate",
    "fill_splits",
    "is_readable",
    "majority_baseline",
    "prepare",
    "root_operator_baseline",
    "trivial_baselines",
    "truncated_value",
]

# Part of the cache's name: raise it when the same configuration gives other trees.
GENERATOR_VERSION = 1
# The same of official files: 1 took tokens that ListOps does not have.
OFFICIAL_VERSION = 2
GENERATE = "generate"
BRACKETS = (MIN_ID, SM_ID, CLOSE_ID)
PICKLES = Pickles("listops", "lra-listops", VOCAB_SIZE, NUM_CLASSES, padded=True)
# Draws without a new tree after which a configuration counts as impossible.
BARREN_DRAWS = 2**21


@dataclass(frozen=True)
class ListOpsConfig:
    """What the data is made of; the defaults are the published set.

    Attributes:
        source: "generate", or a folder with the official files (or with ``listops-1000/``) or
            with Skyformer's pickles.
        min_length: generated trees are longer than this many tokens.
        max_length: generated trees are shorter than this many tokens.
        max_depth: depth of the tree; nodes this deep are digits, the root has depth 1.
        max_operands: an operator has 2 to this many operands, both included.
        train: generated sequences of the training split; official files bring their own number.
        validation: the same for the validation split.
        test: the same for the test split.
        sequence_length: sequences are padded to this many tokens.
        seed: where the generator's random streams start.
    """

    source: str = GENERATE
    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_operands: int = 10
    train: int = 96000
    validation: int = 2000
    test: int = 2000
    sequence_length: int = 2048
    seed: int = 0

    def validate(self) -> None:
        """Raise ConfigError for the first value that is not allowed."""
        if not isinstance(self.source, str) or not self.source:
            raise ConfigError(
                f"data.source is {self.source!r}; allowed: {GENERATE!r} or a folder with "
                f"{', '.join(OFFICIAL_FILES.values())}"
            )
        lowest = {"min_length": 0, "seed": 0, "max_depth": 2, "max_operands": 2}
        for field in fields(self):
            if field.name == "source":
                continue
            value, low = getattr(self, field.name), lowest.get(field.name, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ConfigError(
                    f"data.{field.name} is {value!r}; allowed: a whole number from {low} up; "
                    f"the published set has {field.default}"
                )
        if self.source == GENERATE:
            self._validate_lengths()

    def _validate_lengths(self) -> None:
        if self.max_length < self.min_length + 2:
            raise ConfigError(
                f"data.max_length is {self.max_length} with data.min_length {self.min_length}; "
                "both bounds are exclusive, so allowed: data.min_length + 2 and up; "
                "raise one or lower the other"
            )
        if self.sequence_length < self.max_length - 1:
            raise ConfigError(
                f"data.sequence_length is {self.sequence_length}; allowed: at least "
                f"data.max_length - 1 = {self.max_length - 1}, the longest tree; raise it or "
                "lower data.max_length"
            )


def prepare(config: ListOpsConfig, root: Path, verify: bool = True) -> Dataset:
    """Return the data of ``config``, generating or converting it under ``root`` if it is new.

    Args:
        config: what the data is made of.
        root: the folder of all dataset caches.
        verify: read the user's files and compare the checksums of the cache; one rank of a run is
            enough, before the others.

    Raises:
        ConfigError: a value of ``config`` is not allowed, or allows no trees.
        DataError: an official file or the cache is missing, damaged or of another format.
    """
    config.validate()
    if config.source == GENERATE:
        parameters = {**asdict(config), "generator_version": GENERATOR_VERSION}
        return prepare_cache(
            root, "listops", parameters, lambda folder: _build_generated(config, folder), verify
        )
    if pickles := PICKLES.paths(config.source):
        return PICKLES.prepare(pickles, config.sequence_length, root, verify)
    check_source(config)
    paths = official_paths(config.source)
    return prepare_from_files(
        root,
        "listops",
        {path.name: path for path in paths.values()},
        {"sequence_length": config.sequence_length, "version": OFFICIAL_VERSION},
        lambda folder: _build_official(config, paths, folder),
        verify,
    )


def _build_generated(config: ListOpsConfig, folder: Path) -> None:
    splits = [
        create_split(folder, name, getattr(config, name), config.sequence_length) for name in SPLITS
    ]
    fill_splits(config, splits)


def fill_splits(config: ListOpsConfig, splits: Sequence[Split]) -> None:
    """Generate distinct trees into the splits' arrays, one split after the other.

    The result is a function of ``config`` alone, whatever the machine and the NumPy version.

    Raises:
        ConfigError: the configuration allows no trees, or fewer than asked for.
    """
    total = sum(len(split) for split in splits)
    chunks = _distinct_trees(config)
    ids, lengths, labels = next(chunks)
    with tqdm(total=total, desc="generating ListOps", unit=" trees", mininterval=1.0) as progress:
        for split in splits:
            filled = 0
            while filled < len(split):
                if not len(labels):
                    ids, lengths, labels = next(chunks)
                take = min(len(labels), len(split) - filled)
                split.input_ids[filled : filled + take] = ids[:take]
                split.lengths[filled : filled + take] = lengths[:take]
                split.labels[filled : filled + take] = labels[:take]
                ids, lengths, labels = ids[take:], lengths[take:], labels[take:]
                filled += take
                progress.update(take)


def _distinct_trees(config: ListOpsConfig) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield chunks (ids, lengths, labels) of trees that no earlier chunk had, without end."""
    shape = TreeShape(config.min_length, config.max_length, config.max_depth, config.max_operands)
    # Bounds the memory of a chunk, which holds up to max_length nodes a tree.
    draws = max(64, min(4096, 2**23 // config.max_length))
    seen: set[bytes] = set()
    barren = 0
    for ids, lengths, labels in _chunks_in_order(config, shape, draws):
        new = []
        for row, tokens in enumerate(ids):
            digest = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                new.append(row)
        barren = 0 if new else barren + draws
        if barren > BARREN_DRAWS:
            raise ConfigError(
                f"data.min_length {config.min_length}, data.max_length {config.max_length}, "
                f"data.max_depth {config.max_depth} and data.max_operands {config.max_operands} "
                f"gave {len(seen)} distinct trees and then none in {barren} draws; allow more "
                "lengths, depth or operands, or ask for fewer sequences"
            )
        yield ids[new], lengths[new], labels[new]


def _chunks_in_order(
    config: ListOpsConfig, shape: TreeShape, draws: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield chunk 0, 1, … without end, drawn ahead on all cores.

    Threads serve: NumPy works on whole chunks outside the interpreter's lock.
    """

    def draw(chunk: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        stream = np.random.PCG64(np.random.SeedSequence(config.seed, spawn_key=(chunk,)))
        return draw_trees(shape, draws, stream, config.sequence_length)

    workers = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        ahead = deque(pool.submit(draw, chunk) for chunk in range(workers + 1))
        for chunk in itertools.count(workers + 1):
            yield ahead.popleft().result()
            ahead.append(pool.submit(draw, chunk))


def check_source(config: ListOpsConfig) -> None:
    """Look at the official files' presence, first and last lines; write nothing.

    Raises:
        DataError: a file is missing, truncated or of another format.
    """
    if config.source == GENERATE or PICKLES.paths(config.source):
        return
    try:
        for path in official_paths(config.source).values():
            check_ends(path, config.sequence_length)
    except OSError as error:
        raise DataError(f"an official file cannot be read: {error}") from error


def _build_official(config: ListOpsConfig, paths: dict[str, Path], folder: Path) -> None:
    for name in SPLITS:
        lines = parse_official(paths[name], config.sequence_length)
        rows = list(tqdm(lines, desc=f"reading {paths[name].name}", unit=" lines", mininterval=1.0))
        split = create_split(folder, name, len(rows), config.sequence_length)
        for row, (ids, label) in enumerate(rows):
            split.input_ids[row, : len(ids)] = ids
            split.lengths[row] = len(ids)
            split.labels[row] = label


def trivial_baselines(train: Split, split: Split) -> dict[str, float]:
    """Return accuracies in [0, 1] on ``split`` of readers that no model should be proud to match.

    The majority class, the root operator alone, and readers that see 1 to 4 levels of operators
    (left out where the tokens are not ours). What is counted is counted on ``train``.
    """
    accuracies = {
        "majority class": majority_baseline(train, split),
        "root operator only": root_operator_baseline(train, split),
    }
    if is_readable(split):
        for depth in range(1, 5):
            accuracies[f"exact down to depth {depth}"] = depth_baseline(train, split, depth)
    return accuracies


def is_readable(split: Split) -> bool:
    """Return whether the ids mean what ours mean: the first samples' values are their labels."""
    if (split.input_ids == UNKNOWN_ID).any():
        return False
    try:
        rows = zip(split.input_ids[:20], split.labels[:20], strict=True)
        return all(evaluate(ids.tolist()) == label for ids, label in rows)
    except DataError:
        return False


def root_operator_baseline(train: Split, split: Split) -> float:
    """Return the accuracy of predicting each root operator's most frequent label in ``train``."""
    return depth_baseline(train, split, depth=0)


def depth_baseline(train: Split, split: Split, depth: int) -> float:
    """Return the accuracy of predicting ``truncated_value``: all operators deeper are left out.

    Where nothing is left, the prediction is the root operator's most frequent label in ``train``.
    A reader that guesses the operators it cannot see (MIN 0, MAX 9, MED 4) does better: about
    57, 72, 81 and 88 % for depths 1 to 4 of the published set.
    """
    fallback = _labels_by_root(train)
    predictions = fallback[split.input_ids[:, 0]]
    if depth > 0:
        for row, (ids, length) in enumerate(zip(split.input_ids, split.lengths, strict=True)):
            value = truncated_value(np.asarray(ids[:length]), depth)
            if value is not None:
                predictions[row] = value
    return float((split.labels == predictions).mean())


def _labels_by_root(train: Split) -> np.ndarray:
    """Return (VOCAB_SIZE,) the most frequent label by first token, by all if never seen."""
    counts = np.zeros((VOCAB_SIZE, NUM_CLASSES), np.int64)
    np.add.at(counts, (train.input_ids[:, 0], train.labels), 1)
    best = counts.argmax(axis=1)
    best[counts.sum(axis=1) == 0] = counts.sum(axis=0).argmax()
    return best
