"""Masks as files: what was saved is what is loaded, and what does not fit changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spion_ds.attention import LearnedPattern, SparseSelfAttention
from spion_ds.errors import CheckpointError, ConfigError
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
from spion_ds.switching.masks import find_attentions, get_mask, set_mask

safetensors = pytest.importorskip("safetensors")

LENGTH, DIM = 64, 16


class OwnConfig(SparsityConfig):
    """A switchable configuration of a user's: it takes any mask of its layer, but ``refused``."""

    pattern: Tensor | None = None
    refused: Tensor | None = None

    def set_pattern(self, pattern: Tensor | None) -> None:
        if self.refused is not None and pattern is not None and pattern.equal(self.refused):
            raise ConfigError("pattern is refused")
        self.pattern = None if pattern is None else pattern.clone()

    def make_mask(self, seq_len: int, longer: str = "error") -> Tensor:
        n = -(-seq_len // self.block)
        return torch.ones(n, n, dtype=torch.bool) if self.pattern is None else self.pattern


class Layer(nn.Module):
    """Attention between two linear maps, (B, L, DIM) to (B, L, DIM)."""

    def __init__(self, config: SparsityConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.attend = SparseSelfAttention(config)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend.sparsity_config.num_heads
        split = self.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.attend(*split).transpose(1, 2).flatten(2)


class Own(nn.Module):
    """A model of one's own: layers of other blocks and heads, shared, per head and dense."""

    def __init__(self, **configs: SparsityConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        configs = {
            "shared": SpionSparsityConfig(2, 16),
            "per_head": OwnConfig(4, 32, True),
            "dense": SpionSparsityConfig(4, 16),
            **configs,
        }
        self.encoder = nn.ModuleDict({name: Layer(one) for name, one in configs.items()})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder.values():
            x = layer(x)
        return x

    def attention(self, name: str) -> SparseSelfAttention:
        return self.encoder[name].attend


def random_mask(*shape: int, seed: int = 1) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    return mask | torch.eye(shape[-1], dtype=torch.bool)


def sparse_model(**configs: SparsityConfig) -> Own:
    model = Own(**configs)
    set_mask(model.attention("shared"), random_mask(4, 4))
    set_mask(model.attention("per_head"), random_mask(4, 2, 2))
    return model


def masks_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if (mask := get_mask(attention, LENGTH)) is None else mask.clone()
        for name, attention in find_attentions(model).items()
    }


def assert_same(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    assert list(ours) == list(theirs)
    for name, mask in theirs.items():
        other = ours[name]
        assert (other is None) == (mask is None), name
        assert other is None or (other.dtype == torch.bool and torch.equal(other, mask)), name


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model(torch.randn(2, LENGTH, DIM, generator=torch.Generator().manual_seed(7)))


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
    set_mask(attention, random_mask(4, 4))
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
    set_mask(fresh.attention("shared"), None)
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
    set_mask(fresh.attention("shared"), None)
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


def refuses(model: nn.Module, path: Path, message: str) -> None:
    before = masks_of(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_masks(model, path)
    assert "\n" not in str(caught.value)
    assert_same(masks_of(model), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SpionSparsityConfig(2, 32), "is of blocks of 16 tokens, and the layer's are of 32"),
        (SpionSparsityConfig(4, 16), "is of a layer of 2 heads, and the layer has 4"),
        (OwnConfig(2, 16, True), "is shared by the heads, and the layer's OwnConfig has one a"),
        (DenseSparsityConfig(2, 16), "is another one than the layer's DenseSparsityConfig makes"),
    ],
    ids=["block", "heads", "one a head", "static"],
)
def test_a_mask_of_another_layer_is_refused(
    config: SparsityConfig, message: str, file: Path
) -> None:
    model = Own(shared=config)
    set_mask(model.attention("per_head"), random_mask(4, 2, 2, seed=3))
    refuses(model, file, f"the mask of 'encoder.shared.attend' in .* {message}")


def test_masks_a_head_are_not_spread_into_a_shared_layer(file: Path) -> None:
    model = Own(per_head=SpionSparsityConfig(4, 32))
    refuses(model, file, "per_head.attend'.* is one a head, and the heads of the layer's Spion")


def test_a_mask_of_another_number_of_blocks_than_the_layer_has_is_refused(file: Path) -> None:
    model = Own()
    set_mask(model.attention("shared"), random_mask(5, 5))
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
    own = OwnConfig(4, 32, True)
    own.refused = random_mask(4, 2, 2)
    model = Own(per_head=own)
    set_mask(model.attention("shared"), random_mask(4, 4, seed=5))
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


def test_who_loads_masks_imports_no_trainer() -> None:
    lines = [
        "import sys",
        "import spion_ds.masks",
        "rooms = {f'spion_ds.{room}' for room in ('training', 'inference', 'models', 'data')}",
        "assert not (rooms | {'deepspeed', 'PIL'}) & set(sys.modules)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
