"""Masks as files: what was saved is what is loaded, and what does not fit changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from spion_ds.attention import LearnedPattern, SparseSelfAttention
from spion_ds.errors import ConfigError
from spion_ds.masks import LayerMask, load_masks, read_masks, save_masks
from spion_ds.sparsity import (
    BigBirdSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    SatSparsityConfig,
    SparsityConfig,
    SpionSparsityConfig,
)
from spion_ds.switching.mask_files import layers_digest, write_masks
from spion_ds.switching.masks import get_mask
from tests.own_model import (
    LENGTH,
    Own,
    OwnConfig,
    assert_same,
    masks_of,
    outputs,
    random_mask,
    refuses,
    sparse_model,
)

safetensors = pytest.importorskip("safetensors")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return the masks file of ``sparse_model()``."""
    path = tmp_path / "masks.safetensors"
    save_masks(sparse_model(), path)
    return path


# What was saved is what is loaded.


def test_a_fresh_copy_with_the_file_gives_the_same_outputs(file: Path) -> None:
    model, fresh = sparse_model(), Own()
    assert not torch.equal(outputs(fresh), outputs(model))
    load_masks(fresh, file)
    assert torch.equal(outputs(fresh), outputs(model))


def test_shared_per_head_and_dense_layers_come_back(file: Path) -> None:
    fresh = Own()
    load_masks(fresh, file)
    assert_same(masks_of(fresh), masks_of(sparse_model()))


def test_read_masks_needs_no_model(file: Path) -> None:
    layers = read_masks(file)
    assert_same({name: one.mask for name, one in layers.items()}, masks_of(sparse_model()))
    sizes = {name: (one.block, one.heads) for name, one in layers.items()}
    assert sizes == {
        "encoder.shared.attend": (16, 2),
        "encoder.per_head.attend": (32, 4),
        "encoder.dense.attend": (16, 4),
    }


def test_a_file_of_dense_layers_makes_a_sparse_model_dense(tmp_path: Path) -> None:
    save_masks(Own(), tmp_path / "dense")
    model = sparse_model()
    load_masks(model, tmp_path / "dense")
    assert set(masks_of(model).values()) == {None}


@pytest.mark.parametrize("n", [1, 3, 5, 8])
def test_masks_whose_bits_fill_no_whole_bytes_come_back(n: int, tmp_path: Path) -> None:
    layers = {"a": LayerMask(random_mask(3, n, n), 16, 3), "b": LayerMask(random_mask(n, n), 64, 8)}
    write_masks(layers, tmp_path / "masks")
    found = read_masks(tmp_path / "masks")
    assert_same(
        {name: one.mask for name, one in found.items()},
        {name: one.mask for name, one in layers.items()},
    )


def test_a_lone_attention_is_a_model(tmp_path: Path) -> None:
    attention, fresh = (SparseSelfAttention(SpionSparsityConfig(2, 16)) for _ in range(2))
    attention.set_mask(random_mask(4, 4))
    save_masks(attention, tmp_path / "masks")
    load_masks(fresh, tmp_path / "masks")
    assert torch.equal(get_mask(fresh), random_mask(4, 4))


