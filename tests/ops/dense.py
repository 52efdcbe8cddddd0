"""Block-sparse tensors as dense ones and back: slow, obvious, and differentiable.

Shape suffixes: B batch, H heads, K kept blocks, b tokens of a block, M rows, N columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Errors that are allowed against float64 on the same rounded inputs, relative to the norm: about a
# hundred roundings of float32, and a few of float16, in which operands and results are held.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2}


def draw_layout(heads: int, rows: int, columns: int) -> Tensor:
    """(heads, rows, columns) int64 with an empty row, an empty column and a hot column."""
    layout = (torch.rand(heads, rows, columns) < 0.4).long()
    layout[:, :, -1] = 1
    layout[0, 1] = 0
    layout[-1, :, 0] = 0
    return layout


def to_dense(p_BKbb: Tensor, layout: Tensor, block: int, fill: float = 0.0) -> Tensor:
    """(B, H, M, N) with ``fill`` where no block is kept."""
    heads, rows, columns = layout.shape
    tiles = p_BKbb.new_full((p_BKbb.shape[0], heads, rows, columns, block, block), fill)
    for number, (h, r, c) in enumerate(layout.nonzero().tolist()):
        tiles[:, h, r, c] = p_BKbb[:, number]
    return tiles.transpose(3, 4).reshape(-1, heads, rows * block, columns * block)


def to_blocks(x_BHMN: Tensor, layout: Tensor, block: int) -> Tensor:
    """(B, K, b, b), kept blocks in (head, row, column) order."""
    return torch.stack(
        [
            x_BHMN[:, h, r * block : (r + 1) * block, c * block : (c + 1) * block]
            for h, r, c in layout.nonzero().tolist()
        ],
        dim=1,
    )


def assert_close(name: str, a: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare relative to the norm of what is expected; NaN fails."""
    assert a.shape == expected.shape, name
    error = (a.double() - expected.double()).norm() / expected.double().norm()
    assert error < TOLERANCES[dtype], f"{name}: relative error {error:.1e}"
