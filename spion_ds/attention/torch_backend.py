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

from spion_ds.attention.derivatives import once_differentiable, refuse_every_transform
from spion_ds.attention.grouping import Group, group_by_degree
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.options import AttentionOptions
from spion_ds.random_bits import combine, keep_mask

# Bytes of one intermediate (scores of a piece of a group): about what stays in a CPU's cache, and
# enough to fill a GPU while staying small beside the activations.
_PIECE_BYTES = {"cpu": 4 << 20, "cuda": 128 << 20}


@dataclass(frozen=True)
class _Settings:
    """What every piece of one call shares."""

    block: int
    scale: float
    causal: bool
    pruned: str
    dropout_p: float
    row_offset: int  # position of the layout's first row of tokens


@dataclass(frozen=True)
class _Operands:
    """The tensors of a call, or views of a part of its heads or batch; written in place."""

    q: Tensor  # (B, H, N, D)
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor  # (B, H, N) log-sum-exp of each query row, +inf for a row that keeps nothing
    valid: Tensor | None  # (B, N) keys that are real tokens; None: all are
    row_keys: Tensor | None  # (B, H, N) int32 dropout key of each query row; None: no dropout
    backward: _Backward | None = None

    def heads(self, part: slice) -> _Operands:
        """Return views of some heads."""
        return replace(
            self,
            q=self.q[:, part],
            k=self.k[:, part],
            v=self.v[:, part],
            out=self.out[:, part],
            lse=self.lse[:, part],
            row_keys=None if self.row_keys is None else self.row_keys[:, part],
            backward=None if self.backward is None else self.backward.part(slice(None), part),
        )

    def batch(self, part: slice) -> _Operands:
        """Return views of some samples."""
        return replace(
            self,
            q=self.q[part],
            k=self.k[part],
            v=self.v[part],
            out=self.out[part],
            lse=self.lse[part],
            valid=None if self.valid is None else self.valid[part],
            row_keys=None if self.row_keys is None else self.row_keys[part],
            backward=None if self.backward is None else self.backward.part(part, slice(None)),
        )


@dataclass(frozen=True)
class _Backward:
    """The further tensors of the backward pass."""

    grad_out: Tensor  # (B, H, N, D)
    delta: Tensor  # (B, H, N) sum of out · grad_out over D
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def part(self, samples: slice, heads: slice) -> _Backward:
        """Return views of some samples and heads."""
        tensors = (self.grad_out, self.delta, self.dq, self.dk, self.dv)
        return _Backward(*(tensor[samples, heads] for tensor in tensors))


@torch.compiler.disable
def block_sparse_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    options: AttentionOptions,
) -> Tensor:
    """Return (B, H, L, D); arguments as in ``block_sparse_attention``."""
    refuse_every_transform('block-sparse attention with backend="torch"', q, k, v)
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    length, key_length = q.shape[2], k.shape[2]
    before = options.query_offset % layout.block
    query_pad = layout.num_rows * layout.block - before - length
    key_pad = layout.num_cols * layout.block - key_length
    valid = options.key_padding_mask
    if key_pad:
        if valid is None:
            valid = torch.ones((k.shape[0], key_length), dtype=torch.bool, device=k.device)
        k, v = F.pad(k, (0, 0, 0, key_pad)), F.pad(v, (0, 0, 0, key_pad))
        valid = F.pad(valid, (0, key_pad))
    if before or query_pad:
        q = F.pad(q, (0, 0, before, query_pad))
    settings = _Settings(
        *(layout.block, options.scale, options.causal, options.pruned, options.dropout_p),
        options.query_offset - before,
    )
    # Gathering whole blocks wants each head's tokens side by side.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = _BlockSparseAttention.apply(q, k, v, layout, settings, valid, options.dropout_key)
    return options.zeroed(out[:, :, before : before + length])


