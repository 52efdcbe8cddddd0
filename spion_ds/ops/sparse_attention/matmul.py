"""MatMul: sparse = dense · dense, dense = sparse · dense, dense = dense · sparse."""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.errors import ConfigError, unknown_name
from spion_ds.ops.sparse_attention.block_tensors import (
    BlockIndex,
    multiply_blocks,
    multiply_sampled,
)

_MODES = ("sdd", "dsd", "dds")


class MatMul:
    """Products of matrices of which one is block-sparse, under DeepSpeed's contract.

    Args:
        layout: (n, m) or (heads, n, m) of 0 and 1.
        block: side of a block.
        mode: which of result, first and second operand is sparse ("s") or dense ("d").
        trans_a, trans_b: multiply with the transposed operand.
        bench: accepted, without effect.

    Raises:
        ConfigError: (a ValueError) another mode, or not a layout.
    """

    def __init__(
        self,
        layout: Tensor,
        block: int,
        mode: str,
        trans_a: bool = False,
        trans_b: bool = False,
        bench: bool = False,
    ) -> None:
        if mode not in _MODES:
            raise ConfigError(unknown_name("MatMul mode", mode, _MODES))
        self.layout, self.block, self.mode = layout, block, mode
        self.trans_a, self.trans_b, self.bench = trans_a, trans_b, bench
        # Measured by nobody any more; a profiler does.
        self.time_c = self.time_da = self.time_db = None
        cpu = BlockIndex.from_mask(layout, block, torch.device("cpu"))
        self.spdims, self._kept = cpu.shape, len(cpu.row)
        self._indices = {torch.device("cpu"): cpu}

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the product of ``a`` and ``b``.

        Args:
            a, b: dense: (batch, heads, rows, columns), or without leading dimensions; sparse:
                (batch, kept blocks, block, block), in (head, row, column) order, or without batch.
                A batch of 1 goes with any batch.

        Returns:
            Dense or sparse like the operands, with as many dimensions as the larger one.

        Raises:
            ConfigError: (a ValueError) devices, dtypes or shapes do not fit.
        """
        dims = max(a.dim(), b.dim())
        a, b = self._checked("A", a), self._checked("B", b)
        if a.device != b.device:
            raise ConfigError(f"A is on {a.device} and B on {b.device}; move one of them")
        if torch.is_autocast_enabled(a.device.type):
            dtype = torch.get_autocast_dtype(a.device.type)
            a, b = a.to(dtype), b.to(dtype)
        if a.dtype != b.dtype:
            raise ConfigError(f"A is {a.dtype} and B is {b.dtype}; cast one of them")
        if a.shape[0] != b.shape[0]:
            if 1 not in (a.shape[0], b.shape[0]):
                raise ConfigError(f"A has a batch of {a.shape[0]} and B of {b.shape[0]}")
            batch = max(a.shape[0], b.shape[0])
            a, b = a.expand(batch, -1, -1, -1), b.expand(batch, -1, -1, -1)
        with torch.autocast(a.device.type, enabled=False):
            product = self._multiply(a, b)
        for _ in range(product.dim() - dims):
            product = product.squeeze(0)
        return product

    def _multiply(self, a: Tensor, b: Tensor) -> Tensor:
        index = self._index(a.device)
        heads, rows, columns = self.spdims
        if self.mode == "dsd":
            x = b.transpose(-2, -1) if self.trans_b else b
            self._check_dense("B", x, (heads, (rows if self.trans_a else columns), None))
            return multiply_blocks(a, x, index, transposed=self.trans_a)
        x = a.transpose(-2, -1) if self.trans_a else a
        if self.mode == "dds":  # cᵀ = op(b)ᵀ · op(a)ᵀ
            self._check_dense("A", x, (heads, None, (columns if self.trans_b else rows)))
            out = multiply_blocks(b, x.transpose(-2, -1), index, transposed=not self.trans_b)
            return out.transpose(-2, -1)
        y = b if self.trans_b else b.transpose(-2, -1)
        self._check_dense("A", x, (heads, rows, None))
        self._check_dense("B", y.transpose(-2, -1), (heads, None, columns))
        if x.shape[3] != y.shape[3]:
            raise ConfigError(f"A has {x.shape[3]} inner columns and B {y.shape[3]} inner rows")
        return multiply_sampled(x, y, index)

    def _checked(self, name: str, x: Tensor) -> Tensor:
        """Return the operand with four dimensions."""
        sparse = (self.mode, name) in (("dsd", "A"), ("dds", "B"))
        wanted = (self._kept, self.block, self.block)
        if sparse and (x.dim() not in (3, 4) or tuple(x.shape[-3:]) != wanted):
            raise ConfigError(
                f"{name} is sparse: (batch, kept blocks, block, block), the last three {wanted}; "
                f"got {tuple(x.shape)}"
            )
        if x.dim() not in (2, 3, 4):
            raise ConfigError(f"{name} has 2 to 4 dimensions; got {tuple(x.shape)}")
        return x.reshape(*[1] * (4 - x.dim()), *x.shape)

    def _check_dense(
        self, name: str, x: Tensor, blocks: tuple[int, int | None, int | None]
    ) -> None:
        heads, *sides = blocks
        sizes = [None if side is None else side * self.block for side in sides]
        fits = x.shape[1] == heads and all(
            size in (None, actual) for size, actual in zip(sizes, x.shape[2:], strict=True)
        )
        if not fits:
            rows, columns = ("any" if size is None else size for size in sizes)
            raise ConfigError(
                f"{name} (transposed, if asked for) is (batch, {heads}, {rows}, {columns}) for a "
                f"layout of {tuple(self.spdims)} blocks of {self.block}; got {tuple(x.shape)}; "
                "for one layout for all heads pass layout.expand(heads, -1, -1)"
            )

    def _index(self, device: torch.device) -> BlockIndex:
        if device not in self._indices:
            self._indices[device] = BlockIndex.from_mask(self.layout, self.block, device)
        return self._indices[device]
