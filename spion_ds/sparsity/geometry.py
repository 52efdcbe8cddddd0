"""Shapes that the static layouts are made of: windows, global blocks, random blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from spion_ds.errors import ConfigError

DIRECTIONS = ("bidirectional", "unidirectional")


def check_direction(attention: object) -> str:
    """Return ``attention`` if it is one of the two directions, else raise ConfigError."""
    if attention not in DIRECTIONS:
        raise ConfigError(f"attention is {attention!r}; allowed: {' or '.join(DIRECTIONS)}")
    return str(attention)


def check_horizontal(horizontal: bool, attention: str) -> None:
    """Raise ConfigError if global blocks shall keep all columns and none right of the diagonal."""
    if horizontal and attention == "unidirectional":
        raise ConfigError(
            "horizontal_global_attention is True with attention 'unidirectional'; it would "
            "reach into the future: allowed with 'bidirectional' only"
        )


def check_count(name: str, value: object, least: int) -> int:
    """Return ``value`` if it is a whole number of at least ``least``, else raise ConfigError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; allowed: a whole number from {least} up")
    return value


def check_fits(name: str, value: int, blocks: int, block: int) -> None:
    """Raise ConfigError if a row of ``blocks`` blocks has no room for ``value`` of them."""
    if value > blocks:
        raise ConfigError(
            f"{name} is {value}, and a row has {blocks} blocks of {block} tokens; allowed: at most "
            f"{blocks}, or take a smaller block or a longer input"
        )


def keep_global(layout: Tensor, blocks: slice, attention: str, horizontal: bool) -> None:
    """Let every query attend to the key ``blocks`` in ``layout`` (n, n), in place.

    Queries before the blocks do not if ``attention`` is unidirectional; with ``horizontal`` the
    blocks' queries attend to everything.
    """
    layout[blocks.start if attention == "unidirectional" else 0 :, blocks] = 1
    if horizontal:
        layout[blocks, :] = 1


def global_ranges(starts: object, ends: object) -> tuple[list[int], list[int] | None]:
    """Return ``global_block_indices`` and ``global_block_end_indices`` as lists, checked.

    Raises:
        ConfigError: not whole numbers, lists of different lengths, or an empty range.
    """
    first = _whole_numbers("global_block_indices", starts)
    if ends is None:
        return first, None
    last = _whole_numbers("global_block_end_indices", ends)
    if len(first) != len(last):
        raise ConfigError(
            f"global_block_end_indices has {len(last)} entries and global_block_indices "
            f"{len(first)}; give one end (exclusive) for each start"
        )
    for start, end in zip(first, last, strict=True):
        if start >= end:
            raise ConfigError(
                f"global_block_end_indices has {end} for the start {start}; allowed: an end "
                f"(exclusive) from {start + 1} up"
            )
    return first, last


def window_sizes(name: str, sizes: object) -> list[int]:
    """Return the sizes of consecutive windows as a list, checked: at least one, each from 1 up."""
    checked = _whole_numbers(name, sizes)
    if not checked or min(checked) < 1:
        raise ConfigError(f"{name} is {sizes!r}; allowed: one or more whole numbers from 1 up")
    return checked


def global_slices(starts: list[int], ends: list[int] | None, blocks: int) -> list[slice]:
    """Return the global blocks that lie within ``blocks`` blocks; -1 is the last one."""
    if ends is None:
        ends = [start + 1 if start != -1 else blocks for start in starts]
    return [
        slice(start, min(end, blocks))
        for start, end in zip(starts, ends, strict=True)
        if start < blocks
    ]


def same_window(window_of: Tensor, attention: str) -> Tensor:
    """Return which blocks share a window, (n, n) bool; below the diagonal if unidirectional.

    Args:
        window_of: (n,) the window that each block is in.
        attention: ``"bidirectional"`` or ``"unidirectional"``.
    """
    kept = window_of[:, None] == window_of[None, :]
    return kept.tril() if attention == "unidirectional" else kept


def sliding_window(blocks: int, width: int) -> Tensor:
    """Return the band of ``width // 2`` blocks on either side of the diagonal, (n, n) bool."""
    place = torch.arange(blocks)
    return (place[:, None] - place[None, :]).abs() <= width // 2


def random_blocks(
    blocks: int, count: int, seed: int, head: int, *, up_to_diagonal: bool = False
) -> Tensor:
    """Return ``count`` different blocks of each row drawn from seed and head alone, (n, n) bool.

    With ``up_to_diagonal`` row r draws among its first r + 1 blocks, at most all of them.
    """
    # Only random() is promised to give the same numbers in every version of Python.
    draw = random.Random(seed * 1_000_003 + head).random
    kept = torch.zeros((blocks, blocks), dtype=torch.bool)
    for row in range(blocks):
        order = sorted((draw(), column) for column in range(blocks))
        columns = [column for _, column in order if not up_to_diagonal or column <= row]
        kept[row, columns[:count]] = True
    return kept


def _whole_numbers(name: str, values: object) -> list[int]:
    whole = isinstance(values, Sequence) and not isinstance(values, str)
    if not whole or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):  # type: ignore[attr-defined]
        raise ConfigError(f"{name} is {values!r}; allowed: a list of whole numbers, e.g. [0]")
    return list(values)  # type: ignore[call-overload]