class _BlockSparseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: BlockLayout,
        settings: _Settings,
        valid: Tensor | None,
        dropout_key: Tensor | None,
    ) -> Tensor:
        out = torch.zeros_like(q)
        full = torch.float64 if q.dtype == torch.float64 else torch.float32
        lse = torch.full(q.shape[:3], float("inf"), dtype=full, device=q.device)
        x = _Operands(q, k, v, out, lse, valid, _row_keys(settings, dropout_key, q))
        for heads, index in _per_layout(layout, q.shape[1]):
            for group, samples in _pieces(layout, index, "rows", q[:, heads]):
                _forward_piece(x.heads(heads).batch(samples), group, settings)
        ctx.layout, ctx.settings = layout, settings
        ctx.save_for_backward(q, k, v, out, lse, valid, dropout_key)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, saved: tuple[Any, ...], grad_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, valid, dropout_key = saved
        layout, settings = ctx.layout, ctx.settings
        delta = (grad_out.to(lse.dtype) * out.to(lse.dtype)).sum(dim=-1)
        dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
        more = _Backward(grad_out.contiguous(), delta, dq, dk, dv)
        x = _Operands(q, k, v, out, lse, valid, _row_keys(settings, dropout_key, q), more)
        for heads, index in _per_layout(layout, q.shape[1]):
            for group, samples in _pieces(layout, index, "rows", q[:, heads]):
                _dq_piece(x.heads(heads).batch(samples), group, settings)
            for group, samples in _pieces(layout, index, "columns", q[:, heads]):
                _dkv_piece(x.heads(heads).batch(samples), group, settings)
        return dq, dk, dv, None, None, None, None


def _forward_piece(x: _Operands, group: Group, settings: _Settings) -> None:
    """Write the output and log-sum-exp of a group's query blocks."""
    b = settings.block
    q_BHGbD = _take(x.q, group.members, b)
    k_BHGTD, v_BHGTD = _gather(x.k, group, b), _gather(x.v, group, b)
    scores = _product(q_BHGbD, k_BHGTD.transpose(-2, -1)).mul_(settings.scale)  # (B, H, G, b, T)
    allowed = _allowed(x, group, settings, rows_are_members=True)
    if allowed is not None:
        scores = scores.masked_fill_(~allowed, float("-inf"))
    top = scores.amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    pruned = None
    if settings.pruned == "zero":
        pruned = _pruned_count(x, group, allowed, settings)
        # At least the logit 0 of a pruned entry, in the rows that have one.
        top = torch.where(pruned > 0, top.clamp(min=0.0), top)
    total = scores.sub_(top).exp_().sum(dim=-1, keepdim=True)
    keeps_any = total > 0.0
    if pruned is not None:
        total = total + pruned * (-top.clamp(min=0.0)).exp()
    probs = scores.div_(total.masked_fill(total == 0.0, 1.0))
    if settings.dropout_p > 0.0:
        probs = probs.mul_(_dropout_factor(x, group, settings, rows_are_members=True))
    _put(x.out, group.members, _product(probs.to(x.v.dtype), v_BHGTD), b)
    # +inf makes exp(score - lse) 0 in the backward pass.
    row_lse = (top + total.log()).masked_fill(~keeps_any, float("inf"))
    _put(x.lse[..., None], group.members, row_lse, b)


def _dq_piece(x: _Operands, group: Group, settings: _Settings) -> None:
    """Write the query gradients of a group's query blocks."""
    assert x.backward is not None
    b, members = settings.block, group.members
    k_BHGTD = _gather(x.k, group, b)
    probs = _product(_take(x.q, members, b), k_BHGTD.transpose(-2, -1)).mul_(settings.scale)
    probs = probs.sub_(_take(x.lse[..., None], members, b)).exp_()  # (B, H, G, b, T)
    allowed = _allowed(x, group, settings, rows_are_members=True)
    if allowed is not None:
        probs = probs.masked_fill_(~allowed, 0.0)
    grad_BHGbD = _take(x.backward.grad_out, members, b)
    grad_probs = _product(grad_BHGbD, _gather(x.v, group, b).transpose(-2, -1))
    if settings.dropout_p > 0.0:
        grad_probs = grad_probs.mul_(_dropout_factor(x, group, settings, rows_are_members=True))
    delta_BHGb1 = _take(x.backward.delta[..., None], members, b)
    grad_scores = grad_probs.sub_(delta_BHGb1).mul_(probs).mul_(settings.scale)
    _put(x.backward.dq, members, _product(grad_scores.to(x.k.dtype), k_BHGTD), b)


