"""The block masks of a model's layers: checking that they fit, setting them, reading them back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spion_ds.attention import LearnedPattern, SparseSelfAttention
from spion_ds.attention.layout import pack_mask, unpack_mask
from spion_ds.errors import CheckpointError, ConfigError
from spion_ds.sparsity import DenseSparsityConfig, SwitchingSparsityConfig


def find_attentions(model: nn.Module) -> dict[str, SparseSelfAttention]:
    """Return the block-sparse attentions of a model by the names of their modules, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseSelfAttention)
    }


def is_switchable(attention: SparseSelfAttention) -> bool:
    """Return whether the layer's mask can be set; others are what their configuration says."""
    return isinstance(attention.sparsity_config, SwitchingSparsityConfig)


def get_mask(attention: SparseSelfAttention, length: int | None = None) -> Tensor | None:
    """Return a layer's bool mask, (n, n) or (heads, n, n), on the CPU; None if it has none.

    Args:
        attention: the layer.
        length: tokens that the mask of a static pattern is for; others have one of their own.

    Raises:
        ConfigError: the pattern is static, and ``length`` is not known.
        CheckpointError: the layer has a buffer for its mask, and that is damaged.
    """
    sparsity = attention.sparsity_config
    if isinstance(sparsity, SwitchingSparsityConfig):
        refresh = getattr(attention, "refresh", None)
        if refresh is not None:  # a loaded mask buffer is news to the configuration
            refresh()
        return sparsity.pattern
    if isinstance(sparsity, DenseSparsityConfig):
        return None
    length = length or attention.max_seq_length
    if length is None:
        raise ConfigError(
            f"a {type(sparsity).__name__} makes a mask for each length; give seq_len, the tokens "
            "of an input"
        )
    return sparsity.make_mask(length)


def misfit(attention: SparseSelfAttention, mask: Tensor | None, blocks: int | None) -> str | None:
    """Return why a mask is none of this layer's, as the end of a sentence; None if it is one.

    Args:
        attention: the layer.
        mask: (n, n) or (heads, n, n) bool, None for a dense layer.
        blocks: n of the layer, None where that is open.
    """
    sparsity = attention.sparsity_config
    kind, heads = type(sparsity).__name__, sparsity.num_heads
    static = not is_switchable(attention)
    if mask is None:
        if static and not isinstance(sparsity, DenseSparsityConfig):
            return f"is missing (dense), and the layer's {kind} makes one"
        return None
    if not isinstance(mask, Tensor):
        return f"is a {type(mask).__name__}; wanted: a bool tensor, (n, n) or (heads, n, n)"
    if not is_mask_shape(mask.shape):
        return f"has the shape {tuple(mask.shape)}; wanted: (n, n) or (heads, n, n)"
    if mask.dim() == 3 and mask.shape[0] != heads:
        return f"is of {mask.shape[0]} heads, and the layer has {heads}"
    if mask.dim() == 3 and not sparsity.different_layout_per_head:
        return f"is one a head, and the heads of the layer's {kind} share one"
    if mask.dim() == 2 and sparsity.different_layout_per_head:
        return f"is shared by the heads, and the layer's {kind} has one a head"
    if blocks is not None and mask.shape[-1] != blocks:
        return f"has {mask.shape[-1]} blocks a side, and the layer has {blocks}"
    if static:
        try:
            same = torch.equal(sparsity.make_mask(mask.shape[-1] * sparsity.block), mask)
        except ConfigError as error:
            return f"is none that the layer's {kind} makes: {error}"
        if not same:
            return f"is another one than the layer's {kind} makes"
    return None


