"""The masks in DenseToSparse's state: held, checked against the model's buffers, loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spion_ds.errors import CheckpointError, ConfigError
from spion_ds.switching.masks import get_mask, masks_digest, pack_entry, unpack_entry
from spion_ds.switching.observation import Layer

FORMAT = 1
_KEYS = {"format", "last_step", "switch_step", "overdue", "rule", "layers", "masks", "digest"}


def pack_masks(layers: Sequence[Layer], sparse: bool) -> dict[str, Any]:
    """Return the masks of layers without a buffer of their own, and a digest of all masks.

    Args:
        layers: the attentions.
        sparse: whether they have switched.
    """
    masks = [get_mask(layer.attention) if sparse else None for layer in layers]
    return {
        "layers": [_describe(layer) for layer in layers],
        "masks": [
            None if mask is None or _has_buffer(layer) else pack_entry(mask)
            for layer, mask in zip(layers, masks, strict=True)
        ],
        "digest": masks_digest(masks) if sparse else "",
    }


def check_state(state: Any, layers: Sequence[Layer]) -> None:
    """Raise CheckpointError unless ``state`` is DenseToSparse's, of a model with these layers."""
    if not isinstance(state, dict) or set(state) != _KEYS or state["format"] != FORMAT:
        found = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise CheckpointError(
            f"this is no state of DenseToSparse of format {FORMAT}: it has {found}; give what "
            "switch.state_dict() returned"
        )
    theirs, ours = state["layers"], [_describe(layer) for layer in layers]
    if theirs != ours:
        where = next(
            (
                f"layer {number} has {there} there and {here} here"
                for number, (there, here) in enumerate(zip(theirs, ours, strict=False))
                if there != here
            ),
            f"it has {len(theirs)} layers and this model {len(ours)}",
        )
        raise CheckpointError(
            f"the state is of another model: {where}; build the model as it was when it was saved"
        )


def unpack_masks(state: dict[str, Any], layers: Sequence[Layer]) -> None:
    """Set the masks of a checked state in the layers that have no buffer.

    Raises:
        CheckpointError: a mask is damaged, or is missing where there is no buffer.
    """
    sparse = state["switch_step"] is not None
    masks: list[Tensor | None] = []
    for layer, packed in zip(layers, state["masks"], strict=True):
        if _has_buffer(layer) or not sparse:
            masks.append(None)
            continue
        if packed is None:
            raise CheckpointError(
                f"the state has no mask for {layer.name}, which had a mask buffer when it was "
                "saved: build its SparseSelfAttention with max_seq_length= as then"
            )
        masks.append(_unpack(packed, layer))
    # All are read before the first is set.
    for layer, mask in zip(layers, masks, strict=True):
        if not _has_buffer(layer):
            layer.attention.set_mask(mask)


def verify_masks(layers: Sequence[Layer], sparse: bool, digest: str | None) -> None:
    """Raise unless the layers' masks are those that the driver knows of.

    Args:
        layers: the attentions.
        sparse: whether they have switched.
        digest: of the masks of a loaded state, None where none was loaded.

    Raises:
        ConfigError: a layer has a mask in the dense phase, or none in the sparse phase.
        CheckpointError: the masks are not those of the loaded state.
    """
    masks = [get_mask(layer.attention) for layer in layers]
    for layer, mask in zip(layers, masks, strict=True):
        if sparse == (mask is None):
            raise ConfigError(
                f"{layer.name} is {'dense' if mask is None else 'sparse'} and the driver of the "
                f"switch is in the {'sparse' if sparse else 'dense'} phase; load the model's "
                "state and switch.load_state_dict() of one checkpoint, or make a mask-free start "
                "with attention.set_mask(None)"
            )
    if sparse and digest is not None and masks_digest(masks) != digest:
        raise CheckpointError(
            "the model's masks are not those of the loaded state (their digests differ); load "
            "both from one checkpoint"
        )


def _has_buffer(layer: Layer) -> bool:
    return layer.attention.max_seq_length is not None


def _describe(layer: Layer) -> dict[str, Any]:
    sparsity = layer.sparsity
    return {
        "heads": sparsity.num_heads,
        "block": sparsity.block,
        "per_head": bool(sparsity.different_layout_per_head),
    }


def _unpack(entry: Any, layer: Layer) -> Tensor:
    try:
        return unpack_entry(entry)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"the mask of {layer.name} is damaged: {error}") from error
