"""Flood fill: which blocks of a pooled attention map greedy walks mark (arXiv 2309.12578)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spion_ds.errors import ConfigError
from spion_ds.extension import cuda_operators_available, operators_available


def flood_fill(pooled: Tensor, threshold: float) -> Tensor:
    """Return the blocks that some walk steps onto and whose value is above the threshold.

    Walks start at every block of the first row and of the first column, and go down, right or
    diagonally to the largest neighbour until they leave the map. Values are compared in float64.
    The diagonal is not forced in. Runs where the map is, in CUDA or C++, a thread a walk or some;
    without a CUDA compiler in C++ on the CPU, and without any in Python, with the same result.

    Args:
        pooled: (n, n) pooled attention map, any floating dtype, any device, finite.
        threshold: only blocks strictly above it are marked.

    Returns:
        (n, n) bool, on the device of ``pooled``.

    Raises:
        ConfigError: ``pooled`` is not square, is empty, not floating or not finite, or
            ``threshold`` is NaN.
    """
    threshold = float(threshold)
    if math.isnan(threshold):
        raise ConfigError("threshold is nan; allowed: any number")
    check_pooled(pooled)
    if pooled.is_cuda and cuda_operators_available():
        return torch.ops.spion_ds.flood_fill(pooled.detach(), threshold)
    on_cpu = pooled.detach().to("cpu", torch.float64)
    if operators_available():
        marked = torch.ops.spion_ds.flood_fill(on_cpu, threshold)
    else:
        marked = flood_fill_reference(on_cpu, threshold)
    return marked.to(pooled.device)


def flood_fill_reference(pooled: Tensor, threshold: float) -> Tensor:
    """Return what :func:`flood_fill` returns, on the CPU: its specification, written to be read.

    Args:
        pooled: (n, n) floating map.
        threshold: only blocks strictly above it are marked.

    Returns:
        (n, n) bool on the CPU.
    """
    n = pooled.shape[0]
    # One row of zeros below and one column of zeros on the right: (n + 1, n + 1).
    padded = torch.nn.functional.pad(pooled.detach().to("cpu", torch.float64), (0, 1, 0, 1))
    value = padded.tolist()
    marked = torch.zeros(n + 1, n + 1, dtype=torch.bool).tolist()
    starts = [(0, k) for k in range(n)] + [(k, 0) for k in range(n)]
    for x, y in starts:
        while x < n and y < n:
            down, right, diagonal = value[x + 1][y], value[x][y + 1], value[x + 1][y + 1]
            if down > right and down > diagonal:
                x += 1
            elif down <= right and right > diagonal:
                y += 1
            else:
                x += 1
                y += 1
            if value[x][y] > threshold:
                marked[x][y] = True
    return torch.tensor(marked)[:n, :n].contiguous()


def check_pooled(pooled: Tensor, name: str = "pooled") -> None:
    """Raise ConfigError unless ``pooled`` is a square, non-empty, floating and finite map."""
    if pooled.dim() != 2 or pooled.shape[0] != pooled.shape[1] or pooled.shape[0] == 0:
        raise ConfigError(
            f"{name} has shape {tuple(pooled.shape)}; allowed: a square (n, n) map with n ≥ 1"
        )
    if not pooled.is_floating_point():
        raise ConfigError(f"{name} has dtype {pooled.dtype}; allowed: a floating dtype")
    finite = torch.isfinite(pooled)
    if not finite.all():
        bad = int((~finite).sum())
        raise ConfigError(
            f"{name} of shape {tuple(pooled.shape)} has {bad} entries that are NaN or infinite; "
            f"allowed: finite values"
        )
