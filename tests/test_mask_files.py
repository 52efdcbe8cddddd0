"""A masks file that is damaged or of another kind, and what writing one may replace."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spion_ds.errors import ConfigError
from spion_ds.masks import load_masks, read_masks, save_masks
from tests.own_model import Own, refuses, sparse_model

safetensors = pytest.importorskip("safetensors")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the masks file of ``sparse_model()``."""
    path = tmp_path / "masks.safetensors"
    save_masks(sparse_model(), path)
    return path


# A damaged file, and files of another kind.


def rewrite(path: Path, change: Callable[[dict[str, str], dict[str, Tensor]], None]) -> None:
    """Change the metadata and tensors of a masks file, and leave it a whole safetensors file."""
    from safetensors.torch import save_file

    with safetensors.safe_open(path, framework="pt") as file:
        names = file.keys()
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in names}
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def changed_entry(**values: Any) -> Callable[[dict[str, str], dict[str, Tensor]], None]:
    def change(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
        layers = json.loads(metadata["layers"])
        layers["encoder.shared.attend"].update(values)
        metadata["layers"] = json.dumps(layers)

    return change


def flip_a_bit(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["encoder.shared.attend"][1] ^= 1


def drop_a_tensor(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    del tensors["encoder.shared.attend"]


def add_a_tensor(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["other"] = torch.zeros(2, dtype=torch.uint8)


def make_floats(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    tensors["encoder.shared.attend"] = tensors["encoder.shared.attend"].float()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip_a_bit, "its masks do not have its digest"),
        (changed_entry(block=32), "its masks do not have its digest"),
        (changed_entry(heads=4), "its masks do not have its digest"),
        (changed_entry(shape=[2, 8]), "is no shape of a mask"),
        (changed_entry(shape=[3, 3]), "do not have its digest"),  # as many bytes
        (changed_entry(shape=[5, 5]), "2 bytes cannot be a packed mask of shape"),
        (changed_entry(shape=[2**32, 2**32]), "2 bytes cannot be a packed mask of shape"),
        (changed_entry(shape=[3, 2, 2]), "has masks of 3 heads, and 2 heads"),
        (changed_entry(shape="(4, 4)"), "is no shape of a mask"),
        (changed_entry(shape=None), "tensors without a layer"),
        (changed_entry(block="16"), "has block '16'"),
        (drop_a_tensor, "is damaged"),
        (add_a_tensor, "tensors without a layer"),
        (make_floats, r"are no \(bytes,\) uint8 tensor"),
        (lambda metadata, _: metadata.pop("digest"), "is damaged"),
        (lambda metadata, _: metadata.update(layers="[1]"), "is damaged"),
        (lambda metadata, _: metadata.update(layers="{"), "is damaged"),
        (lambda metadata, _: metadata.update(version="2"), "version 2, and this spion_ds reads"),
        (lambda metadata, _: metadata.update(format="pt"), "is a safetensors file without masks"),
    ],
)
def test_a_changed_file_is_refused(change: Any, message: str, file: Path) -> None:
    rewrite(file, change)
    refuses(sparse_model(), file, message)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_file_that_was_cut_off_is_refused(kept: int, file: Path) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    refuses(sparse_model(), file, "is damaged, or no masks file")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    refuses(sparse_model(), tmp_path / "none", "there is no masks file")
    refuses(sparse_model(), tmp_path, "is no file")


# Nothing is overwritten silently, and nothing is half there.


def test_a_masks_file_is_replaced(file: Path) -> None:
    save_masks(Own(), file)
    assert {one.mask for one in read_masks(file).values()} == {None}
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_another_kind_of_file_is_not_overwritten(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    for name in ("model.safetensors", "notes.txt", "folder"):
        path = tmp_path / name
        before = path.read_bytes() if path.is_file() else None
        with pytest.raises(ConfigError, match=f"{name} exists and is no masks file"):
            save_masks(sparse_model(), path)
        assert before is None or path.read_bytes() == before


def test_a_write_that_fails_leaves_the_file_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        save_masks(Own(), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_folders_of_the_path_are_made(tmp_path: Path) -> None:
    save_masks(sparse_model(), tmp_path / "a" / "b" / "masks")
    load_masks(Own(), tmp_path / "a" / "b" / "masks")


def test_a_path_below_a_file_is_an_error(file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        save_masks(sparse_model(), file / "masks")
