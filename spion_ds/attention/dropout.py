"""Counter-based dropout: a mask is computed again in the backward pass instead of being stored.

The draws are those of ``random_bits.py``: the same on every device and in every backend.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.attention.available import HAS_TRITON
from spion_ds.random_bits import combine, keep_mask


def dropout(x: Tensor, p: float, key: Tensor) -> Tensor:
    """Return ``x`` with elements zeroed with probability ``p``, the rest scaled by 1 / (1 - p).

    Args:
        x: (batch, ..., columns).
        p: probability of dropping.
        key: (batch,) int32, from :func:`sample_keys`.
    """
    if p == 0.0:
        return x
    # A compiler fuses the formula below into its neighbours.
    if x.is_cuda and HAS_TRITON and not torch.compiler.is_compiling():
        from spion_ds.attention.triton.dropout import dropout_triton

        return dropout_triton(x, p, key)
    rows = x[0].numel() // x.shape[-1]
    row = torch.arange(rows, dtype=torch.int32, device=x.device)
    column = torch.arange(x.shape[-1], dtype=torch.int32, device=x.device)
    keep = keep_mask(combine(key[:, None], row)[:, :, None], column, p)
    return x * keep.view(x.shape) * (1.0 / (1.0 - p))
