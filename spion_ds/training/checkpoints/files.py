"""Which checkpoint folders are whole, which one to use, and which ones to keep.

    checkpoints/latest, best                 names of checkpoints
    checkpoints/step-000500/manifest.json    its step; size and sha256 of every other file

Nothing here reads what is in the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from spion_ds.durable_files import flush, read_json, replace_text, sha256_of
from spion_ds.errors import CheckpointError

FORMAT = 1
_MANIFEST = "manifest.json"


def write_manifest(folder: Path, step: int, best_step: int | None) -> None:
    """Describe every file of a checkpoint, and flush all of them to disk."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter
        digests = list(pool.map(sha256_of, paths))
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "best_step": best_step,
        "files": files,
    }
    manifest["sha256"] = _digest(manifest)
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def check_whole(folder: Path, *, checksums: bool) -> None:
    """Compare a checkpoint with its manifest.

    Args:
        folder: the checkpoint.
        checksums: also read every file and compare its sha256; otherwise only the sizes.

    Raises:
        CheckpointError: a file is missing, cut off or changed; it names the file.
    """
    files = _read_manifest(folder)["files"]
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{path} is damaged: it has {path.stat().st_size} bytes, its manifest says "
                f"{entry['bytes']}"
            )
    if not checksums:
        return
    with ThreadPoolExecutor() as pool:
        digests = pool.map(sha256_of, [folder / name for name in files])
    for (name, entry), digest in zip(files.items(), digests, strict=True):
        if digest != entry["sha256"]:
            raise _changed(folder / name)


def read_checked(folder: Path, name: str) -> bytes:
    """Return the content of a file of a checkpoint, which has the sha256 of the manifest.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    entry, path = _read_manifest(folder)["files"].get(name), folder / name
    if entry is None or not path.is_file():
        raise CheckpointError(f"{path} is missing; use another checkpoint of the run")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise _changed(path)
    return content


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: it does not have the sha256 of its manifest")


def find_checkpoint(
    place: Path,
    pointer: str = "latest",
    *,
    checksums: bool = False,
    passed_over: list[str] | None = None,
) -> Path:
    """Return the checkpoint folder that ``place`` means: a run, or a checkpoint itself.

    Of a run it is the one that ``pointer`` names. If the latest is damaged or partial it is the
    newest whole one before it.

    Args:
        place: a run's folder or a checkpoint's.
        pointer: ``"latest"`` or ``"best"``.
        checksums: whether every byte is compared, or sizes alone.
        passed_over: receives a sentence for each damaged checkpoint on the way.

    Raises:
        CheckpointError: there is none, none is whole, or the one that was named outright is not.
    """
    if is_checkpoint(place):
        _check_named(place, checksums)
        return place
    root = place / "checkpoints"
    candidates = _candidates(root, pointer)
    if not candidates:
        raise CheckpointError(
            f"there is no checkpoint in {place}; give a run's folder (runs/NAME, with checkpoints/"
            f"{pointer}) or a checkpoint's (with state.pt), or start anew without --resume"
        )
    if pointer != "latest":
        _check_named(candidates[0], checksums)
        return candidates[0]
    failures = []
    for folder in candidates:
        try:
            check_whole(folder, checksums=checksums)
            read_checked(folder, "state.pt")  # small, and read first
        except CheckpointError as error:
            failures.append(str(error))
            continue
        if passed_over is not None:
            passed_over += failures
        return folder
    raise CheckpointError(
        f"no checkpoint in {root} is whole ({'; '.join(failures)}); start anew without --resume"
    )


def is_checkpoint(place: Path) -> bool:
    """Return whether a place is a checkpoint itself, and not a run."""
    return (place / _MANIFEST).is_file() or (place / "state.pt").is_file()


def has_checkpoint(run: Path) -> bool:
    """Return whether a run has saved anything."""
    return bool(_candidates(run / "checkpoints", "latest"))


def write_pointer(root: Path, pointer: str, name: str) -> None:
    """Make ``root/pointer`` ("latest" or "best") name a checkpoint, atomically."""
    replace_text(root / pointer, name)


def publish(incomplete: Path, folder: Path) -> None:
    """Give a finished checkpoint its name, and make ``latest`` name it."""
    if os.path.lexists(folder):  # of an earlier attempt, from a checkpoint before it
        os.rename(folder, incomplete.with_name(f"{incomplete.name}.replaced"))
    os.rename(incomplete, folder)
    write_pointer(folder.parent, "latest", folder.name)


def prune_checkpoints(root: Path, keep: int) -> None:
    """Remove the run's checkpoints except the newest ``keep``, and the best that these know.

    Checkpoints after ``latest`` belong to an attempt that was given up, and stay. Of a symbolic
    link the link alone is removed. What is no ``step-<number>`` folder is not ours, and stays.
    """
    kept = _candidates(root, "latest")[:keep]
    spared = {path.name for path in kept} | {_pointed(root, "best")}
    for folder in kept:
        with contextlib.suppress(CheckpointError):
            spared.add(checkpoint_name(_read_manifest(folder)["best_step"] or 0))
    for folder in _candidates(root, "latest"):
        if folder.name in spared:
            continue
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)


def checkpoint_name(step: int) -> str:
    """Return the folder name of a step's checkpoint."""
    return f"step-{step:06d}"


def _candidates(root: Path, pointer: str) -> list[Path]:
    """Return the checkpoint that a pointer names and those before it, newest first."""
    names = {path.name for path in root.glob("step-*") if _step(path.name) >= 0 and path.is_dir()}
    named = _pointed(root, pointer)
    if named is not None:
        names = {name for name in names if _step(name) <= _step(named)} | {named}
    return [root / name for name in sorted(names, key=_step, reverse=True)]


def _pointed(root: Path, pointer: str) -> str | None:
    try:
        name = (root / pointer).read_text().strip() if (root / pointer).is_file() else ""
    except (OSError, UnicodeDecodeError):
        return None
    return name if _step(name) >= 0 else None


def _step(name: str) -> int:
    prefix, _, digits = name.partition("-")
    number = prefix == "step" and digits.isdecimal() and len(digits) < 20
    return int(digits) if number else -1


def _check_named(folder: Path, checksums: bool) -> None:
    try:
        check_whole(folder, checksums=checksums)
    except CheckpointError as error:
        before = [p.name for p in _candidates(folder.parent, "latest") if p.name < folder.name]
        instead = f"the one before it is {before[0]}" if before else "there is none before it"
        raise CheckpointError(f"{error}; use another checkpoint of the run: {instead}") from None


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = read_json(path)
        stated, found = manifest.pop("sha256", None), _digest(manifest)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    if stated != found:
        raise CheckpointError(f"{path} is damaged: it does not have its own sha256")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}, not {FORMAT}")
    if not _describes_files(manifest):
        raise CheckpointError(f"{path} is damaged: it does not describe a checkpoint's files")
    return manifest


def _describes_files(manifest: dict[str, Any]) -> bool:
    """Return whether the values are of the types that ``write_manifest`` writes."""
    files, best = manifest.get("files"), manifest.get("best_step", False)
    return (
        type(manifest.get("step")) is int
        and (best is None or type(best) is int)
        and isinstance(files, dict)
        and all(
            isinstance(entry, dict)
            and type(entry.get("bytes")) is int
            and isinstance(entry.get("sha256"), str)
            for entry in files.values()
        )
    )


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
