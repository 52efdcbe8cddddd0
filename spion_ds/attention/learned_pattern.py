"""LearnedPattern: SAT's W of one layer, learned from the attention that the layer computes.

Shape suffixes: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spion_ds.attention.streaming_maps import MapRequest, check_tensors, pooled_map
from spion_ds.errors import ConfigError
from spion_ds.patterns import pattern_loss


class LearnedPattern(nn.Module):
    """W, whose product W·Wᵀ learns the pooled attention of a layer (SAT, IEEE Access 12, 2024).

    The attention is what W learns from, and gets no gradient: a dense phase is the same with and
    without it, and nothing of size L × L is made.

    Args:
        blocks: n, blocks a side.
        head_dim: width of W.
        block: side of a block in tokens.

    Attributes:
        weight: W, (n, head_dim), uniform(0, 1) at the start.
        learning: True until ``freeze``. (ZeRO-3 gathers a parameter that another module looks at,
            its ``requires_grad`` too: hence a flag.)
        watching: whether the layer is to call ``observe``, which resets this, so that a pass
            recomputed for activation checkpointing is not seen twice.
    """

    def __init__(self, blocks: int, head_dim: int, block: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(blocks, head_dim))
        self.blocks, self.block = blocks, block
        self.learning = True
        self.watching = False
        self._target: Tensor | None = None

    def freeze(self) -> None:
        """Let W be as it is: it gets no gradient, and stays a parameter of every checkpoint."""
        self.learning = False
        self.weight.requires_grad_(False)

    # The pooled map is a registered operator on some devices alone, and W·Wᵀ is small.
    @torch.compiler.disable
    @torch.no_grad()
    def observe(self, q_BHLD: Tensor, k_BHLD: Tensor, key_padding_mask: Tensor | None) -> None:
        """Pool the attention of a micro-batch to learn from; arguments as ``attention_map``.

        The target is the mean over heads and samples of their block means; rows of padding are 0.

        Raises:
            ConfigError: the input has another number of blocks than W.
        """
        self.watching = False
        check_tensors(q_BHLD, k_BHLD, key_padding_mask)
        batch, heads, length, head_dim = q_BHLD.shape
        if -(-length // self.block) != self.blocks:
            raise ConfigError(
                f"the input has {length} tokens, and the pattern is learned for {self.blocks} "
                f"blocks of {self.block}; pad the input to {self.blocks * self.block} tokens"
            )
        weights = q_BHLD.new_full((length,), 1.0 / (batch * heads), dtype=torch.float64)
        self._target = pooled_map(
            MapRequest(
                q_BHLD,
                k_BHLD,
                weights,
                key_padding_mask,
                causal=False,
                scale=head_dim**-0.5,
                block=self.block,
            )
        )

    @torch.compiler.disable
    def forward(self) -> Tensor:
        """Return the pattern loss of the observed micro-batch, () float32, and forget that."""
        assert self._target is not None, "nothing was observed"
        target, self._target = self._target.float(), None
        with torch.autocast(target.device.type, enabled=False):
            return pattern_loss(self.weight, target)
