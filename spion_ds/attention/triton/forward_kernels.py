"""The Triton kernel of block-sparse attention's forward pass, and what both passes know of padding.

A program owns OWN tokens of one block (keys where it writes dK and dV, else queries) and
walks over the block's kept partners, TILE tokens at a time: a part of a block, a block, or several
blocks gathered. Scores are in base 2: log2(e) is part of their scale. Sums are in a fixed order:
the same inputs give the same bits.
An argument that is None is compiled out: padding_ptr without padding, dropout_ptr without dropout,
query_offset where the first query stands at position 0 or nothing is causal.

Shape suffixes: B batch, H heads, L queries, M keys, O own tokens, T tokens of a tile, D head_dim
padded to a power of two. A (B, H, L, head_dim) tensor is a tuple here: pointer and strides of
batch, head and token in elements; the stride of head_dim is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from spion_ds.attention.triton.dropout import kept
from spion_ds.attention.triton.tokens import (
    DATA,
    LOWEST,
    allowed_entries,
    load_tokens,
    partner_tokens,
    plain_tiles,
    real_keys,
    real_span,
    row_keys,
    store_tokens,
    tile_count,
)


@triton.jit(do_not_specialize=DATA)
def real_keys_kernel(
    padding_ptr: tl.tensor,  # (B, M) bytes, 1 = real token
    seen_ptr: tl.tensor,  # (B, M) int32
    spans_ptr: tl.tensor,  # (B, 2) int32
    keys: tl.tensor,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Write how many keys of a sample up to and including each are real, and its spans.

    Those are the first blocks without any padding, and the blocks up to the last real key.
    """
    start = tl.program_id(0).to(tl.int64) * keys
    seen, last, first_padded = tl.zeros((), tl.int32), tl.zeros((), tl.int32), keys
    for first in range(0, keys, CHUNK):
        token = first + tl.arange(0, CHUNK)
        inside = token < keys
        real = tl.load(padding_ptr + start + token, mask=inside, other=0).to(tl.int32)
        tl.store(seen_ptr + start + token, seen + tl.cumsum(real), mask=inside)
        seen += tl.sum(real)
        last = tl.maximum(last, tl.max(real * (token + 1)))
        first_padded = tl.minimum(first_padded, tl.min(tl.where(real != 0, keys, token)))
    spans = spans_ptr + tl.program_id(0) * 2
    tl.store(spans, tl.where(first_padded < keys, first_padded // BLOCK, tl.cdiv(keys, BLOCK)))
    tl.store(spans + 1, tl.cdiv(last, BLOCK))


@triton.jit(do_not_specialize=DATA)
def block_sparse_attention_fwd_kernel(
    q: tl.tuple,
    k: tl.tuple,
    v: tl.tuple,
    out: tl.tuple,
    lse_ptr: tl.tensor,  # (B, H, num_rows * BLOCK), +inf past L
    row_ptr: tl.tensor,
    col_idx: tl.tensor,
    seen_ptr: tl.tensor,  # (B, M) int32 real keys up to and including each; or None
    spans_ptr: tl.tensor,  # (B, 2) int32 of real_keys_kernel, or None
    padding_ptr: tl.tensor,  # (B, M) bytes, 1 = real token, or None
    dropout_ptr: tl.tensor,  # (B,) int32 keys, or None
    threshold: tl.tensor,  # keep_threshold(p)
    dropout_scale: tl.tensor,  # 1 / (1 - p)
    num_rows: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    query_offset: tl.tensor,  # position of the first query, a multiple of BLOCK; or None
    scale_log2: tl.tensor,  # above 0
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
    PRUNED_ZERO: tl.constexpr,
    SKIP_PADDED: tl.constexpr,
) -> None:
    """Write the output and the base-2 log-sum-exp of OWN queries of one head."""
    parts: tl.constexpr = BLOCK // OWN
    part = tl.program_id(0) % (num_rows * parts)
    bh = tl.program_id(0) // (num_rows * parts)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    own, lane_O = part * OWN, tl.arange(0, OWN)
    rows_O = own + lane_O
    positions_O = rows_O if query_offset is None else rows_O + query_offset
    layout_row = row_ptr + (h * (num_rows + 1) if PER_HEAD else 0) + part // parts
    start, stop = tl.load(layout_row), tl.load(layout_row + 1)
    whole = stop - start
    if padding_ptr is not None:
        whole, stop = real_span(col_idx, start, stop, spans_ptr + 2 * b)
        if SKIP_PADDED:
            stop = tl.where(part // parts < tl.load(spans_ptr + 2 * b + 1), stop, start)

    q_OD = load_tokens(q, b, h, own, lane_O, queries, True, HEAD_DIM, D)
    if padding_ptr is not None:
        padding_ptr += b * keys
    if dropout_ptr is not None:
        row_keys_O = row_keys(tl.load(dropout_ptr + b), h, rows_O)

    top_O = tl.full((OWN,), LOWEST, tl.float32)  # of the unscaled scores
    total_O = tl.zeros((OWN,), tl.float32)
    masked_O = tl.zeros((OWN,), tl.int32)  # entries of kept blocks that do not exist
    out_OD = tl.zeros((OWN, D), tl.float32)
    tiles = tile_count(stop - start, BLOCK, TILE)
    plain = plain_tiles(tiles, whole, BLOCK, TILE, TAIL)
    for ends in tl.static_range(0, 2 if TAIL > 0 or padding_ptr is not None else 1):
        # The last tiles may hold padding, keys past the sequence or the list, and, under CAUSAL,
        # past the queries; the ones before them nothing to mask.
        for tile in range(plain if ends else 0, tiles if ends else plain):
            first, others_T = partner_tokens(col_idx, start, stop, tile, BLOCK, TILE)
            tokens_T = first + others_T
            real_T = real_keys(tokens_T, keys, padding_ptr, ends)
            k_TD = load_tokens(k, b, h // GROUP, first, others_T, keys, ends, HEAD_DIM, D)
            # A probability of 0 times NaN is NaN.
            v_TD = load_tokens(v, b, h // GROUP, first, others_T, keys, ends, HEAD_DIM, D, real_T)
            scores_OT = tl.dot(q_OD, tl.trans(k_TD), input_precision=PRECISION)
            if ends:
                allowed_OT = allowed_entries(positions_O, tokens_T, real_T, CAUSAL)
                scores_OT = tl.where(allowed_OT, scores_OT, float("-inf"))
                if PRUNED_ZERO:
                    masked_O += tl.sum(1 - allowed_OT.to(tl.int32), axis=1)
            new_top_O = tl.maximum(top_O, tl.max(scores_OT, axis=1))
            shift_O = new_top_O * scale_log2
            shrink_O = tl.exp2((top_O - new_top_O) * scale_log2)
            weights_OT = tl.exp2(scores_OT * scale_log2 - shift_O[:, None])
            total_O = total_O * shrink_O + tl.sum(weights_OT, axis=1)
            if dropout_ptr is not None:
                keep_OT = kept(row_keys_O[:, None], tokens_T[None, :], threshold)
                weights_OT = tl.where(keep_OT, weights_OT, 0.0)
            out_OD = out_OD * shrink_O[:, None]
            out_OD = tl.dot(weights_OT.to(v_TD.dtype), v_TD, out_OD, input_precision=PRECISION)
            top_O = new_top_O

    has_any_O = total_O > 0.0
    shift_O = tl.where(has_any_O, top_O * scale_log2, 0.0)
    if PRUNED_ZERO:
        valid = tl.minimum(positions_O + 1, keys) if CAUSAL else keys
        if padding_ptr is not None:
            valid = tl.load(seen_ptr + b * keys + valid - 1)
        pruned_O = (valid - (tiles * TILE - masked_O)).to(tl.float32)
        # A pruned entry is a logit 0, so the shift is at least 0 where there is one.
        new_shift_O = tl.where(pruned_O > 0.0, tl.maximum(shift_O, 0.0), shift_O)
        shrink_O = tl.exp2(shift_O - new_shift_O)
        total_O = total_O * shrink_O + pruned_O * tl.exp2(-tl.maximum(new_shift_O, 0.0))
        out_OD = out_OD * shrink_O[:, None]
        shift_O = new_shift_O
    if SKIP_PADDED:
        has_any_O = has_any_O & (tl.load(padding_ptr + rows_O, mask=rows_O < queries, other=0) != 0)
        out_OD = tl.where(has_any_O[:, None], out_OD, 0.0)
    total_O = tl.where(has_any_O, total_O, 1.0)
    out_OD = out_OD / total_O[:, None]
    if dropout_ptr is not None:
        out_OD = out_OD * dropout_scale
    # +inf makes every exp2(score - lse) 0 in the backward pass.
    has_any_O = has_any_O & (rows_O < queries)
    lse_O = tl.where(has_any_O, shift_O + tl.log2(total_O), float("inf"))
    tl.store(lse_ptr + (b * heads + h) * num_rows * BLOCK + rows_O, lse_O)
    store_tokens(out, b, h, own, lane_O, queries, out_OD, HEAD_DIM, D)
