"""Pooled attention maps on CUDA devices, in Triton: nothing of size L × L, the same bits each time.

The kernels are in triton_map_kernels.py. What their tiles give to blocks is added up here, in a
fixed order.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from spion_ds.attention.map_request import MapRequest
from spion_ds.attention.triton.map_kernels import (
    attention_map_softmax_kernel,
    attention_map_tile_kernel,
)
from spion_ds.attention.triton.tiles import launch_options

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEAD_DIM = 128
# A tile visits all blocks that it reaches: of smaller ones that would be hundreds.
MIN_BLOCK = 16
_LOG2_E = math.log2(math.e)


class MapTiles(NamedTuple):
    """A launch configuration; see benchmarks/maps.py.

    Attributes:
        rows, columns: of the scores that are computed at a time.
        pieces: such pieces side by side in a tile, 1 or 2; of the softmax kernel always 1.
        num_warps, num_stages: Triton's.
        max_registers: of a thread; None: as many as it takes.
    """

    rows: int
    columns: int
    pieces: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def launch(self) -> dict[str, int]:
        """Triton's options."""
        return launch_options(self.num_warps, self.num_stages, self.max_registers)


def unsupported(request: MapRequest) -> str | None:
    """Return why there is no kernel for these tensors, None if there is."""
    q, k = request.q, request.k
    if q.dtype not in _DTYPES or k.dtype != q.dtype or not 1 <= q.shape[3] <= _MAX_HEAD_DIM:
        return (
            f"the kernels take bf16, fp16 and fp32 with head_dim 1 to {_MAX_HEAD_DIM}; got "
            f"{q.dtype} and {k.dtype} with head_dim {q.shape[3]}"
        )
    if request.block < MIN_BLOCK and (request.block, request.filter_size) != (1, 1):
        return (
            f"the kernels take blocks from {MIN_BLOCK}, and of 1 without a filter; got "
            f"{request.block} with a filter of {request.filter_size}"
        )
    interpreted = not isinstance(attention_map_tile_kernel, triton.JITFunction)
    if not (q.is_cuda or interpreted):
        return f"the kernels run on CUDA devices; the tensors are on {q.device}"
    return None


def choose_tiles(q: Tensor) -> tuple[MapTiles, MapTiles]:
    """Return how the softmax kernel and the tile kernel cut their work; chosen on an H100."""
    if q.dtype == torch.float32:
        # Full float32 products use no tensor cores, and hold their operands in registers.
        return MapTiles(32, 32, 1, 4, 1), MapTiles(32, 32, 1, 4, 1)
    if q.shape[3] <= 64:
        return MapTiles(128, 64, 1, 8, 3), MapTiles(64, 64, 2, 4, 3, 168)
    return MapTiles(128, 64, 1, 8, 2), MapTiles(128, 64, 2, 8, 2)


def block_sums_triton(request: MapRequest) -> Tensor:
    """Return what ``block_sums_torch`` returns.

    Products are in the inputs' dtype, scores, probabilities and the sums of a tile float32; tiles
    are added in float64. Token-level maps have twice the digits: rounded to float32, the mean over
    a batch is the same in whatever shares it is made. The request must be one that
    :func:`unsupported` has nothing against.
    """
    softmax, tiles = choose_tiles(request.q)
    if request.block == 1:
        tiles = tiles._replace(pieces=1)
    sums = _Sums(request, tiles)
    _launch(request, softmax, tiles, sums, 0.0)
    return sums.add_up()


def central_sums_triton(request: MapRequest, mean: float) -> Tensor:
    """Return what ``central_sums_torch`` returns; precision as of :func:`block_sums_triton`."""
    softmax, tiles = choose_tiles(request.q)
    sums = _Sums(request, tiles, powers=True)
    _launch(request, softmax, tiles, sums, mean)
    return sums.parts.sum(dim=(1, 2), dtype=torch.float64)


