"""LocalSlidingWindowSparsityConfig: a sliding window and nothing else."""

from __future__ import annotations

from torch import Tensor

from spion_ds.sparsity.config import SparsityConfig
from spion_ds.sparsity.geometry import check_count, check_direction, check_fits, sliding_window


class LocalSlidingWindowSparsityConfig(SparsityConfig):
    """A band around the diagonal, the same for all heads.

    Args:
        num_heads, block: as in :class:`SparsityConfig`.
        num_sliding_window_blocks: width of the band, odd; half of it lies left of the diagonal.
        attention: ``"unidirectional"``, nothing right of the diagonal block, or
            ``"bidirectional"``. The diagonal blocks themselves are kept whole: inside them only a
            causal attention mask keeps a token from the future.

    Raises:
        ConfigError: (a ValueError) a value is out of range.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 16,
        num_sliding_window_blocks: int = 3,
        attention: str = "unidirectional",
    ) -> None:
        super().__init__(num_heads, block)
        self.num_sliding_window_blocks = check_count(
            "num_sliding_window_blocks", num_sliding_window_blocks, 0
        )
        self.attention = check_direction(attention)

    def set_sliding_window_layout(self, h: int, layout: Tensor) -> Tensor:
        """Keep the band of head ``h``, in place, and return ``layout``."""
        blocks, width = layout.shape[1], self.num_sliding_window_blocks
        check_fits("num_sliding_window_blocks", width, blocks, self.block)
        band = sliding_window(blocks, width)
        layout[h][band.tril() if self.attention == "unidirectional" else band] = 1
        return layout

    def make_layout(self, seq_len: int) -> Tensor:
        """Return the int64 layout (num_heads, n, n) of 0 and 1 for ``seq_len`` tokens."""
        layout = self.setup_layout(seq_len)
        self.set_sliding_window_layout(0, layout)
        return self.check_and_propagate_first_head_layout(layout)
