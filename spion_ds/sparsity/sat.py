"""SatSparsityConfig: dense until a pattern is set, then SAT's learned block pattern."""

from __future__ import annotations

from torch import Tensor

from spion_ds.errors import ConfigError
from spion_ds.patterns import sat_pattern
from spion_ds.sparsity.switching import SwitchingSparsityConfig


class SatSparsityConfig(SwitchingSparsityConfig):
    """The block pattern of one layer, shared by all its heads (SAT, IEEE Access 12, 2024).

    Args:
        num_heads: attention heads of the layer.
        block: side of a block in tokens.
        different_layout_per_head: must be False: SAT learns one W a layer.
        density: share of blocks kept, the largest entries of W·Wᵀ.
        causal: whether attention is causal: only blocks on and below the diagonal are kept, and
            ``density`` is of these; ``SparseSelfAttention(causal=True)`` makes it so.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 64,
        different_layout_per_head: bool = False,
        density: float = 0.04,
        causal: bool = False,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head, causal)
        if different_layout_per_head:
            raise ConfigError(
                "different_layout_per_head is True; SAT learns one W a layer, whose pattern all "
                "heads share: leave it False"
            )
        if not 0.0 < density <= 1.0:
            raise ConfigError(f"density is {density}; allowed: above 0, up to 1 (e.g. 0.04)")
        self.density = density

    def find_pattern(self, source: Tensor) -> Tensor:
        """Return the (n, n) bool pattern that W, (n, head_dim), gives; sets nothing."""
        return sat_pattern(source, self.density, causal=self.causal)
