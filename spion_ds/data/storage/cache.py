"""Dataset caches: folders of .npy arrays that are complete and checksummed, or not there at all.

    <root>/<task>-<digest of task and parameters>/
        {train,validation,test}_{input_ids,lengths,labels}.npy
        manifest.json    format version, task, parameters; size, shape, dtype, sha256 of each file
    <root>/<the same name>.lock    held by the process that writes the folder

A cache is written under a temporary name and renamed when every byte of it is on disk.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spion_ds.durable_files import flush, read_json, sha256_of
from spion_ds.errors import DataError

FORMAT_VERSION = 1
SPLITS = ("train", "validation", "test")
# Name, dtypes and dimensions of a split's arrays; the last of these is with several documents.
_ARRAYS: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...] = (
    ("input_ids", ("uint8", "uint16"), (2, 3)),
    ("lengths", ("int32",), (1, 2)),
    ("labels", ("uint8",), (1,)),
)
_MANIFEST = "manifest.json"
# What a file system without file locks answers, for instance Lustre mounted without `flock`.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Split:
    """One split: N sequences padded to L tokens, or N times several documents of L tokens.

    Attributes:
        input_ids: (N, L) or (N, documents, L), uint8 or uint16, padded at the end.
        lengths: (N,) or (N, documents) int32, tokens before the padding.
        labels: (N,) uint8.
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """The three splits of a task (read-only memory maps), their folder and its manifest."""

    train: Split
    validation: Split
    test: Split
    folder: Path
    manifest: dict[str, Any]


def cache_folder(root: Path, task: str, parameters: Mapping[str, Any]) -> Path:
    """Return the folder under ``root`` that belongs to these parameters (JSON values)."""
    return Path(root) / _folder_name(task, parameters)


def create_split(
    folder: Path,
    name: str,
    count: int,
    sequence_length: int,
    *,
    documents: int = 1,
    dtype: str = "uint8",
) -> Split:
    """Create the files of one split, all zero, as writable memory maps.

    Args:
        folder: where.
        name: of the split.
        count: samples.
        sequence_length: tokens of a document, padding included.
        documents: of a sample.
        dtype: of the token ids, ``"uint8"`` or ``"uint16"``.

    Raises:
        OSError: the disk has no room for them.
    """
    arrays = {}
    each = () if documents == 1 else (documents,)
    shapes = {"input_ids": (count, *each, sequence_length), "lengths": (count, *each)}
    for array, dtypes, _ in _ARRAYS:
        path = folder / f"{name}_{array}.npy"
        shape = shapes.get(array, (count,))
        kind = dtype if dtype in dtypes else dtypes[0]
        arrays[array] = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
        # Reserve the space now: a full disk is an error here, but a killed process in a mapping.
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return Split(**arrays)


def prepare_cache(
    root: Path,
    task: str,
    parameters: Mapping[str, Any],
    build: Callable[[Path], None],
    verify: bool = True,
) -> Dataset:
    """Open the cache of ``parameters``; if it is not there, build it first, in one process.

    Args:
        root: the folder of all caches; created when missing.
        task: the task's name, the first part of the folder's name.
        parameters: JSON values that determine the content, versions and seeds included.
        build: writes the nine arrays into the folder it is given (see ``create_split``).
        verify: compare the checksums of a cache that is there.

    Raises:
        DataError: the cache is damaged, or cannot be written.
    """
    folder = cache_folder(root, task, parameters)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _writer_lock(folder) as locked:
                if locked:
                    _remove_stale(folder)
                # Another process may have finished it while this one waited.
                if not folder.exists():
                    _build(folder, task, parameters, build)
        except OSError as error:
            raise DataError(
                f"cannot write the dataset cache {folder}: {error}; free some space or choose "
                "another data folder"
            ) from error
    return open_cache(folder, verify=verify)


