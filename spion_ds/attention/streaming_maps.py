"""Attention maps pooled while they are computed: memory for tiles and (n, n) sums at any length.

The diagonal convolution is linear, so a tile of the map can be added to the block sums as soon as
it is known. The PyTorch functions here are the specification; cpu_maps.py and triton_maps.py are
faster versions, chosen by :func:`block_sums`.

Shape suffixes: B batch, H heads, L tokens, R rows and C columns of a tile, D head_dim, n blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spion_ds.attention.dropout import HAS_TRITON
from spion_ds.errors import ConfigError
from spion_ds.patterns.pooling import add_groups, check_block, check_filter_size, group_sizes

# Bytes of the scores of one tile, all heads and samples.
_TILE_BYTES = 64 << 20


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
    """

    q: Tensor
    k: Tensor
    row_weights: Tensor
    key_padding_mask: Tensor | None
    causal: bool
    scale: float
    block: int = 1
    filter_size: int = 1

    @property
    def length(self) -> int:
        """L."""
        return self.q.shape[2]


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


def pooled_map(request: MapRequest) -> Tensor:
    """Return the pooled map of one batch, (n, n) float64; means over the entries of each block."""
    sizes = group_sizes(request.length, request.block, request.q.device)
    return block_sums(request) / (sizes[:, None] * sizes)


def block_sums(request: MapRequest) -> Tensor:
    """Return the block sums of the convolved map, (n, n) float64, by the fastest way there is."""
    if request.q.is_cuda and HAS_TRITON:
        from spion_ds.attention import triton_maps

        if triton_maps.unsupported(request) is None:
            return triton_maps.block_sums_triton(request)
    if request.q.device.type == "cpu":
        from spion_ds.attention import cpu_maps

        if cpu_maps.unsupported(request) is None:
            return cpu_maps.block_sums_cpu(request)
    return block_sums_torch(request)


