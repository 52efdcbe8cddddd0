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
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from spion_ds.data.baselines import majority_baseline
from spion_ds.data.cache import SPLITS, Dataset, Split, create_split, prepare_cache, sha256_of
from spion_ds.data.listops_trees import (
    CLOSE_ID,
    DIGIT_IDS,
    MAX_ID,
    MED_ID,
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
from spion_ds.data.skyformer import Pickles
from spion_ds.errors import ConfigError, DataError, near_matches

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
    "parse_official",
    "prepare",
    "root_operator_baseline",
    "trivial_baselines",
    "truncated_value",
]

# Part of the cache's name: raise it when the same configuration gives other trees.
GENERATOR_VERSION = 1
GENERATE = "generate"
OFFICIAL_FILES = {
    "train": "basic_train.tsv",
    "validation": "basic_val.tsv",
    "test": "basic_test.tsv",
}
PICKLES = Pickles("listops", "lra-listops", VOCAB_SIZE, NUM_CLASSES, padded=True)
# Draws without a new tree after which a configuration counts as impossible.
BARREN_DRAWS = 2**21

_TOKEN_IDS = {b"%d" % (token_id - DIGIT_IDS[0]): token_id for token_id in DIGIT_IDS} | {
    b"[MIN": MIN_ID,
    b"[MAX": MAX_ID,
    b"[MED": MED_ID,
    b"[SM": SM_ID,
    b"]": CLOSE_ID,
}


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
        verify: compare the checksums of the cache; one rank of a run is enough.

    Raises:
        ConfigError: a value of ``config`` is not allowed, or allows no trees.
        DataError: an official file or the cache is missing, damaged or of another format.
    """
    config.validate()
    parameters: dict[str, Any]
    if config.source == GENERATE:
        parameters = {**asdict(config), "generator_version": GENERATOR_VERSION}
        return prepare_cache(
            root, "listops", parameters, lambda folder: _build_generated(config, folder), verify
        )
    if pickles := PICKLES.paths(config.source):
        return PICKLES.prepare(pickles, config.sequence_length, root, verify)
    check_source(config)
    paths = _official_paths(config.source)
    parameters = {
        "source": "official",
        "sha256": {path.name: sha256_of(path) for path in paths.values()},
        "sequence_length": config.sequence_length,
    }
    return prepare_cache(
        root, "listops", parameters, lambda folder: _build_official(config, paths, folder), verify
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
        for path in _official_paths(config.source).values():
            _check_ends(path, config.sequence_length)
    except OSError as error:
        raise DataError(f"an official file cannot be read: {error}") from error


def parse_official(path: Path, sequence_length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (tokens,) uint8 ids and the label 0..9 of each line of an official file.

    Parentheses are dropped; a token that ListOps does not have becomes ``UNKNOWN_ID``.

    Raises:
        DataError: the file is truncated, of another format, or has a sequence longer than
            ``sequence_length``; it names the file and the line.
    """
    with path.open("rb") as file:
        _check_header(path, file)
        number = 1
        for number, line in enumerate(file, start=2):
            yield _parse_line(line, f"{path}, line {number}", sequence_length)
        if number == 1:
            raise _not_official(f"{path}, line 2", "nothing", "the file is truncated")


def _build_official(config: ListOpsConfig, paths: dict[str, Path], folder: Path) -> None:
    for name in SPLITS:
        lines = parse_official(paths[name], config.sequence_length)
        rows = list(tqdm(lines, desc=f"reading {paths[name].name}", unit=" lines", mininterval=1.0))
        split = create_split(folder, name, len(rows), config.sequence_length)
        for row, (ids, label) in enumerate(rows):
            split.input_ids[row, : len(ids)] = ids
            split.lengths[row] = len(ids)
            split.labels[row] = label