def open_cache(folder: Path, *, verify: bool = True) -> Dataset:
    """Open a cache read-only, as memory maps, after checking that it is whole.

    Args:
        folder: the cache, as ``cache_folder`` names it.
        verify: also compare every file's sha256; otherwise existence, sizes, shapes and dtypes.

    Raises:
        DataError: something is missing, damaged or of another format; it names the file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is not a folder, as a dataset cache is; remove it")
    if not folder.is_dir():
        raise DataError(
            f"there is no dataset cache at {folder}; launch/prepare_data.py generates one"
        )
    manifest = _read_manifest(folder)
    for name in _file_names():
        _check_file(folder, name, manifest["files"][name], verify)
    splits = {split: _open_split(folder, split, manifest["files"]) for split in SPLITS}
    shapes = {split.input_ids.shape[1:] for split in splits.values()}
    if len(shapes) > 1:
        raise _damaged(folder, _MANIFEST, f"has splits of different lengths: {sorted(shapes)}")
    return Dataset(**splits, folder=folder, manifest=manifest)


def temporary_path(folder: Path) -> Path:
    """Return this process's own name beside a cache's, for what becomes part of it.

    What a killed process leaves there the next one that builds the cache removes.
    """
    return folder.with_name(f"{folder.name}.tmp-{socket.gethostname()}-{os.getpid()}")


def _folder_name(task: str, parameters: Mapping[str, Any]) -> str:
    key = {"format_version": FORMAT_VERSION, "task": task, "parameters": parameters}
    text = json.dumps(key, sort_keys=True)
    return f"{task}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _file_names() -> list[str]:
    return [f"{split}_{array}.npy" for split in SPLITS for array, _, _ in _ARRAYS]


@contextmanager
def _writer_lock(folder: Path) -> Iterator[bool]:
    """Hold the lock beside ``folder``; yields False where the file system has no locks."""
    # The kernel lets go of the lock when its holder ends, however it ends.
    lock = folder.with_name(folder.name + ".lock")
    if lock.exists() and not lock.is_file():
        raise DataError(f"{lock} is not a regular file; remove it")
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is preparing {folder}: waiting", file=sys.stderr, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            yield False
            return
        yield True


def _remove_stale(folder: Path) -> None:
    # Whoever holds the lock is the only living writer, so these were left by dead ones.
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
        if stale.is_dir():
            shutil.rmtree(stale, ignore_errors=True)
        else:
            stale.unlink(missing_ok=True)


def _build(
    folder: Path, task: str, parameters: Mapping[str, Any], build: Callable[[Path], None]
) -> None:
    temporary = temporary_path(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # of a dead process that had our id
    temporary.mkdir()
    try:
        build(temporary)
        _write_manifest(temporary, task, parameters)
        for path in (*temporary.iterdir(), temporary):
            flush(path)
        try:
            temporary.rename(folder)
        except OSError:
            # Without locks another node may have been faster; its cache is as good.
            if not folder.exists():
                raise
        flush(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_manifest(folder: Path, task: str, parameters: Mapping[str, Any]) -> None:
    files = {}
    for name in _file_names():
        array = np.load(folder / name, mmap_mode="r", allow_pickle=False)
        files[name] = {
            "bytes": (folder / name).stat().st_size,
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "sha256": sha256_of(folder / name),
        }
    manifest = {
        "format_version": FORMAT_VERSION,
        "task": task,
        "parameters": dict(parameters),
        "files": files,
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def _damaged(folder: Path, name: str, what: str) -> DataError:
    # What a damaged file says may be long.
    return DataError(
        f"{folder / name} {what[:300]}; delete the folder {folder} and run again: it is made anew"
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.is_file():
        raise _damaged(folder, _MANIFEST, "is missing")
    try:
        manifest = read_json(path)
        version, files = manifest["format_version"], manifest["files"]
        name = _folder_name(manifest["task"], manifest["parameters"])
        entries = {key: files[key] for key in _file_names()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(
            folder, _MANIFEST, f"cannot be read as a manifest ({type(error).__name__}: {error})"
        ) from error
    if version != FORMAT_VERSION:
        raise _damaged(folder, _MANIFEST, f"has format {version!r}, not {FORMAT_VERSION}")
    if name != folder.name:
        raise _damaged(
            folder, _MANIFEST, f"describes the cache {name}: it was edited or the folder renamed"
        )
    for key, entry in entries.items():
        if not isinstance(entry, dict) or not {"bytes", "shape", "dtype", "sha256"} <= set(entry):
            raise _damaged(folder, _MANIFEST, f"does not describe {key} in full")
    return manifest


def _check_file(folder: Path, name: str, entry: Mapping[str, Any], verify: bool) -> None:
    path = folder / name
    if not path.is_file():
        raise _damaged(folder, name, "is missing")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise _damaged(folder, name, f"has {size} bytes, its manifest says {entry['bytes']}")
    if verify and sha256_of(path) != entry["sha256"]:
        raise _damaged(folder, name, "does not have the sha256 of its manifest")


def _open_split(folder: Path, split: str, files: Mapping[str, Any]) -> Split:
    arrays: dict[str, np.ndarray] = {}
    for array, dtypes, dimensions in _ARRAYS:
        name = f"{split}_{array}.npy"
        try:
            values = np.load(folder / name, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged header raises whatever its parser stumbles on
            raise _damaged(folder, name, f"is not a readable .npy file ({error})") from error
        found = {"shape": list(values.shape), "dtype": values.dtype.name}
        stated = {key: files[name][key] for key in found}
        if found != stated:
            raise _damaged(folder, name, f"has {found}, its manifest says {stated}")
        if values.dtype.name not in dtypes or values.ndim not in dimensions:
            raise _damaged(
                folder, name, f"is not a {dimensions[0]}-dimensional array of {dtypes[0]}: {found}"
            )
        arrays[array] = values
    whole = Split(**arrays)
    rows = whole.lengths.shape[0]
    if whole.input_ids.shape[:-1] != whole.lengths.shape or rows != len(whole) or rows == 0:
        shapes = ", ".join(f"{array} {values.shape}" for array, values in arrays.items())
        raise _damaged(folder, f"{split}_*.npy", f"have no rows, or differ in rows: {shapes}")
    return whole
