"""Pools an (L, L) attention map to (n, n) blocks: the same bits on every device.

Flood fill breaks ties by equality, so one differing last bit can change a pattern. Everything here
is float64 and elementwise adds in one fixed order; no library reduction, whose order would depend
on the device and the number of threads.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor

from spion_ds.errors import ConfigError

# Rows that pool_map treats at a time: little enough for a CPU's cache. On a GPU, where each of some
# hundred small operators a strip is a launch, as many as have so many entries.
_STRIP_ROWS = 128
_GPU_STRIP_ENTRIES = 1 << 23


def pool_map(attention_map: Tensor, block: int, filter_size: int | None = None) -> Tensor:
    """Return the block means of an attention map, after the diagonal convolution if asked for.

    With ``filter_size`` = 2h+1 the map A is first replaced by S[i,j] = Σ_{f=-h..h} A[i+f, j+f],
    terms outside the map being 0 (arXiv 2309.12578; an identity kernel, not normalised). A last
    partial block is the mean over the entries that exist. Needs memory for a few strips of rows.

    Args:
        attention_map: (L, L), any floating dtype, any device.
        block: side of a block, 1 to L.
        filter_size: side of the diagonal convolution, odd; None pools the map as it is.

    Returns:
        (n, n) float64 with n = ceil(L / block), on the map's device; equal inputs give equal bits
        on every device and with every number of threads.

    Raises:
        ConfigError: the map is not square or not floating, or an argument is out of range.
    """
    check_map(attention_map)
    length = attention_map.shape[0]
    check_block(block, length)
    check_filter_size(filter_size)
    rows = _STRIP_ROWS
    if attention_map.is_cuda:
        rows = max(rows, _GPU_STRIP_ENTRIES // length)
    strip = block * max(1, rows // block)
    pooled = []
    for start in range(0, length, strip):
        stop = min(length, start + strip)
        first, last = rows_needed(start, stop, length, filter_size)
        pooled.append(pool_rows(attention_map[first:last], start, stop, block, filter_size))
    return torch.cat(pooled)


def rows_needed(
    start: int, stop: int, length: int, filter_size: int | None = None
) -> tuple[int, int]:
    """Return the range of map rows that pooling the rows ``start`` to ``stop`` reads.

    That is [start - h, stop + h) cut to [0, length), h being half the filter (0 without one).
    """
    half = (filter_size or 1) // 2
    return max(0, start - half), min(length, stop + half)


def pool_rows(
    rows: Tensor, start: int, stop: int, block: int, filter_size: int | None = None
) -> Tensor:
    """Return the block rows that the map rows ``start`` to ``stop`` give.

    For maps that are computed strip by strip. The strips may be cut anywhere between blocks:
    put together, the results are bit for bit what :func:`pool_map` returns for the whole map.

    Args:
        rows: (R, L) the rows of the map in the range ``rows_needed(start, stop, L, filter_size)``,
            any floating dtype, any device.
        start: first row to pool, a multiple of ``block``.
        stop: end of the rows to pool, a multiple of ``block`` or L.
        block: side of a block.
        filter_size: side of the diagonal convolution, odd; None pools the rows as they are.

    Returns:
        (k, n) float64 with k = ceil((stop - start) / block) and n = ceil(L / block).

    Raises:
        ConfigError: ``rows`` is not the range that is needed, or an argument is out of range.
    """
    _check_rows(rows, start, stop, block, filter_size)
    rows = rows.detach().to(torch.float64)
    if filter_size is not None:
        rows = _convolve(rows, start, stop, filter_size)  # (stop - start, L)
    sums = add_groups(add_groups(rows, block).T, block).T  # (k, n)
    heights = group_sizes(rows.shape[0], block, rows.device)
    widths = group_sizes(rows.shape[1], block, rows.device)
    # A tensor of counts: dividing by a Python number multiplies by its reciprocal on a GPU.
    return sums / (heights[:, None] * widths)


def quantile(values: Tensor, q: float) -> float:
    """Return the q-quantile over all entries, by linear interpolation in float64.

    The same as ``numpy.quantile(values, q)`` (method "linear") for float64 values, of any number.

    Args:
        values: non-empty floating tensor of any shape and device.
        q: 0 to 1.

    Raises:
        ConfigError: ``values`` is empty or has a NaN, or ``q`` is out of range.
    """
    if not isinstance(q, Real) or not 0.0 <= q <= 1.0:
        raise ConfigError(f"q is {q!r}; allowed: 0 to 1")
    if values.numel() == 0:
        raise ConfigError(f"values has shape {tuple(values.shape)}; allowed: at least one entry")
    ordered = values.detach().to(torch.float64).flatten().sort().values
    if ordered[-1].isnan():  # sorting puts NaN last
        raise ConfigError("values has NaN entries; allowed: numbers")
    position = float(q) * (ordered.numel() - 1)
    below = math.floor(position)
    fraction = position - below
    low = ordered[below].item()
    high = ordered[min(below + 1, ordered.numel() - 1)].item()
    # Interpolating from the nearer end never overshoots it, whatever the rounding.
    if fraction >= 0.5:
        return high - (high - low) * (1 - fraction)
    return low + (high - low) * fraction


def _convolve(rows: Tensor, start: int, stop: int, filter_size: int) -> Tensor:
    """Return the rows start to stop of the diagonal convolution, (stop - start, L) float64."""
    length = rows.shape[1]
    half = filter_size // 2
    first, _ = rows_needed(start, stop, length, filter_size)
    result = rows.new_zeros(stop - start, length)
    for f in range(-half, half + 1):
        # Rows i and columns j of the result for which (i + f, j + f) is inside the map.
        top, bottom = max(start, -f), min(stop, length - f)
        left, right = max(0, -f), min(length, length - f)
        if top < bottom and left < right:
            shifted = rows[top + f - first : bottom + f - first, left + f : right + f]
            result[top - start : bottom - start, left:right] += shifted
    return result


def add_groups(values: Tensor, block: int) -> Tensor:
    """Add each ``block`` consecutive rows, first to last: (R, C) → (ceil(R / block), C)."""
    sums = values[::block].clone()
    for offset in range(1, min(block, values.shape[0])):
        part = values[offset::block]
        sums[: part.shape[0]] += part
    return sums


def group_sizes(rows: int, block: int, device: torch.device) -> Tensor:
    """Return how many of ``rows`` consecutive rows fall into each group, (k,) float64."""
    sizes = torch.full((math.ceil(rows / block),), float(block), dtype=torch.float64, device=device)
    sizes[-1] = rows - block * (sizes.numel() - 1)
    return sizes


def _check_rows(rows: Tensor, start: int, stop: int, block: int, filter_size: int | None) -> None:
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ConfigError(
            f"rows has shape {tuple(rows.shape)} and dtype {rows.dtype}; allowed: (R, L) floating"
        )
    length = rows.shape[1]
    check_block(block, length)
    check_filter_size(filter_size)
    if not 0 <= start < stop <= length or start % block or (stop % block and stop != length):
        raise ConfigError(
            f"start is {start} and stop is {stop}; allowed: multiples of block ({block}) with "
            f"0 ≤ start < stop ≤ {length}; stop may also be {length}"
        )
    first, last = rows_needed(start, stop, length, filter_size)
    if rows.shape[0] != last - first:
        raise ConfigError(
            f"rows has {rows.shape[0]} rows; pooling rows {start} to {stop} of {length} with "
            f"filter_size {filter_size} needs the {last - first} rows from {first} to {last}"
        )


def check_map(attention_map: Tensor) -> None:
    """Raise ConfigError unless the map is square, non-empty and floating."""
    shape = tuple(attention_map.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ConfigError(f"attention_map has shape {shape}; allowed: a square (L, L), L ≥ 1")
    if not attention_map.is_floating_point():
        raise ConfigError(
            f"attention_map has dtype {attention_map.dtype}; allowed: a floating dtype"
        )


def check_block(block: int, length: int) -> None:
    """Raise ConfigError unless ``block`` is a whole number from 1 to ``length``."""
    if not isinstance(block, Integral) or isinstance(block, bool) or not 1 <= block <= length:
        raise ConfigError(f"block is {block!r}; allowed: a whole number from 1 to {length}")


def check_filter_size(filter_size: int | None) -> None:
    """Raise ConfigError unless ``filter_size`` is None or an odd positive whole number."""
    if filter_size is None:
        return
    whole = isinstance(filter_size, Integral) and not isinstance(filter_size, bool)
    if not whole or filter_size < 1 or filter_size % 2 == 0:
        raise ConfigError(f"filter_size is {filter_size!r}; allowed: odd whole numbers, e.g. 31")
