"""The Triton kernels of block-sparse attention's backward pass: by rows and by columns.

They recompute the probabilities from the saved log-sum-exp. How a program takes its tokens, what
None stands for and what the shape suffixes mean: see forward_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spion_ds.attention.triton.dropout import kept
from spion_ds.attention.triton.tokens import (
    DATA,
    allowed_entries,
    count_below,
    load_sums,
    load_tokens,
    partner_tokens,
    plain_tiles,
    real_keys,
    real_span,
    row_keys,
    store_tokens,
    taking_rows,
    tile_count,
)


@triton.jit(do_not_specialize=DATA)
def block_sparse_attention_bwd_kernel(
    q: tl.tuple,
    k: tl.tuple,
    v: tl.tuple,
    grad: tl.tuple,
    out: tl.tuple,
    dq: tl.tuple,
    dk: tl.tuple,
    dv: tl.tuple,
    lse_ptr: tl.tensor,  # (B, H, num_rows * BLOCK)
    delta_ptr: tl.tensor,  # (B, H, num_rows * BLOCK), from rows to columns; None with both
    row_ptr: tl.tensor,
    col_idx: tl.tensor,
    col_ptr: tl.tensor,
    row_idx: tl.tensor,
    col_order: tl.tensor,
    col_parts: tl.tensor,
    sums_ptr: tl.tensor,  # (B, kv heads, num_parts, 2, BLOCK, D) float32, for dK and dV of parts
    done_ptr: tl.tensor,  # (B, kv heads, num_parts, BLOCK / OWN) int32, zeros
    spans_ptr: tl.tensor,
    padding_ptr: tl.tensor,
    dropout_ptr: tl.tensor,
    threshold: tl.tensor,
    dropout_scale: tl.tensor,
    num_rows: tl.tensor,
    num_cols: tl.tensor,
    num_parts: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    query_offset: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    TILE: tl.constexpr,
    ROW_TAIL: tl.constexpr,
    COLUMN_TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    SKIP_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Write dQ of OWN queries (ROWS), dK and dV of OWN keys (COLUMNS), or one of the two.

    Rows alone leave delta, the row sums of dO * O, for columns alone to read. In one launch
    neither waits for the other: the columns take those sums again, from out.

    First the parts of long columns of all heads, so that none is left for the end; then head by
    head the other columns and the rows, so that a head's tensors are in the cache while they are
    needed. A part leaves its sums; whichever part of a column comes last adds them up, in the
    parts' order.
    """
    parts: tl.constexpr = BLOCK // OWN
    kv_heads = heads // GROUP
    columns = num_parts + num_cols if COLUMNS else 0
    each = columns + num_rows * GROUP if ROWS else columns
    part = tl.program_id(0) % parts
    place = tl.program_id(0) // parts
    copies = tl.num_programs(0) // parts // each
    ahead = num_parts if COLUMNS else 0
    rest = place - ahead * copies
    rank = tl.where(rest < 0, place // copies, ahead + rest % (each - ahead))
    bh = tl.where(rest < 0, place % copies, rest // (each - ahead))
    b, kv_head = (bh // kv_heads).to(tl.int64), (bh % kv_heads).to(tl.int64)
    reach = tl.maximum(num_rows, num_cols)  # blocks up to the last real token
    unpadded = reach  # first blocks without padding
    if padding_ptr is not None:
        padding_ptr += b * keys
        spans_ptr += b * 2
        unpadded, reach = tl.load(spans_ptr), tl.load(spans_ptr + 1)
    if dropout_ptr is not None:
        dropout_ptr += b
    if ROWS and rank >= columns:
        h = kv_head * GROUP + (rank - columns) // num_rows
        block = (rank - columns) % num_rows
        layout_row = row_ptr + (h * (num_rows + 1) if PER_HEAD else 0) + block
        row_sums = (b * heads + h) * num_rows * BLOCK
        if delta_ptr is not None:
            delta_ptr += row_sums
        start, stop = tl.load(layout_row), tl.load(layout_row + 1)
        whole = stop - start
        if padding_ptr is not None:
            whole, stop = real_span(col_idx, start, stop, spans_ptr)
            if SKIP_PADDED:
                stop = tl.where(block < reach, stop, start)
        _write_dq(
            (q, k, v, grad, out, dq),
            *(lse_ptr + row_sums, delta_ptr, padding_ptr),
            *(dropout_ptr, threshold, dropout_scale),
            (b, h, block * BLOCK + part * OWN),
            (col_idx, start, stop, whole),
            (queries, keys, scale, scale_log2),
            query_offset,
            *(HEAD_DIM, D, PRECISION, GROUP, BLOCK, OWN, TILE, ROW_TAIL, CAUSAL),
        )
    elif COLUMNS:
        head = kv_head * GROUP if PER_HEAD else 0
        divided = rank < num_parts
        entry = col_parts + (head * num_parts + rank) * 3
        whole = tl.load(col_order + head * num_cols + rank - num_parts, mask=~divided, other=-1)
        column = tl.load(entry, mask=divided, other=whole)
        piece = tl.load(entry + 1, mask=divided, other=0)
        pieces = tl.load(entry + 2, mask=divided, other=1)
        if column >= 0:
            own = column * BLOCK + part * OWN
            dk_OD, dv_OD = _sum_dk_dv(
                (q, k, v, grad, out),
                *(lse_ptr, delta_ptr, padding_ptr),
                *(dropout_ptr, threshold, dropout_scale),
                (b, kv_head, own),
                (col_ptr, row_idx, num_cols, column, piece, pieces, reach, unpadded),
                (heads, num_rows * BLOCK, queries, keys, scale_log2),
                query_offset,
                *(HEAD_DIM, D, PRECISION, GROUP, PER_HEAD, BLOCK, OWN, TILE, COLUMN_TAIL, CAUSAL),
                SKIP_PADDED,
            )
            last = pieces == 1
            if divided:
                first_part = bh.to(tl.int64) * num_parts + rank - piece
                sums_ptr += first_part * 2 * BLOCK * D + part * OWN * D
                _store_sums(sums_ptr + piece * 2 * BLOCK * D, dk_OD, dv_OD, BLOCK, OWN, D)
                # All threads' sums are written before the one that counts releases them.
                tl.debug_barrier()
                before = tl.atomic_add(done_ptr + first_part * parts + part, 1, sem="acq_rel")
                last = before == pieces - 1
                if last:
                    dk_OD, dv_OD = _add_sums(sums_ptr, pieces, BLOCK, OWN, D)
            if last:
                lane_O = tl.arange(0, OWN)
                if padding_ptr is not None:
                    # A key's own row is all that it reaches here: masking once is enough.
                    own_O = own + lane_O
                    real_O = tl.load(padding_ptr + own_O, mask=own_O < keys, other=0) != 0
                    dk_OD = tl.where(real_O[:, None], dk_OD, 0.0)
                    dv_OD = tl.where(real_O[:, None], dv_OD, 0.0)
                store_tokens(dk, b, kv_head, own, lane_O, keys, dk_OD * scale, HEAD_DIM, D)
                store_tokens(dv, b, kv_head, own, lane_O, keys, dv_OD, HEAD_DIM, D)


@triton.jit
def _write_dq(
    tensors: tl.tuple,  # q, k, v, grad, out, dq
    lse_ptr: tl.tensor,  # of the head
    delta_ptr: tl.tensor,  # of the head, or None
    padding_ptr: tl.tensor,  # of the sample, or None
    dropout_ptr: tl.tensor,  # of the sample, or None
    threshold: tl.tensor,
    dropout_scale: tl.tensor,
    place: tl.tuple,  # b, h, first own token
    partners: tl.tuple,  # column indices, start, stop, how many of the first are without padding
    sizes: tl.tuple,
    query_offset: tl.tensor,  # or None
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    TILE: tl.constexpr,
    TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> None:
    """Write dQ of OWN queries, and delta where there is room for it."""
    q, k, v, grad, out, dq = tensors
    b, h, own = place
    col_idx, start, stop, whole = partners
    queries, keys, scale, scale_log2 = sizes
    lane_O = tl.arange(0, OWN)
    rows_O = own + lane_O
    positions_O = rows_O if query_offset is None else rows_O + query_offset
    q_OD = load_tokens(q, b, h, own, lane_O, queries, True, HEAD_DIM, D)
    out_OD = load_tokens(out, b, h, own, lane_O, queries, True, HEAD_DIM, D)
    grad_OD = load_tokens(grad, b, h, own, lane_O, queries, True, HEAD_DIM, D)
    delta_O = tl.sum(out_OD.to(tl.float32) * grad_OD.to(tl.float32), axis=1)
    if delta_ptr is not None:
        tl.store(delta_ptr + rows_O, delta_O)
    lse_O = tl.load(lse_ptr + rows_O)
    if dropout_ptr is not None:
        row_keys_O = row_keys(tl.load(dropout_ptr), h, rows_O)

    dq_OD = tl.zeros((OWN, D), tl.float32)
    tiles = tile_count(stop - start, BLOCK, TILE)
    plain = plain_tiles(tiles, whole, BLOCK, TILE, TAIL)
    for ends in tl.static_range(0, 2 if TAIL > 0 or padding_ptr is not None else 1):
        for tile in range(plain if ends else 0, tiles if ends else plain):
            first, others_T = partner_tokens(col_idx, start, stop, tile, BLOCK, TILE)
            tokens_T = first + others_T
            real_T = real_keys(tokens_T, keys, padding_ptr, ends)
            k_TD = load_tokens(k, b, h // GROUP, first, others_T, keys, ends, HEAD_DIM, D, real_T)
            v_TD = load_tokens(v, b, h // GROUP, first, others_T, keys, ends, HEAD_DIM, D, real_T)
            scores_OT = tl.dot(q_OD, tl.trans(k_TD), input_precision=PRECISION)
            probs_OT = tl.exp2(scores_OT * scale_log2 - lse_O[:, None])
            if ends:
                allowed_OT = allowed_entries(positions_O, tokens_T, real_T, CAUSAL)
                probs_OT = tl.where(allowed_OT, probs_OT, 0.0)
            dprobs_OT = tl.dot(grad_OD, tl.trans(v_TD), input_precision=PRECISION)
            if dropout_ptr is not None:
                keep_OT = kept(row_keys_O[:, None], tokens_T[None, :], threshold)
                dprobs_OT = tl.where(keep_OT, dprobs_OT * dropout_scale, 0.0)
            dscores_OT = (probs_OT * (dprobs_OT - delta_O[:, None])).to(k_TD.dtype)
            dq_OD = tl.dot(dscores_OT, k_TD, dq_OD, input_precision=PRECISION)
    if padding_ptr is not None:
        wanted_O = taking_rows(rows_O, lse_O, queries, keys, padding_ptr)
        dq_OD = tl.where(wanted_O[:, None], dq_OD, 0.0)
    store_tokens(dq, b, h, own, lane_O, queries, dq_OD * scale, HEAD_DIM, D)


@triton.jit
def _sum_dk_dv(
    tensors: tl.tuple,  # q, k, v, grad, out
    lse_ptr: tl.tensor,
    delta_ptr: tl.tensor,  # or None
    padding_ptr: tl.tensor,  # of the sample, or None
    dropout_ptr: tl.tensor,  # of the sample, or None
    threshold: tl.tensor,
    dropout_scale: tl.tensor,
    place: tl.tuple,  # b, kv_head, first own token
    partners: tl.tuple,  # column pointers, row indices, columns; column, piece, pieces, reach,
    # unpadded
    sizes: tl.tuple,
    query_offset: tl.tensor,  # or None
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    TILE: tl.constexpr,
    TAIL: tl.constexpr,
    CAUSAL: tl.constexpr,
    SKIP_PADDED: tl.constexpr,
) -> tl.tuple:
    """Return dK (unscaled) and dV of OWN keys, of one of ``pieces`` pieces of their column.

    Summed over the GROUP query heads of the kv head in order. Columns from ``reach`` on are all
    padding, and give zeros; with SKIP_PADDED rows from there on give nothing either.
    """
    q, k, v, grad, out = tensors
    b, kv_head, own = place
    col_ptr, row_idx, num_cols, column, piece, pieces, reach, unpadded = partners
    heads, padded, queries, keys, scale_log2 = sizes
    lane_O = tl.arange(0, OWN)
    own_O = own + lane_O
    k_OD = load_tokens(k, b, kv_head, own, lane_O, keys, True, HEAD_DIM, D)
    v_OD = load_tokens(v, b, kv_head, own, lane_O, keys, True, HEAD_DIM, D)
    dk_OD = tl.zeros((OWN, D), tl.float32)
    dv_OD = tl.zeros((OWN, D), tl.float32)
    if dropout_ptr is not None:
        dropout_key = tl.load(dropout_ptr)
    for member in range(0, GROUP):
        h = kv_head * GROUP + member
        layout_column = col_ptr + (h * (num_cols + 1) if PER_HEAD else 0) + column
        begin, length = tl.load(layout_column), tl.load(layout_column + 1)
        length = tl.where(column < reach, length - begin, 0)
        start, stop = begin + length * piece // pieces, begin + length * (piece + 1) // pieces
        if SKIP_PADDED:
            stop = start + count_below(row_idx, start, stop, reach)
        row_sums = (b * heads + h) * padded
        tiles = tile_count(stop - start, BLOCK, TILE)
        whole = stop - start
        if padding_ptr is not None:
            whole = count_below(row_idx, start, stop, unpadded)
        plain = plain_tiles(tiles, whole, BLOCK, TILE, TAIL)
        for ends in tl.static_range(0, 2 if TAIL > 0 or padding_ptr is not None else 1):
            for tile in range(plain if ends else 0, tiles if ends else plain):
                first, others_T = partner_tokens(row_idx, start, stop, tile, BLOCK, TILE)
                rows_T = first + others_T
                # Rows that do not exist have lse = +inf, so probability 0.
                lse_T = load_sums(lse_ptr + row_sums, first, others_T, padded, ends, float("inf"))
                wanted_T = None
                if ends and padding_ptr is not None:
                    wanted_T = taking_rows(rows_T, lse_T, queries, keys, padding_ptr)
                q_TD = load_tokens(q, b, h, first, others_T, queries, ends, HEAD_DIM, D, wanted_T)
                grad_TD = load_tokens(
                    grad, b, h, first, others_T, queries, ends, HEAD_DIM, D, wanted_T
                )
                if delta_ptr is None:
                    out_TD = load_tokens(
                        out, b, h, first, others_T, queries, ends, HEAD_DIM, D, wanted_T
                    )
                    delta_T = tl.sum(out_TD.to(tl.float32) * grad_TD.to(tl.float32), axis=1)
                else:
                    delta_T = load_sums(delta_ptr + row_sums, first, others_T, padded, ends, 0.0)
                    if wanted_T is not None:
                        delta_T = tl.where(wanted_T, delta_T, 0.0)
                scores_OT = tl.dot(k_OD, tl.trans(q_TD), input_precision=PRECISION)
                probs_OT = tl.exp2(scores_OT * scale_log2 - lse_T[None, :])
                if CAUSAL:
                    positions_T = rows_T if query_offset is None else rows_T + query_offset
                    probs_OT = tl.where(own_O[:, None] <= positions_T[None, :], probs_OT, 0.0)
                dprobs_OT = tl.dot(v_OD, tl.trans(grad_TD), input_precision=PRECISION)
                dropped_OT = probs_OT
                if dropout_ptr is not None:
                    row_keys_T = row_keys(dropout_key, h, rows_T)
                    keep_OT = kept(row_keys_T[None, :], own_O[:, None], threshold)
                    dprobs_OT = tl.where(keep_OT, dprobs_OT * dropout_scale, 0.0)
                    dropped_OT = tl.where(keep_OT, probs_OT * dropout_scale, 0.0)
                dropped_OT = dropped_OT.to(v_OD.dtype)
                dv_OD = tl.dot(dropped_OT, grad_TD, dv_OD, input_precision=PRECISION)
                dscores_OT = (probs_OT * (dprobs_OT - delta_T[None, :])).to(q_TD.dtype)
                dk_OD = tl.dot(dscores_OT, q_TD, dk_OD, input_precision=PRECISION)
    return dk_OD, dv_OD


@triton.jit
def _store_sums(
    pointer: tl.tensor,
    dk_OD: tl.tensor,
    dv_OD: tl.tensor,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Write a part's dK, and its dV a block further."""
    place = tl.arange(0, OWN)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(pointer + place, dk_OD)
    tl.store(pointer + BLOCK * D + place, dv_OD)


@triton.jit
def _add_sums(
    pointer: tl.tensor,
    pieces: tl.tensor,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    D: tl.constexpr,
) -> tl.tuple:
    """Return the sums of dK and dV over ``pieces`` parts, in their order."""
    # Others wrote them: past the first-level cache, which is not coherent.
    place = tl.arange(0, OWN)[:, None] * D + tl.arange(0, D)[None, :]
    dk_OD = tl.zeros((OWN, D), tl.float32)
    dv_OD = tl.zeros((OWN, D), tl.float32)
    for piece in range(0, pieces):
        sums = pointer + piece * 2 * BLOCK * D + place
        dk_OD += tl.load(sums, cache_modifier=".cg")
        dv_OD += tl.load(sums + BLOCK * D, cache_modifier=".cg")
    return dk_OD, dv_OD
