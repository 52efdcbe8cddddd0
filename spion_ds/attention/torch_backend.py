"""Block-sparse attention in PyTorch operators: cost and memory follow the kept blocks.

Query blocks that keep about the same number of key blocks form a group; a group's key blocks are
gathered, so that each group is a few batched matrix products and a plain softmax. The backward
pass draws the probabilities again from the saved log-sum-exp: once by rows for dQ and once by
columns for dK and dV. No scatter with atomics, so the same inputs give the same bits.

Shape suffixes: B batch, H heads, G blocks of a group, S slots (kept blocks a group member has room
for), b tokens of a block, T = S·b gathered tokens, N = all tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from spion_ds.attention.dropout import combine, keep_mask
from spion_ds.attention.layout import BlockLayout

# Bytes of one intermediate (scores of a piece of a group): about what stays in a CPU's cache, and
# enough to fill a GPU while staying small beside the activations.
_PIECE_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}


@dataclass(frozen=True)
class _Group:
    """Blocks with about the same number of partners.

    members: (G,) block indices; partners: (G, S) block indices of the other side; filled: (G, S)
    bool, which slots hold a partner, or None when all do.
    """

    members: Tensor
    partners: Tensor
    filled: Tensor | None


@dataclass(frozen=True)
class _Problem:
    """What forward and backward share, for one layout and the heads that use it."""

    block: int
    scale: float
    causal: bool
    pruned: str
    dropout_p: float
    valid_BN: Tensor | None  # keys that are real tokens; None: all are
    row_keys_BHN: Tensor | None  # dropout key of every query row


def block_sparse_attention_torch(
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
    """Return (B, H, L, D); arguments as in ``block_sparse_attention``."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    length, key_length = q.shape[2], k.shape[2]
    query_pad = layout.num_rows * layout.block - length
    key_pad = layout.num_cols * layout.block - key_length
    if key_pad and key_padding_mask is None:
        key_padding_mask = torch.ones((k.shape[0], key_length), dtype=torch.bool, device=k.device)
    if key_pad:
        k, v = F.pad(k, (0, 0, 0, key_pad)), F.pad(v, (0, 0, 0, key_pad))
        key_padding_mask = F.pad(key_padding_mask, (0, key_pad))
    if query_pad:
        q = F.pad(q, (0, 0, 0, query_pad))
    problem = _Problem(layout.block, scale, causal, pruned, dropout_p, key_padding_mask, None)
    out = _BlockSparseAttention.apply(q, k, v, layout, problem, dropout_key)
    return out[:, :, :length]


class _BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        problem: _Problem,
        dropout_key: Tensor | None,
    ) -> Tensor:
        # Gathering whole blocks wants each head's tokens side by side.
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        lse = q.new_zeros(q.shape[:3], dtype=_accumulator(q.dtype))
        for heads, shared in _per_layout(layout, q.shape[1]):
            part = _with_row_keys(problem, dropout_key, q, heads)
            args = (q[:, heads], k[:, heads], v[:, heads], out[:, heads], lse[:, heads])
            for group, batch in _pieces(layout, shared, "rows", args[0]):
                _forward_piece(*(x[batch] for x in args), group, _slice(part, batch))
        ctx.layout, ctx.problem = layout, problem
        ctx.save_for_backward(q, k, v, out, lse, dropout_key)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, dropout_key = ctx.saved_tensors
        layout, problem = ctx.layout, ctx.problem
        grad_out = grad_out.contiguous()
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1)  # (B, H, N)
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for heads, shared in _per_layout(layout, q.shape[1]):
            part = _with_row_keys(problem, dropout_key, q, heads)
            args = tuple(x[:, heads] for x in (q, k, v, grad_out, lse, delta))
            dq_h, dk_h, dv_h = dq[:, heads], dk[:, heads], dv[:, heads]
            for group, batch in _pieces(layout, shared, "rows", args[0]):
                _dq_piece(*(x[batch] for x in args), dq_h[batch], group, _slice(part, batch))
            for group, batch in _pieces(layout, shared, "columns", args[0]):
                _dkv_piece(
                    *(x[batch] for x in args), dk_h[batch], dv_h[batch], group, _slice(part, batch)
                )
        return dq, dk, dv, None, None, None


