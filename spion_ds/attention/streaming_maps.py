"""Attention maps pooled while they are computed: memory for tiles and (n, n) sums at any length.

The diagonal convolution is linear, so a tile of the map can be added to the block sums as soon as
it is known. The PyTorch functions here are the specification; cpu/maps.py and triton/maps.py are
faster versions, chosen in map_dispatch.py.

Shape suffixes: B batch, H heads, L tokens, R rows and C columns of a tile, D head_dim, n blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from spion_ds.attention.map_request import MapRequest
from spion_ds.patterns.pooling import add_groups

# Bytes of the scores of one tile, all heads and samples.
_TILE_BYTES = 64 << 20


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
