"""The Triton kernels of pooled attention maps, which triton_maps.py launches.

The first writes each row's softmax statistics. In the second a program owns a tile of the map, adds
the probabilities of all samples and heads to it in registers, and writes what the tile gives to the
blocks that it reaches; where each head has its own map, those of all samples of one head. A tile
leaves out the samples that end before it begins.

Where the filter is no wider than a block, a tile is cut at the middle of blocks: around each
corner, where four blocks meet, an entry adds to these four alone, and its four weights are a
minimum and three differences. Elsewhere a tile visits all blocks that it reaches. For the skewness
a tile writes its powers instead, and for a token-level map, whose blocks are single tokens, itself.

Shape suffixes: B batch, H heads, L tokens, R rows and C columns of a tile, D head_dim padded to a
power of two, n blocks a side.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spion_ds.attention.triton.tokens import LOWEST

# Above every score: makes the probabilities of a row that is left out 0, however large its scores.
_HIGHEST = tl.constexpr(1.0e30)
# Programs that run at the same time share this many row tiles, so that few keys are read at a time.
_ROW_GROUP = tl.constexpr(8)
_DATA = ["padding_ptr", "ends_ptr", "heads", "length"]
_TILE_DATA = ["padding_ptr", "order_ptr", "reach_ptr", "heads", "length", "weights_ptr"]
_TILE_DATA += ["batch", "row_tiles", "column_tiles", "first_head", "head_stride"]


@triton.jit(do_not_specialize=_DATA)
def attention_map_softmax_kernel(
    q: tl.tuple,  # pointer and strides of batch, head and token; the stride of head_dim is 1
    k: tl.tuple,
    top_ptr: tl.tensor,  # (B, H, L) float32, largest score in base 2
    inverse_ptr: tl.tensor,  # (B, H, L) float32, 1 / sum of 2^(score - largest), 0 for padding
    padding_ptr: tl.tensor,  # (B, L) bytes, 1 = real token, or None
    ends_ptr: tl.tensor,  # (B,) int32, tokens up to the last real one; None without padding
    heads: tl.tensor,
    length: tl.tensor,
    scale_log2: tl.tensor,  # above 0
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
) -> None:
    """Write the softmax statistics of R rows of one head."""
    bh = tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows_R = tl.program_id(0) * R + tl.arange(0, R)
    q_RD = _load(q, b, h, tl.minimum(rows_R, length - 1), HEAD_DIM, D)
    end = length
    if padding_ptr is not None:
        padding_ptr += b * length
        end = tl.load(ends_ptr + b)
        end = tl.where(tl.program_id(0) * R < end, end, 0)
    top_R = tl.full((R,), LOWEST, tl.float32)
    total_R = tl.zeros((R,), tl.float32)
    seen = tl.minimum(end, tl.program_id(0) * R + R) if CAUSAL else end
    # The first loop has no masks; under causality it ends before the tile's first query.
    plain = (tl.minimum(tl.program_id(0) * R, end) // C if CAUSAL else end // C) * C
    for ends in tl.static_range(0, 2):
        for first in range(plain if ends else 0, seen if ends else plain, C):
            columns_C = first + tl.arange(0, C)
            read_C = tl.minimum(columns_C, length - 1) if ends else columns_C
            k_CD = _load(k, b, h // GROUP, read_C, HEAD_DIM, D)
            scores_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision="ieee")
            if ends:
                scores_RC = tl.where((columns_C < length)[None, :], scores_RC, float("-inf"))
            if padding_ptr is not None:
                real_C = tl.load(padding_ptr + read_C) != 0
                scores_RC = tl.where(real_C[None, :], scores_RC, float("-inf"))
            if CAUSAL and ends:
                past_RC = columns_C[None, :] <= rows_R[:, None]
                scores_RC = tl.where(past_RC, scores_RC, float("-inf"))
            # Scaled after the maximum, so that scale and shift are one operation an entry.
            new_top_R = tl.maximum(top_R, tl.max(scores_RC, axis=1) * scale_log2)
            added_R = tl.sum(tl.exp2(scores_RC * scale_log2 - new_top_R[:, None]), axis=1)
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


@triton.jit(do_not_specialize=_TILE_DATA)
def attention_map_tile_kernel(
    q: tl.tuple,
    k: tl.tuple,
    top_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    padding_ptr: tl.tensor,
    order_ptr: tl.tensor,  # (B,) int32, samples by falling end; None without padding
    reach_ptr: tl.tensor,  # (L,) int32, how many of them have a real token here or later; or None
    weights_ptr: tl.tensor,  # (L,) float32; float64 for "tokens"
    sums_ptr: tl.tensor,  # float32, what _corner_sums … write; (L, L) float64 for "tokens"
    batch: tl.tensor,
    heads: tl.tensor,
    length: tl.tensor,
    scale_log2: tl.tensor,
    row_tiles: tl.tensor,
    column_tiles: tl.tensor,
    centre: tl.tensor,  # float32, of the powers
    first_head: tl.tensor,  # the head of program_id(1) 0; of no consequence without PER_HEAD
    head_stride: tl.tensor,  # between the sums of two heads
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    PIECES: tl.constexpr,  # 1 for "tokens"
    SUMS: tl.constexpr,  # "corners", "blocks", "powers" or "tokens"
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    REACH: tl.constexpr,
    PER_HEAD: tl.constexpr,  # whether program_id(1) counts heads, each with its own map
) -> None:
    """Write the sums of a tile of R rows and C · PIECES columns of the map."""
    row_tile, column_tile = _place(row_tiles, column_tiles)
    summed = heads
    if PER_HEAD:
        summed = 1
        sums_ptr += tl.program_id(1).to(tl.int64) * head_stride
    shift: tl.constexpr = BLOCK // 2 if SUMS == "corners" else 0
    first_row, first_column = row_tile * R - shift, column_tile * (C * PIECES) - shift
    rows_R = first_row + tl.arange(0, R)
    columns_C, more_C = first_column + tl.arange(0, C), first_column + C + tl.arange(0, C)
    # Rows and columns that do not exist read others', and are masked at the end.
    row_R = tl.minimum(tl.maximum(rows_R, 0), length - 1)
    sums_RC, more_RC = tl.zeros((R, C), tl.float32), tl.zeros((R, C), tl.float32)
    samples = batch
    if padding_ptr is not None:
        begin = tl.maximum(tl.maximum(first_row, first_column), 0)
        samples = tl.load(reach_ptr + tl.minimum(begin, length - 1))
    # A tile wholly in the future has no probability.
    pairs = (
        tl.where(first_column >= first_row + R, 0, samples * summed) if CAUSAL else samples * summed
    )
    sample = tl.zeros((), tl.int32)
    if padding_ptr is not None:
        sample = tl.load(order_ptr)
    for pair in range(0, pairs):
        bh = tl.zeros((), tl.int64) + pair
        b, h = bh // summed, bh % summed
        if padding_ptr is not None:
            b = sample.to(tl.int64)
            bh = b * heads + h
            # A load ahead: one that q's address waited for would cost the loop a stage.
            sample = tl.load(order_ptr + tl.minimum(pair + 1, pairs - 1) // summed)
        if PER_HEAD:
            h += first_head + tl.program_id(1)
            bh = b * heads + h
        q_RD = _load(q, b, h, row_R, HEAD_DIM, D)
        top_R = tl.load(top_ptr + bh * length + row_R)
        inverse_R = tl.load(inverse_ptr + bh * length + row_R)
        for piece in tl.static_range(0, PIECES):
            read_C = tl.minimum(tl.maximum(more_C if piece else columns_C, 0), length - 1)
            k_CD = _load(k, b, h // GROUP, read_C, HEAD_DIM, D)
            scores_RC = tl.dot(q_RD, tl.trans(k_CD), input_precision="ieee")
            if padding_ptr is not None:
                real_C = tl.load(padding_ptr + b * length + read_C) != 0
                scores_RC = tl.where(real_C[None, :], scores_RC, float("-inf"))
            probs_RC = tl.exp2(scores_RC * scale_log2 - top_R[:, None])
            if SUMS == "tokens":
                # What each addition rounds away is added up beside it (Knuth's two-sum).
                added_RC = probs_RC * inverse_R[:, None]
                total_RC = sums_RC + added_RC
                taken_RC = total_RC - sums_RC
                more_RC += (sums_RC - (total_RC - taken_RC)) + (added_RC - taken_RC)
                sums_RC = total_RC
            elif piece:
                more_RC += probs_RC * inverse_R[:, None]
            else:
                sums_RC += probs_RC * inverse_R[:, None]
    weights_R = tl.load(weights_ptr + row_R)
    weights_R = tl.where((rows_R >= 0) & (rows_R < length), weights_R, 0.0)
    for piece in tl.static_range(0, PIECES):
        here_C = more_C if piece else columns_C
        # Position and causality are the same for all heads: one mask at the end. Rows that do not
        # exist have no weight.
        inside_C = (here_C >= 0) & (here_C < length)
        exists_RC = inside_C[None, :]
        if CAUSAL:
            exists_RC = exists_RC & (here_C[None, :] <= rows_R[:, None])
        if SUMS == "tokens":
            mean_RC = sums_RC.to(tl.float64) + more_RC.to(tl.float64)
        else:
            mean_RC = more_RC if piece else sums_RC
        mean_RC = tl.where(exists_RC, mean_RC * weights_R[:, None], 0.0)
        at, size = (row_tile, column_tile * PIECES + piece), (row_tiles, column_tiles * PIECES)
        if SUMS == "corners":
            _corner_sums(mean_RC, rows_R, here_C, sums_ptr, at, size, BLOCK, HALF)
        elif SUMS == "blocks":
            _block_sums(mean_RC, rows_R, here_C, sums_ptr, at, size, length, BLOCK, HALF, REACH)
        elif SUMS == "tokens":
            place = sums_ptr + rows_R.to(tl.int64)[:, None] * length + here_C[None, :]
            tl.store(place, mean_RC, mask=(rows_R < length)[:, None] & inside_C[None, :])
        else:
            inside_RC = (rows_R < length)[:, None] & inside_C[None, :]
            _power_sums(tl.where(inside_RC, mean_RC - centre, 0.0), sums_ptr, at, size)


@triton.jit
def _place(row_tiles: tl.tensor, column_tiles: tl.tensor) -> tl.tuple:
    """Return the row and column tile of this program: down _ROW_GROUP rows, then to the right."""
    group, within = (
        tl.program_id(0) // (_ROW_GROUP * column_tiles),
        tl.program_id(0) % (_ROW_GROUP * column_tiles),
    )
    rows = tl.minimum(row_tiles - group * _ROW_GROUP, _ROW_GROUP)
    return group * _ROW_GROUP + within % rows, within // rows


@triton.jit
def _corner_sums(
    mean_RC: tl.tensor,
    rows_R: tl.tensor,
    columns_C: tl.tensor,
    sums_ptr: tl.tensor,  # (4, row groups, column groups) float32
    at: tl.tuple,  # the tile's place, and how many there are, down and to the right
    size: tl.tuple,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """Write what each group of entries gives to the four blocks at its corner.

    Of the 2 · HALF + 1 shifted copies of entry (r, c), x are below the corner's border and y to
    the right of it. As the shifts are the same, min(x, y) copies are both: they are the lower
    right block's; x - min(x, y) are the lower left's, y - min(x, y) the upper right's.
    """
    R: tl.constexpr = mean_RC.shape[0]
    C: tl.constexpr = mean_RC.shape[1]
    ROWS: tl.constexpr = R if R < BLOCK else BLOCK
    COLUMNS: tl.constexpr = C if C < BLOCK else BLOCK
    x_R1, y_1C = _beyond(rows_R, BLOCK, HALF)[:, None], _beyond(columns_C, BLOCK, HALF)[None, :]
    both_RC = tl.minimum(x_R1, y_1C)
    above_RC = y_1C - both_RC
    group_R = at[0] * (R // ROWS) + tl.arange(0, R // ROWS)
    group_C = at[1] * (C // COLUMNS) + tl.arange(0, C // COLUMNS)
    row_groups, column_groups = size[0] * (R // ROWS), size[1] * (C // COLUMNS)
    place = sums_ptr + group_R.to(tl.int64)[:, None] * column_groups + group_C[None, :]
    for corner in tl.static_range(0, 4):
        if corner == 0:
            count_RC = both_RC
        elif corner == 1:
            count_RC = x_R1 - both_RC
        elif corner == 2:
            count_RC = above_RC
        else:
            count_RC = (2 * HALF + 1 - x_R1) - above_RC
        share = tl.reshape(count_RC * mean_RC, (R, C // COLUMNS, COLUMNS)).sum(axis=2)
        share = tl.reshape(share, (R // ROWS, ROWS, C // COLUMNS)).sum(axis=1)
        tl.store(place + row_groups.to(tl.int64) * column_groups * corner, share)


@triton.jit
def _beyond(tokens: tl.tensor, BLOCK: tl.constexpr, HALF: tl.constexpr) -> tl.tensor:
    """Return how many shifted copies of each token are at or past the nearest border of blocks."""
    border = (tokens + BLOCK // 2) // BLOCK * BLOCK
    copies = tl.minimum(tl.maximum(tokens - border + HALF + 1, 0), 2 * HALF + 1)
    return copies.to(tl.float32)


@triton.jit
def _block_sums(
    mean_RC: tl.tensor,
    rows_R: tl.tensor,
    columns_C: tl.tensor,
    sums_ptr: tl.tensor,  # (row tiles, REACH, column tiles, REACH) float32
    at: tl.tuple,
    size: tl.tuple,
    length: tl.tensor,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    REACH: tl.constexpr,
) -> None:
    """Write what the tile gives to each of the REACH × REACH blocks that it may reach.

    Entry (r, c) adds to block (i, j) once for every shift f, |f| <= HALF, with r - f in row i and
    c - f in column j: that many are in the intersection of two intervals.
    """
    top_block = tl.maximum(at[0] * mean_RC.shape[0] - HALF, 0) // BLOCK
    left_block = tl.maximum(at[1] * mean_RC.shape[1] - HALF, 0) // BLOCK
    width = size[1] * REACH
    place = sums_ptr + at[0].to(tl.int64) * REACH * width + at[1] * REACH
    for j in range(0, REACH):
        low_C, high_C = _shifts(columns_C, left_block + j, length, BLOCK, HALF)
        for i in range(0, REACH):
            low_R, high_R = _shifts(rows_R, top_block + i, length, BLOCK, HALF)
            high_RC = tl.minimum(high_R[:, None], high_C[None, :])
            count_RC = tl.maximum(high_RC - tl.maximum(low_R[:, None], low_C[None, :]), 0.0)
            tl.store(place + i * width + j, tl.sum(count_RC * mean_RC))


@triton.jit
def _power_sums(
    difference_RC: tl.tensor,
    sums_ptr: tl.tensor,  # (2, row tiles, column tiles) float32
    at: tl.tuple,
    size: tl.tuple,
) -> None:
    """Write the sums of the squares and of the cubes of a tile."""
    place = sums_ptr + at[0].to(tl.int64) * size[1] + at[1]
    square_RC = difference_RC * difference_RC
    tl.store(place, tl.sum(square_RC))
    tl.store(place + size[0].to(tl.int64) * size[1], tl.sum(square_RC * difference_RC))


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
def _load(
    x: tl.tuple,
    b: tl.tensor,
    h: tl.tensor,
    tokens: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """Return tokens of a head, (tokens, D), 0 past head_dim; the tokens exist."""
    column = tl.arange(0, D)[None, :]
    pointers = x[0] + b * x[1] + h * x[2] + tokens.to(tl.int64)[:, None] * x[3] + column
    if HEAD_DIM < D:
        tile = tl.load(pointers, mask=column < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile
