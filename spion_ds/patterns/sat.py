"""SAT's block pattern: learned as W·Wᵀ from pooled attention (IEEE Access 12, 2024)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spion_ds.errors import ConfigError
from spion_ds.patterns.spion import check_density, top_blocks


def sat_pattern(weight: Tensor, density: float, *, causal: bool = False) -> Tensor:
    """Return SAT's pattern: the int(n²·density) largest entries of W·Wᵀ; no diagonal is forced.

    Args:
        weight: W, (n, head_dim), floating, finite.
        density: above 0, up to 1.
        causal: only entries on and below the diagonal may be kept, and ``density`` is of these.

    Returns:
        (n, n) bool on W's device; of equal entries the earlier in row-major order.

    Raises:
        ConfigError: names the argument, its value and what is allowed.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ConfigError(
            f"weight has shape {tuple(weight.shape)} and dtype {weight.dtype}; allowed: (n, "
            "head_dim) floating"
        )
    if not torch.isfinite(weight).all():
        raise ConfigError("weight has NaN or infinite entries; allowed: finite values")
    wide = weight.detach().to(torch.float64)
    product = wide @ wide.T
    # Exactly symmetric whatever the order of the sums, so that (i, j) and (j, i) tie.
    product = product.triu() + product.triu(1).T
    allowed = product.numel()
    if causal:
        above = torch.ones_like(product, dtype=torch.bool).triu(1)
        product, allowed = product.masked_fill(above, -math.inf), allowed - int(above.sum())
    return top_blocks(product, int(allowed * check_density(density)))


def pattern_loss(weight: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error between W·Wᵀ and a pooled map, () in ``target``'s dtype.

    SAT's loss is the mean of (W·Wᵀ − O)² over the pooled maps O of all heads and samples. With
    ``target`` their mean this differs from it by the variance of the O, which does not depend on
    W: the gradient to W is the same.

    Args:
        weight: W, (n, head_dim), floating.
        target: (n, n) floating, no gradient: the mean over heads and samples of the block means
            of the attention, rows of padding being 0.
    """
    wide = weight.to(target.dtype)
    return (wide @ wide.T - target).square().mean()