def _forward_piece(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, group: _Group, problem: _Problem
) -> None:
    """Write the output and log-sum-exp of a group's query blocks."""
    b = problem.block
    q_BHGbD = _take(q, group.members, b)
    k_BHGTD, v_BHGTD = _gather(k, group, b), _gather(v, group, b)
    scores = _product(q_BHGbD, k_BHGTD.transpose(-2, -1)).mul_(problem.scale)  # (B, H, G, b, T)
    allowed = _allowed(group, problem, rows_are_members=True)
    if allowed is not None:
        scores = scores.masked_fill_(~allowed, float("-inf"))
    top = scores.amax(dim=-1, keepdim=True)
    if problem.pruned == "zero":
        top = top.clamp(min=0.0)
    top = top.masked_fill(top == float("-inf"), 0.0)
    total = scores.sub_(top).exp_().sum(dim=-1, keepdim=True)
    kept_anything = total > 0.0
    if problem.pruned == "zero":
        total = total + _pruned_count(q, k, group, allowed, problem) * (-top).exp()
    probs = scores.div_(total.masked_fill(total == 0.0, 1.0))
    if problem.dropout_p > 0.0:
        probs.mul_(_dropout_factor(group, problem, rows_are_members=True))
    _put(out, group.members, _product(probs.to(v.dtype), v_BHGTD).to(out.dtype), b)
    # A row that keeps nothing gets +inf, so that exp(score - lse) is 0 in the backward pass.
    row_lse = (top + total.log()).masked_fill(~kept_anything, float("inf"))
    _put(lse[..., None], group.members, row_lse, b)


def _dq_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    group: _Group,
    problem: _Problem,
) -> None:
    """Write the query gradients of a group's query blocks."""
    b = problem.block
    q_BHGbD, k_BHGTD = _take(q, group.members, b), _gather(k, group, b)
    probs = _product(q_BHGbD, k_BHGTD.transpose(-2, -1)).mul_(problem.scale)
    probs = probs.sub_(_take(lse[..., None], group.members, b)).exp_()  # (B, H, G, b, T)
    allowed = _allowed(group, problem, rows_are_members=True)
    if allowed is not None:
        probs = probs.masked_fill_(~allowed, 0.0)
    grad_BHGbD = _take(grad_out, group.members, b)
    grad_probs = _product(grad_BHGbD, _gather(v, group, b).transpose(-2, -1))
    if problem.dropout_p > 0.0:
        grad_probs.mul_(_dropout_factor(group, problem, rows_are_members=True))
    delta_BHGb1 = _take(delta[..., None], group.members, b)
    grad_scores = probs.mul_(grad_probs.sub_(delta_BHGb1)).mul_(problem.scale)
    _put(dq, group.members, _product(grad_scores.to(k.dtype), k_BHGTD).to(dq.dtype), b)


def _dkv_piece(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    group: _Group,
    problem: _Problem,
) -> None:
    """Write the key and value gradients of a group's key blocks; here members are key blocks."""
    b = problem.block
    k_BHGbD, q_BHGTD = _take(k, group.members, b), _gather(q, group, b)
    probs = _product(k_BHGbD, q_BHGTD.transpose(-2, -1)).mul_(problem.scale)
    probs = probs.sub_(_gather(lse[..., None], group, b).transpose(-2, -1)).exp_()  # (B,H,G,b,T)
    allowed = _allowed(group, problem, rows_are_members=False)
    if allowed is not None:
        probs = probs.masked_fill_(~allowed, 0.0)
    grad_BHGTD = _gather(grad_out, group, b)
    grad_probs = _product(_take(v, group.members, b), grad_BHGTD.transpose(-2, -1))
    dropped = probs
    if problem.dropout_p > 0.0:
        factor = _dropout_factor(group, problem, rows_are_members=False)
        grad_probs, dropped = grad_probs.mul_(factor), probs * factor
    _put(dv, group.members, _product(dropped.to(v.dtype), grad_BHGTD).to(dv.dtype), b)
    delta_BHG1T = _gather(delta[..., None], group, b).transpose(-2, -1)
    grad_scores = grad_probs.sub_(delta_BHG1T).mul_(probs).mul_(problem.scale)
    _put(dk, group.members, _product(grad_scores.to(q.dtype), q_BHGTD).to(dk.dtype), b)


