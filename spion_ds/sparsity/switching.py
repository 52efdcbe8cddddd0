"""SwitchingSparsityConfig: dense until a pattern is set, then that pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.errors import ConfigError
from spion_ds.patterns import pool_map
from spion_ds.sparsity.config import SparsityConfig


class SwitchingSparsityConfig(SparsityConfig):
    """The block pattern of one layer, found in training and shared by all its heads.

    Args:
        num_heads: attention heads of the layer.
        block: side of a block in tokens.
        different_layout_per_head: must be False.

    Raises:
        ConfigError: names the argument, its value and what is allowed.
    """

    def __init__(
        self, num_heads: int, block: int = 64, different_layout_per_head: bool = False
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        if different_layout_per_head:
            raise ConfigError(
                "different_layout_per_head is True; SPION and SAT make one pattern a layer, shared "
                "by all heads: leave it False"
            )
        self._pattern: Tensor | None = None

    @property
    def pattern(self) -> Tensor | None:
        """The (n, n) bool pattern on the CPU, or None while the layer is dense."""
        return self._pattern

    @property
    def convolution(self) -> int | None:
        """The filter size that the layer's pooled map is made with, None without one."""
        return None

    def pool(self, attention_map: Tensor) -> Tensor:
        """Return the pooled float64 map (n, n) of an (L, L) map, as this layer wants it."""
        return pool_map(attention_map, self.block, self.convolution)

    def find_pattern(self, source: Tensor) -> Tensor:
        """Return the (n, n) bool pattern that ``source`` gives; sets nothing."""
        raise NotImplementedError(f"{type(self).__name__} does not define find_pattern")

    def set_pattern(self, pattern: Tensor | None) -> None:
        """Make the layer block-sparse with an (n, n) bool pattern, or dense again with None."""
        if pattern is None:
            self._pattern = None
            return
        if pattern.dim() != 2 or pattern.shape[0] != pattern.shape[1]:
            raise ConfigError(f"a pattern is a square (n, n) mask; got {tuple(pattern.shape)}")
        self._pattern = pattern.detach().to("cpu", torch.bool).clone()

    def make_layout(self, seq_len: int) -> Tensor:
        """Return the int64 layout (num_heads, n, n): all ones while there is no pattern.

        Raises:
            ConfigError: ``seq_len`` does not divide into blocks, or the pattern was found at
                another sequence length.
        """
        layout = self.setup_layout(seq_len)
        layout[0] = self.make_mask(seq_len)
        return self.check_and_propagate_first_head_layout(layout)

    def make_mask(self, seq_len: int) -> Tensor:
        """Return the (n, n) bool pattern itself: all True while there is none.

        Raises:
            ConfigError: the pattern was found at another sequence length.
        """
        n = -(-seq_len // self.block)
        if self._pattern is None:
            return torch.ones((n, n), dtype=torch.bool)
        if self._pattern.shape[0] != n:
            captured = self._pattern.shape[0] * self.block
            raise ConfigError(
                f"the pattern was found at {captured} tokens and the input has {seq_len}; pad or "
                f"cut the input to {captured} tokens, or find a pattern at this length"
            )
        return self._pattern
