"""LearnedPattern: SAT's W of one layer, learned from the attention that the layer computes.

Shape suffixes: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spion_ds.attention.map_dispatch import pooled_map
from spion_ds.attention.map_request import check_tensors, map_request
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
    """

    def __init__(self, blocks: int, head_dim: int, block: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(blocks, head_dim))
        self.blocks, self.block = blocks, block
        self.learning = True

    def freeze(self) -> None:
        """Let W be as it is: it gets no gradient, and stays a parameter of every checkpoint."""
        self.learning = False
        self.weight.requires_grad_(False)

    def forward(self, q_BHLD: Tensor, k_BHLD: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """Return the pattern loss of a micro-batch, () float32; arguments as ``attention_map``.

        The target is the mean over heads and samples of their block means; rows of padding are 0.

        Raises:
            ConfigError: the input has another number of blocks than W.
        """
        check_tensors(q_BHLD, k_BHLD, key_padding_mask)
        length = q_BHLD.shape[2]
        if -(-length // self.block) != self.blocks:
            raise ConfigError(
                f"the input has {length} tokens, and the pattern is learned for {self.blocks} "
                f"blocks of {self.block}; pad the input to {self.blocks * self.block} tokens"
            )
        target = _block_means(q_BHLD.detach(), k_BHLD.detach(), key_padding_mask, self.block)
        with torch.autocast(target.device.type, enabled=False):
            return pattern_loss(self.weight, target)


# An operator, so that torch.compile need not trace how a map is made.
@torch.library.custom_op(
    "spion_ds::block_means",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor? key_padding_mask, int block) -> Tensor",
)
def _block_means(q: Tensor, k: Tensor, key_padding_mask: Tensor | None, block: int) -> Tensor:
    """Return the mean over heads and samples of the pooled attention, (n, n) float32."""
    batch, heads, length, _ = q.shape
    weights = q.new_full((length,), 1.0 / (batch * heads), dtype=torch.float64)
    request = map_request(q, k, weights, key_padding_mask, False, None)
    return pooled_map(request._replace(block=block)).float()


@_block_means.register_fake
def _(q: Tensor, k: Tensor, key_padding_mask: Tensor | None, block: int) -> Tensor:
    n = -(-q.shape[2] // block)
    return q.new_empty((n, n), dtype=torch.float32)
