"""SPION's block patterns from an attention map: CF, F and C (arXiv 2309.12578)."""

from __future__ import annotations

import math
from numbers import Real

import torch
from torch import Tensor

from spion_ds.errors import ConfigError, unknown_name
from spion_ds.patterns.flood_fill import check_pooled, flood_fill
from spion_ds.patterns.pooling import check_filter_size, pool_map, quantile

VARIANTS = ("cf", "f", "c")


def spion_cf(attention_map: Tensor, block: int, alpha: float, filter_size: int = 31) -> Tensor:
    """Return SPION-CF's pattern: diagonal convolution, pooling, flood fill, diagonal.

    Args:
        attention_map: (L, L) post-softmax attention, mean over batch and heads; floating, finite.
        block: side of a block, 1 to L.
        alpha: 0 to 1; flood fill marks blocks above this quantile of the pooled map.
        filter_size: side of the diagonal convolution, odd.

    Returns:
        (n, n) bool with n = ceil(L / block), on the map's device.

    Raises:
        ConfigError: names the argument, its value and what is allowed.
    """
    _check_alpha(alpha)
    pooled = _pool(attention_map, block, _whole_filter(filter_size))
    return pattern_from_pooled(pooled, "cf", alpha=alpha)


def spion_f(attention_map: Tensor, block: int, alpha: float) -> Tensor:
    """Return SPION-F's pattern: pooling, flood fill, diagonal.

    Args and errors are those of :func:`spion_cf`; returns (n, n) bool on the map's device.
    """
    _check_alpha(alpha)
    return pattern_from_pooled(_pool(attention_map, block, None), "f", alpha=alpha)


def spion_c(attention_map: Tensor, block: int, density: float, filter_size: int = 31) -> Tensor:
    """Return SPION-C's pattern: diagonal convolution, pooling, top-k, diagonal.

    Args:
        attention_map: (L, L) post-softmax attention, mean over batch and heads; floating, finite.
        block: side of a block, 1 to L.
        density: above 0, up to 1; the k = int(n²·density − n) largest blocks are kept.
        filter_size: side of the diagonal convolution, odd.

    Returns:
        (n, n) bool with n = ceil(L / block), on the map's device.

    Raises:
        ConfigError: names the argument, its value and what is allowed.
    """
    check_density(density)
    pooled = _pool(attention_map, block, _whole_filter(filter_size))
    return pattern_from_pooled(pooled, "c", density=density)


def pattern_from_pooled(
    pooled: Tensor,
    variant: str,
    *,
    alpha: float | None = None,
    density: float | None = None,
    causal: bool = False,
) -> Tensor:
    """Return a variant's pattern from a map that :func:`pool_map` pooled as the variant needs it.

    Args:
        pooled: (n, n) floating, finite; pooled with the diagonal convolution for "cf" and "c",
            without for "f".
        variant: "cf", "f" or "c".
        alpha: 0 to 1, needed by "cf" and "f"; "c" ignores it.
        density: above 0, up to 1, needed by "c"; "cf" and "f" ignore it.
        causal: only blocks on and below the diagonal may be kept; the quantile and the density are
            of these.

    Returns:
        (n, n) bool with the diagonal set, on the device of ``pooled``.

    Raises:
        ConfigError: names the argument, its value and what is allowed.
    """
    if variant not in VARIANTS:
        raise ConfigError(unknown_name("SPION variant", variant, VARIANTS))
    check_pooled(pooled)
    allowed = torch.ones_like(pooled, dtype=torch.bool)
    if causal:
        allowed = allowed.tril()
        pooled = pooled.tril()
    if variant == "c":
        blocks = int(allowed.sum())
        count = int(blocks * check_density(density) - pooled.shape[0])
        scores = pooled.masked_fill(~allowed, -math.inf) if causal else pooled
        pattern = top_blocks(scores, min(max(count, 0), blocks))
    else:
        pattern = flood_fill(pooled, quantile(pooled[allowed], _check_alpha(alpha))) & allowed
    pattern.fill_diagonal_(True)
    return pattern


def top_blocks(pooled: Tensor, count: int) -> Tensor:
    """Return the ``count`` largest blocks, the earlier in row-major order in a tie; (n, n) bool."""
    # Adding 0.0 makes -0.0 equal to 0.0 for sorts that look at bits.
    order = (pooled.detach().flatten() + 0.0).sort(descending=True, stable=True).indices
    pattern = torch.zeros(pooled.numel(), dtype=torch.bool, device=pooled.device)
    pattern[order[:count]] = True
    return pattern.view_as(pooled)


def _pool(attention_map: Tensor, block: int, filter_size: int | None) -> Tensor:
    """Return the pooled map, refusing NaN and infinity."""
    pooled = pool_map(attention_map, block, filter_size)
    # Every entry is part of its own block's sum, so checking the small map finds them all.
    check_pooled(pooled, name="the pooled attention_map")
    return pooled


def _whole_filter(filter_size: int) -> int:
    """Refuse None too: pool_map takes it for "no convolution", which C and CF never are."""
    if filter_size is None:
        raise ConfigError("filter_size is None; allowed: odd whole numbers, e.g. 31")
    check_filter_size(filter_size)
    return filter_size


def _check_alpha(alpha: float | None) -> float:
    if not isinstance(alpha, Real) or isinstance(alpha, bool) or not 0.0 <= alpha <= 1.0:
        raise ConfigError(f"alpha is {alpha!r}; allowed: 0 to 1 (a quantile, e.g. 0.98)")
    return float(alpha)


def check_density(density: float | None) -> float:
    """Return ``density`` as a float, or raise ConfigError unless it is above 0, up to 1."""
    if not isinstance(density, Real) or isinstance(density, bool) or not 0.0 < density <= 1.0:
        raise ConfigError(f"density is {density!r}; allowed: above 0, up to 1 (e.g. 0.04)")
    return float(density)