def _dkv_piece(x: _Operands, group: Group, settings: _Settings) -> None:
    """Write the key and value gradients of a group's key blocks; here members are key blocks."""
    assert x.backward is not None
    b, members = settings.block, group.members
    q_BHGTD = _gather(x.q, group, b)
    probs = _product(_take(x.k, members, b), q_BHGTD.transpose(-2, -1)).mul_(settings.scale)
    lse_BHG1T = _gather(x.lse[..., None], group, b).transpose(-2, -1)
    probs = probs.sub_(lse_BHG1T).exp_()  # (B, H, G, b, T)
    allowed = _allowed(x, group, settings, rows_are_members=False)
    if allowed is not None:
        probs = probs.masked_fill_(~allowed, 0.0)
    grad_BHGTD = _gather(x.backward.grad_out, group, b)
    grad_probs = _product(_take(x.v, members, b), grad_BHGTD.transpose(-2, -1))
    dropped = probs
    if settings.dropout_p > 0.0:
        factor = _dropout_factor(x, group, settings, rows_are_members=False)
        grad_probs, dropped = grad_probs.mul_(factor), probs * factor
    _put(x.backward.dv, members, _product(dropped.to(x.v.dtype), grad_BHGTD), b)
    delta_BHG1T = _gather(x.backward.delta[..., None], group, b).transpose(-2, -1)
    grad_scores = grad_probs.sub_(delta_BHG1T).mul_(probs).mul_(settings.scale)
    _put(x.backward.dk, members, _product(grad_scores.to(x.q.dtype), q_BHGTD), b)


def _pruned_count(
    x: _Operands, group: Group, allowed: Tensor | None, settings: _Settings
) -> Tensor:
    """Return how many valid keys each query row does not keep, broadcastable to (B, H, G, b, 1)."""
    queries, tokens = x.q.shape[2], x.k.shape[2]
    kept: Tensor | int = group.partners.shape[1] * settings.block
    if allowed is not None:
        kept = allowed.sum(dim=-1, keepdim=True)
    if settings.causal:
        valid = x.valid
        if valid is None:
            valid = torch.ones((1, tokens), dtype=torch.bool, device=x.q.device)
        row = torch.arange(queries, device=x.q.device) + settings.row_offset
        row = row.clamp_(max=tokens - 1)
        seen = valid.cumsum(dim=1)[:, None, row, None]  # keys up to the query, (B, 1, N, 1)
        return _take(seen, group.members, settings.block) - kept
    if x.valid is not None:
        return x.valid.sum(dim=1)[:, None, None, None, None] - kept
    return torch.full((), tokens, device=x.q.device) - kept


def _allowed(
    x: _Operands, group: Group, settings: _Settings, *, rows_are_members: bool
) -> Tensor | None:
    """Return which entries of a piece exist, broadcastable to (B, H, G, b, T), None for all."""
    block, masks = settings.block, []
    if group.filled is not None:
        masks.append(group.filled.repeat_interleave(block, dim=1)[None, None, :, None, :])
    if x.valid is not None:
        valid = x.valid[:, None, :, None]  # (B, 1, N, 1)
        if rows_are_members:
            masks.append(_gather(valid, group, block).transpose(-2, -1))
        else:
            masks.append(_take(valid, group.members, block))
    if settings.causal:
        member, partner = _positions(group, block)
        member, partner = member[:, :, None], partner[:, None, :]
        key, query = (partner, member) if rows_are_members else (member, partner)
        masks.append(key <= query + settings.row_offset)
    if not masks:
        return None
    allowed = masks[0]
    for mask in masks[1:]:
        allowed = allowed & mask
    return allowed