def _pruned_count(
    q: Tensor, k: Tensor, group: _Group, allowed: Tensor | None, problem: _Problem
) -> Tensor | int:
    """Return how many valid keys each query row does not keep, broadcastable to (B, H, G, b, 1)."""
    tokens = k.shape[2]
    kept: Tensor | int
    kept = group.partners.shape[1] * problem.block
    if allowed is not None:
        kept = allowed.sum(dim=-1, keepdim=True)
    if problem.causal:
        valid = problem.valid_BN
        if valid is None:
            valid = torch.ones((1, tokens), dtype=torch.bool, device=q.device)
        seen = valid.cumsum(dim=1)[:, None, : q.shape[2], None]
        if q.shape[2] > tokens:
            seen = F.pad(seen, (0, 0, 0, q.shape[2] - tokens), mode="replicate")
        return _take(seen, group.members, problem.block) - kept
    if problem.valid_BN is not None:
        return problem.valid_BN.sum(dim=1)[:, None, None, None, None] - kept
    return tokens - kept


def _allowed(group: _Group, problem: _Problem, *, rows_are_members: bool) -> Tensor | None:
    """Return which entries of a piece exist, broadcastable to (B, H, G, b, T), None for all."""
    masks = []
    if group.filled is not None:
        masks.append(group.filled.repeat_interleave(problem.block, dim=1)[None, None, :, None, :])
    if problem.valid_BN is not None:
        valid = problem.valid_BN[:, None, :, None]  # (B, 1, N, 1)
        if rows_are_members:
            masks.append(_gather(valid, group, problem.block).transpose(-2, -1))
        else:
            masks.append(_take(valid, group.members, problem.block))
    if problem.causal:
        member, partner = _positions(group, problem.block)
        member, partner = member[:, :, None], partner[:, None, :]
        masks.append((partner <= member) if rows_are_members else (member <= partner))
    if not masks:
        return None
    allowed = masks[0]
    for mask in masks[1:]:
        allowed = allowed & mask
    return allowed


def _dropout_factor(group: _Group, problem: _Problem, *, rows_are_members: bool) -> Tensor:
    """Return 0 for dropped entries and 1 / (1 - p) for kept ones, (B, H, G, b, T)."""
    assert problem.row_keys_BHN is not None
    member, partner = _positions(group, problem.block)
    row_keys = problem.row_keys_BHN[..., None]
    if rows_are_members:
        rows = _take(row_keys, group.members, problem.block)
        columns = partner[:, None, :]
    else:
        rows = _gather(row_keys, group, problem.block).transpose(-2, -1)
        columns = member[:, :, None]
    keep = keep_mask(rows, columns, problem.dropout_p)
    return keep.to(torch.float32).mul_(1.0 / (1.0 - problem.dropout_p))


def _positions(group: _Group, block: int) -> tuple[Tensor, Tensor]:
    """Return the token positions of members (G, b) and of partners (G, T), int32."""
    inside = torch.arange(block, dtype=torch.int32, device=group.members.device)
    member = group.members[:, None].to(torch.int32) * block + inside
    partner = group.partners[..., None].to(torch.int32) * block + inside
    return member, partner.flatten(1)


def _take(x_BHND: Tensor, members: Tensor, block: int) -> Tensor:
    """Return the member blocks, (B, H, G, b, D)."""
    return x_BHND.unflatten(2, (-1, block)).index_select(2, members)


def _gather(x_BHND: Tensor, group: _Group, block: int) -> Tensor:
    """Return the partners of each member side by side, (B, H, G, T, D)."""
    slots = group.partners.shape
    if slots[1] * block == x_BHND.shape[2] and group.filled is None:
        # Every block is a partner, in order: a view does.
        return x_BHND[:, :, None].expand(-1, -1, slots[0], -1, -1)
    taken = x_BHND.unflatten(2, (-1, block)).index_select(2, group.partners.flatten())
    return taken.unflatten(2, slots).flatten(3, 4)


