"""Masks in a checkpoint's state.pt: each layer's has its own shape, and format 1 is still read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spion_ds.distributed.process_group import discover_ranks
from spion_ds.errors import CheckpointError
from spion_ds.training.checkpoints import checkpoint
from spion_ds.training.checkpoints.checkpoint import TrainingState, load_state
from spion_ds.training.checkpoints.files import find_checkpoint, write_manifest, write_pointer
from spion_ds.training.step.evaluation import build_model, load_checkpoint_model
from tests.training.launching import TINY
from tests.training.test_config import build

HEADS = (
    "sparse_attention.mode=fixed",
    "sparse_attention.different_layout_per_head=true",
    "sparse_attention.num_local_blocks=4",
    "sparse_attention.num_different_global_patterns=2",
)


def mask(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) > 0.5


def save_state(folder: Path, masks: list[Tensor] | None, **state: Any) -> dict[str, Any]:
    """Write a state.pt as ``save_checkpoint`` does, and return what is in it."""
    values = checkpoint._pack(
        TrainingState(step=4, switch_step=2, masks=masks, **state),
        build(str(TINY), {}),
        discover_ranks(),
    )
    checkpoint._save(values, folder / "state.pt")
    write_manifest(folder, 4, None)
    return values


def rewrite(folder: Path, name: str, values: dict[str, Any]) -> None:
    """Replace a file, and describe it in the manifest."""
    torch.save(values, folder / name)
    (folder / "manifest.json").unlink()
    write_manifest(folder, 4, None)


@pytest.mark.parametrize(
    "shapes",
    [[(8, 8), (8, 8)], [(2, 8, 8), (2, 8, 8)], [(5, 5), (2, 3, 3), (1, 1)]],
    ids=["shared", "a head", "mixed"],
)
def test_masks_come_back_with_their_shapes(shapes: list[tuple[int, ...]], tmp_path: Path) -> None:
    masks = [mask(*shape) for shape in shapes]
    save_state(tmp_path, masks)
    state, _ = load_state(tmp_path)
    assert (state.step, state.switch_step, state.phase) == (4, 2, "sparse")
    assert [one.dtype for one in state.masks] == [torch.bool] * len(masks)
    assert [tuple(one.shape) for one in state.masks] == shapes
    assert all(torch.equal(a, b) for a, b in zip(state.masks, masks, strict=True))


def test_a_dense_state_has_no_masks(tmp_path: Path) -> None:
    save_state(tmp_path, None)
    assert load_state(tmp_path)[0].masks is None


@pytest.mark.parametrize("shape", [None, (5, 5), (2, 5, 5)])
def test_format_1_is_read(shape: tuple[int, ...] | None, tmp_path: Path) -> None:
    masks = None if shape is None else [mask(*shape), ~mask(*shape)]
    # Written out as that format was: one shape, of the masks of all layers.
    values = save_state(tmp_path, None)
    values["state"] = {
        "step": 4,
        "samples_seen": 32,
        "seed": 0,
        "switch_step": 2,
        "rule": {},
        "best_step": None,
        "best_accuracy": -1.0,
    }
    bits = [torch.from_numpy(np.packbits(one.numpy().reshape(-1))) for one in masks or []]
    packed = None if shape is None else {"shape": list(shape), "bits": bits}
    rewrite(tmp_path, "state.pt", {**values, "format": 1, "masks": packed})
    state, _ = load_state(tmp_path)
    assert (state.step, state.masks is None) == (4, shape is None)
    assert all(torch.equal(a, b) for a, b in zip(state.masks or [], masks or [], strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format": 3}, "is not a spion_ds checkpoint of format 1 or 2"),
        ({"masks": [{"shape": [8, 8]}]}, "does not hold a training state"),
        ({"masks": [{"shape": [9, 9], "bits": torch.zeros(8).byte()}]}, "8 bytes cannot be"),
        ({"masks": [{"shape": [4, 16], "bits": torch.zeros(8).byte()}]}, "is no shape of a mask"),
        ({"masks": [{"shape": [8, 8], "bits": torch.zeros(8)}]}, "uint8"),
    ],
    ids=["format", "bits", "size", "shape", "dtype"],
)
def test_a_state_that_cannot_be_read_is_named(
    changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    rewrite(tmp_path, "state.pt", {**save_state(tmp_path, [mask(8, 8)]), **changed})
    with pytest.raises(CheckpointError, match=message):
        load_state(tmp_path)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(8, 8)], "masks of 1 layers, and the model has 2"),
        ([(8, 8), (4, 4)], "layer 1 has 4 blocks a side, and the layer has 8"),
        ([(2, 8, 8), (8, 8)], "layer 0 is one a head, and the heads of the layer's Spion"),
    ],
    ids=["layers", "blocks", "heads"],
)
def test_masks_that_do_not_fit_the_model_are_refused(
    shapes: list[tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    config = build(str(TINY), {})
    save_state(tmp_path, [mask(*shape) for shape in shapes])
    rewrite(tmp_path, "weights.pt", build_model(config).state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint_model(tmp_path, config, torch.device("cpu"))


def test_a_checkpoint_with_a_mask_a_head_is_the_model_that_was_saved(tmp_path: Path) -> None:
    config = build(str(TINY), {}, HEADS)
    model = build_model(config).eval()
    masks = [one.sparsity_config.make_mask(128) for one in model.attentions]
    assert [tuple(one.shape) for one in masks] == [(2, 8, 8)] * 2
    assert not torch.equal(masks[0][0], masks[0][1])
    save_state(tmp_path, masks)
    rewrite(tmp_path, "weights.pt", model.state_dict())
    loaded = load_checkpoint_model(tmp_path, config, torch.device("cpu"))
    ids = torch.randint(1, 16, (2, 128), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(loaded(ids, ids > 0), model(ids, ids > 0))


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    config = build(str(TINY), {})
    save_state(tmp_path, None)
    weights = build_model(config).state_dict()
    weights["norm.weight"][0] = torch.nan
    rewrite(tmp_path, "weights.pt", weights)
    with pytest.raises(CheckpointError, match=r"NaN or infinite \(norm\.weight\)"):
        load_checkpoint_model(tmp_path, config, torch.device("cpu"))


@pytest.mark.parametrize("name", ["state.pt", "weights.pt"])
def test_a_file_with_one_bit_changed_is_not_loaded(name: str, tmp_path: Path) -> None:
    config = build(str(TINY), {})
    save_state(tmp_path, None)
    rewrite(tmp_path, "weights.pt", build_model(config).state_dict())
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged: it does not have the sha256"):
        load_checkpoint_model(tmp_path, config, torch.device("cpu"))


def test_a_changed_state_in_the_latest_checkpoint_means_the_one_before(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    for step in (2, 4):
        folder = root / f"step-{step:06d}"
        folder.mkdir(parents=True)
        save_state(folder, None)
    write_pointer(root, "latest", "step-000004")
    assert find_checkpoint(tmp_path) == root / "step-000004"
    state = root / "step-000004" / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    assert find_checkpoint(tmp_path) == root / "step-000002"
