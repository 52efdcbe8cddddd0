"""ListOps as text: the official files, line by line, and single expressions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spion_ds.data.listops.levels import first_fault
from spion_ds.data.listops.trees import (
    CLOSE_ID,
    DIGIT_IDS,
    MAX_ID,
    MED_ID,
    MIN_ID,
    SM_ID,
)
from spion_ds.data.storage.archives import user_folder
from spion_ds.errors import DataError, near_matches

OFFICIAL_FILES = {
    "train": "basic_train.tsv",
    "validation": "basic_val.tsv",
    "test": "basic_test.tsv",
}

_MEND = "unpack the official file again, or set data.source to 'generate'"
_TOKEN_IDS = {b"%d" % (token_id - DIGIT_IDS[0]): token_id for token_id in DIGIT_IDS} | {
    b"[MIN": MIN_ID,
    b"[MAX": MAX_ID,
    b"[MED": MED_ID,
    b"[SM": SM_ID,
    b"]": CLOSE_ID,
}


def official_paths(source: str) -> dict[str, Path]:
    """Return the path of each split's file; all exist."""
    folder = user_folder(source)
    names = OFFICIAL_FILES.values()
    if not any((folder / name).exists() for name in names) and (folder / "listops-1000").is_dir():
        folder = folder / "listops-1000"
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"data.source is {source!r}{near_matches(source, ['generate'])}, but {folder} lacks "
            f"{', '.join(missing)}; give the folder with the three official files of ListOps, "
            "or 'generate', which needs none"
        )
    return {split: folder / name for split, name in OFFICIAL_FILES.items()}


def check_ends(path: Path, sequence_length: int) -> None:
    """Raise DataError unless an official file's header, first and last line are as they should."""
    with path.open("rb") as file:
        _check_header(path, file)
        first = file.readline()
        if not first:
            raise _not_official(f"{path}, line 2", "nothing", "the file is truncated")
        _parse_line(first, f"{path}, line 2", sequence_length)
        _parse_line(_last_line(file), f"{path}, last line", sequence_length)


def parse_official(path: Path, sequence_length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (tokens,) uint8 ids and the label 0..9 of each line of an official file.

    Expressions are read as ``encode`` reads them.

    Raises:
        DataError: the file is truncated, of another format, has a line that ``encode`` refuses or
            that is longer than ``sequence_length``; it names the file and the line.
    """
    with path.open("rb") as file:
        _check_header(path, file)
        number = 1
        for number, line in enumerate(file, start=2):
            yield _parse_line(line, f"{path}, line {number}", sequence_length)
        if number == 1:
            raise _not_official(f"{path}, line 2", "nothing", "the file is truncated")


def encode(text: str, config: Any) -> np.ndarray:
    """Return the token ids (tokens,) uint8 of one expression, e.g. ``[MAX 2 [MIN 7 3 ] ]``.

    Args:
        text: the expression, with or without the official files' parentheses.
        config: of the task; nothing here depends on it.

    Raises:
        DataError: it has a token that ListOps does not have, its brackets do not close, or an
            operator has no operand.
    """
    return _expression(text.encode())


def _expression(source: bytes) -> np.ndarray:
    tokens = source.translate(None, delete=b"()").split()
    try:
        ids = np.array([_TOKEN_IDS[token] for token in tokens], np.uint8)
    except KeyError as error:
        raise DataError(
            f"{_shown(error.args[0])} is no token of ListOps; allowed: 0 to 9, [MIN, [MAX, [MED, "
            "[SM and ], with spaces between them"
        ) from None
    if len(ids) and (fault := first_fault(ids[None])) is not None:
        raise DataError(
            f"{fault[1]}; allowed: one expression, each operator with one operand or more"
        )
    return ids


def _not_official(where: str, found: str, hint: str) -> DataError:
    return DataError(
        f"{where}: expected an expression, a tab and its value 0..9, found {found}: {hint}; {_MEND}"
    )


def _check_header(path: Path, file: BinaryIO) -> None:
    header = file.readline(4096)
    if header.rstrip(b"\r\n") != b"Source\tTarget":
        raise DataError(
            f"{path}, line 1: expected the header 'Source<TAB>Target', found {_shown(header)}; "
            f"{_MEND}"
        )


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
    try:
        ids = _expression(source)
    except DataError as error:
        raise DataError(f"{where}: {error}; {_MEND}") from None
    if not len(ids):
        raise _not_official(where, "no expression", "the file is damaged or another")
    if len(ids) > sequence_length:
        raise DataError(
            f"{where}: {len(ids)} tokens do not fit data.sequence_length {sequence_length}; "
            "raise it"
        )
    return ids, int(target)


def _shown(line: bytes) -> str:
    """Return the start of a line for a message."""
    return repr(line[:40].decode("utf-8", "replace")) if line else "nothing"
