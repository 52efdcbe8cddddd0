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
# Of the parts that are there at a time, for maps of several heads.
_PARTS_BYTES = 64 << 20


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
    """Return what ``block_sums_torch`` returns, or with ``per_head`` that of each head.

    Products are in the inputs' dtype, scores, probabilities and the sums of a tile float32; tiles
    are added in float64. Token-level maps have twice the digits: rounded to float32, the mean over
    a batch is the same in whatever shares it is made. The request must be one that
    :func:`unsupported` has nothing against.
    """
    softmax, tiles = choose_tiles(request.q)
    if request.block == 1:
        tiles = tiles._replace(pieces=1)
    sums = _Sums(request, tiles)
    inputs = _Inputs(request, softmax)
    if not request.per_head:
        return sums.add_up(_launch(inputs, tiles, sums))
    heads = request.q.shape[1]
    total = request.row_weights.new_empty((heads, sums.n, sums.n))
    # What tiles give may be much more than the maps: of some heads at a time.
    some = max(1, min(heads, _PARTS_BYTES // sums.bytes))
    for first in range(0, heads, some):
        those = range(first, min(first + some, heads))
        total[first : those.stop] = sums.add_up(_launch(inputs, tiles, sums, heads=those))
    return total


def central_sums_triton(request: MapRequest, mean: float) -> Tensor:
    """Return what ``central_sums_torch`` returns; precision as of :func:`block_sums_triton`."""
    softmax, tiles = choose_tiles(request.q)
    sums = _Sums(request, tiles, powers=True)
    parts = _launch(_Inputs(request, softmax), tiles, sums, mean)
    return parts.sum(dim=(1, 2), dtype=torch.float64)


class _Inputs:
    """What the tile kernel reads: queries and keys, and each row's softmax statistics."""

    def __init__(self, request: MapRequest, softmax: MapTiles) -> None:
        q, k, scale = request.q.detach(), request.k.detach(), request.scale
        if scale <= 0.0:  # the kernels need one above 0
            q, scale = q * (-1.0 if scale < 0.0 else 0.0), -scale or 1.0
        q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
        self.batch, self.heads, self.length, head_dim = q.shape
        self.row_weights, self.device = request.row_weights, q.device
        padding = request.key_padding_mask
        self.ends = self.order = self.reach = None
        if padding is not None:
            self.ends, self.order, self.reach = _ends(padding)
            padding = padding.contiguous().view(torch.uint8)
        self.padding = padding
        self.statistics = torch.empty(
            (2, self.batch, self.heads, self.length), dtype=torch.float32, device=q.device
        )
        self.strided = ((q, *q.stride()[:3]), (k, *k.stride()[:3]))
        self.scale_log2 = scale * _LOG2_E
        padded_dim = max(16, triton.next_power_of_2(head_dim))
        self.shape = (self.heads // k.shape[1], head_dim, padded_dim, request.causal)
        grid = (triton.cdiv(self.length, softmax.rows), self.batch * self.heads)
        with torch.cuda.device_of(q):
            attention_map_softmax_kernel[grid](
                *(*self.strided, *self.statistics, self.padding, self.ends),
                *(self.heads, self.length, self.scale_log2),
                *(*self.shape, softmax.rows, softmax.columns),
                **softmax.launch,
            )


def _launch(
    inputs: _Inputs, tiles: MapTiles, sums: _Sums, centre: float = 0.0, heads: range | None = None
) -> Tensor:
    """Return the parts that the tiles give: of all heads together, or of each of ``heads``."""
    parts = sums.empty(() if heads is None else (len(heads),))
    grid = (sums.row_tiles * sums.column_tiles, 1 if heads is None else len(heads))
    first_head, head_stride = (0, 0) if heads is None else (heads.start, parts.stride(0))
    with torch.cuda.device_of(parts):
        attention_map_tile_kernel[grid](
            *(*inputs.strided, *inputs.statistics, inputs.padding, inputs.order, inputs.reach),
            *(inputs.row_weights.to(parts.dtype), parts, inputs.batch),
            *(inputs.heads, inputs.length, inputs.scale_log2, sums.row_tiles, sums.column_tiles),
            *(centre, first_head, head_stride),
            *(*inputs.shape, tiles.rows, tiles.columns, tiles.pieces),
            *(sums.kind, sums.block, sums.half, sums.reach, heads is not None),
            **tiles.launch,
        )
    return parts


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
        self.shape: tuple[int, ...]
        if self.kind == "corners":
            groups = [max(1, side // block) for side in (tiles.rows, tiles.columns)]
            self.shape = (4, self.row_tiles * groups[0], pieces * groups[1])
        elif self.kind == "blocks":
            self.shape = (self.row_tiles, self.reach, pieces, self.reach)
        elif self.kind == "tokens":
            self.shape = (request.length, request.length)
        else:
            self.shape = (2, self.row_tiles, pieces)
        self.dtype = torch.float64 if self.kind == "tokens" else torch.float32
        self.device = request.q.device

    @property
    def bytes(self) -> int:
        """Of the parts of one map."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, heads: tuple[int, ...]) -> Tensor:
        """Return memory for the parts of a map, or of as many as ``heads`` says."""
        return torch.empty((*heads, *self.shape), dtype=self.dtype, device=self.device)

    def add_up(self, parts: Tensor) -> Tensor:
        """Return the block sums, (n, n) float64, or (heads, n, n) of parts of several heads."""
        if self.kind == "tokens":
            return parts
        if self.kind == "blocks":
            into_rows, into_columns = self._chosen(self.rows, 0), self._chosen(self.columns, 2)
            wide = parts.flatten(-2).flatten(-3, -2).to(torch.float64)
            return into_rows @ wide @ into_columns.T
        n = self.n
        # A block is the lower right one at its first corner, the lower left one at the next, …
        total = self._at_corners(parts, 0)[..., :n, :n] + self._at_corners(parts, 1)[..., :n, 1:]
        total += self._at_corners(parts, 2)[..., 1:, :n]
        return total.add_(self._at_corners(parts, 3)[..., 1:, 1:])

    def _at_corners(self, parts: Tensor, quarter: int) -> Tensor:
        """Return what each corner gives to one of its blocks, (…, n + 1, n + 1) float64."""
        corners = self.n + 1
        down, right = max(1, self.block // self.rows), max(1, self.block // self.columns)
        parts = parts[..., quarter, : corners * down, : corners * right]
        parts = parts.unflatten(-1, (corners, right)).unflatten(-3, (corners, down))
        return parts.sum(dim=(-3, -1), dtype=torch.float64)

    def _chosen(self, side: int, dim: int) -> Tensor:
        """Return the 0 and 1 that add the parts of tiles where they belong, (n, parts) float64.

        As a product, since index_add_ on a GPU would add in no fixed order.
        """
        device = self.device
        first = torch.arange(self.shape[dim], device=device) * side - self.half
        first = first.clamp(min=0) // self.block
        to = first[:, None] + torch.arange(self.reach, device=device)
        chosen = torch.arange(self.n, device=device)[:, None] == to.flatten()
        return chosen.to(torch.float64)
