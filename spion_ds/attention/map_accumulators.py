"""Observers of one layer's attention: they add up its maps over micro-batches and ranks.

Shape suffixes: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from spion_ds.attention.map_dispatch import block_sums, pooled_map
from spion_ds.attention.map_request import (
    MapRequest,
    check_tensors,
    map_request,
    mean_row_weights,
    pad_to,
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

    There are two ways of averaging:

    - Exact, with ``row_weights``. The mean over the global batch divides row i by the number of
      (sample, head) pairs in which token i is real. Pooling mixes rows, so that number must be
      known before the first micro-batch: it follows from the padding masks alone
      (:func:`row_counts`, summed over micro-batches and ranks, then :func:`mean_row_weights`).
      ``total``, added up over all ranks, is the pooled mean map.
    - Every micro-batch's mean counts alike, without ``row_weights``. ``total`` is the sum of
      ``attention_map`` of each micro-batch; both ``total`` and ``added``, added up over all ranks,
      give the mean. It is the exact one where no token is padding and all micro-batches have the
      same number of samples.

    An input shorter than L counts as padded to L tokens.

    Args:
        block: side of a block, 1 to L.
        filter_size: side of the diagonal convolution, odd, or None for none.
        row_weights: (L,) floating, on the device of the queries to come; with ``per_head`` those
            of one head, ``mean_row_weights(row_counts(mask, heads=1))``.
        length: L; None takes that of ``row_weights``, or else of the first micro-batch.
        per_head: one map a query head instead of their mean, or weighted sum.
        keep_batches: whether to keep queries, keys and padding masks, for moments of the map that
            are no sums over samples (:func:`skewness`).

    Attributes:
        added: how many micro-batches were added.
        batches: what was added, if it is kept, as requests for the map over all heads. Each has the
            row weights that it was added with: without ``row_weights`` those of itself alone.

    Raises:
        ConfigError: an argument is out of range.
    """

    def __init__(
        self,
        block: int,
        filter_size: int | None,
        row_weights: Tensor | None = None,
        *,
        length: int | None = None,
        per_head: bool = False,
        keep_batches: bool = False,
    ) -> None:
        length = _checked_length(block, row_weights, length)
        check_filter_size(filter_size)
        self.block, self.filter_size = block, filter_size
        self.length, self.per_head = length, per_head
        self.row_weights: Tensor | None = None
        self._total: Tensor | None = None
        if row_weights is not None:
            self.row_weights = row_weights.detach().to(torch.float64)
            if not per_head:
                n = -(-self.row_weights.shape[0] // block)
                self._total = self.row_weights.new_zeros((n, n))
        self.added = 0
        self.keep_batches = keep_batches
        self.batches: list[MapRequest] = []

    @property
    def total(self) -> Tensor:
        """The sum, (n, n) or with ``per_head`` (heads, n, n) float64, n = ceil(L / block).

        Raises:
            ConfigError: nothing has been added yet (with ``row_weights`` of all heads it is zeros).
        """
        if self._total is None:
            raise ConfigError(
                "total: no micro-batch has been added, so it has no device and no heads yet; ask "
                "after the first add (added says how many there were)"
            )
        return self._total

    @total.setter
    def total(self, total: Tensor) -> None:
        self._total = total

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
            ConfigError: shapes do not fit each other, the input is longer than L, or with
                ``per_head`` it has another number of heads than those before; nothing is added.
        """
        check_tensors(q_BHLD, k_BHLD, key_padding_mask)
        heads = q_BHLD.shape[1]
        length = self._length_for(q_BHLD)
        if self._total is not None and self.per_head and self._total.shape[0] != heads:
            raise ConfigError(
                f"q has {heads} heads; those before had {self._total.shape[0]}, and per_head is "
                "True: add up the maps of one layer alone"
            )
        q, k, real = pad_to(q_BHLD.detach(), k_BHLD.detach(), key_padding_mask, length)
        weights = self.row_weights
        if weights is None:
            weights = mean_row_weights(query_counts(q[:, :1] if self.per_head else q, real))
        request = map_request(q, k, weights, real, causal, scale)
        request = request._replace(
            block=self.block, filter_size=self.filter_size or 1, per_head=self.per_head
        )
        found = pooled_map(request)
        self.length = length
        if self._total is None:
            self._total = torch.zeros_like(found)
        self._total += found
        self.added += 1
        if self.keep_batches:
            if self.per_head:
                request = request._replace(row_weights=weights / heads, per_head=False)
            self.batches.append(request)

    def _length_for(self, q_BHLD: Tensor) -> int:
        """Return L, which the first micro-batch fixes; refuse longer inputs."""
        found = q_BHLD.shape[2]
        if self.length is None:
            check_block(self.block, found)
            return found
        if found > self.length:
            of = "row_weights are for" if self.row_weights is not None else "the maps are of"
            raise ConfigError(
                f"q has {found} tokens; {of} {self.length}: allowed are at most as many. Give the "
                "accumulator the length of the longest input"
            )
        return self.length


def _checked_length(block: int, row_weights: Tensor | None, length: int | None) -> int | None:
    """Return L where it is known by now, or raise ConfigError unless the arguments fit."""
    whole = isinstance(length, Integral) and not isinstance(length, bool)
    if length is not None and not (whole and length >= 1):
        raise ConfigError(f"length is {length!r}; allowed: a whole number from 1 up, or None")
    if row_weights is not None:
        if row_weights.dim() != 1 or not row_weights.is_floating_point():
            raise ConfigError(
                f"row_weights has shape {tuple(row_weights.shape)} and dtype {row_weights.dtype}; "
                f"allowed: (L,) floating"
            )
        if length is not None and length != row_weights.shape[0]:
            raise ConfigError(
                f"length is {length} and row_weights are for {row_weights.shape[0]} tokens; "
                "allowed: the same, or leave length out"
            )
        length = row_weights.shape[0]
    if length is not None:
        check_block(block, length)
    elif not isinstance(block, Integral) or isinstance(block, bool) or block < 1:
        raise ConfigError(f"block is {block!r}; allowed: a whole number from 1 up")
    return length
