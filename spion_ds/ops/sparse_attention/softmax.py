"""Softmax of a block-sparse matrix, with scale, relative positions and masks."""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.errors import ConfigError
from spion_ds.ops.sparse_attention.block_tensors import BlockIndex
from spion_ds.ops.sparse_attention.masks import additive, block_softmax, check_mode


class Softmax:
    """Softmax over the kept entries of each row, under DeepSpeed's contract.

    Unlike the old one it leaves its input and the incoming gradient as they are.

    Args:
        layout: (n, m) or (heads, n, m) of 0 and 1.
        block: side of a block.
        bench: accepted, without effect.

    Raises:
        ConfigError: (a ValueError) not a layout.
    """

    def __init__(self, layout: Tensor, block: int, bench: bool = False) -> None:
        self.layout, self.block, self.bench = layout, block, bench
        self.time_y = None
        cpu = BlockIndex.from_mask(layout, block, torch.device("cpu"))
        self.spdims, self.num_blocks = cpu.shape, len(cpu.row)
        self._indices = {torch.device("cpu"): cpu}

    def __call__(
        self,
        x: Tensor,
        scale: float = 1.0,
        rpe: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask_mode: str = "add",
        attn_mask_mode: str = "add",
    ) -> Tensor:
        """Return softmax(scale · x + rpe + masks), like ``x``; zeros in a row of -inf alone.

        Args:
            x: (batch, kept blocks, block, block) in (head, row, column) order.
            scale: factor of x.
            rpe: relative position bias, (rows, columns) or with leading (batch or 1, heads or 1);
                it gets a gradient.
            key_padding_mask: (batch, columns).
            attn_mask: (rows, columns) or with leading (batch or 1, heads or 1).
            key_padding_mask_mode, attn_mask_mode: ``"add"`` adds the mask, ``"mul"`` excludes
                where it is 0; a bool mask excludes where it is False in either mode.

        Raises:
            ConfigError: (a ValueError) another mode, or a shape that does not fit.
        """
        wanted = (self.num_blocks, self.block, self.block)
        if x.dim() not in (3, 4) or tuple(x.shape[-3:]) != wanted:
            raise ConfigError(
                f"x is (batch, kept blocks, block, block), the last three {wanted}; got "
                f"{tuple(x.shape)}"
            )
        check_mode("key_padding_mask_mode", key_padding_mask_mode)
        check_mode("attn_mask_mode", attn_mask_mode)
        blocks = x if x.dim() == 4 else x[None]
        heads, rows, columns = self.spdims
        sides = (rows * self.block, columns * self.block)
        full = torch.float64 if x.dtype == torch.float64 else torch.float32
        if key_padding_mask is not None:
            self._check("key_padding_mask", key_padding_mask, (blocks.shape[0], sides[1]))
            key_padding_mask = additive(key_padding_mask, key_padding_mask_mode, full)
        if attn_mask is not None:
            self._check_matrix("attn_mask", attn_mask, (blocks.shape[0], heads, *sides))
            attn_mask = additive(attn_mask, attn_mask_mode, full)
        if rpe is not None:
            self._check_matrix("rpe", rpe, (blocks.shape[0], heads, *sides))
        if x.device not in self._indices:
            self._indices[x.device] = BlockIndex.from_mask(self.layout, self.block, x.device)
        probs = block_softmax(
            blocks,
            self._indices[x.device],
            scale=scale,
            rpe=rpe,
            key_padding_mask=key_padding_mask,
            attn_mask=attn_mask,
        )
        return probs if x.dim() == 4 else probs[0]

    @staticmethod
    def _check(name: str, mask: Tensor, wanted: tuple[int, ...]) -> None:
        if tuple(mask.shape) != wanted:
            raise ConfigError(f"{name} is {wanted}; got {tuple(mask.shape)}")

    @staticmethod
    def _check_matrix(name: str, x: Tensor, full: tuple[int, int, int, int]) -> None:
        shape = (*[1] * (4 - x.dim()), *x.shape)
        fits = len(shape) == 4 and shape[2:] == full[2:]
        if not fits or shape[0] not in (1, full[0]) or shape[1] not in (1, full[1]):
            raise ConfigError(
                f"{name} is {full[2:]}, or with leading ({full[0]} or 1, {full[1]} or 1); got "
                f"{tuple(x.shape)}"
            )
