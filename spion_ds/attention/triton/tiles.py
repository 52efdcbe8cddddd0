"""How each Triton kernel cuts its work, by head_dim and block; see benchmarks/tune_tiles.py.

Taken on one H100 in bf16; docs/kernels_triton.md says what else was tried. A wrong choice costs
time, never correctness.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch


class Tiles(NamedTuple):
    """A launch configuration.

    Attributes:
        own: tokens of a block that a program owns.
        tile: partner tokens that it takes at a time.
        num_warps, num_stages: Triton's.
        max_registers: of a thread, so that more programs fit a multiprocessor; None: as many as
            it takes.
    """

    own: int
    tile: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def launch(self) -> dict[str, int]:
        """Triton's options."""
        return launch_options(self.num_warps, self.num_stages, self.max_registers)


# By kernel, head_dim (up to) and block, for 16-bit floats.
TABLE: dict[str, dict[int, dict[int, Tiles]]] = {
    "fwd": {
        32: {
            16: Tiles(16, 32, 1, 2),
            32: Tiles(32, 32, 1, 2, 128),
            64: Tiles(64, 64, 4, 3, 96),
            128: Tiles(64, 64, 4, 3, 96),
        },
        64: {
            16: Tiles(16, 32, 1, 2),
            32: Tiles(32, 32, 1, 2),
            64: Tiles(64, 64, 4, 2),
            128: Tiles(64, 64, 4, 2),
        },
        128: {
            16: Tiles(16, 64, 2, 2),
            32: Tiles(32, 64, 4, 2),
            64: Tiles(64, 64, 4, 3),
            128: Tiles(64, 64, 4, 3),
        },
        256: {
            16: Tiles(16, 32, 4, 2),
            32: Tiles(32, 32, 4, 2),
            64: Tiles(64, 32, 8, 2),
            128: Tiles(64, 32, 8, 2),
        },
    },
    "dq": {
        32: {
            16: Tiles(16, 32, 1, 2),
            32: Tiles(32, 32, 1, 2),
            64: Tiles(64, 64, 4, 2),
            128: Tiles(64, 64, 4, 2),
        },
        64: {
            16: Tiles(16, 32, 1, 2),
            32: Tiles(32, 32, 1, 2),
            64: Tiles(64, 64, 4, 3),
            128: Tiles(64, 64, 4, 2),
        },
        128: {
            16: Tiles(16, 64, 2, 2),
            32: Tiles(32, 64, 4, 2),
            64: Tiles(64, 64, 4, 2),
            128: Tiles(64, 64, 4, 2),
        },
        256: {
            16: Tiles(16, 32, 4, 1),
            32: Tiles(32, 32, 4, 1),
            64: Tiles(64, 32, 8, 1),
            128: Tiles(64, 32, 8, 1),
        },
    },
    "dkv": {
        32: {
            16: Tiles(16, 32, 1, 2),
            32: Tiles(32, 32, 2, 2),
            64: Tiles(64, 64, 4, 1),
            128: Tiles(64, 64, 4, 1),
        },
        64: {
            16: Tiles(16, 64, 1, 2),
            32: Tiles(32, 64, 2, 2),
            64: Tiles(64, 64, 4, 2),
            128: Tiles(64, 64, 4, 2),
        },
        128: {
            16: Tiles(16, 64, 2, 2),
            32: Tiles(32, 64, 4, 2),
            64: Tiles(64, 32, 4, 2),
            128: Tiles(64, 32, 4, 2),
        },
        256: {
            16: Tiles(16, 32, 4, 1),
            32: Tiles(32, 32, 4, 1),
            64: Tiles(64, 32, 8, 1),
            128: Tiles(64, 32, 8, 1),
        },
    },
}

# Rows and columns in one launch, where that is faster: q, k, v and dO are then read once.
TABLE["both"] = {
    32: {
        16: Tiles(16, 32, 1, 2),
        32: Tiles(32, 32, 1, 2, 168),
        64: Tiles(64, 64, 4, 1, 128),
        128: Tiles(64, 64, 4, 1, 128),
    },
}

# With dropout, whose bits need registers, other cuts keep more programs on a multiprocessor.
TABLE["both_dropout"] = {
    32: {
        16: Tiles(16, 32, 1, 2),
        32: Tiles(32, 32, 2, 1, 128),
        64: Tiles(64, 32, 4, 2),
        128: Tiles(64, 32, 4, 2),
    },
}

MAX_HEAD_DIM = max(TABLE["fwd"])


@functools.cache
def choose_tiles(kernel: str, block: int, head_dim: int, dtype: torch.dtype) -> Tiles:
    """Return how ``kernel``, a key of the table, cuts blocks of ``block`` tokens."""
    if dtype == torch.float32:
        # Full float32 products use no tensor cores, and hold their operands in registers.
        return Tiles(min(block, 32), 32, 4 if head_dim <= 64 else 8, 1)
    table = TABLE[kernel]
    return table[next(width for width in table if head_dim <= width)][block]


@functools.cache
def find_tiles(kernel: str, block: int, head_dim: int, dtype: torch.dtype) -> Tiles | None:
    """Return how ``kernel`` cuts blocks, None where the table has no tiles for this head_dim."""
    if dtype == torch.float32 or head_dim > max(TABLE[kernel]):
        return None
    return choose_tiles(kernel, block, head_dim, dtype)


@functools.cache
def launch_options(num_warps: int, num_stages: int, max_registers: int | None) -> dict[str, int]:
    """Return Triton's options of a launch."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return options if max_registers is None else {**options, "maxnreg": max_registers}
