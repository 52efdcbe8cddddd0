"""Work lists of the Hopper kernels, derived from a block layout once.

A kernel's consumer warpgroup owns 64 tokens, and a workgroup's few owners share one stream of
partner blocks (csrc/hopper/stream.cuh). Everything here is in blocks of 64 tokens.
"""

from __future__ import annotations

import functools
import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.observing import captures
from spion_ds.errors import ConfigError

TOKENS = 64
_MASK_BITS = 3
# A block longer than this many times the median, and than its share of a quarter of a warpgroup's
# work, is cut.
_LONG = 1.5
_SHARE = 4
_SHORTEST_PART = 16


# An item costs its longest owner's tiles and about this many more for its start and end.
_ITEM_TILES = 2
# Up to this many items the balance is computed one by one, beyond by turns.
_FEW_ITEMS = 20_000


@dataclass(frozen=True, eq=False)
class WorkList:
    """What the workgroups of one kernel do; int32 tensors on the layout's device.

    Attributes:
        items: (items, 12), workgroup by workgroup: first entry, entries, copy, 3 owners (-1: none),
            3 workspace slots (-1: none), 3 unused. A copy is a (batch, head) of a shared layout, or
            a batch where each head has its layout.
        entries: (entries,): partner * 8 + a bit for each owner that keeps the pair.
        starts: (workgroups + 1,): workgroup i takes the items starts[i] : starts[i + 1].
        splits: (cut owners, 3): owner, first slot, slots.
        slots: slots of the workspace that a copy needs.
    """

    items: Tensor
    entries: Tensor
    starts: Tensor
    splits: Tensor
    slots: int

    def to(self, device: torch.device) -> WorkList:
        """Return the lists on ``device`` as the kernels read them."""
        items, entries, starts, splits = (
            x.to(torch.int32).contiguous().to(device)
            for x in (self.items, self.entries, self.starts, self.splits)
        )
        return WorkList(items, entries, starts, splits, self.slots)


class WorkLists(NamedTuple):
    """What the operators take of a layout, in their order; int32 on the layout's device.

    The tensors of the two :class:`WorkList`; ``column_slots`` (slots,) is only a length. A number
    would be a constant of a compiled graph, the size of a tensor may change.
    """

    row_items: Tensor
    row_entries: Tensor
    row_starts: Tensor
    column_items: Tensor
    column_entries: Tensor
    column_starts: Tensor
    column_splits: Tensor
    column_slots: Tensor


