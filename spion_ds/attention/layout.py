"""BlockLayout: which (query block, key block) pairs are kept, indexed by rows and by columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from spion_ds.errors import ConfigError

# Tokens of a column's kept blocks, over which it may be cut into parts that run side by side.
LONGEST_PART = 512


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
        col_order: (heads, num_cols) int32; the columns of each head that are not cut, most kept
            blocks first, then -1.
        col_parts: (heads, parts, 3) int32; the parts of the long columns of each head: column,
            which of its parts, how many it has; then -1.
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
    col_parts: Tensor
    above_diagonal: bool
    # What a backend derives from the layout once (groupings, launch orders), keyed by its name.
    plans: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        # torch.compile shall not trace again for a layout that keeps more or fewer blocks.
        for index, dim in ((self.col_idx, 0), (self.row_idx, 0), (self.col_parts, 1)):
            torch._dynamo.maybe_mark_dynamic(index, dim)

    @classmethod
    @torch.compiler.disable  # its shapes depend on the mask's values
    @torch.inference_mode(False)  # a training step may come to read it
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
        col_order, col_parts = _divide_columns(kept.sum(dim=1), rows, block)
        above_diagonal = bool(kept.triu(1).any())
        index = (row_ptr, col_idx, col_ptr, row_idx, col_order, col_parts)
        return cls(block, rows, cols, *index, above_diagonal).to(mask.device)

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
    @torch.inference_mode(False)
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
            self.col_parts.to(device),
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

    @torch.compiler.disable
    def crop(self, rows: int | slice, columns: int | slice) -> BlockLayout:
        """Return the layout of some consecutive rows and columns, the same for all heads.

        Args:
            rows: how many query blocks from the first on, or a slice of them.
            columns: the same of the key blocks.

        Raises:
            ConfigError: nothing would be left, or the layout has fewer rows or columns.
        """
        of_rows = _consecutive("rows", rows, self.num_rows)
        of_columns = _consecutive("columns", columns, self.num_cols)
        if (of_rows, of_columns) == (slice(0, self.num_rows), slice(0, self.num_cols)):
            return self
        mask = self.mask_of_rows(of_rows.start, of_rows.stop)[..., of_columns]
        return BlockLayout.from_mask(mask, self.block).to(self.device)

    @torch.inference_mode(False)
    def mask_of_rows(self, first: int, last: int) -> Tensor:
        """Return the kept blocks of the rows ``first`` to ``last`` - 1, in time for these alone.

        (heads, last - first, m) bool on the CPU, where the layout keeps a copy of its index.
        """
        if "host" not in self.plans:
            self.plans["host"] = (self.row_ptr.cpu(), self.col_idx.cpu().long())
        row_ptr, col_idx = self.plans["host"]
        pointers = row_ptr[:, first : last + 1]  # (heads, rows + 1)
        mask = torch.zeros((self.heads, last - first, self.num_cols), dtype=torch.bool)
        line = torch.arange(self.heads * (last - first))
        line = torch.repeat_interleave(line, pointers.diff(dim=1).flatten())
        column = torch.cat([col_idx[begin:end] for begin, *_, end in pointers.tolist()])
        mask.view(-1, self.num_cols)[line, column] = True
        return mask

    @torch.compiler.disable
    def heads_of(self, rank: int, size: int) -> BlockLayout:
        """Return the layouts of one of ``size`` equal parts of the heads, in their order.

        A layout that all heads share serves every part, and is returned as it is.

        Args:
            rank: which part, from 0.
            size: how many parts there are, e.g. of a tensor-parallel or Ulysses group.

        Raises:
            ConfigError: ``size`` does not divide the heads, or ``rank`` is not below ``size``.
        """
        for name, value, least in (("size", size, 1), ("rank", rank, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} is {value!r}; allowed: a whole number from {least} up")
        if rank >= size:
            raise ConfigError(f"rank is {rank}; allowed: 0 to {size - 1}, below size")
        if self.heads == 1 or size == 1:
            return self
        if self.heads % size:
            raise ConfigError(
                f"size is {size}, and the layout has {self.heads} heads; allowed: a number that "
                "divides them"
            )
        each = self.heads // size
        return BlockLayout.from_mask(self.to_mask()[rank * each : (rank + 1) * each], self.block)

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


def _consecutive(name: str, wanted: int | slice, count: int) -> slice:
    """Return the slice of ``count`` blocks that ``wanted`` means, or raise ConfigError."""
    if isinstance(wanted, slice):
        start = 0 if wanted.start is None else wanted.start
        stop = count if wanted.stop is None else wanted.stop
        step = 1 if wanted.step is None else wanted.step
    else:
        start, stop, step = 0, wanted, 1
    whole = all(isinstance(x, int) and not isinstance(x, bool) for x in (start, stop, step))
    if not whole or step != 1 or not 0 <= start < stop <= count:
        raise ConfigError(
            f"{name} is {wanted!r}; the layout has {count}; allowed: a number of blocks from 1 to "
            f"{count}, or slice(start, stop) with 0 ≤ start < stop ≤ {count}"
        )
    return slice(start, stop)


def _divide_columns(lengths: Tensor, num_rows: int, block: int) -> tuple[Tensor, Tensor]:
    """Return ``col_order`` and ``col_parts`` of columns that keep ``lengths`` (heads, num_cols).

    A column is cut into parts of at most twice the mean, a quarter of all rows or LONGEST_PART
    tokens, whichever is most. Fewer parts are fewer sums to write and to read again.
    """
    heads, num_cols = lengths.shape
    least = max(num_rows / 4, LONGEST_PART / block)
    longest = (2 * lengths.double().mean(dim=1)).clamp(min=least).ceil().long()
    pieces = -(-lengths // longest[:, None])  # (heads, num_cols)
    order = lengths.argsort(dim=1, descending=True, stable=True)
    if not bool((pieces > 1).any()):
        return order.int(), torch.empty((heads, 0, 3), dtype=torch.int32)
    col_order = torch.full((heads, num_cols), -1, dtype=torch.int32)
    divided = []
    for head in range(heads):
        cut = pieces[head, order[head]] > 1
        whole, columns = order[head, ~cut], order[head, cut]
        col_order[head, : len(whole)] = whole
        counts = pieces[head, columns]
        each = torch.repeat_interleave(torch.stack([columns, counts], dim=1), counts, dim=0)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        which = torch.arange(len(each)) - first
        divided.append(torch.stack([each[:, 0], which, each[:, 1]], dim=1).int())
    return col_order, torch.nn.utils.rnn.pad_sequence(divided, True, -1)


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