def _official_paths(source: str) -> dict[str, Path]:
    """Return the path of each split's file; all exist."""
    folder = Path(source).expanduser()
    names = OFFICIAL_FILES.values()
    if not any((folder / name).exists() for name in names) and (folder / "listops-1000").is_dir():
        folder = folder / "listops-1000"
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"data.source is {source!r}{near_matches(source, [GENERATE])}, but {folder} lacks "
            f"{', '.join(missing)}; give the folder with the three official files of ListOps, "
            f"or {GENERATE!r}, which needs none"
        )
    return {split: folder / name for split, name in OFFICIAL_FILES.items()}


def _not_official(where: str, found: str, hint: str) -> DataError:
    return DataError(
        f"{where}: expected an expression, a tab and its value 0..9, found {found}: {hint}; "
        f"unpack the official file again, or set data.source to {GENERATE!r}"
    )


def _check_header(path: Path, file: BinaryIO) -> None:
    header = file.readline(4096)
    if header.rstrip(b"\r\n") != b"Source\tTarget":
        raise DataError(
            f"{path}, line 1: expected the header 'Source<TAB>Target', found {_shown(header)}; "
            f"unpack the official file again, or set data.source to {GENERATE!r}"
        )


def _check_ends(path: Path, sequence_length: int) -> None:
    with path.open("rb") as file:
        _check_header(path, file)
        first = file.readline()
        if not first:
            raise _not_official(f"{path}, line 2", "nothing", "the file is truncated")
        _parse_line(first, f"{path}, line 2", sequence_length)
        _parse_line(_last_line(file), f"{path}, last line", sequence_length)


def _last_line(file: BinaryIO) -> bytes:
    # Longer than any line of the official files, which are about 10 KB.
    size = file.seek(0, 2)
    file.seek(max(0, size - (1 << 20)))
    return file.readlines()[-1]


def _parse_line(line: bytes, where: str, sequence_length: int) -> tuple[np.ndarray, int]:
    source, tab, target = line.rstrip(b"\r\n").partition(b"\t")
    if not tab:
        raise _not_official(where, f"no tab in {_shown(line)}", "the file is truncated or another")
    if target not in _TOKEN_IDS or _TOKEN_IDS[target] not in DIGIT_IDS:
        raise _not_official(where, f"the value {_shown(target)}", "not a digit")
    if source.count(b"[") != source.count(b"]"):
        raise _not_official(where, "brackets that do not close", "the file is damaged")
    tokens = source.translate(None, delete=b"()").split()
    if not tokens:
        raise _not_official(where, "no expression", "the file is damaged or another")
    if len(tokens) > sequence_length:
        raise DataError(
            f"{where}: {len(tokens)} tokens do not fit data.sequence_length {sequence_length}; "
            "raise it"
        )
    ids = np.array([_TOKEN_IDS.get(token, UNKNOWN_ID) for token in tokens], np.uint8)
    return ids, int(target)


def encode(text: str) -> np.ndarray:
    """Return the token ids (tokens,) uint8 of one expression, e.g. ``[MAX 2 [MIN 7 3 ] ]``.

    Raises:
        DataError: it has a token that ListOps does not have, or its brackets do not close.
    """
    tokens = text.encode().translate(None, delete=b"()").split()
    for token in tokens:
        if token not in _TOKEN_IDS:
            raise DataError(
                f"{_shown(token)} is no token of ListOps; allowed: 0 to 9, [MIN, [MAX, [MED, [SM "
                "and ], with spaces between them"
            )
    depth = 0
    for place, token in enumerate(tokens):
        depth += token.startswith(b"[") - (token == b"]")
        if depth < 0 or (depth == 0 and place < len(tokens) - 1):
            raise DataError(f"the expression ends at token {place + 1} of {len(tokens)}")
    if depth > 0:
        raise DataError(f"{depth} bracket(s) do not close")
    return np.array([_TOKEN_IDS[token] for token in tokens], np.uint8)


def _shown(line: bytes) -> str:
    """Return the start of a line for a message."""
    return repr(line[:40].decode("utf-8", "replace")) if line else "nothing"


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
