"""What the Triton kernels of attention and of its maps share: lists of blocks, tiles of tokens.

A tile is TILE tokens: a part of a block, a block, or several blocks gathered. Shape suffixes and
tensors as in forward_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spion_ds.attention.triton.dropout import combine

# Arguments whose values (1, divisible by 16) must not be compiled in: another layout, batch or
# length then needs no other kernel.
DATA = ["row_ptr", "col_idx", "col_ptr", "row_idx", "col_order", "padding_ptr", "seen_ptr"]
DATA += ["col_parts", "sums_ptr", "done_ptr", "num_parts", "spans_ptr"]
DATA += ["dropout_ptr", "threshold"]
DATA += ["num_rows", "num_cols", "heads", "queries", "keys", "query_offset"]

# Below every score yet finite, so that a row that has met no key yet is no special case.
LOWEST = tl.constexpr(-1.0e30)
# Entries of a list that are counted at a time.
_LANES = tl.constexpr(128)
# A token position past the end of every sequence.
_NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def load_sums(
    pointer: tl.tensor,
    first: tl.tensor,
    others: tl.tensor,
    padded: tl.tensor,
    MASK: tl.constexpr,
    OTHER: tl.constexpr,
) -> tl.tensor:
    """Return row sums of the tokens ``first`` + ``others``, with MASK OTHER past the last block."""
    if MASK:
        sums = tl.load(pointer + first + others, mask=first + others < padded, other=OTHER)
    else:
        sums = tl.load(pointer + first + others)
    return sums


@triton.jit
def count_below(
    indices: tl.tensor, start: tl.tensor, stop: tl.tensor, limit: tl.tensor
) -> tl.tensor:
    """Return how many of the entries from ``start`` to ``stop`` are below ``limit``."""
    lane = tl.arange(0, _LANES)
    count = tl.zeros((_LANES,), tl.int32)
    for first in range(start, stop, _LANES):
        inside = first + lane < stop
        index = tl.load(indices + first + lane, mask=inside, other=0)
        count += (inside & (index < limit)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def real_span(
    indices: tl.tensor, start: tl.tensor, stop: tl.tensor, spans_ptr: tl.tensor
) -> tl.tuple:
    """Return how many first entries are blocks without padding, and where the real keys end."""
    whole = count_below(indices, start, stop, tl.load(spans_ptr))
    return whole, start + count_below(indices, start, stop, tl.load(spans_ptr + 1))


@triton.jit
def plain_tiles(
    tiles: tl.tensor,
    whole: tl.tensor,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    TAIL: tl.constexpr,
) -> tl.tensor:
    """Return how many first tiles have nothing to mask; ``whole`` blocks have no padding."""
    unpadded = whole * (BLOCK // TILE) if TILE <= BLOCK else whole // (TILE // BLOCK)
    return tl.minimum(tl.maximum(tiles - TAIL, 0), unpadded)


@triton.jit
def tile_count(blocks: tl.tensor, BLOCK: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """Return how many tiles hold ``blocks`` kept blocks."""
    return blocks * (BLOCK // TILE) if TILE <= BLOCK else tl.cdiv(blocks, TILE // BLOCK)


@triton.jit
def partner_tokens(
    indices: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    tile: tl.tensor,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tuple:
    """Return the first token of a tile and the further ones relative to it, (TILE,).

    A tile of several gathered blocks has first token 0 and positions, _NOWHERE past the list.
    """
    lane = tl.arange(0, TILE)
    if TILE <= BLOCK:
        parts: tl.constexpr = BLOCK // TILE
        first = tl.load(indices + start + tile // parts) * BLOCK + (tile % parts) * TILE
        others = lane
    else:
        entry = start + tile * (TILE // BLOCK) + lane // BLOCK
        block = tl.load(indices + entry, mask=entry < stop, other=0)
        first = tl.zeros((), tl.int32)
        others = tl.where(entry < stop, block * BLOCK + lane % BLOCK, _NOWHERE).to(tl.int64)
    return first, others


@triton.jit
def real_keys(
    tokens_T: tl.tensor, keys: tl.tensor, padding_ptr: tl.tensor, MASK: tl.constexpr
) -> tl.tensor:
    """Return which keys exist and are no padding, (T,); without MASK that is None, for all."""
    real_T = None
    if MASK:
        real_T = tokens_T < keys
        if padding_ptr is not None:
            real_T = real_T & (tl.load(padding_ptr + tokens_T, mask=real_T, other=0) != 0)
    return real_T


@triton.jit
def taking_rows(
    rows: tl.tensor, lse: tl.tensor, queries: tl.tensor, keys: tl.tensor, padding_ptr: tl.tensor
) -> tl.tensor:
    """Return which queries take part in the gradients: real ones, and padding that keeps something.

    Other padding may hold NaN, which a probability of 0 does not make 0. Only where there are as
    many queries as keys does the mask say which queries are padding.
    """
    masked = tl.where(queries == keys, keys, 0)
    real = tl.load(padding_ptr + rows, mask=rows < masked, other=1) != 0
    return real | (lse != float("inf"))


@triton.jit
def allowed_entries(
    positions_O: tl.tensor, tokens_T: tl.tensor, real_T: tl.tensor, CAUSAL: tl.constexpr
) -> tl.tensor:
    """Return which entries of a tile exist, (1, T), or (O, T) with CAUSAL."""
    allowed = real_T[None, :]
    if CAUSAL:
        allowed = allowed & (tokens_T[None, :] <= positions_O[:, None])
    return allowed


@triton.jit
def load_tokens(
    x: tl.tuple,
    b: tl.tensor,
    h: tl.tensor,
    first: tl.tensor,
    others: tl.tensor,
    length: tl.tensor,
    MASK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    wanted: tl.tensor = None,
) -> tl.tensor:
    """Return the tokens ``first`` + ``others`` of head ``h``, (tokens, D), 0 past head_dim.

    With MASK also 0 past the sequence, and for tokens that are not ``wanted``; without, all tokens
    must be inside it.
    """
    pointers, column = locate(x, b, h, first, others, D)
    if MASK:
        mask = first + others < length
        if wanted is not None:
            mask = mask & wanted
        mask = mask[:, None]
        if HEAD_DIM < D:
            mask = mask & (column < HEAD_DIM)
        tile = tl.load(pointers, mask=mask, other=0.0)
    elif HEAD_DIM < D:
        tile = tl.load(pointers, mask=column < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_tokens(
    x: tl.tuple,
    b: tl.tensor,
    h: tl.tensor,
    first: tl.tensor,
    others: tl.tensor,
    length: tl.tensor,
    values: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Write (tokens, D) of head ``h`` in the target's dtype, nothing past the sequence."""
    pointers, column = locate(x, b, h, first, others, D)
    mask = (first + others < length)[:, None]
    if HEAD_DIM < D:
        mask = mask & (column < HEAD_DIM)
    tl.store(pointers, values.to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def locate(
    x: tl.tuple,
    b: tl.tensor,
    h: tl.tensor,
    first: tl.tensor,
    others: tl.tensor,
    D: tl.constexpr,
) -> tl.tuple:
    """Return pointers (tokens, D) into (pointer, strides of batch, head, token), and columns.

    Offsets that can pass 2^31 elements are int64: those of gathered positions and of first tokens.
    Those relative to a first token are not, and are the same in every tile.
    """
    column = tl.arange(0, D)[None, :]
    # b and h are int64 here.
    start = x[0] + b * x[1] + h * x[2] + first.to(tl.int64) * x[3]
    return start + others[:, None] * x[3] + column, column


@triton.jit
def row_keys(sample_key: tl.tensor, h: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """Return the dropout key of each query row, uint32."""
    return combine(combine(sample_key.to(tl.uint32, bitcast=True), h), rows)
