"""Block-sparse attention on Hopper GPUs: CUDA kernels for wgmma and the bulk copy engine.

They compute what triton_backend.py computes, for bf16 and fp16, head_dim 64 and 128, and blocks of
64 and 128 tokens, without causal masking and dropout. csrc/hopper/ holds them;
docs/kernels_hopper.md says how they work and what was measured.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from spion_ds import compiling
from spion_ds.attention.hopper_plan import column_list, row_list
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.options import AttentionOptions
from spion_ds.errors import ConfigError

_DTYPES = (torch.bfloat16, torch.float16)
_HEAD_DIMS = (64, 128)
_BLOCKS = (64, 128)


def unsupported(q: Tensor, layout: BlockLayout, options: AttentionOptions) -> str | None:
    """Return why there is no kernel for such a call, None if there is."""
    if q.dtype not in _DTYPES or q.shape[3] not in _HEAD_DIMS:
        return (
            f"the hopper backend takes bf16 and fp16 with head_dim 64 and 128; got {q.dtype} with "
            f"head_dim {q.shape[3]}"
        )
    if layout.block not in _BLOCKS:
        return f"the hopper backend has kernels for blocks of {_BLOCKS}; got {layout.block}"
    if options.causal or options.dropout_p > 0.0:
        return "the hopper backend has no causal masking and no dropout"
    if options.scale <= 0.0:
        return f"the hopper backend takes a scale above 0; got {options.scale}"
    if not q.is_cuda or torch.cuda.get_device_capability(q.device) != (9, 0):
        return f"the hopper backend runs on GPUs of compute capability 9.0; q is on {q.device}"
    return None


@functools.cache
def load() -> None:
    """Load the operators on the first call, compiling them if need be.

    Raises:
        ConfigError: the compiler is missing or fails.
    """
    try:
        compiling.HOPPER.load(torch.ops.load_library)
    except (RuntimeError, OSError, ImportError) as error:
        why = compiling.reason(error).splitlines()[0]
        raise ConfigError(
            f"the hopper backend could not be compiled or loaded ({why}); it needs nvcc 12.3 or "
            'newer, a C++ compiler and ninja; backend="triton" needs none'
        ) from error


def block_sparse_attention_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    options: AttentionOptions,
) -> Tensor:
    """Return (B, H, L, D) in q's dtype; arguments as in ``block_sparse_attention``.

    Scores and sums are float32; probabilities are rounded to q's dtype where they are multiplied.

    Raises:
        ConfigError: no kernel for these arguments or this device.
    """
    reason = unsupported(q, layout, options)
    if reason is not None:
        raise ConfigError(reason)
    load()
    q, k, v = (_copyable(x) for x in (q, k, v))
    out = _BlockSparseAttention.apply(
        *(q, k, v, layout, options.scale, options.pruned == "zero", options.key_padding_mask)
    )
    return options.zeroed(out)


class _BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        scale: float,
        pruned_zero: bool,
        key_padding_mask: Tensor | None,
    ) -> Tensor:
        (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
        rows = row_list(layout, batch, heads, queries, keys, head_dim)
        bits = counts = None
        if key_padding_mask is not None:
            bits, counts = torch.ops.spion_ds.hopper_pack_padding(key_padding_mask.contiguous())
        out, lse = torch.ops.spion_ds.hopper_attention_fwd(
            *(q, k, v, rows.items, rows.entries, rows.starts, bits, counts),
            *(layout.heads > 1, scale, pruned_zero),
        )
        ctx.layout, ctx.scale = layout, scale
        ctx.save_for_backward(q, k, v, out, lse, bits, counts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, bits, counts = ctx.saved_tensors
        layout = ctx.layout
        (batch, heads, queries, head_dim), (kv_heads, keys) = q.shape, k.shape[1:3]
        rows = row_list(layout, batch, heads, queries, keys, head_dim)
        columns = column_list(layout, batch, heads, kv_heads, queries, keys, head_dim)
        dq, dk, dv = torch.ops.spion_ds.hopper_attention_bwd(
            *(q, k, v, out, _copyable(grad_out), lse, rows.items, rows.entries, rows.starts),
            *(columns.items, columns.entries, columns.starts, columns.splits, columns.slots),
            *(bits, counts, layout.heads > 1, ctx.scale),
        )
        return dq, dk, dv, None, None, None, None


def _copyable(x: Tensor) -> Tensor:
    """Return ``x``, or a contiguous copy where the copy engine cannot follow its strides."""
    strides = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    fits = x.stride(3) == 1 and all(s > 0 and s % 8 == 0 for s in strides)
    return x if fits and x.data_ptr() % 16 == 0 else x.contiguous()
