"""The counter-based dropout of ``dropout.py`` as one Triton kernel: the same bits, one pass."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spion_ds.random_bits import MULTIPLY_1, MULTIPLY_2, STRIDE, keep_threshold

# The constants of dropout.combine and dropout.keep_mask, as uint32.
_STRIDE = tl.constexpr(STRIDE % 2**32)
_MULTIPLY_1 = tl.constexpr(MULTIPLY_1 % 2**32)
_MULTIPLY_2 = tl.constexpr(MULTIPLY_2 % 2**32)
_ELEMENTS = 1024


def dropout_triton(x: Tensor, p: float, key: Tensor) -> Tensor:
    """Return what ``dropout`` returns; arguments as there, ``x`` on a CUDA device."""
    return _Dropout.apply(x, p, key)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, key: Tensor) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(key)
        return _launch(x, p, key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Dropout.apply(grad, ctx.p, *ctx.saved_tensors), None, None


def _launch(x: Tensor, p: float, key: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    size = x[0].numel()
    with torch.cuda.device_of(x):
        dropout_kernel[(triton.cdiv(size, _ELEMENTS), x.shape[0])](
            x, y, key, size, x.shape[-1], keep_threshold(p), 1.0 / (1.0 - p), ELEMENTS=_ELEMENTS
        )
    return y


@triton.jit(do_not_specialize=["threshold"])
def dropout_kernel(
    x_ptr: tl.tensor,  # (batch, size)
    y_ptr: tl.tensor,
    key_ptr: tl.tensor,  # (batch,) int32
    size: tl.tensor,
    columns: tl.tensor,
    threshold: tl.tensor,
    keep_scale: tl.tensor,
    ELEMENTS: tl.constexpr,
) -> None:
    """Write x with dropped elements 0 and kept ones scaled, ELEMENTS of one sample."""
    sample = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < size
    key = tl.load(key_ptr + sample).to(tl.uint32, bitcast=True)
    row_keys = combine(key, element // columns)
    keep = kept(row_keys, element % columns, threshold)
    x = tl.load(x_ptr + sample * size + element, mask=inside, other=0.0)
    y = tl.where(keep, x.to(tl.float32) * keep_scale, 0.0)
    tl.store(y_ptr + sample * size + element, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def kept(row_keys: tl.tensor, columns: tl.tensor, threshold: tl.tensor) -> tl.tensor:
    """Return dropout.keep_mask: the element's bits, signed, are at least the threshold.

    What belongs to a row or to a column alone is computed before the two meet.
    """
    words = (columns.to(tl.uint32) + 1) * _STRIDE
    words = (words ^ (words >> 16)) * _MULTIPLY_1
    bits = (row_keys ^ words) * (row_keys * _MULTIPLY_2 | 1)
    return bits.to(tl.int32, bitcast=True) >= threshold


@triton.jit
def combine(key: tl.tensor, counter: tl.tensor) -> tl.tensor:
    """Return dropout.combine in uint32: mix(key + (counter + 1) · stride)."""
    x = key + (counter.to(tl.uint32) + 1) * _STRIDE
    x ^= x >> 16
    x *= _MULTIPLY_1
    x ^= x >> 15
    x *= _MULTIPLY_2
    x ^= x >> 16
    return x
