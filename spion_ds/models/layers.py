"""The parts of the encoder that hold attention: a layer, and the pooling by attention.

Shape suffixes: B batch, L tokens, E model dim, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spion_ds.attention import LearnedPattern, SparseSelfAttention
from spion_ds.attention.dropout import dropout
from spion_ds.models.config import ModelConfig
from spion_ds.models.rotary import rotate

# Dropout keys of a layer; the first is its attention's.
PLACES_A_LAYER = 4


class EncoderLayer(nn.Module):
    """Pre-LayerNorm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, attention: SparseSelfAttention) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads, self.dropout_p = config.heads, config.dropout
        self.attention_norm = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * inner)
        self.attention = attention
        self.projection = nn.Linear(inner, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.ffn_in = nn.Linear(config.dim, config.ffn_dim)
        self.ffn_out = nn.Linear(config.ffn_dim, config.dim)
        self.pattern: LearnedPattern | None = None  # SAT's, given by the model

    def forward(
        self,
        x_BLE: Tensor,
        padding_mask: Tensor | None,
        keys: Tensor | None,
        rotation: Tensor | None = None,
        shown: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Return (B, L, E), and queries and keys, (B, H, L, D) each, if they are asked for.

        Args:
            x_BLE: (B, L, E).
            padding_mask: (B, L) bool, True = real token; None where all are.
            keys: (4, B) int32 dropout keys, None for no dropout.
            rotation: of rotary positions, None for others.
            shown: ask for queries and keys.
        """
        p = self.dropout_p if keys is not None else 0.0
        drop = dropper(p, keys)
        # (B, L, 3·H·D) → 3 × (B, H, L, D)
        qkv = self.qkv(self.attention_norm(x_BLE)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(dim=2))
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        attended = self.attention(q, k, v, padding_mask, None if keys is None else keys[0])
        x_BLE = x_BLE + drop(self.projection(attended.transpose(1, 2).flatten(2)), 1)
        hidden = drop(nn.functional.gelu(self.ffn_in(self.ffn_norm(x_BLE))), 2)
        return x_BLE + drop(self.ffn_out(hidden), 3), (q, k) if shown else None


class AttentionPooling(nn.Module):
    """The first token, which has attended to all: dense attention of a single row."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = config.heads * config.head_dim
        self.heads = config.heads
        self.query = nn.Linear(config.dim, inner)
        self.key_value = nn.Linear(config.dim, 2 * inner)
        self.projection = nn.Linear(inner, config.dim)

    def forward(self, x_BLE: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Return (B, E), given (B, L, E) and the padding mask (B, L) bool, True = real token."""
        first = x_BLE[:, 0]
        q_BHD = self.query(first).unflatten(-1, (self.heads, -1))
        key_value = self.key_value(x_BLE).unflatten(-1, (2, self.heads, -1))
        k_BLHD, v_BLHD = key_value.unbind(dim=2)
        # Written out: fused attention is made for many rows.
        exact = torch.promote_types(x_BLE.dtype, torch.float32)
        logits_BHL = torch.einsum("bhd,blhd->bhl", q_BHD, k_BLHD).to(exact)
        logits_BHL = logits_BHL * q_BHD.shape[-1] ** -0.5
        if padding_mask is not None:
            # Not infinite: a sample without real tokens shall give no NaN.
            lowest = torch.finfo(exact).min
            logits_BHL = logits_BHL.masked_fill(~padding_mask[:, None], lowest)
        weights = logits_BHL.softmax(dim=-1)
        attended = torch.einsum("bhl,blhd->bhd", weights.to(x_BLE.dtype), v_BLHD)
        return first + self.projection(attended.flatten(1))


def dropper(p: float, keys: Tensor | None) -> Callable[[Tensor, int], Tensor]:
    """Return f(x, place) that drops with the key of ``place``, or leaves x alone."""
    if p == 0.0 or keys is None:
        return lambda x, place: x
    return lambda x, place: dropout(x, p, keys[place])
