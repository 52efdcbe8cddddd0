"""Attention maps by the fastest backend that serves: the one place that knows all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.attention.available import HAS_TRITON
from spion_ds.attention.cpu import maps as cpu_maps
from spion_ds.attention.derivatives import refuse_transforms
from spion_ds.attention.map_request import MapRequest
from spion_ds.attention.streaming_maps import block_sums_torch, central_sums_torch
from spion_ds.patterns.pooling import group_sizes

_DETACHED = "tensors that are detached, as maps have no gradient"


def pooled_map(request: MapRequest) -> Tensor:
    """Return the pooled map of one batch, float64; means over the entries of each block.

    (n, n), or (heads, n, n) of a request for a map a head.
    """
    refuse_transforms("an attention map", request.q, request.k, allowed=_DETACHED)
    sizes = group_sizes(request.length, request.block, request.q.device)
    return block_sums(request) / (sizes[:, None] * sizes)


def block_sums(request: MapRequest) -> Tensor:
    """Return the block sums of the convolved map, by the fastest way there is.

    (n, n) float64, or (heads, n, n) of a request for a map a head.
    """
    if request.q.is_cuda and HAS_TRITON:
        from spion_ds.attention.triton import maps as triton_maps

        if triton_maps.unsupported(request) is None:
            return triton_maps.block_sums_triton(request)
    on_cpu = request.q.device.type == "cpu" and cpu_maps.unsupported(request) is None
    sums_of = cpu_maps.block_sums_cpu if on_cpu else block_sums_torch
    if request.per_head:
        return torch.stack([sums_of(head) for head in request.of_heads()])
    return sums_of(request)


def skewness(request: MapRequest) -> Tensor:
    """Return the third standardised moment over all L² entries of the map, () float64.

    The variance is the population's. The rows of a mean map sum to 1, or to 0 where the token is
    padding in every sample, so the mean is known beforehand and the powers of the differences
    from it add up tile by tile without cancellation. 0 where all entries are equal.
    """
    refuse_transforms("an attention map", request.q, request.k, allowed=_DETACHED)
    entries = request.length**2
    mean = float((request.row_weights > 0).sum()) / entries
    square, cube = _central_sums(request, mean)
    # Not 0 / 0. NaN stays NaN.
    return torch.where(square == 0.0, 0.0, (cube / entries) / (square / entries) ** 1.5)


def _central_sums(request: MapRequest, mean: float) -> Tensor:
    """Return Σ(a - mean)² and Σ(a - mean)³ over the map, (2,) float64."""
    if request.q.is_cuda and HAS_TRITON:
        from spion_ds.attention.triton import maps as triton_maps

        request = request._replace(block=triton_maps.MIN_BLOCK)  # of no consequence here
        if triton_maps.unsupported(request) is None:
            return triton_maps.central_sums_triton(request, mean)
    if request.q.device.type == "cpu" and cpu_maps.unsupported(request) is None:
        return cpu_maps.central_sums_cpu(request, mean)
    return central_sums_torch(request, mean)