def _launch(
    request: MapRequest, softmax: MapTiles, tiles: MapTiles, sums: _Sums, centre: float
) -> None:
    """Fill the parts of ``sums``."""
    q, k, scale = request.q.detach(), request.k.detach(), request.scale
    if scale <= 0.0:  # the kernels need one above 0
        q, scale = q * (-1.0 if scale < 0.0 else 0.0), -scale or 1.0
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    batch, heads, length, head_dim = q.shape
    padding = request.key_padding_mask
    ends = order = reach = None
    if padding is not None:
        ends, order, reach = _ends(padding)
        padding = padding.contiguous().view(torch.uint8)
    top, inverse = torch.empty((2, batch, heads, length), dtype=torch.float32, device=q.device)
    strided = ((q, *q.stride()[:3]), (k, *k.stride()[:3]))
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    shape = (heads // k.shape[1], head_dim, padded_dim, request.causal)
    with torch.cuda.device_of(q):
        attention_map_softmax_kernel[(triton.cdiv(length, softmax.rows), batch * heads)](
            *(*strided, top, inverse, padding, ends, heads, length, scale * _LOG2_E),
            *(*shape, softmax.rows, softmax.columns),
            **softmax.launch,
        )
        attention_map_tile_kernel[(sums.row_tiles * sums.column_tiles,)](
            *(*strided, top, inverse, padding, order, reach),
            *(request.row_weights.to(sums.parts.dtype), sums.parts, batch),
            *(heads, length, scale * _LOG2_E, sums.row_tiles, sums.column_tiles, centre),
            *(*shape, tiles.rows, tiles.columns, tiles.pieces),
            *(sums.kind, sums.block, sums.half, sums.reach),
            **tiles.launch,
        )


def _ends(key_padding_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where samples end, which end last, and how many reach each token; all int32.

    (B,), tokens up to the last real one; (B,), samples by falling end; (L,), how many samples have
    a real token here or later.
    """
    place = torch.arange(1, key_padding_mask.shape[1] + 1, device=key_padding_mask.device)
    ends = (key_padding_mask * place).amax(dim=1)
    order = ends.argsort(descending=True, stable=True)
    reach = (ends[:, None] >= place).sum(dim=0)
    return ends.int(), order.int(), reach.int()


class _Sums:
    """What the tile kernel writes for a request, and how it adds up to the block sums."""

    def __init__(self, request: MapRequest, tiles: MapTiles, *, powers: bool = False) -> None:
        block, half = request.block, request.filter_size // 2
        self.block, self.half, self.n = block, half, -(-request.length // block)
        self.rows, self.columns = tiles.rows, tiles.columns
        corners = block & (block - 1) == 0 and request.length % block == 0 and 2 * half <= block
        self.kind = "powers" if powers else "corners" if corners else "blocks"
        if (block, half) == (1, 0) and not powers:
            self.kind = "tokens"
        # Corners lie on both sides of the first and of the last block.
        covered = request.length + (block if self.kind == "corners" else 0)
        self.row_tiles = triton.cdiv(covered, tiles.rows)
        self.column_tiles = triton.cdiv(covered, tiles.columns * tiles.pieces)
        pieces = self.column_tiles * tiles.pieces
        self.reach = min((max(tiles.rows, tiles.columns) + 2 * half - 2) // block + 2, self.n)
        shape: tuple[int, ...]
        if self.kind == "corners":
            groups = [max(1, side // block) for side in (tiles.rows, tiles.columns)]
            shape = (4, self.row_tiles * groups[0], pieces * groups[1])
        elif self.kind == "blocks":
            shape = (self.row_tiles, self.reach, pieces, self.reach)
        elif self.kind == "tokens":
            shape = (request.length, request.length)
        else:
            shape = (2, self.row_tiles, pieces)
        dtype = torch.float64 if self.kind == "tokens" else torch.float32
        self.parts = torch.empty(shape, dtype=dtype, device=request.q.device)

    def add_up(self) -> Tensor:
        """Return the block sums, (n, n) float64."""
        if self.kind == "tokens":
            return self.parts
        if self.kind == "blocks":
            into_rows, into_columns = self._chosen(self.rows, 0), self._chosen(self.columns, 2)
            parts = self.parts.flatten(2).flatten(0, 1).to(torch.float64)
            return into_rows @ parts @ into_columns.T
        n = self.n
        # A block is the lower right one at its first corner, the lower left one at the next, …
        total = self._at_corners(0)[:n, :n] + self._at_corners(1)[:n, 1:]
        total += self._at_corners(2)[1:, :n]
        return total.add_(self._at_corners(3)[1:, 1:])

    def _at_corners(self, quarter: int) -> Tensor:
        """Return what each corner gives to one of its blocks, (n + 1, n + 1) float64."""
        corners = self.n + 1
        down, right = max(1, self.block // self.rows), max(1, self.block // self.columns)
        parts = self.parts[quarter, : corners * down, : corners * right]
        parts = parts.unflatten(1, (corners, right)).unflatten(0, (corners, down))
        return parts.sum(dim=(1, 3), dtype=torch.float64)

    def _chosen(self, side: int, dim: int) -> Tensor:
        """Return the 0 and 1 that add the parts of tiles where they belong, (n, parts) float64.

        As a product, since index_add_ on a GPU would add in no fixed order.
        """
        device = self.parts.device
        first = torch.arange(self.parts.shape[dim], device=device) * side - self.half
        first = first.clamp(min=0) // self.block
        to = first[:, None] + torch.arange(self.reach, device=device)
        chosen = torch.arange(self.n, device=device)[:, None] == to.flatten()
        return chosen.to(torch.float64)