class Wrapper(nn.Module):
    """Holds a model as DistributedDataParallel and DeepSpeed's engine do."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    "wrap",
    [Wrapper, torch.compile, lambda model: Wrapper(Wrapper(torch.compile(model)))],
    ids=["module", "compiled", "all"],
)
def test_wrappers_do_not_matter(wrap: Callable[[nn.Module], Any], tmp_path: Path) -> None:
    save_masks(wrap(sparse_model()), tmp_path / "masks")
    plain, wrapped = Own(), Own()
    load_masks(plain, tmp_path / "masks")
    load_masks(wrap(wrapped), tmp_path / "masks")
    assert_same(masks_of(plain), masks_of(sparse_model()))
    assert_same(masks_of(wrapped), masks_of(sparse_model()))


def test_layers_that_share_a_configuration_come_back(tmp_path: Path) -> None:
    def shared() -> Own:
        one = SpionSparsityConfig(2, 16)
        return sparse_model(shared=one, again=one)

    save_masks(shared(), tmp_path / "masks")
    fresh = shared()
    fresh.attention("shared").set_mask(None)
    load_masks(fresh, tmp_path / "masks")
    assert torch.equal(get_mask(fresh.attention("again")), random_mask(4, 4))


def test_sats_patterns_are_frozen_by_masks(file: Path) -> None:
    model = Own(shared=SatSparsityConfig(2, 16))
    model.learned = LearnedPattern(4, 8, 16)
    load_masks(model, file)
    assert not model.learned.learning
    assert not model.learned.weight.requires_grad


# Static patterns are saved, and compared.


def static_model(seed: int = 0, **named: Any) -> Own:
    return sparse_model(
        bigbird=BigBirdSparsityConfig(2, 16, seed=seed, num_sliding_window_blocks=1),
        fixed=FixedSparsityConfig(
            4, 16, different_layout_per_head=True, num_local_blocks=2, **named
        ),
        full=DenseSparsityConfig(2, 16),
    )


def test_static_patterns_are_in_the_file(tmp_path: Path) -> None:
    save_masks(static_model(), tmp_path / "masks", seq_len=LENGTH)
    masks = {name: one.mask for name, one in read_masks(tmp_path / "masks").items()}
    assert_same(masks, masks_of(static_model()))
    assert masks["encoder.fixed.attend"].shape == (4, 4, 4)
    assert masks["encoder.full.attend"] is None


def test_the_same_static_patterns_load(tmp_path: Path) -> None:
    save_masks(static_model(), tmp_path / "masks", seq_len=LENGTH)
    fresh = static_model()
    fresh.attention("shared").set_mask(None)
    load_masks(fresh, tmp_path / "masks")
    assert_same(masks_of(fresh), masks_of(static_model()))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 1}, "bigbird.attend'.* is another one than the layer's BigBirdSparsityConfig"),
        ({"attention": "unidirectional"}, "fixed.attend'.* is another one than the layer's Fixed"),
    ],
)
def test_another_static_pattern_is_refused(
    other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_masks(static_model(), tmp_path / "masks", seq_len=LENGTH)
    refuses(static_model(**other), tmp_path / "masks", message)


def test_a_static_pattern_without_a_length_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="BigBirdSparsityConfig makes a mask for each length"):
        save_masks(static_model(), tmp_path / "masks")
    assert list(tmp_path.iterdir()) == []


def test_a_dense_layer_of_the_file_is_no_static_pattern(tmp_path: Path) -> None:
    save_masks(sparse_model(extra=SpionSparsityConfig(2, 16)), tmp_path / "masks")
    model = sparse_model(extra=BigBirdSparsityConfig(2, 16))
    refuses(model, tmp_path / "masks", r"extra.attend'.* is missing \(dense\)")


# The digest.


def test_save_and_load_return_the_digest_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "masks"
    digest = save_masks(sparse_model(), path)
    assert load_masks(Own(), path) == digest == layers_digest(read_masks(path))
    with safetensors.safe_open(path, framework="pt") as raw:
        metadata = raw.metadata()
    assert metadata["digest"] == digest
    assert (metadata["format"], metadata["version"]) == ("spion_ds.masks", "1")
    assert json.loads(metadata["layers"])["encoder.dense.attend"] == {
        "shape": None,
        "block": 16,
        "heads": 4,
    }


def test_the_digest_does_not_depend_on_the_order_of_layers(file: Path) -> None:
    layers = read_masks(file)
    assert layers_digest(dict(reversed(layers.items()))) == layers_digest(layers)


def changed_layers() -> dict[str, LayerMask]:
    flipped = torch.ones(4, 4, dtype=torch.bool)
    flipped[3, 3] = False
    full = torch.ones(4, 4, dtype=torch.bool)
    return {
        "a bit": LayerMask(flipped, 16, 2),
        "block": LayerMask(full, 32, 2),
        "heads": LayerMask(full, 16, 4),
        "shape": LayerMask(torch.ones(1, 4, 4, dtype=torch.bool), 16, 2),
        "dense": LayerMask(None, 16, 2),
    }


@pytest.mark.parametrize("what", list(changed_layers()))
def test_the_digest_tells_masks_apart(what: str) -> None:
    digest = layers_digest({"a": LayerMask(torch.ones(4, 4, dtype=torch.bool), 16, 2)})
    assert layers_digest({"a": changed_layers()[what]}) != digest


# What does not fit is refused, and changes nothing.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SpionSparsityConfig(2, 32), "is of blocks of 16 tokens, and the layer's are of 32"),
        (SpionSparsityConfig(4, 16), "is of a layer of 2 heads, and the layer has 4"),
        (OwnConfig(2, 16), "is shared by the heads, and the layer's OwnConfig has one a"),
        (DenseSparsityConfig(2, 16), "is another one than the layer's DenseSparsityConfig makes"),
    ],
    ids=["block", "heads", "one a head", "static"],
)
def test_a_mask_of_another_layer_is_refused(
    config: SparsityConfig, message: str, file: Path
) -> None:
    model = Own(shared=config)
    model.attention("per_head").set_mask(random_mask(4, 2, 2, seed=3))
    refuses(model, file, f"the mask of 'encoder.shared.attend' in .* {message}")


def test_masks_a_head_are_not_spread_into_a_shared_layer(file: Path) -> None:
    model = Own(per_head=SpionSparsityConfig(4, 32))
    refuses(model, file, "per_head.attend'.* is one a head, and the heads of the layer's Spion")


def test_a_mask_of_another_number_of_blocks_than_the_layer_has_is_refused(file: Path) -> None:
    model = Own()
    model.attention("shared").set_mask(random_mask(5, 5))
    refuses(model, file, "shared.attend'.* has 4 blocks a side, and the layer has 5")


def test_a_mask_of_another_length_than_the_layer_is_made_for_is_refused(file: Path) -> None:
    model = Own()
    model.attention("shared").max_seq_length = 65  # five blocks, the last of one token
    refuses(model, file, "shared.attend'.* has 4 blocks a side, and the layer has 5")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"more": SpionSparsityConfig(2, 16)}, "it has no mask of 'encoder.more.attend'"),
        (
            {"many": SpionSparsityConfig(2, 16), "more": SpionSparsityConfig(2, 16), "most": None},
            "it has no mask of 'encoder.many.attend', 'encoder.more.attend' and 1 more",
        ),
    ],
    ids=["one", "many"],
)
def test_a_model_with_other_layers_is_refused(
    names: dict[str, Any], message: str, file: Path
) -> None:
    configs = {name: one or SpionSparsityConfig(2, 16) for name, one in names.items()}
    refuses(sparse_model(**configs), file, f"is of another model: {message}")


def test_a_name_that_the_model_has_not_is_named_with_those_like_it(tmp_path: Path) -> None:
    save_masks(sparse_model(layer_10=SpionSparsityConfig(2, 16)), tmp_path / "masks")
    model = sparse_model(layer_01=SpionSparsityConfig(2, 16))
    message = r"masks of 'encoder.layer_10.attend', which the model has not \(did you mean "
    refuses(model, tmp_path / "masks", message)


def test_a_layer_that_refuses_its_mask_leaves_all_as_they_were(file: Path) -> None:
    own = OwnConfig(4, 32)
    own.refused = random_mask(4, 2, 2)
    model = Own(per_head=own)
    model.attention("shared").set_mask(random_mask(4, 4, seed=5))
    refuses(model, file, "does not fit the model: pattern is refused")


def test_two_masks_for_one_configuration_are_refused(tmp_path: Path) -> None:
    model = sparse_model(again=SpionSparsityConfig(2, 16))
    save_masks(model, tmp_path / "masks")
    one = SpionSparsityConfig(2, 16)
    refuses(
        Own(shared=one, again=one),
        tmp_path / "masks",
        "'encoder.shared.attend' and 'encoder.again.attend' share one SpionSparsityConfig",
    )


def test_a_model_without_sparse_attention_is_an_error(file: Path) -> None:
    for call in (save_masks, load_masks):
        with pytest.raises(ConfigError, match="the Linear has no SparseSelfAttention"):
            call(nn.Linear(2, 2), file)


def test_who_loads_masks_imports_no_trainer() -> None:
    lines = [
        "import sys",
        "import spion_ds.masks",
        "rooms = {f'spion_ds.{room}' for room in ('training', 'inference', 'models', 'data')}",
        "assert not (rooms | {'deepspeed', 'PIL'}) & set(sys.modules)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
