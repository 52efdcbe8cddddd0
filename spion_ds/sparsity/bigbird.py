"""BigBirdSparsityConfig: a sliding window, the first blocks global, random blocks."""

from __future__ import annotations

from torch import Tensor

from spion_ds.sparsity.config import SparsityConfig
from spion_ds.sparsity.geometry import (
    check_count,
    check_direction,
    check_fits,
    random_blocks,
    sliding_window,
)


class BigBirdSparsityConfig(SparsityConfig):
    """The pattern of BigBird (arXiv 2007.14062) with global blocks inside the input ("ITC").

    Args:
        num_heads, block, different_layout_per_head: as in :class:`SparsityConfig`.
        num_random_blocks: random blocks of a row.
        num_sliding_window_blocks: width of the band around the diagonal, odd.
        num_global_blocks: first blocks that keep everything and are kept by everyone.
        attention: ``"bidirectional"``, or ``"unidirectional"``: nothing right of the diagonal
            block, and random blocks left of it. The diagonal blocks themselves are kept whole:
            inside them only a causal attention mask keeps a token from the future.
        seed: of the random blocks; the same seed gives the same blocks on every rank.

    Raises:
        ConfigError: (a ValueError) a value is out of range.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_random_blocks: int = 1,
        num_sliding_window_blocks: int = 3,
        num_global_blocks: int = 1,
        attention: str = "bidirectional",
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_random_blocks = check_count("num_random_blocks", num_random_blocks, 0)
        self.num_sliding_window_blocks = check_count(
            "num_sliding_window_blocks", num_sliding_window_blocks, 0
        )
        self.num_global_blocks = check_count("num_global_blocks", num_global_blocks, 0)
        self.attention = check_direction(attention)
        self.seed = check_count("seed", seed, 0)

    def set_random_layout(self, h: int, layout: Tensor) -> Tensor:
        """Keep the random blocks of head ``h``, in place, and return ``layout``."""
        blocks, count = layout.shape[1], self.num_random_blocks
        check_fits("num_random_blocks", count, blocks, self.block)
        causal = self.attention == "unidirectional"
        layout[h][random_blocks(blocks, count, self.seed, h, up_to_diagonal=causal)] = 1
        return layout

    def set_sliding_window_layout(self, h: int, layout: Tensor) -> Tensor:
        """Keep the band of head ``h``, in place, and return ``layout``."""
        blocks, width = layout.shape[1], self.num_sliding_window_blocks
        check_fits("num_sliding_window_blocks", width, blocks, self.block)
        layout[h][sliding_window(blocks, width)] = 1
        return layout

    def set_global_layout_itc(self, h: int, layout: Tensor) -> Tensor:
        """Keep the global blocks of head ``h`` and return the layout, cut if unidirectional."""
        count = self.num_global_blocks
        check_fits("num_global_blocks", count, layout.shape[1], self.block)
        layout[h, :count, :] = 1
        layout[h, :, :count] = 1
        return layout.tril() if self.attention == "unidirectional" else layout

    def make_layout(self, seq_len: int) -> Tensor:
        """Return the int64 layout (num_heads, n, n) of 0 and 1 for ``seq_len`` tokens."""
        layout = self.setup_layout(seq_len)
        for head in range(self.num_layout_heads):
            self.set_random_layout(head, layout)
            self.set_sliding_window_layout(head, layout)
            layout = self.set_global_layout_itc(head, layout)
        return self.check_and_propagate_first_head_layout(layout)
