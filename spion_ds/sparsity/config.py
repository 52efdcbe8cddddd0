"""SparsityConfig: which blocks of the attention matrix are kept, under DeepSpeed's contract."""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.errors import ConfigError


class SparsityConfig:
    """Base of all sparsity configurations; the contract is DeepSpeed 0.19.6's.

    Args:
        num_heads: attention heads of the layer.
        block: side of a block in tokens.
        different_layout_per_head: one layout a head; otherwise all heads share the first one's.

    Subclasses add ``make_layout(seq_len)``.
    """

    def __init__(
        self, num_heads: int, block: int = 16, different_layout_per_head: bool = False
    ) -> None:
        for name, value in (("num_heads", num_heads), ("block", block)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} is {value!r}; allowed: a whole number from 1 up")
        self.num_heads = num_heads
        self.block = block
        self.different_layout_per_head = different_layout_per_head
        self.num_layout_heads = num_heads if different_layout_per_head else 1

    def setup_layout(self, seq_len: int) -> Tensor:
        """Return an all-zero int64 layout (num_heads, n, n), n = seq_len / block, on the CPU.

        Raises:
            ConfigError: (a ValueError) ``seq_len`` is not a multiple of ``block``.
        """
        if seq_len < 1 or seq_len % self.block != 0:
            raise ConfigError(
                f"a sequence length of {seq_len} is not a multiple of the block {self.block}; "
                f"pad the input to {-(-max(seq_len, 1) // self.block) * self.block} tokens or "
                "choose a block that divides it"
            )
        n = seq_len // self.block
        return torch.zeros((self.num_heads, n, n), dtype=torch.int64)

    def make_layout(self, seq_len: int) -> Tensor:
        """Return the int64 layout (num_heads, n, n) of 0 and 1 for ``seq_len`` tokens."""
        raise NotImplementedError(f"{type(self).__name__} does not define make_layout")

    def make_mask(self, seq_len: int) -> Tensor:
        """Return the kept blocks for ``seq_len`` tokens, the last block partial or not.

        Returns:
            (n, n) bool on the CPU for all heads, or (num_heads, n, n) with one layout a head;
            n = ceil(seq_len / block). Not to be written to.
        """
        layout = self.make_layout(-(-seq_len // self.block) * self.block).bool()
        return layout if self.different_layout_per_head else layout[0]

    def check_and_propagate_first_head_layout(self, layout: Tensor) -> Tensor:
        """Copy the first head's layout to all heads, in place, unless each has its own."""
        if not self.different_layout_per_head:
            layout[1:] = layout[0]
        return layout


class DenseSparsityConfig(SparsityConfig):
    """Every block is kept."""

    def make_layout(self, seq_len: int) -> Tensor:
        """Return an all-one int64 layout (num_heads, n, n)."""
        return self.setup_layout(seq_len).fill_(1)
