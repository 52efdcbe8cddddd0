"""The retrieval task of the Long Range Arena: does one paper cite the other? Byte by byte.

A sample is a pair of documents of the ACL Anthology Network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

from tqdm import tqdm

from spion_ds.data.storage.archives import user_folder
from spion_ds.data.storage.cache import Dataset, create_split
from spion_ds.data.storage.skyformer import Pickles
from spion_ds.data.storage.sources import prepare_from_files
from spion_ds.data.text import VOCAB_SIZE, byte_ids, encode
from spion_ds.errors import DataError
from spion_ds.settings import require

__all__ = ["VOCAB_SIZE", "RetrievalConfig", "check_source", "encode", "prepare"]

NUM_CLASSES = 2
DOCUMENTS = 2
FILES = {
    "train": "new_aan_pairs.train.tsv",
    "validation": "new_aan_pairs.eval.tsv",
    "test": "new_aan_pairs.test.tsv",
}
ADDRESS = "https://storage.googleapis.com/long-range-arena/lra_release.gz"
PICKLES = Pickles("retrieval", "lra-retrieval", VOCAB_SIZE, NUM_CLASSES, True, DOCUMENTS)
# Part of the cache's name: raise it when the same files give other tokens.
_VERSION = 1


@dataclass(frozen=True)
class RetrievalConfig:
    """What the data is made of.

    Attributes:
        source: a folder with the three official files (or with ``tsv_data/``), or with Skyformer's
            pickles. There is no default: the archive has 7.7 GB.
        max_length: bytes of a document that are read.
        sequence_length: documents are padded to this many tokens.
    """

    source: str = ""
    max_length: int = 4000
    sequence_length: int = 4096

    @property
    def train(self) -> int:
        """Training samples of the official files."""
        return 147_086

    def validate(self) -> None:
        """Raise ConfigError for the first value that is not allowed."""
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            require(value >= 1, f"data.{field.name}", value, "a whole number from 1 up")
        require(
            self.max_length <= self.sequence_length,
            "data.max_length",
            self.max_length,
            f"at most data.sequence_length, {self.sequence_length}",
        )


def prepare(config: RetrievalConfig, root: Path, verify: bool = True) -> Dataset:
    """Return the data of ``config``, converting it under ``root`` if it is new.

    Raises:
        ConfigError: a value of ``config`` is not allowed.
        DataError: an official file or the cache is missing, damaged or of another format.
    """
    config.validate()
    if config.source and (pickles := PICKLES.paths(config.source)):
        return PICKLES.prepare(pickles, config.sequence_length, root, verify)
    paths = _official_paths(config.source)
    return prepare_from_files(
        root,
        "retrieval",
        {path.name: path for path in paths.values()},
        {
            "max_length": config.max_length,
            "sequence_length": config.sequence_length,
            "version": _VERSION,
        },
        lambda folder: _convert(config, paths, folder),
        verify,
    )


def check_source(config: RetrievalConfig) -> None:
    """Look at the official files' presence and first lines; write nothing.

    Raises:
        DataError: a file is missing or of another format.
    """
    if config.source and PICKLES.paths(config.source):
        return
    for path in _official_paths(config.source).values():
        next(parse_pairs(path, config.max_length))


def parse_pairs(path: Path, max_length: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield the label 0 or 1 and the first ``max_length`` bytes of both documents of each line.

    Raises:
        DataError: the file is truncated or of another format; it names the file and the line.
    """
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            columns = line.rstrip(b"\r\n").split(b"\t")
            try:
                label = {0.0: 0, 1.0: 1}[float(columns[0])]
                _, _, _, first, second = columns
            except (KeyError, ValueError):
                raise DataError(
                    f"{path}, line {number}: expected label 0 or 1, two names and two texts with "
                    f"tabs between, found {len(columns)} columns from {columns[0][:20]!r}; unpack "
                    "the official file again"
                ) from None
            yield label, first[:max_length], second[:max_length]
    if number == 0:
        raise DataError(f"{path} is empty; unpack the official file again")


def _official_paths(source: str) -> dict[str, Path]:
    """Return the path of each split's file; all exist."""
    where = f"they are in lra_release/tsv_data of {ADDRESS}"
    if not source:
        raise DataError(
            f"data.source is not set; name the folder with {', '.join(FILES.values())}; {where}"
        )
    folder = user_folder(source)
    for place in (folder, folder / "tsv_data", folder / "lra_release" / "tsv_data"):
        if (place / FILES["train"]).is_file():
            folder = place
            break
    for name in FILES.values():
        if not (folder / name).is_file():
            raise DataError(
                f"data.source: {folder / name} is missing, and so is "
                f"{PICKLES.stem}.train.pickle; {where}"
            )
    return {split: folder / name for split, name in FILES.items()}


def _convert(config: RetrievalConfig, paths: dict[str, Path], folder: Path) -> None:
    for name, path in paths.items():
        # The lines are long and many: counted first, so that none is held in memory.
        count = _count_lines(path)
        split = create_split(
            folder, name, count, config.sequence_length, documents=DOCUMENTS, dtype="uint16"
        )
        pairs = parse_pairs(path, config.max_length)
        for row, (label, *texts) in enumerate(
            tqdm(pairs, total=count, desc=f"reading {path.name}", unit=" pairs")
        ):
            for document, text in enumerate(texts):
                split.input_ids[row, document, : len(text)] = byte_ids(text)
                split.lengths[row, document] = len(text)
            split.labels[row] = label


def _count_lines(path: Path) -> int:
    count, block, last = 0, b"", b"\n"
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            count, last = count + block.count(b"\n"), block[-1:]
    return count + (last != b"\n")
