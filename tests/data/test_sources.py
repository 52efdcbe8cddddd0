"""Caches of the user's files: a cache belongs to all of their content, and to nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from spion_ds.data.storage import sources
from spion_ds.data.storage.cache import SPLITS, Dataset, create_split
from spion_ds.data.storage.sources import prepare_from_files
from spion_ds.errors import DataError

LABEL = 3 << 19  # in the middle of the file, far from its ends


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    paths = {name: tmp_path / name for name in ("a.tsv", "b.tsv")}
    for path in paths.values():
        path.write_bytes(bytes(3 << 20))
    return paths


def prepare(files: dict[str, Path], verify: bool = True, meanwhile: str = "") -> Dataset:
    root = files["a.tsv"].parent / "data"

    def build(folder: Path) -> None:
        for name in SPLITS:
            split = create_split(folder, name, 2, 8)
            split.labels[:] = files["a.tsv"].read_bytes()[LABEL]
            split.lengths[:] = 8
        if meanwhile:
            relabel(files[meanwhile], 7)

    return prepare_from_files(root, "toy", files, {"length": 8}, build, verify)


def relabel(path: Path, label: int) -> None:
    """Change one byte, and nothing that a listing shows."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(LABEL)
        file.write(bytes([label]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_byte_changed_anywhere_is_another_cache(files: dict[str, Path]) -> None:
    before = prepare(files)
    relabel(files["a.tsv"], 1)
    after = prepare(files)
    assert after.train.labels.tolist() == [1, 1]
    relabel(files["b.tsv"], 1)
    assert prepare(files).folder not in (before.folder, after.folder)
    relabel(files["a.tsv"], 0)
    relabel(files["b.tsv"], 0)
    assert prepare(files).folder == before.folder


def test_names_and_order_belong_to_the_key(files: dict[str, Path]) -> None:
    swapped = {"b.tsv": files["b.tsv"], "a.tsv": files["a.tsv"]}
    assert prepare(swapped).folder != prepare(files).folder


def test_the_other_ranks_do_not_hash_what_one_has_hashed(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_hash(*_: object) -> str:
        raise AssertionError("the hash is known")

    folder = prepare(files).folder
    monkeypatch.setattr(sources, "_hash", no_hash)
    assert prepare(files, verify=False).folder == folder
    with pytest.raises(AssertionError):
        prepare(files)  # the first rank relies on nothing


def test_the_other_ranks_hash_what_has_changed_since(files: dict[str, Path]) -> None:
    before = prepare(files)
    relabel(files["a.tsv"], 1)
    assert prepare(files, verify=False).folder != before.folder


@pytest.mark.parametrize("content", ["", "0" * 63, "é" * 64, None])
def test_a_damaged_note_of_the_hash_is_not_used(
    files: dict[str, Path], content: str | None
) -> None:
    folder = prepare(files).folder
    [note] = (folder.parent / "sources").iterdir()
    note.unlink()
    note.mkdir() if content is None else note.write_text(content, encoding="utf-8")
    assert prepare(files, verify=False).folder == folder
    assert prepare(files).folder == folder


def test_files_that_change_while_they_are_read_make_no_cache(files: dict[str, Path]) -> None:
    for name in files:
        with pytest.raises(DataError, match="files of toy changed while they were read; run again"):
            prepare(files, meanwhile=name)
    assert not [path for path in (files["a.tsv"].parent / "data").iterdir() if path.is_dir()]
    assert np.all(prepare(files).train.labels == 7)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_no_file_is_named(files: dict[str, Path], kind: str) -> None:
    path = files["b.tsv"]
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(DataError, match=rf"{path} (cannot be read|is not a regular file)"):
        prepare(files)
