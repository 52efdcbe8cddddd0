"""VariableSparsityConfig: windows of chosen sizes, chosen global blocks, random blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spion_ds.sparsity.config import SparsityConfig
from spion_ds.sparsity.geometry import (
    check_count,
    check_direction,
    check_fits,
    check_horizontal,
    global_ranges,
    global_slices,
    keep_global,
    random_blocks,
    same_window,
    window_sizes,
)


class VariableSparsityConfig(SparsityConfig):
    """The fixed pattern with windows and global blocks of the caller's choice.

    Args:
        num_heads, block, different_layout_per_head: as in :class:`SparsityConfig`.
        num_random_blocks: random blocks of a row, anywhere in it: with ``"unidirectional"`` too.
        local_window_blocks: sizes of the first windows; the last size goes on to the end.
        global_block_indices: blocks that all rows keep; those beyond the input are left out.
        global_block_end_indices: with it, global blocks are ranges up to these (exclusive).
        attention: ``"bidirectional"``, or ``"unidirectional"``: windows keep nothing right of the
            diagonal block and global blocks no rows above themselves. Inside the diagonal blocks
            only a causal attention mask keeps a token from the future.
        horizontal_global_attention: global blocks also keep all columns; bidirectional only.
        seed: of the random blocks; the same seed gives the same blocks on every rank.

    Raises:
        ConfigError: (a ValueError) a value is out of range or two contradict each other.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 0,
        local_window_blocks: Sequence[int] = (4,),
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = "bidirectional",
        horizontal_global_attention: bool = False,
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_random_blocks = check_count("num_random_blocks", num_random_blocks, 0)
        self.local_window_blocks = window_sizes("local_window_blocks", local_window_blocks)
        self.global_block_indices, self.global_block_end_indices = global_ranges(
            global_block_indices, global_block_end_indices
        )
        self.attention = check_direction(attention)
        self.horizontal_global_attention = horizontal_global_attention
        self.seed = check_count("seed", seed, 0)
        check_horizontal(horizontal_global_attention, attention)

    def set_random_layout(self, h: int, layout: Tensor) -> Tensor:
        """Keep the random blocks of head ``h``, in place, and return ``layout``."""
        blocks = layout.shape[1]
        check_fits("num_random_blocks", self.num_random_blocks, blocks, self.block)
        layout[h][random_blocks(blocks, self.num_random_blocks, self.seed, h)] = 1
        return layout

    def set_local_layout(self, h: int, layout: Tensor) -> Tensor:
        """Keep the local windows of head ``h``, in place, and return ``layout``."""
        blocks, sizes = layout.shape[1], self.local_window_blocks
        rest = max(0, blocks - sum(sizes))
        sizes = [*sizes, *[sizes[-1]] * -(-rest // sizes[-1])]
        window_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))[:blocks]
        layout[h][same_window(window_of, self.attention)] = 1
        return layout

    def set_global_layout(self, h: int, layout: Tensor) -> Tensor:
        """Keep the global blocks of head ``h``, in place, and return ``layout``."""
        starts, ends = self.global_block_indices, self.global_block_end_indices
        for blocks in global_slices(starts, ends, layout.shape[1]):
            keep_global(layout[h], blocks, self.attention, self.horizontal_global_attention)
        return layout

    def make_layout(self, seq_len: int) -> Tensor:
        """Return the int64 layout (num_heads, n, n) of 0 and 1 for ``seq_len`` tokens."""
        layout = self.setup_layout(seq_len)
        for head in range(self.num_layout_heads):
            self.set_random_layout(head, layout)
            self.set_local_layout(head, layout)
            self.set_global_layout(head, layout)
        return self.check_and_propagate_first_head_layout(layout)
