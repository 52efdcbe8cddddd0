"""An embedding whose gradient is right in bf16 on a CPU and fast on a GPU.

PyTorch's own adds up a batch's rows in their dtype on a CPU: in bf16 a sum of thousands stands
still long before its end. On a GPU it sorts the rows, or uses atomics in no fixed order: slow where
half a million meet in some tens of places, and a product with one-hot vectors is not.

Shape suffixes: B batch, L tokens, V ids, E model dim.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# With more ids the one-hot vectors cost more than what they avoid.
_MOST_IDS = 512
# Elements of one-hot vectors that are made at a time: 64 MiB in bf16.
_CHUNK = 2**25


class Embedding(nn.Embedding):
    """``nn.Embedding`` of ids (B, L) int64, with ``embedding_gradient``."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the vectors of the ids, (B, L, E)."""
        return _Embed.apply(self.weight, input)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VE: Tensor, ids_BL: Tensor) -> Tensor:
        ctx.save_for_backward(ids_BL)
        # Not the weight itself, which ZeRO-3 has given away by then.
        ctx.count = len(weight_VE)
        return F.embedding(ids_BL, weight_VE)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [ids_BL], [gradient_BLE] = ctx.saved_tensors, gradients
        return embedding_gradient(gradient_BLE, ids_BL, ctx.count), None


def embedding_gradient(gradient_BLE: Tensor, ids_BL: Tensor, count: int) -> Tensor:
    """Return the sum of the gradients of each id, (count, E), added in float32 at least.

    Args:
        gradient_BLE: (B, L, E), of the vectors.
        ids_BL: (B, L) int64, below ``count``.
        count: of all ids.
    """
    if gradient_BLE.is_cuda and count <= _MOST_IDS:
        return one_hot_product(gradient_BLE, ids_BL, count)
    # PyTorch's own adds in the gradient's dtype.
    summed = gradient_BLE.to(torch.promote_types(gradient_BLE.dtype, torch.float32))
    gradient_VE = torch.ops.aten.embedding_dense_backward(summed, ids_BL, count, -1, False)
    return gradient_VE.to(gradient_BLE.dtype)


def one_hot_product(gradient_BLE: Tensor, ids_BL: Tensor, count: int) -> Tensor:
    """Return ``embedding_gradient`` as a product, the same bits every time.

    One-hot vectors are exact in every dtype. A product adds up a sample in float32 and rounds to
    the gradient's dtype, as the gradients themselves were rounded; samples are added in float32.
    """
    samples, length = ids_BL.shape
    step = max(1, _CHUNK // (count * max(1, length)))
    every_id = torch.arange(count, device=ids_BL.device)[:, None]
    total = gradient_BLE.new_zeros(count, gradient_BLE.shape[-1], dtype=torch.float32)
    for first in range(0, samples, step):
        part = slice(first, first + step)
        one_hot_BVL = (ids_BL[part, None] == every_id).to(gradient_BLE.dtype)
        sums_BVE = torch.bmm(one_hot_BVL, gradient_BLE[part])
        total = total + sums_BVE.sum(0, dtype=torch.float32)
    return total.to(gradient_BLE.dtype)
