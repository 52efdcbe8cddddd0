"""Watching dense attention: the mean attention map of a layer, as a function and as an observer.

A token-level map is one whose blocks are single tokens.

Shape suffixes: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.attention.map_dispatch import pooled_map, skewness
from spion_ds.attention.map_request import (
    check_tensors,
    map_request,
    mean_row_weights,
    query_counts,
)
from spion_ds.errors import ConfigError
from spion_ds.patterns.pooling import check_filter_size


def attention_map(
    q: Tensor,
    k: Tensor,
    *,
    block: int | None = None,
    filter_size: int | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    per_head: bool = False,
) -> Tensor:
    """Return the post-softmax attention averaged over batch and heads, without gradient.

    Row i is the mean over the heads and over the samples whose token i is real; a row that is
    padding in every sample is zero. Nothing of size batch × heads × L × L is made; with ``block``
    the map is pooled tile by tile, in memory for some tiles and (n, n) sums.

    With ``per_head`` each query head h has its own map, the mean over the samples alone: what its
    queries and its key head, h · kv_heads // heads, give without the others.

    Args:
        q: (batch, heads, L, head_dim).
        k: (batch, kv_heads, L, head_dim), kv_heads divides heads.
        block: side of the blocks to pool, or None for the token-level map.
        filter_size: side of the diagonal convolution before pooling (odd), or None for none.
        key_padding_mask: (batch, L) bool, True = real token.
        causal: keys after the query are excluded.
        scale: factor of the scores; head_dim ** -0.5 if None.
        per_head: one map a query head instead of their mean.

    Returns:
        (L, L) float64 for ``block=None``, else the pooled map (n, n) float64, n = ceil(L / block)
        (SPION, arXiv 2309.12578, section on pattern generation); with ``per_head`` (heads, L, L)
        or (heads, n, n).

    Raises:
        ConfigError: shapes do not fit, or ``filter_size`` is given without ``block``.
    """
    _check(q, k, key_padding_mask, block, filter_size)
    with torch.no_grad():
        weights = mean_row_weights(query_counts(q[:, :1] if per_head else q, key_padding_mask))
        request = map_request(q, k, weights, key_padding_mask, causal, scale)
        return pooled_map(
            request._replace(block=block or 1, filter_size=filter_size or 1, per_head=per_head)
        )


def attention_skewness(
    q: Tensor,
    k: Tensor,
    *,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return the skewness of the token-level :func:`attention_map`, without making that map.

    That is the third standardised moment over all L² entries, with the population's standard
    deviation (SAT, IEEE Access 12, 2024). It is exact for the batch that is given. It is no sum
    over samples: the skewness of several micro-batches or ranks does not give that of their mean.

    Args:
        q, k, key_padding_mask, causal, scale: as in :func:`attention_map`.

    Returns:
        () float64 on q's device; 0 where all entries are equal.

    Raises:
        ConfigError: shapes do not fit.
    """
    _check(q, k, key_padding_mask, None, None)
    with torch.no_grad():
        weights = mean_row_weights(query_counts(q, key_padding_mask))
        return skewness(map_request(q, k, weights, key_padding_mask, causal, scale))


def _check(
    q: Tensor,
    k: Tensor,
    key_padding_mask: Tensor | None,
    block: int | None,
    filter_size: int | None,
) -> None:
    check_tensors(q, k, key_padding_mask)
    if block is None and filter_size is not None:
        raise ConfigError("filter_size is given without block; the convolution comes with pooling")
    if block is not None and not 1 <= block <= q.shape[2]:
        raise ConfigError(f"block is {block}; allowed: 1 to the sequence length, {q.shape[2]}")
    check_filter_size(filter_size)
