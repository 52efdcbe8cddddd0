"""Files that outlive a crash: on disk when that is said, and known by their content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Give a file a new content: after a crash it has this or the one before, never half of it."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    flush(temporary)
    os.replace(temporary, path)
    flush(path.parent)


def sha256_of(path: Path, seen: Callable[[int], object] = lambda _: None) -> str:
    """Return the hexadecimal sha256 of a file's content; ``seen`` is told of each bytes read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            seen(len(block))
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file that a program of ours wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else, with the reason.
    """
    if not path.is_file():  # a pipe would be waited for
        if path.exists():
            raise ValueError("it is no file")
        raise FileNotFoundError(f"there is no {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object")
    return values
