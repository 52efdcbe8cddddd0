"""Pooled attention maps on CPUs: the C++ operator of csrc/attention_map.cpp.

The same inputs give the same bits with any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.attention.map_request import MapRequest
from spion_ds.extension import when_available

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported(request: MapRequest) -> str | None:
    """Return why the operator does not serve these tensors, None if it does."""
    q, k = request.q, request.k
    if q.device.type != "cpu":
        return f"the operator runs on CPUs; the tensors are on {q.device}"
    if q.dtype not in _DTYPES or k.dtype != q.dtype:
        return f"the operator takes float32, bfloat16 and float16; got {q.dtype} and {k.dtype}"
    if not _ready():
        return "the C++ operators are not available (a warning has said why)"
    return None


def block_sums_cpu(request: MapRequest) -> Tensor:
    """Return what ``block_sums_torch`` returns; sums of up to 32 heads are float32 on the way."""
    return _run(request, None)[0]


def central_sums_cpu(request: MapRequest, mean: float) -> Tensor:
    """Return what ``central_sums_torch`` returns."""
    return _run(request._replace(block=request.length, filter_size=1), mean)[1]


def _run(request: MapRequest, mean: float | None) -> tuple[Tensor, Tensor]:
    return torch.ops.spion_ds.attention_map_pooled(
        request.q.detach(),
        request.k.detach(),
        request.key_padding_mask,
        request.row_weights,
        request.block,
        request.filter_size,
        request.scale,
        request.causal,
        mean,
    )


def _fake(
    q: Tensor,
    k: Tensor,
    key_padding_mask: Tensor | None,
    row_weights: Tensor,
    block: int,
    filter_size: int,
    scale: float,
    causal: bool,
    mean: float | None = None,
) -> tuple[Tensor, Tensor]:
    n = -(-q.shape[2] // block)
    return row_weights.new_empty((n, n)), row_weights.new_empty((0 if mean is None else 2,))


@when_available
def _ready() -> None:
    torch.library.register_fake("spion_ds::attention_map_pooled", _fake)
