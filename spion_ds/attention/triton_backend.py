"""Block-sparse attention as three Triton kernels: forward, dQ by rows, dK and dV by columns.

A program owns OWN tokens of one block (queries in the first two kernels, keys in the third) and
walks over the block's kept partners, TILE tokens at a time. Scores are in base 2: log2(e) is part
of their scale. The backward pass draws the probabilities again from the saved log-sum-exp. No
atomics, so the same inputs give the same bits. Layouts are data: another one compiles nothing. An
argument that is None is compiled out: padding_ptr without padding, dropout without dropout.

Shape suffixes: B batch, H heads, L queries, M keys, D head_dim. In the kernels: O own tokens,
T tokens of a tile, D head_dim padded to a power of two. The kernels take a (B, H, L, D) tensor as
a tuple: pointer and strides of batch, head and token in elements. The stride of head_dim is 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from spion_ds.attention.dropout import keep_threshold
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.triton_dropout import combine, kept
from spion_ds.errors import ConfigError

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCKS = (16, 32, 64, 128)
_MAX_HEAD_DIM = 256

# Below every score yet finite, so that a row that has met no key yet is no special case.
_LOWEST = tl.constexpr(-3.0e38)
# A token position past the end of every sequence.
_NOWHERE = tl.constexpr(2**31 - 1)

# Arguments whose values (1, divisible by 16) and addresses must not be compiled in.
_DATA = ["row_ptr", "col_idx", "col_ptr", "row_idx", "order", "num_rows", "num_cols"]
_DATA += ["batch", "heads", "queries", "keys"]


def block_sparse_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    *,
    key_padding_mask: Tensor | None,
    causal: bool,
    scale: float,
    pruned: str,
    dropout_p: float,
    dropout_key: Tensor | None,
) -> Tensor:
    """Return (B, H, L, D) in q's dtype; arguments as in ``block_sparse_attention``.

    Scores and sums are float32. Float32 inputs are multiplied in full float32 precision, bf16 and
    fp16 inputs in their own dtype, to which the probabilities are rounded.

    Raises:
        ConfigError: no kernel for this dtype, head_dim, block or device.
    """
    reason = unsupported(q, layout)
    if reason is not None:
        raise ConfigError(reason)
    q, k, v = (_unit_stride(x) for x in (q, k, v))
    settings = _Settings(scale, causal, pruned == "zero", dropout_p)
    return _BlockSparseAttention.apply(q, k, v, layout, settings, key_padding_mask, dropout_key)


@dataclass(frozen=True)
class _Settings:
    """What forward and backward share besides tensors."""

    scale: float
    causal: bool
    pruned_zero: bool
    dropout_p: float


class _BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        settings: _Settings,
        key_padding_mask: Tensor | None,
        dropout_key: Tensor | None,
    ) -> Tensor:
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        seen = None
        if key_padding_mask is not None and settings.pruned_zero:
            seen = key_padding_mask.cumsum(dim=1, dtype=torch.int32)  # (B, M)
        tiles = _tiles("fwd", layout.block, q)
        programs = layout.num_rows * (layout.block // tiles["OWN"]) * q.shape[0] * q.shape[1]
        with torch.cuda.device_of(q):
            block_sparse_attention_fwd_kernel[(programs,)](
                *(_strided(q), _strided(k), _strided(v), _strided(out)),
                *(lse, layout.row_ptr, layout.col_idx, seen),
                **_arguments(q, k, layout, settings, key_padding_mask, dropout_key),
                **tiles,
                num_rows=layout.num_rows,
                PRUNED_ZERO=settings.pruned_zero,
                CHECK=_reaches_past(k.shape[2], layout, tiles),
            )
        ctx.layout, ctx.settings = layout, settings
        ctx.save_for_backward(q, k, v, out, lse, key_padding_mask, dropout_key)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, key_padding_mask, dropout_key = ctx.saved_tensors
        layout, settings = ctx.layout, ctx.settings
        grad_out = _unit_stride(grad_out)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        delta = torch.empty_like(lse)
        arguments = _arguments(q, k, layout, settings, key_padding_mask, dropout_key)
        arguments["scale"] = settings.scale
        with torch.cuda.device_of(q):
            tiles = _tiles("dq", layout.block, q)
            programs = layout.num_rows * (layout.block // tiles["OWN"]) * q.shape[0] * q.shape[1]
            block_sparse_attention_bwd_dq_kernel[(programs,)](
                *(_strided(q), _strided(k), _strided(v), _strided(grad_out)),
                *(_strided(out), _strided(dq)),
                *(lse, delta, layout.row_ptr, layout.col_idx),
                **arguments,
                **tiles,
                num_rows=layout.num_rows,
                CHECK=_reaches_past(k.shape[2], layout, tiles),
            )
            # Reads the delta that the kernel above writes.
            tiles = _tiles("dkv", layout.block, q)
            programs = layout.num_cols * (layout.block // tiles["OWN"]) * k.shape[0] * k.shape[1]
            block_sparse_attention_bwd_dkv_kernel[(programs,)](
                *(_strided(q), _strided(k), _strided(v), _strided(grad_out)),
                *(_strided(dk), _strided(dv)),
                *(lse, delta, layout.col_ptr, layout.row_idx),
                _longest_first(layout, k.shape[1]),
                **arguments,
                **tiles,
                batch=k.shape[0],
                num_cols=layout.num_cols,
            )
        return dq, dk, dv, None, None, None, None


@triton.jit(do_not_specialize=_DATA)
def block_sparse_attention_fwd_kernel(
    q: tl.tuple,
    k: tl.tuple,
    v: tl.tuple,
    out: tl.tuple,
    lse_ptr: tl.tensor,  # (B, H, L)
    row_ptr: tl.tensor,
    col_idx: tl.tensor,
    seen_ptr: tl.tensor,  # (B, M) real keys up to and including each; or None
    padding_ptr: tl.tensor,  # (B, M) bytes, 1 = real token, or None
    dropout: tl.tuple,  # (pointer to the samples' int32 keys, threshold, 1 / (1 - p)), or None
    num_rows: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    scale_log2: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    TILE: tl.constexpr,
    CHECK: tl.constexpr,
    CAUSAL: tl.constexpr,
    PRUNED_ZERO: tl.constexpr,
) -> None:
    """Write the output and the base-2 log-sum-exp of OWN queries of one head."""
    parts: tl.constexpr = BLOCK // OWN
    part = tl.program_id(0) % (num_rows * parts)
    bh = tl.program_id(0) // (num_rows * parts)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows_O = part * OWN + tl.arange(0, OWN)
    layout_row = row_ptr + (h * (num_rows + 1) if PER_HEAD else 0) + part // parts
    start, stop = tl.load(layout_row), tl.load(layout_row + 1)

    q_OD = _load_tokens(q, b, h, rows_O, queries, HEAD_DIM, D)
    if padding_ptr is not None:
        padding_ptr += b * keys
    if dropout is not None:
        row_keys_O = _row_keys(tl.load(dropout[0] + b), h, rows_O)

    top_O = tl.full((OWN,), _LOWEST, tl.float32)
    total_O = tl.zeros((OWN,), tl.float32)
    kept_O = tl.zeros((OWN,), tl.int32)
    out_OD = tl.zeros((OWN, D), tl.float32)
    for tile in range(0, _tile_count(stop - start, BLOCK, TILE)):
        tokens_T = _partner_tokens(col_idx, start, stop, tile, BLOCK, TILE)
        k_TD = _load_tokens(k, b, h // GROUP, tokens_T, keys, HEAD_DIM, D)
        v_TD = _load_tokens(v, b, h // GROUP, tokens_T, keys, HEAD_DIM, D)
        scores_OT = tl.dot(q_OD, tl.trans(k_TD), input_precision="ieee") * scale_log2
        if CHECK or (CAUSAL or padding_ptr is not None):
            allowed_OT = _allowed(rows_O, tokens_T, keys, padding_ptr, CAUSAL)
            scores_OT = tl.where(allowed_OT, scores_OT, float("-inf"))
            if PRUNED_ZERO:
                kept_O += tl.sum(allowed_OT.to(tl.int32), axis=1)
        new_top_O = tl.maximum(top_O, tl.max(scores_OT, axis=1))
        shrink_O = tl.exp2(top_O - new_top_O)
        weights_OT = tl.exp2(scores_OT - new_top_O[:, None])
        total_O = total_O * shrink_O + tl.sum(weights_OT, axis=1)
        if dropout is not None:
            keep_OT = kept(row_keys_O[:, None], tokens_T[None, :], dropout[1])
            weights_OT = tl.where(keep_OT, weights_OT, 0.0)
        out_OD = out_OD * shrink_O[:, None]
        out_OD = tl.dot(weights_OT.to(v_TD.dtype), v_TD, out_OD, input_precision="ieee")
        top_O = new_top_O

    has_any_O = total_O > 0.0
    if PRUNED_ZERO:
        valid = tl.minimum(rows_O + 1, keys) if CAUSAL else keys
        if padding_ptr is not None:
            valid = tl.load(seen_ptr + b * keys + valid - 1)
        if not (CHECK or (CAUSAL or padding_ptr is not None)):
            kept_O += (stop - start) * BLOCK
        pruned_O = (valid - kept_O).to(tl.float32)
        # A pruned entry is a logit 0, so the shift is at least 0 where there is one.
        new_top_O = tl.where(pruned_O > 0.0, tl.maximum(top_O, 0.0), top_O)
        shrink_O = tl.exp2(top_O - new_top_O)
        total_O = total_O * shrink_O + pruned_O * tl.exp2(-tl.maximum(new_top_O, 0.0))
        out_OD = out_OD * shrink_O[:, None]
        top_O = new_top_O
    total_O = tl.where(has_any_O, total_O, 1.0)
    out_OD = out_OD / total_O[:, None]
    if dropout is not None:
        out_OD = out_OD * dropout[2]
    # +inf makes every exp2(score - lse) 0 in the backward pass.
    lse_O = tl.where(has_any_O, top_O + tl.log2(total_O), float("inf"))
    tl.store(lse_ptr + (b * heads + h) * queries + rows_O, lse_O, mask=rows_O < queries)
    _store_tokens(out, b, h, rows_O, queries, out_OD, HEAD_DIM, D)


@triton.jit(do_not_specialize=_DATA)
def block_sparse_attention_bwd_dq_kernel(
    q: tl.tuple,
    k: tl.tuple,
    v: tl.tuple,
    grad: tl.tuple,
    out: tl.tuple,
    dq: tl.tuple,
    lse_ptr: tl.tensor,  # (B, H, L)
    delta_ptr: tl.tensor,  # (B, H, L), written here
    row_ptr: tl.tensor,
    col_idx: tl.tensor,
    padding_ptr: tl.tensor,
    dropout: tl.tuple,
    num_rows: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    TILE: tl.constexpr,
    CHECK: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> None:
    """Write dQ and delta, the row sums of dO * O, of OWN queries of one head."""
    parts: tl.constexpr = BLOCK // OWN
    part = tl.program_id(0) % (num_rows * parts)
    bh = tl.program_id(0) // (num_rows * parts)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    rows_O = part * OWN + tl.arange(0, OWN)
    layout_row = row_ptr + (h * (num_rows + 1) if PER_HEAD else 0) + part // parts
    start, stop = tl.load(layout_row), tl.load(layout_row + 1)

    q_OD = _load_tokens(q, b, h, rows_O, queries, HEAD_DIM, D)
    out_OD = _load_tokens(out, b, h, rows_O, queries, HEAD_DIM, D)
    grad_OD = _load_tokens(grad, b, h, rows_O, queries, HEAD_DIM, D)
    delta_O = tl.sum(out_OD.to(tl.float32) * grad_OD.to(tl.float32), axis=1)
    row_sums = (b * heads + h) * queries + rows_O
    tl.store(delta_ptr + row_sums, delta_O, mask=rows_O < queries)
    lse_O = tl.load(lse_ptr + row_sums, mask=rows_O < queries, other=float("inf"))
    if padding_ptr is not None:
        padding_ptr += b * keys
    if dropout is not None:
        row_keys_O = _row_keys(tl.load(dropout[0] + b), h, rows_O)

    dq_OD = tl.zeros((OWN, D), tl.float32)
    for tile in range(0, _tile_count(stop - start, BLOCK, TILE)):
        tokens_T = _partner_tokens(col_idx, start, stop, tile, BLOCK, TILE)
        k_TD = _load_tokens(k, b, h // GROUP, tokens_T, keys, HEAD_DIM, D)
        v_TD = _load_tokens(v, b, h // GROUP, tokens_T, keys, HEAD_DIM, D)
        scores_OT = tl.dot(q_OD, tl.trans(k_TD), input_precision="ieee") * scale_log2
        probs_OT = tl.exp2(scores_OT - lse_O[:, None])
        if CHECK or (CAUSAL or padding_ptr is not None):
            allowed_OT = _allowed(rows_O, tokens_T, keys, padding_ptr, CAUSAL)
            probs_OT = tl.where(allowed_OT, probs_OT, 0.0)
        dprobs_OT = tl.dot(grad_OD, tl.trans(v_TD), input_precision="ieee")
        if dropout is not None:
            keep_OT = kept(row_keys_O[:, None], tokens_T[None, :], dropout[1])
            dprobs_OT = tl.where(keep_OT, dprobs_OT * dropout[2], 0.0)
        dscores_OT = probs_OT * (dprobs_OT - delta_O[:, None])
        dq_OD = tl.dot(dscores_OT.to(k_TD.dtype), k_TD, dq_OD, input_precision="ieee")
    _store_tokens(dq, b, h, rows_O, queries, dq_OD * scale, HEAD_DIM, D)


@triton.jit(do_not_specialize=_DATA)
def block_sparse_attention_bwd_dkv_kernel(
    q: tl.tuple,
    k: tl.tuple,
    v: tl.tuple,
    grad: tl.tuple,
    dk: tl.tuple,
    dv: tl.tuple,
    lse_ptr: tl.tensor,  # (B, H, L)
    delta_ptr: tl.tensor,  # (B, H, L)
    col_ptr: tl.tensor,
    row_idx: tl.tensor,
    order: tl.tensor,  # columns, longest first: (num_cols,), or (kv heads * num_cols,) PER_HEAD
    padding_ptr: tl.tensor,
    dropout: tl.tuple,
    batch: tl.tensor,
    num_cols: tl.tensor,
    heads: tl.tensor,
    queries: tl.tensor,
    keys: tl.tensor,
    scale: tl.tensor,
    scale_log2: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> None:
    """Write dK and dV of OWN keys of one kv head, summed over its GROUP query heads in order."""
    parts: tl.constexpr = BLOCK // OWN
    kv_heads = heads // GROUP
    # The samples (and heads, when they share a layout) of the longest column come first.
    copies = batch * (1 if PER_HEAD else kv_heads)
    copy = (tl.program_id(0) // parts) % copies
    column = tl.load(order + tl.program_id(0) // (parts * copies))
    b = (copy if PER_HEAD else copy // kv_heads).to(tl.int64)
    kv_head = (column // num_cols if PER_HEAD else copy % kv_heads).to(tl.int64)
    column = column % num_cols
    own_O = column * BLOCK + (tl.program_id(0) % parts) * OWN + tl.arange(0, OWN)

    k_OD = _load_tokens(k, b, kv_head, own_O, keys, HEAD_DIM, D)
    v_OD = _load_tokens(v, b, kv_head, own_O, keys, HEAD_DIM, D)
    dk_OD = tl.zeros((OWN, D), tl.float32)
    dv_OD = tl.zeros((OWN, D), tl.float32)
    for member in range(0, GROUP):
        h = kv_head * GROUP + member
        layout_column = col_ptr + (h * (num_cols + 1) if PER_HEAD else 0) + column
        start, stop = tl.load(layout_column), tl.load(layout_column + 1)
        row_sums = (b * heads + h) * queries
        if dropout is not None:
            dropout_key = tl.load(dropout[0] + b)
        for tile in range(0, _tile_count(stop - start, BLOCK, TILE)):
            rows_T = _partner_tokens(row_idx, start, stop, tile, BLOCK, TILE)
            inside_T = rows_T < queries
            q_TD = _load_tokens(q, b, h, rows_T, queries, HEAD_DIM, D)
            grad_TD = _load_tokens(grad, b, h, rows_T, queries, HEAD_DIM, D)
            # Rows that do not exist have lse = +inf, so probability 0.
            lse_T = tl.load(lse_ptr + row_sums + rows_T, mask=inside_T, other=float("inf"))
            delta_T = tl.load(delta_ptr + row_sums + rows_T, mask=inside_T, other=0.0)
            scores_OT = tl.dot(k_OD, tl.trans(q_TD), input_precision="ieee") * scale_log2
            probs_OT = tl.exp2(scores_OT - lse_T[None, :])
            if CAUSAL:
                probs_OT = tl.where(own_O[:, None] <= rows_T[None, :], probs_OT, 0.0)
            dprobs_OT = tl.dot(v_OD, tl.trans(grad_TD), input_precision="ieee")
            dropped_OT = probs_OT
            if dropout is not None:
                row_keys_T = _row_keys(dropout_key, h, rows_T)
                keep_OT = kept(row_keys_T[None, :], own_O[:, None], dropout[1])
                dprobs_OT = tl.where(keep_OT, dprobs_OT * dropout[2], 0.0)
                dropped_OT = tl.where(keep_OT, probs_OT * dropout[2], 0.0)
            dv_OD = tl.dot(dropped_OT.to(v_OD.dtype), grad_TD, dv_OD, input_precision="ieee")
            dscores_OT = probs_OT * (dprobs_OT - delta_T[None, :])
            dk_OD = tl.dot(dscores_OT.to(q_TD.dtype), q_TD, dk_OD, input_precision="ieee")
    if padding_ptr is not None:
        # A key's own row is all that it reaches here, so masking once at the end is enough.
        real_O = tl.load(padding_ptr + b * keys + own_O, mask=own_O < keys, other=0) != 0
        dk_OD = tl.where(real_O[:, None], dk_OD, 0.0)
        dv_OD = tl.where(real_O[:, None], dv_OD, 0.0)
    _store_tokens(dk, b, kv_head, own_O, keys, dk_OD * scale, HEAD_DIM, D)
    _store_tokens(dv, b, kv_head, own_O, keys, dv_OD, HEAD_DIM, D)


@triton.jit
def _tile_count(blocks: tl.tensor, BLOCK: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """Return how many tiles hold ``blocks`` kept blocks."""
    return blocks * (BLOCK // TILE) if TILE <= BLOCK else tl.cdiv(blocks, TILE // BLOCK)


@triton.jit
def _partner_tokens(
    indices: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    tile: tl.tensor,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Return the token positions (TILE,) of a tile, _NOWHERE past the last kept block."""
    lane = tl.arange(0, TILE)
    if TILE <= BLOCK:
        parts: tl.constexpr = BLOCK // TILE
        block = tl.load(indices + start + tile // parts)
        tokens = block * BLOCK + (tile % parts) * TILE + lane
    else:
        entry = start + tile * (TILE // BLOCK) + lane // BLOCK
        block = tl.load(indices + entry, mask=entry < stop, other=0)
        tokens = tl.where(entry < stop, block * BLOCK + lane % BLOCK, _NOWHERE)
    return tokens


@triton.jit
def _allowed(
    rows_O: tl.tensor,
    tokens_T: tl.tensor,
    keys: tl.tensor,
    padding_ptr: tl.tensor,
    CAUSAL: tl.constexpr,
) -> tl.tensor:
    """Return which entries of a tile exist, (1, T), or (O, T) with CAUSAL."""
    allowed_T = tokens_T < keys
    if padding_ptr is not None:
        allowed_T = allowed_T & (tl.load(padding_ptr + tokens_T, mask=allowed_T, other=0) != 0)
    allowed = allowed_T[None, :]
    if CAUSAL:
        allowed = allowed & (tokens_T[None, :] <= rows_O[:, None])
    return allowed


@triton.jit
def _load_tokens(
    x: tl.tuple,
    b: tl.tensor,
    h: tl.tensor,
    tokens: tl.tensor,
    length: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
) -> tl.tensor:
    """Return (tokens, D) of head ``h``, 0 past the sequence and past head_dim."""
    pointers, mask = _locate(x, b, h, tokens, length, HEAD_DIM, D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def _store_tokens(
    x: tl.tuple,
    b: tl.tensor,
    h: tl.tensor,
    tokens: tl.tensor,
    length: tl.tensor,
    values: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
) -> None:
    """Write (tokens, D) of head ``h`` in the target's dtype."""
    pointers, mask = _locate(x, b, h, tokens, length, HEAD_DIM, D)
    tl.store(pointers, values.to(x[0].dtype.element_ty), mask=mask)


@triton.jit
def _locate(
    x: tl.tuple,
    b: tl.tensor,
    h: tl.tensor,
    tokens: tl.tensor,
    length: tl.tensor,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
) -> tl.tuple:
    """Return pointers (tokens, D) into (pointer, stride of batch, of head, of token) and a mask."""
    column = tl.arange(0, D)[None, :]
    # b, h and tokens are int64 here: an offset can pass 2^31 elements.
    pointers = x[0] + b * x[1] + h * x[2] + tokens[:, None].to(tl.int64) * x[3] + column
    mask = tokens[:, None] < length
    if HEAD_DIM < D:
        mask = mask & (column < HEAD_DIM)
    return pointers, mask


@triton.jit
def _row_keys(sample_key: tl.tensor, h: tl.tensor, rows: tl.tensor) -> tl.tensor:
    """Return the dropout key of each query row, uint32."""
    return combine(combine(sample_key.to(tl.uint32, bitcast=True), h), rows)


# (OWN, TILE, num_warps, num_stages) by kernel, head_dim (up to) and block. The limits are 255
# registers a thread for the accumulators, and 227 KiB of shared memory for num_stages tiles.
_TILES = {
    "fwd": {
        64: {16: (16, 64, 1, 3), 32: (32, 64, 2, 3), 64: (64, 64, 4, 3), 128: (128, 64, 8, 3)},
        128: {16: (16, 64, 2, 2), 32: (32, 64, 4, 2), 64: (64, 64, 4, 2), 128: (128, 64, 8, 2)},
        256: {16: (16, 32, 4, 2), 32: (32, 32, 4, 2), 64: (64, 32, 8, 2), 128: (64, 32, 8, 2)},
    },
    "dq": {
        64: {16: (16, 64, 1, 2), 32: (32, 64, 2, 2), 64: (64, 64, 4, 2), 128: (128, 64, 8, 2)},
        128: {16: (16, 64, 2, 2), 32: (32, 64, 4, 2), 64: (64, 64, 4, 2), 128: (128, 64, 8, 2)},
        256: {16: (16, 32, 4, 1), 32: (32, 32, 4, 1), 64: (64, 32, 8, 1), 128: (64, 32, 8, 1)},
    },
    "dkv": {
        64: {16: (16, 64, 1, 2), 32: (32, 64, 2, 2), 64: (64, 64, 4, 2), 128: (128, 64, 8, 2)},
        128: {16: (16, 64, 2, 2), 32: (32, 64, 4, 2), 64: (64, 64, 8, 2), 128: (64, 64, 8, 2)},
        256: {16: (16, 32, 4, 1), 32: (32, 32, 4, 1), 64: (64, 32, 8, 1), 128: (64, 32, 8, 1)},
    },
}


def _tiles(kernel: str, block: int, q: Tensor) -> dict[str, int]:
    """Return how ``kernel`` cuts blocks of ``block`` tokens of tensors like ``q``."""
    if q.dtype == torch.float32:
        # Full float32 products use no tensor cores, and hold their operands in registers.
        values = (min(block, 32), 32, 4 if q.shape[3] <= 64 else 8, 1)
    else:
        width = next(width for width in _TILES[kernel] if q.shape[3] <= width)
        values = _TILES[kernel][width][block]
    return dict(zip(("OWN", "TILE", "num_warps", "num_stages"), values, strict=True))


def _arguments(
    q: Tensor,
    k: Tensor,
    layout: BlockLayout,
    settings: _Settings,
    key_padding_mask: Tensor | None,
    dropout_key: Tensor | None,
) -> dict[str, Any]:
    """Return what all three kernels take under the same name."""
    padding = None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
    p = settings.dropout_p
    dropout = (dropout_key, keep_threshold(p), 1.0 / (1.0 - p)) if p > 0.0 else None
    return {
        "padding_ptr": padding,
        "dropout": dropout,
        "heads": q.shape[1],
        "queries": q.shape[2],
        "keys": k.shape[2],
        "scale_log2": settings.scale * math.log2(math.e),
        "HEAD_DIM": q.shape[3],
        "D": max(16, triton.next_power_of_2(q.shape[3])),
        "GROUP": q.shape[1] // k.shape[1],
        "PER_HEAD": layout.heads > 1,
        "BLOCK": layout.block,
        "CAUSAL": settings.causal,
    }


def _longest_first(layout: BlockLayout, kv_heads: int) -> Tensor:
    """Return the launch order of columns, int32, derived once.

    (num_cols,) column numbers for a shared layout, else (kv_heads * num_cols,) numbers
    kv_head * num_cols + column, by kept blocks over the query heads of the group.
    """
    name = ("triton", "longest_first", kv_heads)
    if name not in layout.plans:
        kept = layout.col_ptr.diff(dim=1)  # (layout heads, num_cols)
        if layout.heads > 1:
            kept = kept.unflatten(0, (kv_heads, -1)).sum(dim=1)
        order = kept.flatten().argsort(descending=True, stable=True)
        layout.plans[name] = order.to(torch.int32)
    return layout.plans[name]


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    """Return a tensor as the kernels take it: with its strides of batch, head and token."""
    return (x, x.stride(0), x.stride(1), x.stride(2))


def _reaches_past(keys: int, layout: BlockLayout, tiles: dict[str, int]) -> bool:
    """Return whether a tile may hold keys that do not exist: past M, or past the kept blocks."""
    return keys % layout.block != 0 or tiles["TILE"] > layout.block


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def unsupported(q: Tensor, layout: BlockLayout) -> str | None:
    """Return why there is no kernel for tensors like ``q`` with this layout, None if there is."""
    if q.dtype not in _DTYPES or not 1 <= q.shape[3] <= _MAX_HEAD_DIM:
        return (
            f"the triton backend takes bf16, fp16 and fp32 with head_dim 1 to {_MAX_HEAD_DIM}; "
            f"got {q.dtype} with head_dim {q.shape[3]}"
        )
    if layout.block not in _BLOCKS:
        return f"the triton backend has kernels for blocks of {_BLOCKS}; got {layout.block}"
    interpreted = not isinstance(block_sparse_attention_fwd_kernel, triton.JITFunction)
    if not (q.is_cuda or interpreted):
        return (
            f"the triton backend runs on CUDA devices (elsewhere only with TRITON_INTERPRET=1, "
            f"slowly); the tensors are on {q.device}"
        )
    return None
