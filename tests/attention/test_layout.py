"""BlockLayout: the mask it was made from, its indices, its bits and its errors."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from spion_ds.attention import BlockLayout
from spion_ds.attention.layout import LONGEST_PART, pack_mask, unpack_mask
from spion_ds.errors import ConfigError

from .cases import needs_gpu

SHAPES = [(1, 1), (5, 5), (3, 8), (9, 2), (1, 6, 6), (2, 4, 7), (4, 7, 4), (3, 1, 1)]
DENSITIES = [0.0, 0.1, 0.5, 1.0]


def random_mask(shape: tuple[int, ...], density: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.rand(shape, generator=generator) < density


def entries(pointers: torch.Tensor, indices: torch.Tensor) -> list[tuple[int, int, int]]:
    """The (head, line, index) triples that pointers and indices list, in their order."""
    return [
        (head, line, int(index))
        for head, of_head in enumerate(pointers.tolist())
        for line, (start, stop) in enumerate(itertools.pairwise(of_head))
        for index in indices[start:stop]
    ]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_to_mask_gives_the_mask_that_from_mask_took(shape, density):
    mask = random_mask(shape, density)
    layout = BlockLayout.from_mask(mask, 16)
    # One layout is shared by all heads, however it was given.
    expected = mask[0] if mask.dim() == 3 and shape[0] == 1 else mask
    assert layout.to_mask().dtype == torch.bool
    assert torch.equal(layout.to_mask(), expected)
    assert layout.heads == (shape[0] if len(shape) == 3 else 1)
    assert (layout.num_rows, layout.num_cols) == shape[-2:]
    assert layout.block == 16


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_indices_are_the_kept_blocks_in_order(shape, density):
    mask = random_mask(shape, density)
    layout = BlockLayout.from_mask(mask, 32)
    heads, rows, cols = (1, *shape)[-3:]
    kept = mask.view(heads, rows, cols).tolist()
    by_rows = [
        (h, r, c) for h in range(heads) for r in range(rows) for c in range(cols) if kept[h][r][c]
    ]
    by_columns = [
        (h, c, r) for h in range(heads) for c in range(cols) for r in range(rows) if kept[h][r][c]
    ]
    assert entries(layout.row_ptr, layout.col_idx) == by_rows
    assert entries(layout.col_ptr, layout.row_idx) == by_columns
    # Offsets run on over the heads: nothing is left out and nothing is listed twice.
    for pointers in (layout.row_ptr, layout.col_ptr):
        assert pointers[0, 0] == 0
        assert pointers[-1, -1] == len(by_rows)
        assert torch.equal(pointers[1:, 0], pointers[:-1, -1])
    assert layout.kept == len(by_rows)
    assert layout.density == len(by_rows) / mask.numel()
    for indices in (layout.row_ptr, layout.col_idx, layout.col_ptr, layout.row_idx):
        assert indices.dtype == torch.int32


def test_every_column_is_whole_or_cut_into_parts_of_bounded_length():
    mask = torch.rand(3, 40, 30, generator=torch.Generator().manual_seed(0)) < 0.1
    mask[0, :, 4] = mask[1, :, 7] = mask[1, :, 9] = True
    layout = BlockLayout.from_mask(mask, 128)
    lengths = mask.sum(dim=1)
    for head in range(3):
        whole = [column for column in layout.col_order[head].tolist() if column >= 0]
        kept = lengths[head, whole].tolist()
        assert kept == sorted(kept, reverse=True)
        parts = [tuple(part) for part in layout.col_parts[head].tolist() if part[0] >= 0]
        cut = {column: pieces for column, _, pieces in parts}
        assert sorted(whole + list(cut)) == list(range(30))
        assert sorted(parts) == [(c, piece, cut[c]) for c in sorted(cut) for piece in range(cut[c])]
        longest = max(LONGEST_PART // 128, 40 // 4, -(-2 * int(lengths[head].sum()) // 30))
        assert all(lengths[head, column] <= longest for column in whole)
        assert all(lengths[head, c] > longest and lengths[head, c] <= longest * cut[c] for c in cut)
    assert (layout.col_parts[2] == -1).all()
    assert set(layout.col_parts[1, :, 0].tolist()) >= {7, 9}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_zeros_and_ones_of_any_dtype_are_a_mask(dtype):
    mask = random_mask((4, 5), 0.4)
    assert torch.equal(BlockLayout.from_mask(mask.to(dtype), 16).to_mask(), mask)


def test_strided_masks_are_read_as_they_look():
    mask = random_mask((6, 4), 0.5)
    assert torch.equal(BlockLayout.from_mask(mask.T, 16).to_mask(), mask.T)
    assert torch.equal(BlockLayout.from_mask(mask[::2], 16).to_mask(), mask[::2])


def test_later_changes_of_the_mask_do_not_change_the_layout():
    mask = random_mask((4, 4), 0.5)
    before = mask.clone()
    layout = BlockLayout.from_mask(mask, 16)
    mask.fill_(True)
    assert torch.equal(layout.to_mask(), before)


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_gives_the_layout_that_pack_packed(shape):
    mask = random_mask(shape, 0.5)
    layout = BlockLayout.from_mask(mask, 64)
    bits = layout.pack()
    assert len(bits) == -(-mask.numel() // 8)
    again = BlockLayout.unpack(bits, shape, 64)
    assert again.block == 64
    assert torch.equal(again.to_mask(), layout.to_mask())
    assert torch.equal(again.row_ptr, layout.row_ptr)
    assert torch.equal(again.col_idx, layout.col_idx)


def test_bits_are_row_major_with_the_most_significant_first():
    mask = torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
    assert pack_mask(mask) == bytes([0b10000001, 0b10000000])
    assert torch.equal(unpack_mask(bytes([0b10000001, 0b10000000]), (2, 5)), mask)
    assert pack_mask(mask.T) == np.packbits(mask.T.numpy()).tobytes()


def test_to_gives_the_same_layout_on_another_device():
    layout = BlockLayout.from_mask(random_mask((2, 5, 6), 0.4), 16)
    assert layout.to("cpu") is layout
    assert layout.to(torch.device("cpu")) is layout
    moved = layout.to("meta")
    assert moved.device.type == "meta"
    assert (moved.block, moved.heads, moved.num_rows, moved.num_cols) == (16, 2, 5, 6)
    assert (moved.kept, moved.density) == (layout.kept, layout.density)


@pytest.mark.gpu
@needs_gpu
def test_a_layout_is_the_same_on_a_gpu():
    mask = random_mask((2, 5, 6), 0.4)
    layout, on_gpu = BlockLayout.from_mask(mask, 16), BlockLayout.from_mask(mask.cuda(), 16)
    for moved in (layout.to("cuda"), on_gpu):
        assert moved.device.type == "cuda"
        assert torch.equal(moved.to_mask().cpu(), mask)
        assert moved.pack() == layout.pack()
        for name in ("row_ptr", "col_idx", "col_ptr", "row_idx"):
            assert torch.equal(getattr(moved, name).cpu(), getattr(layout, name))
        assert torch.equal(moved.to("cpu").to_mask(), mask)


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5)])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(4, 3), (1, 5), (7, 2), (slice(2, 6), slice(1, 4)), (slice(None, 3), slice(4, None))],
)
def test_a_crop_keeps_the_blocks_of_its_rows_and_columns(shape, rows, columns):
    mask = random_mask(shape, 0.5)
    cropped = BlockLayout.from_mask(mask, 16).crop(rows, columns)
    of_rows, of_columns = (s if isinstance(s, slice) else slice(s) for s in (rows, columns))
    expected = BlockLayout.from_mask(mask[..., of_rows, of_columns], 16)
    assert torch.equal(cropped.to_mask(), expected.to_mask())
    assert torch.equal(cropped.row_ptr, expected.row_ptr)
    assert torch.equal(cropped.col_order, expected.col_order)
    assert (cropped.block, cropped.heads) == (16, expected.heads)


def test_a_crop_of_everything_is_the_layout_itself():
    layout = BlockLayout.from_mask(random_mask((2, 7, 5), 0.5), 16)
    assert layout.crop(7, 5) is layout
    assert layout.crop(slice(None), slice(0, 5, 1)) is layout


def test_a_crop_says_anew_whether_it_keeps_blocks_above_the_diagonal():
    layout = BlockLayout.from_mask(torch.eye(4).roll(2, 1), 16)
    assert layout.above_diagonal
    assert not layout.crop(2, 2).above_diagonal


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_heads_are_cut_into_equal_parts(size):
    mask = random_mask((6, 4, 5), 0.5)
    layout = BlockLayout.from_mask(mask, 32)
    for rank, part in enumerate(mask.chunk(size)):
        found = layout.heads_of(rank, size)
        assert found.heads == 6 // size
        assert torch.equal(found.row_ptr, BlockLayout.from_mask(part, 32).row_ptr)
        assert torch.equal(found.to_mask(), part[0] if size == 6 else part)


def test_every_part_of_the_heads_shares_a_shared_layout():
    layout = BlockLayout.from_mask(random_mask((4, 4), 0.5), 16)
    assert layout.heads_of(2, 3) is layout


@pytest.mark.gpu
@needs_gpu
def test_parts_of_a_layout_stay_on_its_gpu():
    mask = random_mask((4, 6, 6), 0.4)
    layout = BlockLayout.from_mask(mask, 16).to("cuda")
    for part in (layout.crop(3, 4), layout.heads_of(1, 2)):
        assert part.device.type == "cuda"
    assert torch.equal(layout.crop(3, 4).to_mask().cpu(), mask[:, :3, :4])
    assert torch.equal(layout.heads_of(1, 2).to_mask().cpu(), mask[2:])


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (8, 5, "rows is 8; the layout has 7; allowed: a number of blocks from 1 to 7"),
        (0, 5, "rows is 0"),
        (-1, 5, "rows is -1"),
        (7, 6, "columns is 6; the layout has 5"),
        (7, slice(3, 3), r"columns is slice\(3, 3, None\)"),
        (7, slice(0, 6), r"columns is slice\(0, 6, None\)"),
        (slice(-3, None), 5, r"rows is slice\(-3, None, None\)"),
        (slice(0, 6, 2), 5, r"rows is slice\(0, 6, 2\)"),
        (True, 5, "rows is True"),
        (2.0, 5, "rows is 2.0"),
    ],
)
def test_crops_that_are_not_there_are_named(rows, columns, words):
    with pytest.raises(ConfigError, match=words):
        BlockLayout.from_mask(random_mask((7, 5), 0.5), 16).crop(rows, columns)


@pytest.mark.parametrize(
    ("rank", "size", "words"),
    [
        (0, 4, "size is 4, and the layout has 6 heads; allowed: a number that divides them"),
        (0, 12, "size is 12, and the layout has 6 heads"),
        (3, 3, "rank is 3; allowed: 0 to 2, below size"),
        (-1, 3, "rank is -1; allowed: a whole number from 0 up"),
        (0, 0, "size is 0; allowed: a whole number from 1 up"),
        (0, 2.0, "size is 2.0"),
        (True, 2, "rank is True"),
    ],
)
def test_parts_of_heads_that_are_not_there_are_named(rank, size, words):
    with pytest.raises(ConfigError, match=words):
        BlockLayout.from_mask(random_mask((6, 4, 4), 0.5), 16).heads_of(rank, size)


def test_a_layout_cannot_be_changed():
    layout = BlockLayout.from_mask(torch.eye(3), 16)
    with pytest.raises(AttributeError):
        layout.block = 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.ones(4), 16), r"\(n, m\) or \(heads, n, m\) and not empty; got \(4,\)"),
        ((torch.ones(1, 2, 3, 4), 16), r"got \(1, 2, 3, 4\)"),
        ((torch.ones(0, 3), 16), r"not empty; got \(0, 3\)"),
        ((torch.ones(2, 0, 3), 16), r"got \(2, 0, 3\)"),
        ((torch.eye(3), 0), "block is 0; allowed: a whole number from 1 up"),
        ((torch.eye(3), -16), "block is -16"),
        ((torch.eye(3), 16.0), "block is 16.0"),
        ((torch.eye(3), "16"), "block is '16'"),
        ((torch.eye(3), True), "block is True"),
        ((torch.full((2, 2), 2), 16), "holds only True and False"),
        ((torch.full((2, 2), -1), 16), "holds only True and False"),
        ((torch.full((2, 2), 0.5), 16), "holds only True and False"),
        ((torch.full((2, 2), float("nan")), 16), "holds only True and False"),
    ],
)
def test_wrong_masks_and_blocks_are_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        BlockLayout.from_mask(*arguments)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_bits_of_another_length_are_named(length):
    with pytest.raises(ConfigError, match=rf"{length} bytes .* mask of shape \(3, 5\)"):
        BlockLayout.unpack(bytes(length), (3, 5), 16)


def test_a_layout_made_in_inference_mode_can_be_trained_with():
    mask = torch.ones(2, 2, dtype=torch.bool)
    with torch.inference_mode():
        layout = BlockLayout.from_mask(mask.clone(), 16)
        layouts = (layout, layout.crop(1, 2), layout.to("meta"))
    assert not any(x.col_idx.is_inference() for x in layouts)
