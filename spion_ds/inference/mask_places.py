"""The masks of a run, a checkpoint, an exported model or a masks file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from spion_ds.errors import CheckpointError
from spion_ds.models.saved import is_saved_model, read_model_config, read_model_masks
from spion_ds.switching.mask_files import LayerMask, read_masks
from spion_ds.training.checkpoints.checkpoint import load_state
from spion_ds.training.checkpoints.files import find_checkpoint, has_checkpoint

_PLACES = (
    "a run's folder (runs/NAME), a checkpoint's, an exported model's, or a file that save_masks "
    "wrote"
)


def read_place(place: Path) -> dict[str, LayerMask]:
    """Return the masks that are in a place, by module name.

    Args:
        place: a run's folder (its best checkpoint, or the latest if none is the best), a
            checkpoint's, an exported model's, or a masks file.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """
    if not place.exists():
        raise CheckpointError(f"there is no {place}; give {_PLACES}")
    if not place.is_dir():
        return read_masks(place)
    if is_saved_model(place):
        config = read_model_config(place)
        try:
            model, block = config["model"], config["sparse_attention"]["block"]
            return _layers(read_model_masks(place), model["layers"], model["heads"], block)
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{place / 'config.json'} is damaged ({error!r}); export the model again"
            ) from error
    is_checkpoint = any((place / name).is_file() for name in ("manifest.json", "state.pt"))
    if not is_checkpoint and not has_checkpoint(place):
        raise CheckpointError(f"there are no masks in the folder {place}; give {_PLACES}")
    best = (place / "checkpoints" / "best").is_file()
    state, run = load_state(find_checkpoint(place, "best" if best else "latest"))
    model, sparse = run["identity"]["model"], run["identity"]["sparse_attention"]
    return _layers(state.masks, model["layers"], model["heads"], sparse["block"])


def _layers(
    masks: Sequence[Tensor | None] | None, layers: int, heads: int, block: int
) -> dict[str, LayerMask]:
    """Return the masks of an EncoderClassifier under the names of its attentions."""
    if masks is None:
        masks = [None] * layers
    if len(masks) != layers:
        raise CheckpointError(
            f"there are masks of {len(masks)} layers, and the model has {layers}; use another "
            "checkpoint"
        )
    for layer, mask in enumerate(masks):
        if mask is not None and mask.dim() == 3 and mask.shape[0] != heads:
            raise CheckpointError(
                f"the mask of layer {layer} is of {mask.shape[0]} heads, and the model has "
                f"{heads}; use another checkpoint"
            )
    return {
        f"layers.{layer}.attention": LayerMask(mask, block, heads)
        for layer, mask in enumerate(masks)
    }