def set_masks(
    model: nn.Module, masks: Sequence[Tensor | None] | None, length: int | None = None
) -> None:
    """Give each layer its (n, n) or (heads, n, n) mask; None makes all layers dense.

    With masks SAT's patterns have been learned: they are frozen.

    Args:
        model: with block-sparse attentions.
        masks: one a layer, in order; a layer's None leaves it dense.
        length: tokens that the masks are for, where the caller knows them.

    Raises:
        CheckpointError: a mask does not fit its layer, or a layer's pattern is static and the mask
            is another one; the model is unchanged.
    """
    attentions = find_attentions(model)
    if masks is None:
        replace_masks({name: a for name, a in attentions.items() if is_switchable(a)}, {})
        return
    if len(masks) != len(attentions):
        raise CheckpointError(
            f"there are masks of {len(masks)} layers, and the model has {len(attentions)} layers "
            "of block-sparse attention; use the model that they were saved with"
        )
    for number, (attention, mask) in enumerate(zip(attentions.values(), masks, strict=True)):
        blocks = None if length is None else -(-length // attention.sparsity_config.block)
        if (reason := misfit(attention, mask, blocks)) is not None:
            raise CheckpointError(
                f"the mask of layer {number} {reason}; use the model, and the version, that it was "
                "saved with"
            )
    replace_masks(attentions, dict(zip(attentions, masks, strict=True)))
    freeze_learned_patterns(model)


def replace_masks(
    attentions: Mapping[str, SparseSelfAttention], masks: Mapping[str, Tensor | None]
) -> None:
    """Set the masks of those layers that are switchable, all or none; a layer left out is dense.

    Raises:
        ConfigError: a layer refused its mask, or two that share a configuration have different
            ones; all have the masks from before.
    """
    switchable = {name: layer for name, layer in attentions.items() if is_switchable(layer)}
    _check_shared(switchable, masks)
    before = {name: get_mask(layer) for name, layer in switchable.items()}
    try:
        for name, layer in switchable.items():
            layer.set_mask(masks.get(name))
    except BaseException:  # all or none, whatever came in between
        for name, layer in switchable.items():
            layer.set_mask(before[name])
        raise


def _check_shared(
    attentions: Mapping[str, SparseSelfAttention], masks: Mapping[str, Tensor | None]
) -> None:
    first: dict[int, str] = {}
    for name, attention in attentions.items():
        other = first.setdefault(id(attention.sparsity_config), name)
        ours, theirs = masks.get(name), masks.get(other)
        if ours is not theirs and (ours is None or theirs is None or not torch.equal(ours, theirs)):
            raise ConfigError(
                f"{other!r} and {name!r} share one {type(attention.sparsity_config).__name__}, and "
                "their masks differ; give each attention a configuration of its own"
            )


def freeze_learned_patterns(model: nn.Module) -> None:
    """Freeze SAT's patterns: with masks they have been learned."""
    for module in model.modules():
        if isinstance(module, LearnedPattern):
            module.freeze()


def get_masks(model: nn.Module, length: int) -> list[Tensor] | None:
    """Return each layer's (n, n) or (heads, n, n) bool mask, None if all blocks are kept.

    Args:
        model: with block-sparse attentions.
        length: tokens that the masks are for.
    """
    masks = [
        attention.sparsity_config.make_mask(length) for attention in find_attentions(model).values()
    ]
    return None if all(bool(mask.all()) for mask in masks) else masks


def masks_digest(masks: Iterable[Tensor | None]) -> str:
    """Return the sha256 over the shapes and bits of all layers' masks, hexadecimal.

    Args:
        masks: of each layer (n, n) or (heads, n, n), or None while it is dense.
    """
    digest = hashlib.sha256()
    for mask in masks:
        shape = [] if mask is None else list(mask.shape)
        digest.update(str(shape).encode())
        digest.update(b"" if mask is None else pack_mask(mask))
    return digest.hexdigest()


def layouts_digest(attentions: Sequence[SparseSelfAttention], length: int) -> str:
    """Return the digest of the masks of all layers at ``length`` tokens."""
    return masks_digest(attention.sparsity_config.make_mask(length) for attention in attentions)


def pack_entry(mask: Tensor) -> dict[str, Any]:
    """Return a bool mask as plain values and a tensor: ``shape`` and ``bits``."""
    return {"shape": list(mask.shape), "bits": mask_bits(mask)}


def unpack_entry(entry: Any) -> Tensor:
    """Return the bool mask that ``pack_entry`` packed.

    Raises:
        KeyError, TypeError: it is no such entry.
        ConfigError: its shape is no mask's, or the bits are none of that shape.
    """
    return mask_from_bits(entry["bits"], entry["shape"])


def mask_bits(mask: Tensor) -> Tensor:
    """Return a bool mask as bits, (bytes,) uint8 on the CPU: row by row, highest bit first."""
    return torch.frombuffer(bytearray(pack_mask(mask)), dtype=torch.uint8)


def mask_from_bits(bits: Any, shape: Any) -> Tensor:
    """Return the bool mask of ``shape`` that ``mask_bits`` packed.

    Raises:
        ConfigError: ``shape`` is no mask's, or the bits are none of that shape.
    """
    if not is_mask_shape(shape):
        raise ConfigError(f"{shape!r} is no shape of a mask: (n, n) or (heads, n, n)")
    shape = tuple(shape)
    if not isinstance(bits, Tensor) or bits.dtype != torch.uint8 or bits.dim() != 1:
        raise ConfigError(f"the bits of a mask of shape {shape} are no (bytes,) uint8 tensor")
    # Before the product is made of them: a damaged file may hold any numbers.
    if len(bits) != -(-math.prod(shape) // 8):
        raise ConfigError(f"{len(bits)} bytes cannot be a packed mask of shape {shape}")
    return unpack_mask(bits.cpu().numpy().tobytes(), shape)


def is_mask_shape(shape: Any) -> bool:
    """Return whether ``shape`` is (n, n) or (heads, n, n), whole numbers from 1 up."""
    return (
        isinstance(shape, Sequence)
        and len(shape) in (2, 3)
        and all(type(size) is int and size >= 1 for size in shape)
        and shape[-1] == shape[-2]
    )


def density_text(mask: Tensor) -> str:
    """Return a mask's share of kept blocks as text, with the range over its heads if it has any."""
    share = mask.double().mean(dim=(-2, -1))
    text = f"{float(share.mean()):.1%}"
    if share.dim() == 0:
        return text
    return f"{text} ({float(share.min()):.1%} to {float(share.max()):.1%} over {len(share)} heads)"
