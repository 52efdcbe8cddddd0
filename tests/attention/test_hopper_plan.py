"""The Hopper kernels' work lists hold exactly the layout, and deal it out evenly. No GPU needed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from spion_ds.attention.hopper import plan as hopper_plan
from spion_ds.attention.hopper.plan import Problem, WorkList, column_list, row_list, work_lists
from spion_ds.attention.layout import BlockLayout

# (layout heads, heads, kv_heads, queries, keys, block, head_dim)
CASES = [
    (1, 4, 4, 300, 300, 64, 64),
    (1, 4, 2, 300, 500, 128, 64),
    (1, 2, 2, 64, 70, 128, 128),
    (4, 4, 2, 900, 700, 64, 128),
    (1, 2, 2, 4096, 4096, 64, 64),
]
BATCH = 2


@pytest.fixture(autouse=True)
def _multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper_plan, "_multiprocessors", lambda device: 132)


def make_layout(heads: int, queries: int, keys: int, block: int) -> BlockLayout:
    """Return a random layout with hot columns and an empty row."""
    torch.manual_seed(0)
    mask = torch.rand(heads, -(-queries // block), -(-keys // block)) < 0.1
    mask[:, :, :2] = True
    mask[:, -1] = False
    return BlockLayout.from_mask(mask if heads > 1 else mask[0], block)


def kept_blocks(layout: BlockLayout, queries: int, keys: int) -> Tensor:
    """Return (head, row, column) of the kept blocks of 64 tokens."""
    mask = layout.to_mask().reshape(layout.heads, layout.num_rows, layout.num_cols)
    side = layout.block // 64
    mask = mask.repeat_interleave(side, dim=1).repeat_interleave(side, dim=2)
    return mask[:, : -(-queries // 64), : -(-keys // 64)].nonzero()


def pairs(work: WorkList) -> Counter:
    """Return how often each (copy, owner, partner) is worked on."""
    found: Counter = Counter()
    entries = work.entries.tolist()
    for first, count, copy, *rest in work.items.tolist():
        for entry in entries[first : first + count]:
            for place in range(3):
                if entry >> place & 1:
                    found[copy, rest[place], entry >> 3] += 1
    return found


@pytest.mark.parametrize("case", CASES)
def test_row_lists_hold_each_kept_block_once_a_copy(case: tuple[int, ...]) -> None:
    layout_heads, heads, kv_heads, queries, keys, block, head_dim = case
    layout = make_layout(layout_heads, queries, keys, block)
    work = row_list(layout, Problem(BATCH, heads, kv_heads, queries, keys, head_dim))
    copies = BATCH * (1 if layout_heads > 1 else heads)
    rows = -(-queries // 64)
    kept = kept_blocks(layout, queries, keys).tolist()
    expected = {(c, h * rows + i, j) for c in range(copies) for h, i, j in kept}
    assert pairs(work) == Counter(expected)


@pytest.mark.parametrize("case", CASES)
def test_column_lists_hold_each_kept_block_once_a_copy(case: tuple[int, ...]) -> None:
    layout_heads, heads, kv_heads, queries, keys, block, head_dim = case
    layout = make_layout(layout_heads, queries, keys, block)
    work = column_list(layout, Problem(BATCH, heads, kv_heads, queries, keys, head_dim))
    rows, columns, group = -(-queries // 64), -(-keys // 64), heads // kv_heads
    expected = set()
    for h, i, j in kept_blocks(layout, queries, keys).tolist():
        if layout_heads > 1:
            expected |= {(c, h // group * columns + j, h % group * rows + i) for c in range(BATCH)}
        else:
            copies = range(BATCH * kv_heads)
            expected |= {(c, j, g * rows + i) for c in copies for g in range(group)}
    assert pairs(work) == Counter(expected)


@pytest.mark.parametrize("case", CASES)
def test_every_block_is_written_once_and_cut_blocks_have_all_their_slots(
    case: tuple[int, ...],
) -> None:
    layout_heads, heads, kv_heads, queries, keys, block, head_dim = case
    layout = make_layout(layout_heads, queries, keys, block)
    work = column_list(layout, Problem(BATCH, heads, kv_heads, queries, keys, head_dim))
    slots: dict[tuple[int, int], list[int]] = {}
    for _, _, copy, *rest in work.items.tolist():
        for owner, slot in zip(rest[:3], rest[3:6], strict=True):
            if owner >= 0:
                slots.setdefault((copy, owner), []).append(slot)
    owner_heads = kv_heads if layout_heads > 1 else 1
    copies = BATCH * (1 if layout_heads > 1 else kv_heads)
    assert len(slots) == copies * owner_heads * -(-keys // 64)
    cut = {owner: list(range(first, first + n)) for owner, first, n in work.splits.tolist()}
    for (_, owner), found in slots.items():
        assert sorted(found) == cut.get(owner, [-1])


def test_work_is_dealt_evenly() -> None:
    layout = make_layout(1, 16384, 16384, 64)
    work = column_list(layout, Problem(2, 8, 8, 16384, 16384, 64))
    worker = torch.repeat_interleave(
        torch.arange(work.starts.numel() - 1), work.starts.diff().long()
    )
    entries = torch.zeros(work.starts.numel() - 1).index_add_(0, worker, work.items[:, 1].float())
    # Hot columns have ten times a common column's blocks; without cutting and dealing this is 2.
    assert entries.max() < 1.15 * entries.mean()


def test_lists_are_derived_once_a_batch_size_and_their_lengths_may_change_in_a_graph() -> None:
    layout = make_layout(1, 300, 300, 64)
    whole = Problem(4, 2, 2, 300, 300, 64)
    lists = work_lists(layout, whole)
    last = work_lists(layout, whole._replace(batch=3))
    assert last is not lists
    for _ in range(2):
        assert work_lists(layout, whole) is lists
        assert work_lists(layout, whole._replace(batch=3)) is last
    columns = column_list(layout, whole)
    assert lists.column_slots.shape == (columns.slots,)
    assert all(hasattr(tensor, "_dynamo_weak_dynamic_indices") for tensor in lists)


def test_lists_that_an_evaluation_derived_serve_training() -> None:
    layout = make_layout(1, 300, 300, 64)
    with torch.inference_mode():
        lists = work_lists(layout, Problem(1, 2, 2, 300, 300, 64))
    assert not any(tensor.is_inference() for tensor in lists)