class Problem(NamedTuple):
    """The sizes that work lists depend on, besides the layout."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor) -> Problem:
        """Return that of q (B, H, L, D) and k (B, kv_heads, M, D)."""
        batch, heads, queries, head_dim = q.shape
        return cls(batch, heads, k.shape[1], queries, k.shape[2], head_dim)


def work_lists(layout: BlockLayout, problem: Problem) -> WorkLists:
    """Return the work of all kernels; derived once a layout and problem, kept with the layout.

    Deriving it takes 10 to 20 ms on the host. Neither torch.compile nor a CUDA graph can
    do that: there it must have come before, or the first breaks its graph.

    Raises:
        ConfigError: it was not derived before a CUDA graph is captured.
    """
    name = ("hopper", *problem)
    if name not in layout.plans:
        _derive(layout, problem, name)
    return layout.plans[name]


@torch.compiler.disable(
    reason="the Hopper kernels' work lists depend on the layout's values; derive them before: "
    "by prepare_layout(q, k, layout), or by SparseSelfAttention.prepare(length, device, q, k)"
)
@torch.inference_mode(False)  # a training step may come to read them
def _derive(layout: BlockLayout, problem: Problem, name: tuple) -> None:
    if captures(layout.device):
        raise ConfigError(
            "a CUDA graph is being captured with a layout that the hopper backend meets for the "
            f"first time with {problem}; run the step once before, or call prepare_layout"
        )
    rows, columns = row_list(layout, problem), column_list(layout, problem)
    slots = torch.empty(columns.slots, dtype=torch.int32, device=layout.device)
    lists = WorkLists(
        *(rows.items, rows.entries, rows.starts),
        *(columns.items, columns.entries, columns.starts, columns.splits, slots),
    )
    # torch.compile shall not trace again for a layout that keeps more or fewer blocks.
    for tensor in lists:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    layout.plans[name] = lists


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def owners(head_dim: int) -> int:
    """Return the consumer warpgroups of a workgroup: 2 where accumulators are wide."""
    return 3 if head_dim == 64 else 2


def row_list(layout: BlockLayout, problem: Problem) -> WorkList:
    """Return the work of the forward and dQ kernels: query blocks own, key blocks are partners.

    Owners are numbered head * query blocks + block, head 0 for a shared layout.
    """
    batch, heads, _, queries, keys, head_dim = problem
    rows, columns = -(-queries // TOKENS), -(-keys // TOKENS)
    head, row, column = _kept_blocks(layout, rows, columns)
    return _work_list(
        head * rows + row,
        column,
        owner_heads=layout.heads,
        owner_blocks=rows,
        partner_blocks=columns,
        copies=batch * (1 if layout.heads > 1 else heads),
        workgroups=_multiprocessors(layout.device),
        owners_an_item=owners(head_dim),
        longest=None,
    ).to(layout.device)


def column_list(layout: BlockLayout, problem: Problem) -> WorkList:
    """Return the work of the dK, dV kernel: key blocks own, query blocks are partners.

    Owners are numbered kv_head * key blocks + block, kv_head 0 for a shared layout; partners
    member * query blocks + block, the member being the query head within the kv head's group.
    """
    batch, heads, kv_heads, queries, keys, head_dim = problem
    rows, columns = -(-queries // TOKENS), -(-keys // TOKENS)
    head, row, column = _kept_blocks(layout, rows, columns)
    group = heads // kv_heads
    if layout.heads > 1:
        owner, partner = head // group * columns + column, head % group * rows + row
    else:
        owner = column.repeat(group)
        partner = (torch.arange(group)[:, None] * rows + row).flatten()
    copies = batch * (1 if layout.heads > 1 else kv_heads)
    workgroups = _multiprocessors(layout.device)
    length = torch.bincount(owner, minlength=1)
    typical = length[length > 0].median().item() if owner.numel() else 0
    share = owner.numel() * copies / (workgroups * owners(head_dim))
    return _work_list(
        owner,
        partner,
        owner_heads=kv_heads if layout.heads > 1 else 1,
        owner_blocks=columns,
        partner_blocks=rows * group,
        copies=copies,
        workgroups=workgroups,
        owners_an_item=owners(head_dim),
        longest=max(_SHORTEST_PART, math.ceil(_LONG * typical), math.ceil(share / _SHARE)),
    ).to(layout.device)


def _kept_blocks(layout: BlockLayout, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (head, row, column) of the kept blocks of 64 tokens, int64 on the CPU."""
    counts = layout.row_ptr.cpu().long().diff(dim=1).flatten()
    line = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    head, row = line // layout.num_rows, line % layout.num_rows
    column = layout.col_idx.cpu().long()
    parts = layout.block // TOKENS
    i, j = torch.arange(parts)[:, None], torch.arange(parts)[None, :]
    row = (row[:, None, None] * parts + i).expand(-1, parts, parts).flatten()
    column = (column[:, None, None] * parts + j).expand(-1, parts, parts).flatten()
    head = head.repeat_interleave(parts * parts)
    # The last block of 128 tokens may have no second half.
    exists = (row < rows) & (column < columns)
    return head[exists], row[exists], column[exists]


