"""Block-sparse matrices as tensors of their kept blocks: products, softmax, conversion.

A block-sparse matrix is (B, K, b, b): K kept blocks in (head, row, column) order. Products and
softmax take a row's blocks side by side, so there are no atomics: the same inputs give the same
bits, forward and backward.

Shape suffixes: B batch, H heads, K kept blocks, b tokens of a block, M rows, N columns, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spion_ds.attention.derivatives import refuse_every_transform
from spion_ds.attention.grouping import Group, group_by_degree
from spion_ds.attention.layout import BlockLayout

_WHAT = "a product or softmax of block-sparse matrices"


@dataclass(frozen=True, eq=False)
class BlockIndex:
    """Where the kept blocks of a layout are; every head has its own rows, columns and blocks.

    Attributes:
        block: side of a block in tokens.
        shape: (heads, row blocks, column blocks).
        place: (K,) int64 of each kept block in the flattened layout (heads · rows · columns).
        row, column: (K,) int64 of each kept block; head h's rows start at h · row blocks.
        by_row, by_column: rows (columns) grouped by how many blocks they keep; the partners are
            positions among the K kept blocks.
    """

    block: int
    shape: tuple[int, int, int]
    place: Tensor
    row: Tensor
    column: Tensor
    by_row: list[Group]
    by_column: list[Group]

    @classmethod
    @torch.inference_mode(False)  # a training step may come to read it
    def from_mask(cls, mask: Tensor, block: int, device: torch.device | None = None) -> BlockIndex:
        """Make the index of a mask (n, m) or (heads, n, m) of kept blocks, bool or 0 and 1.

        Raises:
            ConfigError: as :meth:`BlockLayout.from_mask`.
        """
        device = mask.device if device is None else device
        layout = BlockLayout.from_mask(mask.cpu(), block)
        heads, rows, columns = layout.heads, layout.num_rows, layout.num_cols
        kept = layout.to_mask().view(heads, rows, columns)
        head, r, c = kept.nonzero().unbind(1)
        row, column = head * rows + r, head * columns + c
        by_column = column.argsort(stable=True)
        return cls(
            block,
            (heads, rows, columns),
            (row * columns + c).to(device),
            row.to(device),
            column.to(device),
            group_by_degree(_flat(layout.row_ptr), torch.arange(len(row)), device),
            group_by_degree(_flat(layout.col_ptr), by_column, device),
        )


def multiply_sampled(a_BHMD: Tensor, b_BHND: Tensor, index: BlockIndex) -> Tensor:
    """Return a · bᵀ at the kept blocks, (B, K, b, b); differentiable in both, any times."""
    refuse_every_transform(_WHAT, a_BHMD, b_BHND)
    return _Sampled.apply(a_BHMD, b_BHND, index)


def multiply_blocks(
    p_BKbb: Tensor, x_BHND: Tensor, index: BlockIndex, *, transposed: bool = False
) -> Tensor:
    """Return p · x, (B, H, M, D), or pᵀ · x; zero where a row (column) of p keeps nothing.

    Args:
        p_BKbb: block-sparse matrix.
        x_BHND: with as many rows as p has columns; as p has rows if ``transposed``.
        index: of p's blocks.
        transposed: multiply with pᵀ.
    """
    refuse_every_transform(_WHAT, p_BKbb, x_BHND)
    return _Blocks.apply(p_BKbb, x_BHND, index, transposed)


def row_softmax(scores_BKbb: Tensor, index: BlockIndex) -> Tensor:
    """Return the softmax over the kept entries of each row; a row of -inf gives zeros."""
    refuse_every_transform(_WHAT, scores_BKbb)
    return _RowSoftmax.apply(scores_BKbb, index)


def take_blocks(x: Tensor, index: BlockIndex) -> Tensor:
    """Return the kept blocks of a dense matrix, (B or 1, K, b, b).

    Args:
        x: (M, N), or with leading dimensions (B or 1, H or 1).
        index: of the blocks.
    """
    x = x.view(*[1] * (4 - x.dim()), *x.shape)
    heads, rows, columns = index.shape
    tiles = x.unflatten(3, (columns, index.block)).unflatten(2, (rows, index.block))
    tiles = tiles.transpose(3, 4).flatten(1, 3)  # (B, heads · rows · columns, b, b)
    place = index.place if x.shape[1] == heads else index.place % (rows * columns)
    return tiles.index_select(1, place)


def _flat(pointers: Tensor) -> Tensor:
    """Return (heads, n + 1) pointers that run on over the heads as one row of them."""
    return torch.cat([pointers[:, :-1].flatten(), pointers[-1, -1:]])


def _tiles(x_BHND: Tensor, block: int) -> Tensor:
    """Return the row blocks of all heads, (B, H · n, b, D)."""
    return x_BHND.unflatten(2, (-1, block)).flatten(1, 2)


def _gather(p_BKbb: Tensor, group: Group, empty: float, transposed: bool) -> Tensor:
    """Return the blocks of each member side by side, (B, G, b, S · b); ``empty`` in empty slots."""
    members, slots = group.partners.shape
    blocks = p_BKbb.index_select(1, group.partners.flatten()).unflatten(1, (members, slots))
    if group.filled is not None:
        blocks = blocks.masked_fill(~group.filled[:, :, None, None], empty)
    blocks = blocks.transpose(-2, -1) if transposed else blocks
    return blocks.transpose(2, 3).flatten(3)


class _Sampled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, index: BlockIndex) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.index = index
        rows = _tiles(a, index.block).index_select(1, index.row)
        columns = _tiles(b, index.block).index_select(1, index.column)
        return rows @ columns.transpose(-2, -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        da = multiply_blocks(grad, b, ctx.index) if ctx.needs_input_grad[0] else None
        db = None
        if ctx.needs_input_grad[1]:
            db = multiply_blocks(grad, a, ctx.index, transposed=True)
        return da, db, None


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, x: Tensor, index: BlockIndex, transposed: bool) -> Tensor:
        ctx.save_for_backward(p, x)
        ctx.index, ctx.transposed = index, transposed
        heads, rows, columns = index.shape
        partner = index.row if transposed else index.column
        tiles = _tiles(x, index.block)
        count = heads * (columns if transposed else rows)
        out = x.new_zeros((x.shape[0], count, index.block, x.shape[3]))
        for group in index.by_column if transposed else index.by_row:
            weights = _gather(p, group, 0.0, transposed)  # (B, G, b, S · b)
            others = tiles.index_select(1, partner[group.partners.flatten()])
            others = others.unflatten(1, group.partners.shape).flatten(2, 3)  # (B, G, S · b, D)
            out.index_copy_(1, group.members, weights @ others)
        return out.unflatten(1, (heads, -1)).flatten(2, 3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        p, x = ctx.saved_tensors
        dp = dx = None
        if ctx.needs_input_grad[0]:
            left, right = (x, grad) if ctx.transposed else (grad, x)
            dp = multiply_sampled(left, right, ctx.index)
        if ctx.needs_input_grad[1]:
            dx = multiply_blocks(p, grad, ctx.index, transposed=not ctx.transposed)
        return dp, dx, None, None


class _RowSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, index: BlockIndex) -> Tensor:
        probs = torch.zeros_like(scores)
        for group in index.by_row:
            rows = _gather(scores, group, float("-inf"), False)  # (B, G, b, S · b)
            top = rows.amax(dim=-1, keepdim=True)
            weights = (rows - top.masked_fill(top == float("-inf"), 0.0)).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            _scatter(probs, weights / total.masked_fill(total == 0.0, 1.0), group, index.block)
        ctx.save_for_backward(probs)
        ctx.index = index
        return probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (probs,) = ctx.saved_tensors
        # Differentiable itself: the row sums come from an operation of this module.
        weighted = probs * grad
        return weighted - probs * _RowSum.apply(weighted, ctx.index), None


class _RowSum(torch.autograd.Function):
    """The sum of each row, at every kept entry of the row; it is its own transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: BlockIndex) -> Tensor:
        ctx.index = index
        out = torch.zeros_like(x)
        for group in index.by_row:
            rows = _gather(x, group, 0.0, False)
            _scatter(out, rows.sum(dim=-1, keepdim=True).expand_as(rows), group, index.block)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _RowSum.apply(grad, ctx.index), None


def _scatter(target_BKbb: Tensor, rows_BGbT: Tensor, group: Group, block: int) -> None:
    """Write blocks that lie side by side back to their places; empty slots are left out."""
    blocks = rows_BGbT.unflatten(3, (-1, block)).transpose(2, 3).flatten(1, 2)
    places = group.partners.flatten()
    if group.filled is not None:
        filled = group.filled.flatten().nonzero()[:, 0]
        blocks, places = blocks.index_select(1, filled), places[filled]
    target_BKbb.index_copy_(1, places, blocks)
