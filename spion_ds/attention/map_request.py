"""What is asked of a backend that makes attention maps, and how rows are weighted.

Shape suffixes: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spion_ds.attention.options import zero_padding
from spion_ds.errors import ConfigError


class MapRequest(NamedTuple):
    """What a backend needs to know; checked by the functions that make one.

    Attributes:
        q: (batch, heads, L, head_dim).
        k: (batch, kv_heads, L, head_dim).
        row_weights: (L,) float64 on q's device; row i of the map is this times the sum over heads
            and over the samples whose token i is real.
        key_padding_mask: (batch, L) bool, True = real token.
        causal: keys after the query are excluded.
        scale: factor of the scores.
        block: side of a block; 1 gives the token-level map.
        filter_size: side of the diagonal convolution, odd; 1 is none.
        per_head: a map for each query head, whose row i is ``row_weights`` times the sum over the
            samples alone.
    """

    q: Tensor
    k: Tensor
    row_weights: Tensor
    key_padding_mask: Tensor | None
    causal: bool
    scale: float
    block: int = 1
    filter_size: int = 1
    per_head: bool = False

    @property
    def length(self) -> int:
        """L."""
        return self.q.shape[2]

    def of_heads(self) -> Iterator[MapRequest]:
        """Yield the request for the map of each query head alone, with the key head it shares."""
        groups = self.q.shape[1] // self.k.shape[1]
        for head in range(self.q.shape[1]):
            key_head = head // groups
            yield self._replace(q=self.q[:, head : head + 1], k=self.k[:, key_head : key_head + 1])


def row_counts(key_padding_mask: Tensor, heads: int) -> Tensor:
    """Return in how many (sample, head) pairs each token is real, (L,) float64.

    Args:
        key_padding_mask: (batch, L) bool, True = real token.
        heads: of the queries.
    """
    return key_padding_mask.sum(dim=0).to(torch.float64) * heads


def mean_row_weights(count: Tensor) -> Tensor:
    """Return 1 / count, and 0 where a row is padding in every sample; (L,) float64.

    Args:
        count: (L,), :func:`row_counts` of the whole batch.
    """
    return torch.where(count > 0, 1.0 / count.to(torch.float64).clamp(min=1.0), 0.0)


def check_tensors(q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> None:
    """Raise ConfigError unless the tensors fit each other."""
    fits = q.dim() == k.dim() == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    if not fits or q.shape[1] % k.shape[1] != 0:
        raise ConfigError(
            "q is (batch, heads, L, head_dim) and k (batch, kv_heads, L, head_dim), kv_heads "
            f"dividing heads; got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if key_padding_mask is not None and key_padding_mask.shape != (q.shape[0], q.shape[2]):
        raise ConfigError(
            f"key_padding_mask is bool {(q.shape[0], q.shape[2])}; got "
            f"{tuple(key_padding_mask.shape)}"
        )
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise ConfigError(
            f"key_padding_mask is {key_padding_mask.dtype}; allowed: bool, True = real token (for "
            "a mask of 1 and 0 pass mask.bool())"
        )


def pad_to(
    q: Tensor, k: Tensor, key_padding_mask: Tensor | None, length: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return queries, keys and mask as of ``length`` tokens, at least as many as they have.

    The tokens behind the last are padding: their mask is False.
    """
    missing = length - q.shape[2]
    if missing == 0:
        return q, k, key_padding_mask
    real = key_padding_mask
    if real is None:
        real = q.new_ones((q.shape[0], q.shape[2]), dtype=torch.bool)
    q, k = (F.pad(x, (0, 0, 0, missing)) for x in (q, k))
    return q, k, F.pad(real, (0, missing), value=False)


def map_request(
    q: Tensor,
    k: Tensor,
    row_weights: Tensor,
    key_padding_mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> MapRequest:
    """Return a request for the token-level map; ``scale`` None is head_dim ** -0.5.

    Padded tokens are 0 in it: nothing that they hold, NaN included, gets into a map.
    """
    if key_padding_mask is not None:
        q, k = (zero_padding(x, key_padding_mask) for x in (q, k))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return MapRequest(q, k, row_weights, key_padding_mask, causal, scale)


def query_counts(q_BHLD: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """Return how many (sample, head) pairs have a real query in each row, (L,) float64."""
    batch, heads, length, _ = q_BHLD.shape
    if key_padding_mask is None:
        return q_BHLD.new_full((length,), batch * heads, dtype=torch.float64)
    return row_counts(key_padding_mask, heads)
