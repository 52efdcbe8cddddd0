"""Block-sparse attention through Triton: operators and gradients.

A layout is data: another one compiles nothing and allocates nothing. Under torch.compile the
operators ``spion_ds::block_sparse_attention_{fwd,bwd}`` stand in the graph. In eager mode, where
at small shapes Python costs more than the kernels, ``spion_ds::triton_attention`` stands for both:
it asks for the launches of a shape once and repeats them in C++ (csrc/triton_attention.cpp).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from spion_ds.attention.derivatives import derivative_by, refuse_second_derivative
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.options import AttentionOptions
from spion_ds.attention.query_rows import in_whole_blocks
from spion_ds.attention.triton.backward_kernels import block_sparse_attention_bwd_kernel
from spion_ds.attention.triton.forward_kernels import (
    block_sparse_attention_fwd_kernel,
    real_keys_kernel,
)
from spion_ds.attention.triton.launch import Launches, hooked, launch, start
from spion_ds.attention.triton.tiles import MAX_HEAD_DIM, Tiles, choose_tiles, find_tiles
from spion_ds.errors import ConfigError
from spion_ds.extension import operators_available

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BLOCKS = (16, 32, 64, 128)
# Asked once: torch.compile cannot trace the question.
_INTERPRETED = not isinstance(block_sparse_attention_fwd_kernel, triton.JITFunction)
_LOG2_E = math.log2(math.e)
# Keys that real_keys_kernel counts at a time.
_CHUNK = 1024


def block_sparse_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    options: AttentionOptions,
) -> Tensor:
    """Return (B, H, L, D) in q's dtype; arguments as in ``block_sparse_attention``.

    Scores and sums are float32. Float32 inputs are multiplied in full float32 precision, bf16 and
    fp16 inputs in their own dtype, to which the probabilities are rounded.

    Raises:
        ConfigError: no kernel for this dtype, head_dim, block or device.
    """
    reason = unsupported(q, layout.block)
    if reason is not None:
        raise ConfigError(reason)
    scale = options.scale
    if scale <= 0.0:
        # The kernels take the largest unscaled score for the largest scaled one.
        q, scale = (-q, -scale) if scale < 0.0 else (q * 0.0, 1.0)
    queries, before = q.shape[2], options.query_offset % layout.block
    # A token of decoding then has the same shape at every place in a block.
    q = in_whole_blocks(q, options.query_offset, layout.block)
    padding = options.key_padding_mask
    padding = None if padding is None else padding.contiguous()
    key = options.dropout_key if options.dropout_p > 0.0 else None
    index: tuple[Tensor, ...] = (
        *(layout.row_ptr, layout.col_idx, layout.col_ptr, layout.row_idx),
        *(layout.col_order, layout.col_parts),
    )
    settings = _Settings(
        *(layout.block, scale, options.causal, options.pruned == "zero"),
        *(options.zero_padded_queries and padding is not None, options.dropout_p),
        options.query_offset - before if options.causal else 0,
    )
    arguments = (q, k, v, *index, padding, key, *settings)
    transformed = torch._C._are_functorch_transforms_active()  # which C++ Functions do not serve
    if torch.compiler.is_compiling() or transformed or hooked() or not operators_available():
        out = _fwd_op(*arguments)[0]
    else:
        stream = torch._C._cuda_getCurrentRawStream(q.device.index) if q.is_cuda else 0
        out = torch.ops.spion_ds.triton_attention.default(*arguments, stream)
    return out[:, :, before : before + queries] if before else out


class _Settings(NamedTuple):
    """What the operators take besides tensors.

    Under ``causal`` the first query stands at position ``query_offset``, a multiple of ``block``.
    """

    block: int
    scale: float
    causal: bool
    pruned_zero: bool
    skip_padded: bool
    dropout_p: float
    query_offset: int = 0


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    padding: Tensor | None,
    dropout_key: Tensor | None,
    settings: _Settings,
    launches: Launches | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, L, D) and the base-2 log-sum-exp (B, H, L padded) float32."""
    q, k, v = _unit_stride(q), _unit_stride(k), _unit_stride(v)
    batch, heads, queries, head_dim = q.shape
    keys, block = k.shape[2], settings.block
    out = torch.empty_like(q)
    num_rows = -(-queries // block)
    lse = torch.empty((batch, heads, num_rows * block), dtype=torch.float32, device=q.device)
    seen, spans = _real_keys(padding, block, launches)
    tiles = choose_tiles("fwd", block, head_dim, q.dtype)
    launch(
        block_sparse_attention_fwd_kernel,
        num_rows * (block // tiles.own) * batch * heads,
        (q, k, v, out),
        (lse, row_ptr, col_idx, seen, spans),
        padding,
        dropout_key,
        (num_rows, heads, queries, keys, _offset(settings), settings.scale * _LOG2_E),
        (
            *_shape_constants(q, k, row_ptr),
            *_tile_constants(tiles, block, settings.causal or keys % block != 0),
            settings.causal,
            settings.pruned_zero,
            settings.skip_padded,
        ),
        tiles,
        settings.dropout_p,
        launches,
    )
    return out, lse


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    index: tuple[Tensor, ...],
    padding: Tensor | None,
    dropout_key: Tensor | None,
    settings: _Settings,
    launches: Launches | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v."""
    grad, q, k, v = _unit_stride(grad), _unit_stride(q), _unit_stride(k), _unit_stride(v)
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    block, causal = settings.block, settings.causal
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    num_rows, num_cols = -(-queries // block), -(-keys // block)
    parts = index[5].shape[1]
    copies = batch * kv_heads
    both = find_tiles("both" if dropout_key is None else "both_dropout", block, head_dim, q.dtype)
    delta = torch.empty_like(lse) if both is None else None
    shape = _shape_constants(q, k, index[0])
    scales = (settings.scale, settings.scale * _LOG2_E)
    # Without parts they are never touched.
    sums, done = lse, index[4]
    if parts:
        sizes = (copies, parts, 2, block, shape[1])
        sums = torch.empty(sizes, dtype=torch.float32, device=q.device)
        done = torch.zeros((copies, parts, block // 16), dtype=torch.int32, device=q.device)
    _, spans = _real_keys(padding, block, launches)
    for tiles, rows, columns in _backward_launches(both, block, head_dim, q.dtype):
        each = num_rows * (heads // kv_heads) * rows + (parts + num_cols) * columns
        launch(
            block_sparse_attention_bwd_kernel,
            copies * each * (block // tiles.own),
            (q, k, v, grad, out, dq, dk, dv),
            (lse, delta, *index, sums, done, spans),
            padding,
            dropout_key,
            (num_rows, num_cols, parts, heads, queries, keys, _offset(settings), *scales),
            (
                *shape,
                *_tile_constants(tiles, block, causal or keys % block != 0),
                _tail(tiles, block, queries % block != 0),
                causal,
                settings.skip_padded,
                rows,
                columns,
            ),
            tiles,
            settings.dropout_p,
            launches,
        )
    return dq, dk, dv


def _backward_launches(
    both: Tiles | None, block: int, head_dim: int, dtype: torch.dtype
) -> list[tuple[Tiles, bool, bool]]:
    """Return tiles, and whether rows and columns are taken, of one launch or of two in order."""
    if both is not None:
        return [(both, True, True)]
    rows, columns = (choose_tiles(name, block, head_dim, dtype) for name in ("dq", "dkv"))
    return [(rows, True, False), (columns, False, True)]


def _real_keys(
    padding: Tensor | None, block: int, launches: Launches | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return what ``real_keys_kernel`` writes, (B, M) and (B, 2) int32; None without padding."""
    if padding is None:
        return None, None
    batch, keys = padding.shape
    seen = torch.empty((batch, keys), dtype=torch.int32, device=padding.device)
    spans = torch.empty((batch, 2), dtype=torch.int32, device=padding.device)
    arguments = (padding.view(torch.uint8), seen, spans, keys, block, _CHUNK)
    start(real_keys_kernel, (block,), batch, arguments, {"num_warps": 4}, padding, launches)
    return seen, spans


def _offset(settings: _Settings) -> int | None:
    """Return the kernels' query_offset, which is compiled out where it changes nothing."""
    return settings.query_offset if settings.causal and settings.query_offset else None


def _shape_constants(q: Tensor, k: Tensor, pointers: Tensor) -> tuple[int, int, str, int, bool]:
    """Return HEAD_DIM, D, PRECISION, GROUP and PER_HEAD."""
    head_dim, heads = q.shape[3], q.shape[1]
    padded = max(16, 1 << (head_dim - 1).bit_length())  # the next power of 2
    return head_dim, padded, "ieee", heads // k.shape[1], pointers.shape[0] > 1


def _tile_constants(tiles: Tiles, block: int, partial: bool) -> tuple[int, int, int, int]:
    """Return BLOCK, OWN, TILE and TAIL: how many last tiles of a list need masking.

    Lists ascend, so a block that is ``partial``, cut by the sequence's end or by the diagonal, is
    the last; and so is a tile of several blocks that the list does not fill.
    """
    return block, tiles.own, tiles.tile, _tail(tiles, block, partial)


def _tail(tiles: Tiles, block: int, partial: bool) -> int:
    return max(1, block // tiles.tile) if partial or tiles.tile > block else 0


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


_INDEX = (
    "Tensor row_ptr, Tensor col_idx, Tensor col_ptr, Tensor row_idx, Tensor col_order, "
    "Tensor col_parts"
)
_REST = (
    "Tensor? padding, Tensor? dropout_key, int block, float scale, bool causal, bool pruned_zero, "
    "bool skip_padded, float dropout_p, int query_offset=0"
)
# Inductor hands over the strides of eager mode, which the fakes below count on.
_STRIDES = torch.Tag.needs_exact_strides
_library = torch.library.Library("spion_ds", "FRAGMENT")
_FWD = f"(Tensor q, Tensor k, Tensor v, {_INDEX}, {_REST}) -> (Tensor out, Tensor lse"
_BWD = (
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_INDEX}, {_REST}) -> (Tensor dq, Tensor dk, Tensor dv"
)
_library.define(f"block_sparse_attention_fwd{_FWD})", tags=_STRIDES)
_library.define(f"block_sparse_attention_bwd{_BWD})", tags=_STRIDES)
# What csrc/triton_attention.cpp asks once a shape.
_library.define(f"triton_attention_fwd_launches{_FWD}, int[] launches)")
_library.define(f"triton_attention_bwd_launches{_BWD}, int[] launches)")
_fwd_op = torch.ops.spion_ds.block_sparse_attention_fwd.default
_bwd_op = torch.ops.spion_ds.block_sparse_attention_bwd.default


def _fwd_implementation(*args: Any, launches: Launches | None = None) -> tuple[Tensor, Tensor]:
    q, k, v, row_ptr, col_idx, _, _, _, _, padding, dropout_key, *settings = args
    return _forward(q, k, v, row_ptr, col_idx, padding, dropout_key, _Settings(*settings), launches)


def _bwd_implementation(
    *args: Any, launches: Launches | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out, lse, *rest = args
    index, (padding, dropout_key, *settings) = tuple(rest[:6]), rest[6:]
    return _backward(
        *(grad, q, k, v, out, lse, index, padding, dropout_key, _Settings(*settings), launches)
    )


def _with_launches(implementation: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """Return ``implementation`` with what it launched as one more result."""

    def run(*args: Any) -> tuple[Tensor | list[int], ...]:
        launches = Launches()
        return (*implementation(*args, launches=launches), launches.words())

    return run


def _fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    block = rest[8]  # behind the layout, padding and dropout's keys
    padded = -(-q.shape[2] // block) * block
    lse = q.new_empty((*q.shape[:2], padded), dtype=torch.float32)
    return torch.empty_like(_unit_stride(q)), lse


def _bwd_fake(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(_unit_stride(x)) for x in (q, k, v))


_setup_context, _op_backward = derivative_by(_bwd_op, len(_Settings._fields))

for _device in ("CUDA", "CPU"):  # on the CPU only in Triton's interpreter
    _library.impl("block_sparse_attention_fwd", _fwd_implementation, _device)
    _library.impl("block_sparse_attention_bwd", _bwd_implementation, _device)
    for _pass, _implementation in (("fwd", _fwd_implementation), ("bwd", _bwd_implementation)):
        _library.impl(
            f"triton_attention_{_pass}_launches", _with_launches(_implementation), _device
        )
torch.library.register_fake("spion_ds::block_sparse_attention_fwd", _fwd_fake, lib=_library)
torch.library.register_fake("spion_ds::block_sparse_attention_bwd", _bwd_fake, lib=_library)
torch.library.register_autograd(
    "spion_ds::block_sparse_attention_fwd",
    _op_backward,
    setup_context=_setup_context,
    lib=_library,
)
torch.library.register_autograd(
    "spion_ds::block_sparse_attention_bwd", refuse_second_derivative, lib=_library
)


def unsupported(q: Tensor, block: int) -> str | None:
    """Return why there is no kernel for tensors like ``q`` and blocks, None if there is."""
    if q.dtype not in _DTYPES or not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        return (
            f"the triton backend takes bf16, fp16 and fp32 with head_dim 1 to {MAX_HEAD_DIM}; "
            f"got {q.dtype} with head_dim {q.shape[3]}"
        )
    if block not in _BLOCKS:
        return f"the triton backend has kernels for blocks of {_BLOCKS}; got {block}"
    if not (q.is_cuda or _INTERPRETED):
        return (
            f"the triton backend runs on CUDA devices (elsewhere only with TRITON_INTERPRET=1, "
            f"slowly); the tensors are on {q.device}"
        )
    return None
