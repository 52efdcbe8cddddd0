"""The block masks of a model's layers: setting them, and reading them back."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spion_ds.attention import LearnedPattern, SparseSelfAttention
from spion_ds.errors import CheckpointError


def find_attentions(model: nn.Module) -> dict[str, SparseSelfAttention]:
    """Return the block-sparse attentions of a model by the names of their modules, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, SparseSelfAttention)
    }


def set_masks(model: nn.Module, masks: list[Tensor] | None) -> None:
    """Give each layer its (n, n) mask; None makes all layers dense.

    With masks SAT's patterns have been learned: they are frozen.

    Raises:
        CheckpointError: a layer's pattern is static, and the mask is another one.
    """
    for layer, attention in enumerate(find_attentions(model).values()):
        sparsity = attention.sparsity_config
        # Patterns found in training are set; others are what their configuration says.
        set_pattern = getattr(sparsity, "set_pattern", None)
        if set_pattern is not None:
            set_pattern(None if masks is None else masks[layer])
        elif masks is not None:
            length = masks[layer].shape[-1] * sparsity.block
            if not torch.equal(sparsity.make_mask(length), masks[layer]):
                raise CheckpointError(
                    f"layer {layer} was trained with another {type(sparsity).__name__} layout than "
                    "this version makes; use the version that saved the checkpoint"
                )
    if masks is not None:
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


def layouts_digest(attentions: Sequence[SparseSelfAttention], length: int) -> str:
    """Return the sha256 of the block layouts of all layers at ``length`` tokens, hexadecimal."""
    digest = hashlib.sha256()
    for attention in attentions:
        mask = attention.sparsity_config.make_mask(length)
        digest.update(mask.contiguous().numpy().tobytes())
    return digest.hexdigest()
