"""What a state dict must be before a model takes it."""

from __future__ import annotations

from typing import Any

import torch

from spion_ds.errors import CheckpointError

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_weights(weights: Any, where: str) -> None:
    """Raise CheckpointError unless ``weights`` are dense floating tensors, all finite, by name.

    Args:
        weights: what should be a state dict.
        where: it came from or goes to, for the message.
    """
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in weights.items()
    ):
        raise CheckpointError(f"{where} does not hold a model's weights; use another one")
    for name, tensor in weights.items():
        dense = tensor.layout == torch.strided and not tensor.is_meta
        if not dense or tensor.dtype not in _DTYPES:
            kind = tensor.dtype if dense else f"a {tensor.layout} or meta tensor"
            raise CheckpointError(
                f"{where} has {kind} as {name}; allowed: dense float32, bfloat16 or float16"
            )
    wrong = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(
            f"{where} has weights that are NaN or infinite ({wrong[0]}{more}), so every answer "
            "would be wrong; use a checkpoint from before the training diverged"
        )
