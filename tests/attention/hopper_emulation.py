"""The Hopper operators on CPUs, for tests: the work lists are read as the kernels read them.

What is computed is the attention of exactly the pairs of blocks that the lists hold, so that lists,
schemas, fake implementations and gradients are tested where there is no such GPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from spion_ds.attention.hopper import backend as hopper_backend
from spion_ds.attention.hopper import plan as hopper_plan
from spion_ds.attention.hopper.plan import TOKENS, WorkLists


@contextmanager
def emulated_hopper() -> Iterator[None]:
    """Let the hopper backend serve CPU tensors; ``backend="auto"`` still sees no GPU."""
    library = torch.library.Library("spion_ds", "IMPL")
    library.impl("hopper_attention_fwd", _forward, "CPU")
    library.impl("hopper_attention_bwd", _backward, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hopper_backend, "is_hopper", _constant(lambda device: True))
        patch.setattr(hopper_backend, "load", _constant(lambda: True))
        patch.setattr(hopper_plan, "_multiprocessors", lambda device: 7)
        yield
    library._destroy()


def _constant(function):
    return torch.compiler.assume_constant_result(function)


def _pairs(items: Tensor, entries: Tensor, starts: Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (copy, owner, partner) of every item that a workgroup takes."""
    codes = entries.tolist()
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        for first, count, copy, *own in items[begin:end, :6].tolist():
            for code in codes[first : first + count]:
                yield from ((copy, own[i], code >> 3) for i in range(3) if code >> i & 1)


def _row_mask(q: Tensor, k: Tensor, lists: WorkLists, per_head: bool) -> Tensor:
    """Return (B, H, n, m): how often the forward and dQ kernels take each pair of blocks."""
    (batch, heads), n, m = q.shape[:2], -(-q.shape[2] // TOKENS), -(-k.shape[2] // TOKENS)
    taken = torch.zeros((batch, heads, n, m))
    for copy, owner, partner in _pairs(lists.row_items, lists.row_entries, lists.row_starts):
        where = (copy, owner // n) if per_head else divmod(copy, heads)
        taken[(*where, owner % n, partner)] += 1
    return taken


def _column_mask(q: Tensor, k: Tensor, lists: WorkLists, per_head: bool) -> Tensor:
    """Return the same of the dK, dV kernel."""
    (batch, heads), n, m = q.shape[:2], -(-q.shape[2] // TOKENS), -(-k.shape[2] // TOKENS)
    group = heads // k.shape[1]
    taken = torch.zeros((batch, heads, n, m))
    columns = _pairs(lists.column_items, lists.column_entries, lists.column_starts)
    for copy, owner, partner in columns:
        sample, head = (copy, owner // m) if per_head else divmod(copy, k.shape[1])
        taken[sample, head * group + partner // n, partner % n, owner % m] += 1
    return taken


def _tokens(blocks: Tensor, q: Tensor, k: Tensor, padding: Tensor | None) -> Tensor:
    """Return (B, H, L, M): how often a pair of tokens is taken, padded keys never."""
    taken = blocks.repeat_interleave(TOKENS, 2).repeat_interleave(TOKENS, 3)
    taken = taken[:, :, : q.shape[2], : k.shape[2]]
    return taken if padding is None else taken * padding[:, None, None, :]


def _grouped(x: Tensor, heads: int) -> Tensor:
    """Return k or v in float32, with a head for each query head."""
    return x.float().repeat_interleave(heads // x.shape[1], dim=1)


def _forward(q, k, v, *rest) -> tuple[Tensor, Tensor]:
    lists, (padding, per_head, scale, pruned_zero, skip_padded) = WorkLists(*rest[:8]), rest[8:]
    taken = _tokens(_row_mask(q, k, lists, per_head), q, k, padding)
    scores = q.float() @ _grouped(k, q.shape[1]).mT * scale
    weights = taken * scores.exp()
    total = weights.sum(dim=-1)
    empty = total == 0
    if pruned_zero:
        valid = k.shape[2] if padding is None else padding.sum(dim=1)[:, None, None]
        total = total + (valid - (taken > 0).sum(dim=-1))
    out = (weights @ _grouped(v, q.shape[1]) / total[..., None]).masked_fill(empty[..., None], 0)
    lse = torch.full((*q.shape[:2], taken_rows(q)), math.inf)
    lse[:, :, : q.shape[2]] = total.log2().masked_fill(empty, math.inf)
    if skip_padded:
        out = out.masked_fill(~padding[:, None, :, None], 0.0)
        lse[:, :, : q.shape[2]].masked_fill_(~padding[:, None], math.inf)
    return hopper_backend._like(q).copy_(out), lse


def taken_rows(q: Tensor) -> int:
    """Return the queries, rounded up to whole blocks."""
    return -(-q.shape[2] // TOKENS) * TOKENS


def _backward(grad, q, k, v, out, lse, *rest) -> tuple[Tensor, Tensor, Tensor]:
    lists, (padding, per_head, scale, *_) = WorkLists(*rest[:8]), rest[8:]
    heads, kv_heads = q.shape[1], k.shape[1]
    keys, values = _grouped(k, heads), _grouped(v, heads)
    grad = grad.float()
    delta = (grad * out.float()).sum(dim=-1, keepdim=True)
    scores = q.float() @ keys.mT * scale
    weights = (scores * math.log2(math.e) - lse[:, :, : q.shape[2], None]).exp2()
    dscores = weights * (grad @ values.mT - delta) * scale
    rows = _tokens(_row_mask(q, k, lists, per_head), q, k, padding)
    columns = _tokens(_column_mask(q, k, lists, per_head), q, k, padding)
    dq = (rows * dscores) @ keys
    dk, dv = (columns * dscores).mT @ q.float(), (columns * weights).mT @ grad
    dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(dim=2) for x in (dk, dv))
    results = zip((q, k, v), (dq, dk, dv), strict=True)
    dq, dk, dv = (hopper_backend._like(x).copy_(result) for x, result in results)
    return dq, dk, dv
