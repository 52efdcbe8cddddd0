"""BertSparseSelfAttention: a BERT layer's projections around SparseSelfAttention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from spion_ds.errors import ConfigError
from spion_ds.ops.sparse_attention.sparse_self_attention import SparseSelfAttention
from spion_ds.sparsity import FixedSparsityConfig, SparsityConfig


class BertSparseSelfAttention(nn.Module):
    """The self-attention of a BERT layer; parameters are named as BERT's: query, key, value.

    Args:
        config: a BERT configuration: ``hidden_size`` and ``num_attention_heads`` are read.
        sparsity_config: None takes FixedSparsityConfig for the model's heads.

    Raises:
        ConfigError: (a ValueError) the heads do not divide the hidden size, or are not those of
            ``sparsity_config``.
    """

    def __init__(self, config: Any, sparsity_config: SparsityConfig | None = None) -> None:
        super().__init__()
        heads = config.num_attention_heads
        if config.hidden_size % heads != 0:
            raise ConfigError(
                f"hidden_size is {config.hidden_size}; allowed: a multiple of "
                f"num_attention_heads, {heads}"
            )
        if sparsity_config is None:
            sparsity_config = FixedSparsityConfig(num_heads=heads)
        if sparsity_config.num_heads != heads:
            raise ConfigError(
                f"the sparsity configuration is for {sparsity_config.num_heads} heads and the "
                f"model has {heads}; give the configuration num_heads={heads}"
            )
        self.num_attention_heads = heads
        self.attention_head_size = config.hidden_size // heads
        self.all_head_size = heads * self.attention_head_size
        self.query = nn.Linear(config.hidden_size, self.all_head_size)
        self.key = nn.Linear(config.hidden_size, self.all_head_size)
        self.value = nn.Linear(config.hidden_size, self.all_head_size)
        block = sparsity_config.block
        # master_layout needs whole blocks.
        self.sparse_self_attention = SparseSelfAttention(
            sparsity_config, max_seq_length=-(-2048 // block) * block
        )

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        """Return (batch, L, hidden_size) as (batch, heads, L, head_dim)."""
        return x.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return (batch, L, hidden_size).

        Args:
            hidden_states: (batch, L, hidden_size).
            attention_mask: which keys are padding, as SparseSelfAttention's key_padding_mask:
                (batch, L) or (batch, 1, 1, L), added to the scores, or bool, True = real token.
        """
        context = self.sparse_self_attention(
            self.transpose_for_scores(self.query(hidden_states)),
            self.transpose_for_scores(self.key(hidden_states)),
            self.transpose_for_scores(self.value(hidden_states)),
            key_padding_mask=attention_mask,
        )
        return context.transpose(1, 2).flatten(2)
