"""BlockLayout: which (query block, key block) pairs are kept, indexed by rows and by columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spion_ds.errors import ConfigError


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Kept blocks of one layer, for all heads or one layout a head. Immutable data.

    Attributes:
        block: side of a block in tokens.
        num_rows: query blocks.
        num_cols: key blocks.
        row_ptr: (heads, num_rows + 1) int32; the kept blocks of row r of head h are the entries
            ``row_ptr[h, r] : row_ptr[h, r + 1]`` of ``col_idx``. Offsets run on over the heads.
        col_idx: (kept,) int32 key block of each kept block, in (head, row, column) order.
        col_ptr: (heads, num_cols + 1) int32; the same by columns, into ``row_idx``.
        row_idx: (kept,) int32 query block of each kept block, in (head, column, row) order.
        col_order: (heads, num_cols + 1) int32; the columns of each head by kept blocks, most
            first, then how many columns come first as hot: more than twice the mean in some head.
        above_diagonal: whether a block wholly above the diagonal is kept.
    """

    block: int
    num_rows: int
    num_cols: int
    row_ptr: Tensor
    col_idx: Tensor
    col_ptr: Tensor
    row_idx: Tensor
    col_order: Tensor
    above_diagonal: bool
    # What a backend derives from the layout once (groupings, launch orders), keyed by its name.
    plans: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # torch.compile shall not trace again for a layout that keeps more or fewer blocks.
        for index in (self.col_idx, self.row_idx):
            torch._dynamo.maybe_mark_dynamic(index, 0)

    @classmethod
    @torch.compiler.disable  # its shapes depend on the mask's values
    def from_mask(cls, mask: Tensor, block: int) -> BlockLayout:
        """Make a layout from a mask of kept blocks, on the mask's device.

        Args:
            mask: (n, m) for all heads, or (heads, n, m); bool, or 0 and 1.
            block: side of a block in tokens.

        Raises:
            ConfigError: the mask has another number of dimensions, is empty, or ``block`` < 1.
        """
        if mask.dim() not in (2, 3) or 0 in mask.shape:
            raise ConfigError(
                f"a block mask is (n, m) or (heads, n, m) and not empty; got {tuple(mask.shape)}"
            )
        if not isinstance(block, int) or isinstance(block, bool) or block < 1:
            raise ConfigError(f"block is {block!r}; allowed: a whole number from 1 up")
        if mask.dtype != torch.bool and not torch.all((mask == 0) | (mask == 1)):
            raise ConfigError("a block mask holds only True and False (or 1 and 0)")
        kept = mask.to("cpu", torch.bool)
        kept = kept.unsqueeze(0) if kept.dim() == 2 else kept
        row_ptr, col_idx = _index(kept)
        col_ptr, row_idx = _index(kept.transpose(1, 2))
        _, rows, cols = kept.shape
        col_order = _launch_order(kept.sum(dim=1))
        above_diagonal = bool(kept.triu(1).any())
        layout = cls(
            block, rows, cols, row_ptr, col_idx, col_ptr, row_idx, col_order, above_diagonal
        )
        return layout.to(mask.device)

    @property
    def heads(self) -> int:
        """Number of layouts: 1 when all heads share one."""
        return self.row_ptr.shape[0]

    @property
    def kept(self) -> int:
        """Number of kept blocks, over all layouts."""
        return self.col_idx.shape[0]

    @property
    def density(self) -> float:
        """Share of blocks that are kept, 0 to 1."""
        return self.kept / (self.heads * self.num_rows * self.num_cols)

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        return self.row_ptr.device

    @torch.compiler.disable
    def to(self, device: torch.device | str) -> BlockLayout:
        """Return the layout on ``device`` (itself, if it is there already)."""
        if self.device == torch.device(device):
            return self
        return BlockLayout(
            self.block,
            self.num_rows,
            self.num_cols,
            self.row_ptr.to(device),
            self.col_idx.to(device),
            self.col_ptr.to(device),
            self.row_idx.to(device),
            self.col_order.to(device),
            self.above_diagonal,
        )

    def to_mask(self) -> Tensor:
        """Return the kept blocks as bool (n, m), or (heads, n, m) for one layout a head."""
        mask = torch.zeros(
            (self.heads, self.num_rows, self.num_cols), dtype=torch.bool, device=self.device
        )
        counts = (self.row_ptr[:, 1:] - self.row_ptr[:, :-1]).flatten().long()
        flat_row = torch.repeat_interleave(
            torch.arange(self.heads * self.num_rows, device=self.device), counts
        )
        mask.view(-1, self.num_cols)[flat_row, self.col_idx.long()] = True
        return mask[0] if self.heads == 1 else mask

    def pack(self) -> bytes:
        """Return the kept blocks as bits, (head, row, column) order, 8 blocks a byte."""
        return pack_mask(self.to_mask())

    @classmethod
    def unpack(cls, bits: bytes, shape: tuple[int, ...], block: int) -> BlockLayout:
        """Return the layout of ``bits`` made by :meth:`pack` from a mask of ``shape``."""
        return cls.from_mask(unpack_mask(bits, shape), block)


def pack_mask(mask: Tensor) -> bytes:
    """Return a bool mask of any shape as bits in row-major order, most significant bit first."""
    return np.packbits(mask.cpu().numpy().astype(bool).reshape(-1)).tobytes()


def unpack_mask(bits: bytes, shape: tuple[int, ...]) -> Tensor:
    """Return the bool mask of ``shape`` that :func:`pack_mask` packed.

    Raises:
        ConfigError: ``bits`` has another length than ``shape`` needs.
    """
    count = int(np.prod(shape))
    if len(bits) != -(-count // 8):
        raise ConfigError(f"{len(bits)} bytes cannot be a packed mask of shape {shape}")
    flat = np.unpackbits(np.frombuffer(bits, dtype=np.uint8), count=count)
    return torch.from_numpy(flat.astype(bool)).reshape(shape)


def _launch_order(lengths: Tensor) -> Tensor:
    """Return ``col_order`` of columns that keep ``lengths`` (heads, num_cols) blocks."""
    hot = (lengths > 2 * lengths.double().mean(dim=1, keepdim=True)).sum(dim=1).max()
    order = lengths.argsort(dim=1, descending=True, stable=True)
    return torch.cat([order, hot.expand(len(order), 1)], dim=1).to(torch.int32)


def _index(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return (pointers, indices) of the True entries of (heads, n, m), row by row."""
    heads, rows, _ = kept.shape
    ends = kept.sum(dim=2).flatten().cumsum(0)
    if ends[-1] >= 2**31:
        raise ConfigError("a layout holds fewer than 2^31 blocks; use a larger block")
    pointers = torch.zeros((heads, rows + 1), dtype=torch.int32)
    pointers[:, 1:] = ends.view(heads, rows)
    pointers[1:, 0] = pointers[:-1, -1]
    return pointers, kept.nonzero()[:, 2].to(torch.int32)
