"""BSLongformerSparsityConfig: a sliding window and chosen global blocks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from spion_ds.sparsity.config import SparsityConfig
from spion_ds.sparsity.geometry import (
    check_count,
    check_direction,
    check_fits,
    global_ranges,
    global_slices,
    sliding_window,
)


class BSLongformerSparsityConfig(SparsityConfig):
    """The pattern of Longformer (arXiv 2004.05150), in blocks instead of tokens.

    Args:
        num_heads, block, different_layout_per_head: as in :class:`SparsityConfig`.
        num_sliding_window_blocks: width of the band around the diagonal, odd.
        global_block_indices: blocks that keep everything and are kept by everyone; those beyond
            the input are left out.
        global_block_end_indices: with it, global blocks are ranges up to these (exclusive).
        attention: ``"bidirectional"``, or ``"unidirectional"``: nothing right of the diagonal
            block. The diagonal blocks themselves are kept whole: inside them only a causal
            attention mask keeps a token from the future.

    Raises:
        ConfigError: (a ValueError) a value is out of range.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_sliding_window_blocks: int = 3,
        global_block_indices: Sequence[int] = (0,),
        global_block_end_indices: Sequence[int] | None = None,
        attention: str = "bidirectional",
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_sliding_window_blocks = check_count(
            "num_sliding_window_blocks", num_sliding_window_blocks, 0
        )
        self.global_block_indices, self.global_block_end_indices = global_ranges(
            global_block_indices, global_block_end_indices
        )
        self.attention = check_direction(attention)

    def set_sliding_window_layout(self, h: int, layout: Tensor) -> Tensor:
        """Keep the band of head ``h``, in place, and return ``layout``."""
        blocks, width = layout.shape[1], self.num_sliding_window_blocks
        check_fits("num_sliding_window_blocks", width, blocks, self.block)
        layout[h][sliding_window(blocks, width)] = 1
        return layout

    def set_global_layout(self, h: int, layout: Tensor) -> Tensor:
        """Keep the global blocks of head ``h`` and return the layout, cut if unidirectional."""
        starts, ends = self.global_block_indices, self.global_block_end_indices
        for blocks in global_slices(starts, ends, layout.shape[1]):
            layout[h, blocks, :] = 1
            layout[h, :, blocks] = 1
        return layout.tril() if self.attention == "unidirectional" else layout

    def make_layout(self, seq_len: int) -> Tensor:
        """Return the int64 layout (num_heads, n, n) of 0 and 1 for ``seq_len`` tokens."""
        layout = self.setup_layout(seq_len)
        for head in range(self.num_layout_heads):
            self.set_sliding_window_layout(head, layout)
            layout = self.set_global_layout(head, layout)
        return self.check_and_propagate_first_head_layout(layout)