def _put(target_BHND: Tensor, members: Tensor, blocks_BHGbD: Tensor, block: int) -> None:
    """Write member blocks into their places."""
    target_BHND.unflatten(2, (-1, block)).index_copy_(2, members, blocks_BHGbD)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b accumulated and returned in float32 (float64 for float64 inputs)."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.device.type != "cuda":
        return a.float() @ b.float()
    lead = a.shape[:-2]
    flat = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return flat.unflatten(0, lead)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _per_layout(layout: BlockLayout, heads: int) -> Iterator[tuple[slice, int]]:
    """Yield (heads, layout index) for each layout: all heads at once when they share one."""
    if layout.heads == 1:
        yield slice(0, heads), 0
    else:
        for head in range(heads):
            yield slice(head, head + 1), head


def _with_row_keys(
    problem: _Problem, dropout_key: Tensor | None, q: Tensor, heads: slice
) -> _Problem:
    if problem.dropout_p == 0.0 or dropout_key is None:
        return problem
    head = torch.arange(heads.start, heads.stop, dtype=torch.int32, device=q.device)
    row = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
    keys = combine(combine(dropout_key[:, None], head)[:, :, None], row)
    return replace(problem, row_keys_BHN=keys)


def _slice(problem: _Problem, batch: slice) -> _Problem:
    valid, keys = problem.valid_BN, problem.row_keys_BHN
    return replace(
        problem,
        valid_BN=None if valid is None else valid[batch],
        row_keys_BHN=None if keys is None else keys[batch],
    )


def _pieces(
    layout: BlockLayout, index: int, by: str, q_BHND: Tensor
) -> Iterator[tuple[_Group, slice]]:
    """Yield groups cut into pieces (a part of the group, a part of the batch) of bounded memory."""
    batch, heads = q_BHND.shape[:2]
    budget = _PIECE_BYTES.get(q_BHND.device.type, _PIECE_BYTES["cuda"])
    for group in _groups(layout, index, by):
        count, slots = group.partners.shape
        member_bytes = heads * layout.block * slots * layout.block * 4
        fit = max(1, budget // member_bytes)
        samples = max(1, fit // count)
        for first in range(0, count, fit):
            last = first + fit
            piece = _Group(
                group.members[first:last],
                group.partners[first:last],
                None if group.filled is None else group.filled[first:last],
            )
            for start in range(0, batch, samples):
                yield piece, slice(start, start + samples)


def _groups(layout: BlockLayout, index: int, by: str) -> list[_Group]:
    """Return the groups of one layout by rows or by columns, derived once."""
    name = ("torch", index, by)
    if name not in layout.plans:
        pointers = layout.row_ptr if by == "rows" else layout.col_ptr
        partners = layout.col_idx if by == "rows" else layout.row_idx
        layout.plans[name] = _group_by_degree(pointers[index].cpu(), partners.cpu(), layout.device)
    return layout.plans[name]


def _group_by_degree(pointers: Tensor, partners: Tensor, device: torch.device) -> list[_Group]:
    degrees = (pointers[1:] - pointers[:-1]).long()
    widths = torch.tensor([_slots(int(degree)) for degree in degrees])
    limit = int(degrees.max()) if len(degrees) else 0
    widths = widths.clamp(max=limit)
    groups = []
    for slots in sorted(set(widths.tolist()) - {0}, reverse=True):
        members = (widths == slots).nonzero()[:, 0]
        slot = torch.arange(slots)
        filled = slot < degrees[members][:, None]
        # An empty slot points at the member's own first partner, and is masked.
        offset = pointers[:-1].long()[members][:, None] + torch.where(filled, slot, 0)
        groups.append(
            _Group(
                members.to(device),
                partners[offset].long().to(device),
                None if bool(filled.all()) else filled.to(device),
            )
        )
    return groups


def _slots(degree: int) -> int:
    """Return the number of slots for a block with ``degree`` partners: at most a quarter unused.

    0, 1, ..., 4, then 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: four widths between powers of two.
    """
    if degree <= 4:
        return degree
    step = 1 << max(0, (degree - 1).bit_length() - 3)
    return -(-degree // step) * step
