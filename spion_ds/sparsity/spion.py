"""SpionSparsityConfig: dense until a pattern is set, then SPION's flood-filled block pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.errors import ConfigError, unknown_name
from spion_ds.patterns import pattern_from_pooled
from spion_ds.sparsity.switching import SwitchingSparsityConfig, check_maps

VARIANTS = ("cf", "c", "f")


class SpionSparsityConfig(SwitchingSparsityConfig):
    """The block pattern of one layer, from its mean map, or one a head (arXiv 2309.12578).

    Args:
        num_heads: attention heads of the layer.
        block: side of a block in tokens.
        different_layout_per_head: one pattern a head, from that head's own map; as published,
            SPION averages the map over the heads and they share its pattern.
        variant: ``"cf"`` (diagonal convolution and flood fill), ``"f"`` (flood fill) or ``"c"``
            (convolution and top-k).
        alpha: quantile of the pooled map above which flood fill marks a block (cf and f).
        density: share of blocks that top-k keeps (c).
        filter_size: side of the diagonal convolution, odd (cf and c).
        causal: whether attention is causal: the quantile and the density are of the blocks on and
            below the diagonal then; ``SparseSelfAttention(causal=True)`` makes it so.
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
        causal: bool = False,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head, causal)
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

    @property
    def convolution(self) -> int | None:
        """The filter size that this variant's pooled map is made with, None without one."""
        return None if self.variant == "f" else self.filter_size

    def find_pattern(self, source: Tensor) -> Tensor:
        """Return the bool pattern that a pooled map gives; sets nothing.

        Args:
            source: (n, n) floating, or (num_heads, n, n) with one pattern a head: the pattern of
                each head comes from its own map, as if it were alone.

        Returns:
            bool of the same shape, on the source's device.

        Raises:
            ConfigError: another shape, or values that are not finite.
        """
        if not self.different_layout_per_head:
            return self._from_one(source)
        check_maps("pooled", source, self.num_heads)
        return torch.stack([self._from_one(pooled) for pooled in source])

    def _from_one(self, pooled: Tensor) -> Tensor:
        return pattern_from_pooled(
            pooled, self.variant, alpha=self.alpha, density=self.density, causal=self.causal
        )
