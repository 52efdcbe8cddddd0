"""FixedSparsityConfig: local windows, and a few blocks of each window that everyone sees."""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.errors import ConfigError
from spion_ds.sparsity.config import SparsityConfig
from spion_ds.sparsity.geometry import (
    check_count,
    check_direction,
    check_horizontal,
    keep_global,
    same_window,
)


class FixedSparsityConfig(SparsityConfig):
    """The fixed pattern of Sparse Transformers (arXiv 1904.10509), as DeepSpeed draws it.

    Args:
        num_heads, block, different_layout_per_head: as in :class:`SparsityConfig`.
        num_local_blocks: blocks of a local window; windows do not overlap.
        num_global_blocks: blocks of each window that all rows keep; divides num_local_blocks.
        attention: ``"bidirectional"``, or ``"unidirectional"``: nothing right of the diagonal
            block. The diagonal blocks themselves are kept whole: inside them only a causal
            attention mask keeps a token from the future.
        horizontal_global_attention: global blocks also keep all columns; bidirectional only.
        num_different_global_patterns: heads take turns with so many choices of the global blocks,
            from the window's last blocks to its first; more than 1 needs
            different_layout_per_head.

    Raises:
        ConfigError: (a ValueError) a value is out of range or two contradict each other.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        different_layout_per_head: bool = False,
        num_local_blocks: int = 4,
        num_global_blocks: int = 1,
        attention: str = "bidirectional",
        horizontal_global_attention: bool = False,
        num_different_global_patterns: int = 1,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        self.num_local_blocks = check_count("num_local_blocks", num_local_blocks, 1)
        self.num_global_blocks = check_count("num_global_blocks", num_global_blocks, 1)
        self.attention = check_direction(attention)
        self.horizontal_global_attention = horizontal_global_attention
        self.num_different_global_patterns = check_count(
            "num_different_global_patterns", num_different_global_patterns, 1
        )
        if num_local_blocks % num_global_blocks != 0:
            raise ConfigError(
                f"num_global_blocks is {num_global_blocks}; allowed: a divisor of "
                f"num_local_blocks, {num_local_blocks}"
            )
        check_horizontal(horizontal_global_attention, attention)
        if num_different_global_patterns > 1 and not different_layout_per_head:
            raise ConfigError(
                f"num_different_global_patterns is {num_different_global_patterns} with one layout "
                "for all heads; set different_layout_per_head to True, or leave it 1"
            )
        choices = num_local_blocks // num_global_blocks
        if num_different_global_patterns > choices:
            raise ConfigError(
                f"num_different_global_patterns is {num_different_global_patterns}; allowed: at "
                f"most num_local_blocks / num_global_blocks, {choices}"
            )

    def set_local_layout(self, h: int, layout: Tensor) -> Tensor:
        """Keep the local windows of head ``h``, in place, and return ``layout``."""
        window_of = torch.arange(layout.shape[1]) // self.num_local_blocks
        layout[h][same_window(window_of, self.attention)] = 1
        return layout

    def set_global_layout(self, h: int, layout: Tensor) -> Tensor:
        """Keep the global blocks of head ``h``, in place, and return ``layout``."""
        for start in self._global_starts(h, layout.shape[1]):
            blocks = slice(start, start + self.num_global_blocks)
            keep_global(layout[h], blocks, self.attention, self.horizontal_global_attention)
        return layout

    def make_layout(self, seq_len: int) -> Tensor:
        """Return the int64 layout (num_heads, n, n) of 0 and 1 for ``seq_len`` tokens."""
        layout = self.setup_layout(seq_len)
        for head in range(self.num_layout_heads):
            self.set_local_layout(head, layout)
            self.set_global_layout(head, layout)
        return self.check_and_propagate_first_head_layout(layout)

    def _global_starts(self, head: int, blocks: int) -> list[int]:
        turn = 1 + head % self.num_different_global_patterns
        first = self.num_local_blocks - turn * self.num_global_blocks
        whole = blocks - blocks % self.num_local_blocks
        starts = list(range(first, whole, self.num_local_blocks))
        if whole < blocks:
            # A last window that is cut short has its global blocks where they still fit.
            starts.append(min(whole + first, blocks - self.num_global_blocks))
        return starts