def _dropout_factor(
    x: _Operands, group: Group, settings: _Settings, *, rows_are_members: bool
) -> Tensor:
    """Return 0 for dropped entries and 1 / (1 - p) for kept ones, (B, H, G, b, T)."""
    assert x.row_keys is not None
    block = settings.block
    member, partner = _positions(group, block)
    if rows_are_members:
        rows = _take(x.row_keys[..., None], group.members, block)
        columns = partner[:, None, :]
    else:
        rows = _gather(x.row_keys[..., None], group, block).transpose(-2, -1)
        columns = member[:, :, None]
    keep = keep_mask(rows, columns, settings.dropout_p)
    return keep.to(x.lse.dtype).mul_(1.0 / (1.0 - settings.dropout_p))


def _positions(group: Group, block: int) -> tuple[Tensor, Tensor]:
    """Return the token positions of members (G, b) and of partners (G, T), int32."""
    inside = torch.arange(block, dtype=torch.int32, device=group.members.device)
    member = group.members[:, None].to(torch.int32) * block + inside
    partner = group.partners[..., None].to(torch.int32) * block + inside
    return member, partner.flatten(1)


def _take(x_BHND: Tensor, members: Tensor, block: int) -> Tensor:
    """Return the member blocks, (B, H, G, b, D)."""
    return x_BHND.unflatten(2, (-1, block)).index_select(2, members)


def _gather(x_BHND: Tensor, group: Group, block: int) -> Tensor:
    """Return the partners of each member side by side, (B, H, G, T, D)."""
    slots = group.partners.shape
    if slots[1] * block == x_BHND.shape[2] and group.filled is None:
        # Every block is a partner, in order: a view does.
        return x_BHND[:, :, None].expand(-1, -1, slots[0], -1, -1)
    taken = x_BHND.unflatten(2, (-1, block)).index_select(2, group.partners.flatten())
    return taken.unflatten(2, slots).flatten(3, 4)


def _put(target_BHND: Tensor, members: Tensor, blocks_BHGbD: Tensor, block: int) -> None:
    """Write member blocks into their places, in the target's dtype."""
    blocks = blocks_BHGbD.to(target_BHND.dtype)
    target_BHND.unflatten(2, (-1, block)).index_copy_(2, members, blocks)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b accumulated and returned in float32 (float64 for float64 inputs)."""
    if a.dtype not in (torch.bfloat16, torch.float16):
        return a @ b
    if a.device.type != "cuda":
        return a.float() @ b.float()
    lead = a.shape[:-2]
    flat = torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out_dtype=torch.float32)
    return flat.unflatten(0, lead)


def _per_layout(layout: BlockLayout, heads: int) -> Iterator[tuple[slice, int]]:
    """Yield (heads, layout index) for each layout: all heads at once when they share one."""
    if layout.heads == 1:
        yield slice(0, heads), 0
    else:
        for head in range(heads):
            yield slice(head, head + 1), head


def _row_keys(settings: _Settings, dropout_key: Tensor | None, q: Tensor) -> Tensor | None:
    """Return the dropout key of every query row, (B, H, N) int32, None without dropout."""
    if settings.dropout_p == 0.0 or dropout_key is None:
        return None
    head = torch.arange(q.shape[1], dtype=torch.int32, device=q.device)
    row = torch.arange(q.shape[2], dtype=torch.int32, device=q.device)
    return combine(combine(dropout_key[:, None], head)[:, :, None], row)


def _pieces(
    layout: BlockLayout, index: int, by: str, q_BHND: Tensor
) -> Iterator[tuple[Group, slice]]:
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
            piece = Group(
                group.members[first:last],
                group.partners[first:last],
                None if group.filled is None else group.filled[first:last],
            )
            for start in range(0, batch, samples):
                yield piece, slice(start, start + samples)


def _groups(layout: BlockLayout, index: int, by: str) -> list[Group]:
    """Return the groups of one layout by rows or by columns, derived once."""
    name = ("torch", index, by)
    if name not in layout.plans:
        pointers = layout.row_ptr if by == "rows" else layout.col_ptr
        partners = layout.col_idx if by == "rows" else layout.row_idx
        layout.plans[name] = group_by_degree(pointers[index].cpu(), partners.cpu(), layout.device)
    return layout.plans[name]