def block_sums_torch(request: MapRequest) -> Tensor:
    """Return the block sums of the convolved map, (n, n) float64: the specification.

    Entry (r, c) of the map A is part of S[i, j] = Σ_f A[i + f, j + f] for (i, j) = (r - f, c - f),
    f = -h … h, where that is inside the map (arXiv 2309.12578). Probabilities are float32
    (float64 for float64 inputs), sums over heads and blocks float64, in a fixed order.
    """
    length, block, half = request.length, request.block, request.filter_size // 2
    n = -(-length // block)
    total = request.row_weights.new_zeros((n, n))
    for rows, columns, tile in _mean_tiles(request):
        top, left = rows.start - half, columns.start - half
        height, width = tile.shape
        spread = tile.new_zeros(height + 2 * half, width + 2 * half)
        for offset in range(request.filter_size):
            spread[offset : offset + height, offset : offset + width] += tile
        spread = spread[max(0, -top) : length - top, max(0, -left) : length - left]
        top, left = max(0, top), max(0, left)
        # Zeros in front make the first group of rows, and of columns, a whole block.
        spread = F.pad(spread, (left % block, 0, top % block, 0))
        sums = add_groups(add_groups(spread, block).T, block).T
        i, j = top // block, left // block
        total[i : i + sums.shape[0], j : j + sums.shape[1]] += sums
    return total


def skewness(request: MapRequest) -> Tensor:
    """Return the third standardised moment over all L² entries of the map, () float64.

    The variance is the population's. The rows of a mean map sum to 1, or to 0 where the token is
    padding in every sample, so the mean is known beforehand and the powers of the differences
    from it add up tile by tile without cancellation. 0 where all entries are equal.
    """
    entries = request.length**2
    mean = float((request.row_weights > 0).sum()) / entries
    square, cube = _central_sums(request, mean)
    # Not 0 / 0. NaN stays NaN.
    return torch.where(square == 0.0, 0.0, (cube / entries) / (square / entries) ** 1.5)


def _central_sums(request: MapRequest, mean: float) -> Tensor:
    """Return Σ(a - mean)² and Σ(a - mean)³ over the map, (2,) float64."""
    if request.q.is_cuda and HAS_TRITON:
        from spion_ds.attention import triton_maps

        request = request._replace(block=triton_maps.MIN_BLOCK)  # of no consequence here
        if triton_maps.unsupported(request) is None:
            return triton_maps.central_sums_triton(request, mean)
    if request.q.device.type == "cpu":
        from spion_ds.attention import cpu_maps

        if cpu_maps.unsupported(request) is None:
            return cpu_maps.central_sums_cpu(request, mean)
    return central_sums_torch(request, mean)


def central_sums_torch(request: MapRequest, mean: float) -> Tensor:
    """Return Σ(a - mean)² and Σ(a - mean)³ over the map, (2,) float64: the specification."""
    sums = request.row_weights.new_zeros(2)
    zeros = request.length**2
    for _, _, tile in _mean_tiles(request):
        difference = tile - mean
        square = difference * difference
        sums += torch.stack([square.sum(), (square * difference).sum()])
        zeros -= tile.numel()
    return sums + zeros * sums.new_tensor([mean**2, -(mean**3)])


def _mean_tiles(request: MapRequest) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield rows, columns and the weighted sum over heads and samples, (R, C) float64, of tiles.

    Tiles that causality empties are left out.
    """
    batch, heads, length, _ = request.q.shape
    side = max(1, int((_TILE_BYTES // 4 // (batch * heads)) ** 0.5))
    tiles = [slice(first, min(first + side, length)) for first in range(0, length, side)]
    for rows in tiles:
        # Two passes over the keys: the softmax's maximum and denominator, then probabilities.
        top_BHR, total_BHR = _row_statistics(request, rows, tiles)
        for columns in tiles:
            if request.causal and columns.start >= rows.stop:
                continue
            probs_BHRC = (_scores(request, rows, columns) - top_BHR[..., None]).exp_()
            probs_BHRC /= total_BHR[..., None]
            if request.key_padding_mask is not None:
                # Drops padded queries, and the NaN rows of those that see no key.
                padded = ~request.key_padding_mask[:, None, rows, None]
                probs_BHRC.masked_fill_(padded, 0.0)
            tile = probs_BHRC.sum(dim=(0, 1), dtype=torch.float64)  # (R, C)
            yield rows, columns, tile * request.row_weights[rows, None]


def _row_statistics(request: MapRequest, rows: slice, tiles: list[slice]) -> tuple[Tensor, Tensor]:
    """Return each row's largest score and its sum of exp(score - largest), (B, H, R) each."""
    batch, heads, _, _ = request.q.shape
    dtype = torch.float64 if request.q.dtype == torch.float64 else torch.float32
    # The lowest finite number, not -inf: a row that has met no key yet makes no NaN.
    top_BHR = torch.full(
        (batch, heads, rows.stop - rows.start),
        torch.finfo(dtype).min,
        dtype=dtype,
        device=request.q.device,
    )
    total_BHR = torch.zeros_like(top_BHR)
    for columns in tiles:
        if request.causal and columns.start >= rows.stop:
            continue
        scores_BHRC = _scores(request, rows, columns)
        new_BHR = torch.maximum(top_BHR, scores_BHRC.amax(dim=-1))
        total_BHR *= (top_BHR - new_BHR).exp_()
        total_BHR += (scores_BHRC - new_BHR[..., None]).exp_().sum(dim=-1)
        top_BHR = new_BHR
    return top_BHR, total_BHR


def _scores(request: MapRequest, rows: slice, columns: slice) -> Tensor:
    """Return the scaled scores of a tile, (B, H, R, C), -inf where a key is excluded."""
    q_BHLD, k_BHLD = request.q, request.k
    full = torch.float64 if q_BHLD.dtype == torch.float64 else torch.float32
    q_BHRD = q_BHLD[:, :, rows].to(full) * request.scale
    k_BHCD = k_BHLD[:, :, columns].to(full)
    groups = q_BHLD.shape[1] // k_BHLD.shape[1]
    k_BHCD = k_BHCD.repeat_interleave(groups, dim=1) if groups > 1 else k_BHCD
    scores_BHRC = q_BHRD @ k_BHCD.transpose(-2, -1)
    if request.causal and columns.stop > rows.start:
        position = torch.arange(request.length, device=q_BHLD.device)
        scores_BHRC.masked_fill_(position[columns] > position[rows, None], float("-inf"))
    if request.key_padding_mask is not None:
        padded = ~request.key_padding_mask[:, None, None, columns]
        scores_BHRC.masked_fill_(padded, float("-inf"))
    return scores_BHRC


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
