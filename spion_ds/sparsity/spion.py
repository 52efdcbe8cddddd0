"""SpionSparsityConfig: dense until a pattern is set, then SPION's flood-filled block pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.errors import ConfigError, unknown_name
from spion_ds.patterns import pattern_from_pooled, pool_map
from spion_ds.sparsity.config import SparsityConfig

VARIANTS = ("cf", "c", "f")


class SpionSparsityConfig(SparsityConfig):
    """The block pattern of one layer, shared by all its heads (arXiv 2309.12578).

    Args:
        num_heads: attention heads of the layer.
        block: side of a block in tokens.
        different_layout_per_head: must be False: SPION averages the map over the heads.
        variant: ``"cf"`` (diagonal convolution and flood fill), ``"f"`` (flood fill) or ``"c"``
            (convolution and top-k).
        alpha: quantile of the pooled map above which flood fill marks a block (cf and f).
        density: share of blocks that top-k keeps (c).
        filter_size: side of the diagonal convolution, odd (cf and c).
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 64,
        different_layout_per_head: bool = False,
        variant: str = "cf",
        alpha: float = 0.98,
        density: float = 0.04,
        filter_size: int = 31,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head)
        if different_layout_per_head:
            raise ConfigError(
                "different_layout_per_head is True; SPION makes one pattern a layer, shared by "
                "all heads: leave it False"
            )
        if variant not in VARIANTS:
            raise ConfigError(unknown_name("SPION variant", variant, VARIANTS))
        if not 0.0 <= alpha <= 1.0:
            raise ConfigError(f"alpha is {alpha}; allowed: 0 to 1 (a quantile, e.g. 0.98)")
        if not 0.0 < density <= 1.0:
            raise ConfigError(f"density is {density}; allowed: above 0, up to 1 (e.g. 0.04)")
        if not isinstance(filter_size, int) or filter_size < 1 or filter_size % 2 == 0:
            raise ConfigError(f"filter_size is {filter_size}; allowed: odd whole numbers, e.g. 31")
        self.variant = variant
        self.alpha = alpha
        self.density = density
        self.filter_size = filter_size
        self._pattern: Tensor | None = None

    @property
    def pattern(self) -> Tensor | None:
        """The (n, n) bool pattern on the CPU, or None while the layer is dense."""
        return self._pattern

    @property
    def convolution(self) -> int | None:
        """The filter size that this variant's pooled map is made with, None without one."""
        return None if self.variant == "f" else self.filter_size

    def pool(self, attention_map: Tensor) -> Tensor:
        """Return the pooled float64 map (n, n) of an (L, L) map, as this variant wants it."""
        return pool_map(attention_map, self.block, self.convolution)

    def find_pattern(self, pooled: Tensor) -> Tensor:
        """Return the (n, n) bool pattern that a pooled map (n, n) gives; sets nothing."""
        return pattern_from_pooled(pooled, self.variant, alpha=self.alpha, density=self.density)

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