def _work_list(
    owner: Tensor,
    partner: Tensor,
    *,
    owner_heads: int,
    owner_blocks: int,
    partner_blocks: int,
    copies: int,
    workgroups: int,
    owners_an_item: int,
    longest: int | None,
) -> WorkList:
    """Group owners of like length into items, order their partners, deal items to workgroups."""
    order = (owner * partner_blocks + partner).argsort()
    owner, partner = owner[order], partner[order]
    parts = _cut(owner, owner_heads * owner_blocks, longest)
    item, place, item_count = _group(parts, owner_heads, owner_blocks, owners_an_item)
    entries, count = _stream(
        item[parts.of_pair], place[parts.of_pair], partner, partner_blocks, item_count
    )

    items = torch.full((item_count, 12), -1, dtype=torch.int64)
    items[:, 0], items[:, 1] = count.cumsum(0) - count, count
    items[item, 3 + place] = parts.owner
    items[item, 6 + place] = parts.slot
    most = torch.zeros(item_count, dtype=torch.int64)
    most.scatter_reduce_(0, item, parts.length, "amax")
    worker = _deal((most + _ITEM_TILES).repeat(copies), workgroups)
    items = items.repeat(copies, 1)
    items[:, 2] = torch.arange(copies).repeat_interleave(item_count)
    # A workgroup goes through the copies in order: few of them are in the L2 cache at a time.
    items = items[worker.argsort(stable=True)]
    starts = torch.zeros(min(workgroups, items.shape[0]) + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(worker, minlength=starts.numel() - 1).cumsum(0)
    return WorkList(items, entries, starts, parts.splits, parts.slots)


class _Parts(NamedTuple):
    """What warpgroups own: owners, the long ones cut; a pair is an owner and a partner.

    Attributes:
        owner: (parts,) whose part it is.
        number: (parts,) which of the owner's parts.
        length: (parts,) its partners.
        slot: (parts,) workspace slot, -1 where the owner is whole.
        of_pair: (pairs,) the part that each pair belongs to.
        splits: (cut owners, 3): owner, first slot, slots.
        slots: in all.
    """

    owner: Tensor
    number: Tensor
    length: Tensor
    slot: Tensor
    of_pair: Tensor
    splits: Tensor
    slots: int


def _cut(owner: Tensor, owners: int, longest: int | None) -> _Parts:
    """Cut owners of more than ``longest`` partners into even parts; ``owner`` is sorted."""
    length = torch.bincount(owner, minlength=owners)
    parts = torch.ones(owners, dtype=torch.int64)
    if longest is not None:
        parts = (-(-length // longest)).clamp(min=1)
    part_owner = torch.repeat_interleave(torch.arange(owners), parts)
    first_part = parts.cumsum(0) - parts
    rank = torch.arange(owner.numel()) - (length.cumsum(0) - length)[owner]
    of_pair = first_part[owner] + rank * parts[owner] // length[owner].clamp(min=1)
    is_cut = parts[part_owner] > 1
    slot = torch.where(is_cut, is_cut.long().cumsum(0) - 1, -1)
    cut_owner = (parts > 1).nonzero().flatten()
    return _Parts(
        owner=part_owner,
        number=torch.arange(part_owner.numel()) - first_part[part_owner],
        length=torch.bincount(of_pair, minlength=part_owner.numel()),
        slot=slot,
        of_pair=of_pair,
        splits=torch.stack([cut_owner, slot[first_part[cut_owner]], parts[cut_owner]], dim=1),
        slots=int(is_cut.sum()),
    )


def _group(
    parts: _Parts, owner_heads: int, owner_blocks: int, owners_an_item: int
) -> tuple[Tensor, Tensor, int]:
    """Return the item of each part, its place there, and the number of items.

    An item is of one head: like lengths together (they finish together), then neighbours (they
    share a band), and the same part of several hot blocks (they share nearly all partners).
    """
    quantum = max(1.0, parts.length.double().mean().item() / 8)
    level = (parts.length / quantum).round().long()
    head = parts.owner // owner_blocks
    position = _inverse(_lexicographic(head, -level, parts.number))
    parts_a_head = torch.bincount(head, minlength=owner_heads)
    items_a_head = -(-parts_a_head // owners_an_item)
    within = position - (parts_a_head.cumsum(0) - parts_a_head)[head]
    item = (items_a_head.cumsum(0) - items_a_head)[head] + within // owners_an_item
    return item, within % owners_an_item, int(items_a_head.sum())


def _stream(
    item: Tensor, place: Tensor, partner: Tensor, partner_blocks: int, item_count: int
) -> tuple[Tensor, Tensor]:
    """Return the entries of all items and how many each has.

    There is one entry a partner of an item, with a bit for each owner that keeps it.

    Args:
        item, place, partner: of each pair.
    """
    pair, index = torch.unique(item * partner_blocks + partner, return_inverse=True)
    bits = torch.zeros(pair.numel(), dtype=torch.int64).index_add_(0, index, 1 << place)
    entry_item, entry_partner = pair // partner_blocks, pair % partner_blocks
    # Mix the combinations of owners evenly over the stream, so that the owners keep pace.
    kind = entry_item * (1 << _MASK_BITS) + bits
    size = torch.bincount(kind, minlength=1)
    number = _inverse(kind.argsort(stable=True)) - (size.cumsum(0) - size)[kind]
    progress = (number + 0.5) / size[kind]
    order = (entry_item + progress).argsort(stable=True)
    entries = (entry_partner * (1 << _MASK_BITS) + bits)[order]
    return entries, torch.bincount(entry_item, minlength=item_count)


def _deal(cost: Tensor, workgroups: int) -> Tensor:
    """Return the workgroup of each item, so that sums of costs are nearly even."""
    order = cost.argsort(descending=True, stable=True)
    worker = torch.empty_like(order)
    if cost.numel() > _FEW_ITEMS:
        turn = torch.arange(cost.numel())
        lane, back = turn % workgroups, turn // workgroups % 2 == 1
        worker[order] = torch.where(back, workgroups - 1 - lane, lane)
        return worker
    loads = [(0, number) for number in range(min(workgroups, cost.numel()))]
    chosen, costs = [], cost.tolist()
    for item in order.tolist():
        load, number = loads[0]
        chosen.append(number)
        heapq.heapreplace(loads, (load + costs[item], number))
    worker[order] = torch.tensor(chosen, dtype=torch.int64)
    return worker


def _inverse(order: Tensor) -> Tensor:
    """Return the position of each element in an order."""
    position = torch.empty_like(order)
    position[order] = torch.arange(order.numel())
    return position


def _lexicographic(*keys: Tensor) -> Tensor:
    """Return the order that sorts by the first key, then the second, and so on."""
    order = torch.arange(keys[0].numel())
    for key in reversed(keys):
        order = order[key[order].argsort(stable=True)]
    return order
