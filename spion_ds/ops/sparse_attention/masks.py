"""Key padding and attention masks as DeepSpeed's sparse attention takes them: "add" and "mul"."""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.attention.observing import captures
from spion_ds.errors import ConfigError, unknown_name
from spion_ds.ops.sparse_attention.block_tensors import BlockIndex, row_softmax, take_blocks

MASK_MODES = ("add", "mul")
# An added value from here down means "not at all": what is usual is -10000, which bf16 rounds to
# -9984, the dtype's smallest number, or -inf. exp(-5000 + a score) is 0 in every dtype.
EXCLUDED = -5000.0


def check_mode(name: str, mode: str) -> str:
    """Return ``mode`` if it is "add" or "mul", else raise ConfigError."""
    if mode not in MASK_MODES:
        raise ConfigError(unknown_name(name, mode, MASK_MODES))
    return mode


def additive(mask: Tensor, mode: str, dtype: torch.dtype) -> Tensor:
    """Return what is added to the scaled scores: 0 and -inf for "mul" and for a bool mask.

    Args:
        mask: "mul": 0 excludes an entry, anything else changes nothing. "add": is added as it is.
            A bool mask excludes where it is False, in either mode.
        mode: ``"add"`` or ``"mul"``.
        dtype: of the result.
    """
    if mode == "mul" or mask.dtype == torch.bool:
        excluded = torch.full((), float("-inf"), dtype=dtype, device=mask.device)
        return torch.where(mask == 0, excluded, torch.zeros_like(excluded))
    return mask.to(dtype)


def block_softmax(
    x_BKbb: Tensor,
    index: BlockIndex,
    *,
    scale: float = 1.0,
    rpe: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """Return softmax(scale · x + rpe + masks) over the kept entries of each row, in x's dtype.

    Computed in float32 (float64 for float64). A row that is excluded as a whole gives zeros.

    Args:
        x_BKbb: (B, K, b, b) block-sparse scores.
        index: of the blocks.
        scale: factor of the scores.
        rpe: relative position bias, (M, N) or with leading (B or 1, H or 1); gets a gradient.
        key_padding_mask: (B, N), added.
        attn_mask: (M, N) or with leading (B or 1, H or 1), added.
    """
    full = torch.float64 if x_BKbb.dtype == torch.float64 else torch.float32
    scores = x_BKbb.to(full) * scale
    if rpe is not None:
        scores = scores + take_blocks(rpe, index).to(full)
    if attn_mask is not None:
        scores = _added(scores, take_blocks(attn_mask, index).to(full))
    if key_padding_mask is not None:
        tiles = key_padding_mask.to(full).unflatten(1, (-1, index.block))
        columns = tiles.index_select(1, index.column % index.shape[2])
        scores = _added(scores, columns[:, :, None, :])
    return row_softmax(scores, index).to(x_BKbb.dtype)


def _added(scores: Tensor, mask: Tensor) -> Tensor:
    """Return scores + mask, -inf where the mask is, whatever the score: NaN - inf is NaN."""
    return (scores + mask).masked_fill(mask == float("-inf"), float("-inf"))


# Not remembered from mask to mask: NumPy, ``.data`` and collectives write without a trace.


@torch.compiler.disable
def only_excludes(mask: Tensor, mode: str) -> bool:
    """Return whether a mask says nothing but yes or no, so that no kernel need add it."""
    return mode == "mul" or _holds((mask == 0) | (mask <= EXCLUDED))


@torch.compiler.disable
def same_rows(mask: Tensor) -> bool:
    """Return whether a mask (..., L, L) says the same to every query: it is a padding mask then."""
    return mask.stride(-2) == 0 or _holds(mask == mask[..., :1, :])


@torch.compiler.disable
def is_causal(mask: Tensor, mode: str) -> bool:
    """Return whether a mask is the lower triangle, which the fused kernels have built in."""
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2]:
        return False
    yes_or_no = mode == "mul" or mask.dtype == torch.bool
    free = (mask != 0) if yes_or_no else (mask == 0)
    causal = torch.ones(mask.shape[-2:], dtype=torch.bool, device=mask.device).tril()
    return _holds(free == causal) and (yes_or_no or only_excludes(mask, mode))


def _holds(condition: Tensor) -> bool:
    """Return whether all entries are True, by waiting for the device.

    Raises:
        ConfigError: a CUDA graph is being captured, in which no value can be read.
    """
    if captures(condition.device):
        raise ConfigError(
            "a CUDA graph is being captured, in which no mask's values can be read to choose what "
            'computes it; allowed: a bool key_padding_mask, or one in mode "mul", and no attn_mask'
        )
    return bool(condition.all())
