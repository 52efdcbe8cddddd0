"""Observers of one layer's attention: they add up its maps over micro-batches and ranks.

Shape suffixes: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.attention.map_dispatch import block_sums, pooled_map
from spion_ds.attention.map_request import (
    MapRequest,
    check_tensors,
    map_request,
    query_counts,
)
from spion_ds.errors import ConfigError
from spion_ds.patterns.pooling import check_block, check_filter_size


class AttentionMapAccumulator:
    """Sums one layer's attention over micro-batches, so that ranks can add up and divide once.

    Attributes:
        total: (L, L) float64, row i = sum over heads and over the samples whose token i is real.
        count: (L,) float64, how many (sample, head) pairs row i sums.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.count: Tensor | None = None

    @torch.no_grad()
    def add(
        self,
        q_BHLD: Tensor,
        k_BHLD: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> None:
        """Add a micro-batch's attention; arguments as in :func:`attention_map`."""
        check_tensors(q_BHLD, k_BHLD, key_padding_mask)
        ones = q_BHLD.new_ones((q_BHLD.shape[2],), dtype=torch.float64)
        sums = block_sums(map_request(q_BHLD, k_BHLD, ones, key_padding_mask, causal, scale))
        count = query_counts(q_BHLD, key_padding_mask)
        self.total = sums if self.total is None else self.total.add_(sums)
        self.count = count if self.count is None else self.count.add_(count)


class PooledMapAccumulator:
    """Sums one layer's pooled map over micro-batches and ranks; nothing of size L × L is made.

    The mean over the global batch divides row i by the number of (sample, head) pairs in which
    token i is real. Pooling mixes rows, so that number must be known before the first
    micro-batch: it follows from the padding masks alone (:func:`row_counts`, summed over
    micro-batches and ranks, then :func:`mean_row_weights`).

    Args:
        block: side of a block, 1 to L.
        filter_size: side of the diagonal convolution, odd, or None for none.
        row_weights: (L,) floating, on the device of the queries to come.
        keep_batches: whether to keep queries, keys and padding masks, for moments of the map that
            are no sums over samples (:func:`skewness`).

    Attributes:
        total: (n, n) float64 with n = ceil(L / block). Added up over all ranks it is the pooled
            mean map, ``pool_map(mean map, block, filter_size)``.
        batches: what was added, if it is kept.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        block: int,
        filter_size: int | None,
        row_weights: Tensor,
        *,
        keep_batches: bool = False,
    ) -> None:
        if row_weights.dim() != 1 or not row_weights.is_floating_point():
            raise ConfigError(
                f"row_weights has shape {tuple(row_weights.shape)} and dtype {row_weights.dtype}; "
                f"allowed: (L,) floating"
            )
        length = row_weights.shape[0]
        check_block(block, length)
        check_filter_size(filter_size)
        n = -(-length // block)
        self.block, self.filter_size = block, filter_size
        self.row_weights = row_weights.detach().to(torch.float64)
        self.total = self.row_weights.new_zeros((n, n))
        self.keep_batches = keep_batches
        self.batches: list[MapRequest] = []

    @torch.no_grad()
    def add(
        self,
        q_BHLD: Tensor,
        k_BHLD: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> None:
        """Add a micro-batch's attention; arguments as in :func:`attention_map`.

        Raises:
            ConfigError: shapes do not fit each other or ``row_weights``.
        """
        check_tensors(q_BHLD, k_BHLD, key_padding_mask)
        if q_BHLD.shape[2] != self.row_weights.shape[0]:
            raise ConfigError(
                f"q has {q_BHLD.shape[2]} tokens; row_weights are for {self.row_weights.shape[0]}"
            )
        request = MapRequest(
            q_BHLD.detach(),
            k_BHLD.detach(),
            self.row_weights,
            key_padding_mask,
            causal,
            q_BHLD.shape[-1] ** -0.5 if scale is None else scale,
            self.block,
            self.filter_size or 1,
        )
        self.total += pooled_map(request)
        if self.keep_batches:
            self.batches.append(request)
