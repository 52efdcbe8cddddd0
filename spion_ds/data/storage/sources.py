"""Caches of the user's own files: a cache belongs to all that was read, to the last byte."""

from __future__ import annotations

import hashlib
import itertools
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spion_ds.data.storage.cache import Dataset, prepare_cache, temporary_path
from spion_ds.data.storage.threads import map_in_threads
from spion_ds.durable_files import sha256_of
from spion_ds.errors import DataError

# Seconds after which hashing shows its progress.
_PATIENCE = 2.0


def prepare_from_files(
    root: Path,
    task: str,
    files: Mapping[str, Path],
    parameters: Mapping[str, Any],
    build: Callable[[Path], None],
    verify: bool,
) -> Dataset:
    """Open the cache of these files' content and ``parameters``; make it first if it is not there.

    Args:
        root: the folder of all caches; keeps the hashes in its ``sources/``.
        task: the task's name.
        files: all that ``build`` reads, by names that belong to the cache's key.
        parameters: JSON values that determine, with the files, the content.
        build: writes the arrays, as for ``prepare_cache``.
        verify: read all files, whatever is known of them. Otherwise take the hash of whoever did
            last, if no file has another size, time of change or inode since.

    Raises:
        DataError: a file cannot be read or changes meanwhile, or the cache is damaged.
    """
    states = _states(files)
    note = Path(root) / "sources" / hashlib.sha256(repr(states).encode()).hexdigest()[:24]
    digest = None if verify else _noted(note)
    if digest is None:
        digest = _hash(task, files, sum(size for _, size, *_ in states))

    def build_from_unchanged(folder: Path) -> None:
        build(folder)
        if _states(files) != states:
            raise DataError(f"the files of {task} changed while they were read; run again")

    key = {"source": "files", "sha256": digest, **parameters}
    dataset = prepare_cache(root, task, key, build_from_unchanged, verify)
    if verify:
        _write(note, digest)
    return dataset


def _states(files: Mapping[str, Path]) -> list[tuple[str, int, int, int, int]]:
    """Return what every write to a file changes; nobody can set a file's ctime back."""
    states = []
    for path in files.values():
        try:
            info = path.stat()
        except OSError as error:
            raise _unreadable(path, error) from error
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{path} is not a regular file; put the file itself there")
        change = (info.st_mtime_ns, info.st_ctime_ns, info.st_ino)
        states.append((str(path.absolute()), info.st_size, *change))
    return states


def _hash(task: str, files: Mapping[str, Path], size: int) -> str:
    """Return the sha256 of all names and contents, read on several threads."""
    digest = hashlib.sha256()
    # Small files come in hundreds of thousands, a few hundred to a call.
    items, step = iter(files.items()), 1 + len(files) // 1000
    parts = iter(lambda: list(itertools.islice(items, step)), [])
    shown = f"hashing the files of {task}"
    with tqdm(total=size, desc=shown, unit="B", unit_scale=True, delay=_PATIENCE) as bar:

        def hash_part(part: list[tuple[str, Path]]) -> str:
            return "".join(f"{name}\0{_sha256(path, bar.update)}\0" for name, path in part)

        for lines in map_in_threads(hash_part, parts):
            digest.update(lines.encode())
    return digest.hexdigest()


def _sha256(path: Path, seen: Callable[[int], object]) -> str:
    try:
        return sha256_of(path, seen)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be read ({error.strerror}); unpack the files again")


def _noted(note: Path) -> str | None:
    try:
        text = note.read_text(encoding="ascii") if note.is_file() else ""
    except (OSError, ValueError):
        return None
    return text if re.fullmatch("[0-9a-f]{64}", text) else None


def _write(note: Path, digest: str) -> None:
    temporary = temporary_path(note)
    try:
        note.parent.mkdir(exist_ok=True)
        temporary.write_text(digest)
        temporary.rename(note)
    except OSError:
        pass  # the folder of caches is read-only, or full: the other ranks hash as well
