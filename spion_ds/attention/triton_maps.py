"""Pooled attention maps on CUDA devices, in Triton: nothing of size L × L, the same bits each time.

Two kernels. The first writes each row's softmax statistics. In the second a program owns a tile of
the map, adds the probabilities of all samples and heads to it in registers, and writes what the
tile gives to the blocks that it reaches; those parts are then added up in a fixed order.

Shape suffixes: B batch, H heads, L tokens, R rows and C columns of a tile, D head_dim padded to a
power of two, n blocks a side.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from spion_ds.attention.streaming_maps import MapRequest

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_HEAD_DIM = 128
# A tile visits all blocks that it reaches: of smaller ones that would be hundreds.
_MIN_BLOCK = 16
_LOG2_E = math.log2(math.e)
# Below every score yet finite, so that a row that has met no key yet is no special case.
_LOWEST = tl.constexpr(-1.0e30)
# Above every score: makes the probabilities of a row that is left out 0, however large its scores.
_HIGHEST = tl.constexpr(1.0e30)
_DATA = ["padding_ptr", "weights_ptr", "heads", "length", "batch"]


@triton.jit(do_not_specialize=_DATA)
def attention_map_softmax_kernel(
    q: tl.tuple,  # pointer and strides of batch, head and token; the stride of head_dim is 1
    k: tl.tuple,
    top_ptr: tl.tensor,  # (B, H, L) float32, largest score in base 2
    inverse_ptr: tl.tensor,  # (B, H, L) float32, 1 / sum of 2^(score - largest), 0 for padding
    padding_ptr: tl.tensor,  # (B, L) bytes, 1 = real token, or None
    heads: tl.tensor,
    length: tl.tensor,
    scale_log2: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> None:
    """Write the softmax statistics of R rows of one head."""
    bh = tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    q_RD = _load(q, b, h, rows_R, length, True, HEAD_DIM, D)
    if padding_ptr is not None:
        padding_ptr += b * length
    top_R = tl.full((R,), _LOWEST, tl.float32)
    total_R = tl.zeros((R,), tl.float32)
    seen = tl.minimum(length, tl.program_id(0) * R + R) if CAUSAL else length
    # The first loop has no masks; under causality it ends before the tile's first query.
    plain = (tl.program_id(0) * R // C if CAUSAL else length // C) * C
    for ends in tl.static_range(0, 2):
        for first in range(plain if ends else 0, seen if ends else plain, C):
            columns_C = first + tl.arange(0, C)
            k_CD = _load(k, b, h // GROUP, columns_C, length, ends, HEAD_DIM, D)
            scores_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision="ieee") * scale_log2
            scores_RC = _mask(
                scores_RC, rows_R, columns_C, length, padding_ptr, ends, CAUSAL and ends
            )
            new_top_R = tl.maximum(top_R, tl.max(scores_RC, axis=1))
            added_R = tl.sum(tl.exp2(scores_RC - new_top_R[:, None]), axis=1)
            total_R = total_R * tl.exp2(top_R - new_top_R) + added_R
            top_R = new_top_R
    inside_R = rows_R < length
    counts_R = total_R > 0.0
    if padding_ptr is not None:
        counts_R = counts_R & (tl.load(padding_ptr + rows_R, mask=inside_R, other=0) != 0)
    at_R = bh.to(tl.int64) * length + rows_R
    tl.store(top_ptr + at_R, tl.where(counts_R, top_R, _HIGHEST), mask=inside_R)
    inverse_R = tl.where(counts_R, 1.0 / tl.where(counts_R, total_R, 1.0), 0.0)
    tl.store(inverse_ptr + at_R, inverse_R, mask=inside_R)


@triton.jit(do_not_specialize=_DATA)
def attention_map_tile_kernel(
    q: tl.tuple,
    k: tl.tuple,
    top_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    padding_ptr: tl.tensor,
    weights_ptr: tl.tensor,  # (L,) float32
    parts_ptr: tl.tensor,  # (row tiles, REACH, column tiles, REACH) float32
    batch: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    scale_log2: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    REACH: tl.constexpr,
) -> None:
    """Write what a tile of R rows and C columns of the map gives to the blocks that it reaches."""
    first_row, first_column = tl.program_id(1) * R, tl.program_id(0) * C
    rows_R, columns_C = first_row + tl.arange(0, R), first_column + tl.arange(0, C)
    inside_R = rows_R < length
    sums_RC = tl.zeros((R, C), tl.float32)
    # A tile wholly in the future has no probability.
    pairs = tl.where(first_column >= first_row + R, 0, batch * heads) if CAUSAL else batch * heads
    for pair in range(0, pairs):
        bh = tl.zeros((), tl.int64) + pair
        b, h = bh // heads, bh % heads
        q_RD = _load(q, b, h, rows_R, length, True, HEAD_DIM, D)
        k_CD = _load(k, b, h // GROUP, columns_C, length, True, HEAD_DIM, D)
        at_R = bh * length + rows_R
        top_R = tl.load(top_ptr + at_R, mask=inside_R, other=0.0)
        inverse_R = tl.load(inverse_ptr + at_R, mask=inside_R, other=0.0)
        scores_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision="ieee") * scale_log2
        if padding_ptr is not None:
            padding = padding_ptr + b * length
            scores_RC = _mask(scores_RC, rows_R, columns_C, length, padding, False, False)
        sums_RC += tl.exp2(scores_RC - top_R[:, None]) * inverse_R[:, None]
    # Position and causality are the same for all heads: one mask at the end.
    exists_RC = inside_R[:, None] & (columns_C < length)[None, :]
    if CAUSAL:
        exists_RC = exists_RC & (columns_C[None, :] <= rows_R[:, None])
    weights_R = tl.load(weights_ptr + rows_R, mask=inside_R, other=0.0)
    sums_RC = tl.where(exists_RC, sums_RC * weights_R[:, None], 0.0)

    # Entry (r, c) adds to block (i, j) once for every shift f, |f| <= HALF, with r - f in row i and
    # c - f in column j: that many are in the intersection of two intervals.
    top_block = tl.maximum(first_row - HALF, 0) // BLOCK
    left_block = tl.maximum(first_column - HALF, 0) // BLOCK
    part = parts_ptr + tl.program_id(1).to(tl.int64) * REACH * tl.num_programs(0) * REACH
    part += tl.program_id(0) * REACH
    for j in range(0, REACH):
        low_C, high_C = _shifts(columns_C, left_block + j, length, BLOCK, HALF)
        for i in range(0, REACH):
            low_R, high_R = _shifts(rows_R, top_block + i, length, BLOCK, HALF)
            high_RC = tl.minimum(high_R[:, None], high_C[None, :])
            count_RC = tl.maximum(high_RC - tl.maximum(low_R[:, None], low_C[None, :]), 0.0)
            value = tl.sum(count_RC * sums_RC)
            tl.store(part + i * tl.num_programs(0) * REACH + j, value)


@triton.jit
def _shifts(
    tokens: tl.tensor,
    block: tl.tensor,
    length: tl.tensor,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
) -> tl.tuple:
    """Return from which shift on, and before which, each token is shifted into the block."""
    begin, end = block * BLOCK, tl.minimum(block * BLOCK + BLOCK, length)
    low = tl.maximum(tokens - end + 1, -HALF).to(tl.float32)
    high = (tl.minimum(tokens - begin, HALF) + 1).to(tl.float32)
    return low, high


@triton.jit
def _mask(
    scores_RC: tl.tensor,
    rows_R: tl.tensor,
    columns_C: tl.tensor,
    length: tl.tensor,
    padding_ptr: tl.tensor,  # of the sample
    END: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> tl.tensor:
    """Return the scores with -inf for keys past the sequence, padded or in the future."""
    if END:
        scores_RC = tl.where((columns_C < length)[None, :], scores_RC, float("-inf"))
    if padding_ptr is not None:
        real_C = tl.load(padding_ptr + columns_C, mask=columns_C < length, other=0) != 0
        scores_RC = tl.where(real_C[None, :], scores_RC, float("-inf"))
    if CAUSAL:
        past_RC = columns_C[None, :] <= rows_R[:, None]
        scores_RC = tl.where(past_RC, scores_RC, float("-inf"))
    return scores_RC


@triton.jit
def _load(
    x: tl.tuple,
    b: tl.tensor,
    h: tl.tensor,
    tokens: tl.tensor,
    length: tl.tensor,
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """Return tokens of a head, (tokens, D), 0 past head_dim and, with MASK, past the sequence."""
    column = tl.arange(0, D)[None, :]
    pointers = x[0] + b * x[1] + h * x[2] + tokens.to(tl.int64)[:, None] * x[3] + column
    if MASK and HEAD_DIM < D:
        tile = tl.load(pointers, mask=(tokens < length)[:, None] & (column < HEAD_DIM), other=0.0)
    elif MASK:
        tile = tl.load(pointers, mask=(tokens < length)[:, None], other=0.0)
    elif HEAD_DIM < D:
        tile = tl.load(pointers, mask=column < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


def unsupported(request: MapRequest) -> str | None:
    """Return why there is no kernel for these tensors, None if there is."""
    q, k = request.q, request.k
    if q.dtype not in _DTYPES or k.dtype != q.dtype or not 1 <= q.shape[3] <= _MAX_HEAD_DIM:
        return (
            f"the kernels take bf16, fp16 and fp32 with head_dim 1 to {_MAX_HEAD_DIM}; got "
            f"{q.dtype} and {k.dtype} with head_dim {q.shape[3]}"
        )
    if request.block < _MIN_BLOCK:
        return f"the kernels take blocks from {_MIN_BLOCK}; got {request.block}"
    interpreted = not isinstance(attention_map_tile_kernel, triton.JITFunction)
    if not (q.is_cuda or interpreted):
        return f"the kernels run on CUDA devices; the tensors are on {q.device}"
    return None


def block_sums_triton(request: MapRequest) -> Tensor:
    """Return what ``block_sums_torch`` returns.

    Products are in the inputs' dtype, scores, probabilities and the sums of a tile float32; tiles
    are added in float64. The request must be one that :func:`unsupported` has nothing against.
    """
    q = request.q.detach() if request.q.stride(-1) == 1 else request.q.detach().contiguous()
    k = request.k.detach() if request.k.stride(-1) == 1 else request.k.detach().contiguous()
    batch, heads, length, head_dim = q.shape
    padding = request.key_padding_mask
    padding = None if padding is None else padding.contiguous().view(torch.uint8)
    top, inverse = torch.empty((2, batch, heads, length), dtype=torch.float32, device=q.device)
    tile, options = _tile(q)
    tiles = triton.cdiv(length, tile)
    half, block = request.filter_size // 2, request.block
    reach = min((tile + 2 * half - 2) // block + 2, -(-length // block))
    parts = torch.empty((tiles, reach, tiles, reach), dtype=torch.float32, device=q.device)
    strided = ((q, *q.stride()[:3]), (k, *k.stride()[:3]))
    padded_dim = max(16, triton.next_power_of_2(head_dim))
    shape = (heads // k.shape[1], head_dim, padded_dim, tile, min(tile, 64), request.causal)
    scale = request.scale * _LOG2_E
    with torch.cuda.device_of(q):
        attention_map_softmax_kernel[(tiles, batch * heads)](
            *strided, top, inverse, padding, heads, length, scale, *shape, **options
        )
        attention_map_tile_kernel[(tiles, tiles)](
            *strided,
            *(top, inverse, padding, request.row_weights.float(), parts),
            *(batch, heads, length, scale),
            *(*shape[:4], tile, request.causal),
            *(block, half, reach),
            **options,
        )
    return _add_parts(parts, tile, length, block, half)


def _tile(q: Tensor) -> tuple[int, dict[str, int]]:
    """Return the side of a tile of the map, and Triton's launch options."""
    if q.dtype == torch.float32:
        # Full float32 products use no tensor cores, and hold their operands in registers.
        return 32, {"num_warps": 4, "num_stages": 1}
    return 128, {"num_warps": 8, "num_stages": 3 if q.shape[3] <= 64 else 2}


def _add_parts(parts: Tensor, tile: int, length: int, block: int, half: int) -> Tensor:
    """Return (n, n) float64: the parts (tiles, reach, tiles, reach) added where they belong.

    As products with zeros and ones: index_add_ on a GPU would add in no fixed order.
    """
    tiles, reach = parts.shape[:2]
    n = -(-length // block)
    first = torch.arange(tiles, device=parts.device) * tile - half
    to = first.clamp(min=0)[:, None] // block + torch.arange(reach, device=parts.device)
    chosen = torch.arange(n, device=parts.device)[:, None] == to.flatten()
    chosen = chosen.to(torch.float64)  # (n, tiles * reach)
    return chosen @ parts.view(tiles * reach, -1).to(torch.float64) @ chosen.T
