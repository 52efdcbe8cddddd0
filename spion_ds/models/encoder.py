"""The Transformer encoder of the published runs, with a classifier on its pooled output.

Shape suffixes: B batch, L tokens, E model dim, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spion_ds.attention import SparseSelfAttention
from spion_ds.attention.dropout import dropout
from spion_ds.settings import require
from spion_ds.sparsity import AttentionConfig

POOLINGS = ("masked_mean", "mean")
# Dropout places: one in the embedding, then four a layer.
_PLACES_A_LAYER = 4


@dataclass(frozen=True)
class ModelConfig:
    """Size of the encoder; the defaults are the published ones (spec section 5).

    Attributes:
        dim: width of the residual stream.
        ffn_dim: width of the feed-forward layer.
        layers: encoder layers.
        heads: attention heads a layer.
        head_dim: width of a head.
        classifier_dim: width of the classifier's hidden layer.
        dropout: probability, on the embedding, the attention output and the feed-forward layer.
        attention_dropout: probability, on the attention probabilities.
        pooling: ``"masked_mean"`` averages the real tokens, ``"mean"`` the padding too, as the
            published code does.
        activation_checkpointing: whether training keeps only the layers' inputs and computes the
            rest again in the backward pass: less memory, a third more time. Results stay.
    """

    dim: int = 64
    ffn_dim: int = 128
    layers: int = 4
    heads: int = 2
    head_dim: int = 32
    classifier_dim: int = 128
    dropout: float = 0.1
    attention_dropout: float = 0.1
    pooling: str = "masked_mean"
    activation_checkpointing: bool = False

    def validate(self) -> None:
        """Raise ConfigError unless every value is in range."""
        for name in ("dim", "ffn_dim", "layers", "heads", "head_dim", "classifier_dim"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}", value, "a whole number from 1 up")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"model.{name}", value, "0 up to, not including, 1")
        require(self.pooling in POOLINGS, "model.pooling", self.pooling, " or ".join(POOLINGS))


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

    def forward(self, x_BLE: Tensor, padding_mask: Tensor, keys: Tensor | None) -> Tensor:
        """Return (B, L, E). ``keys``: (4, B) int32 dropout keys, None for no dropout."""
        p = self.dropout_p if keys is not None else 0.0
        drop = _dropper(p, keys)
        # (B, L, 3·H·D) → 3 × (B, H, L, D)
        qkv = self.qkv(self.attention_norm(x_BLE)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(dim=2))
        attended = self.attention(q, k, v, padding_mask, None if keys is None else keys[0])
        x_BLE = x_BLE + drop(self.projection(attended.transpose(1, 2).flatten(2)), 1)
        hidden = drop(nn.functional.gelu(self.ffn_in(self.ffn_norm(x_BLE))), 2)
        return x_BLE + drop(self.ffn_out(hidden), 3)


class EncoderClassifier(nn.Module):
    """Embedding, learned positions, encoder layers, mean pooling, two-layer classifier.

    Args:
        config: sizes.
        sparse_attention: each layer gets a SparsityConfig of its own from it.
        vocab_size: token ids.
        num_classes: outputs.
        max_length: longest input, in tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        sparse_attention: AttentionConfig,
        vocab_size: int,
        num_classes: int,
        max_length: int,
    ) -> None:
        super().__init__()
        self.config, self.sparse_attention = config, sparse_attention
        # The other arguments: what a saved model is built from again.
        self.sizes = {
            "vocab_size": vocab_size,
            "num_classes": num_classes,
            "max_length": max_length,
        }
        self.token_embedding = nn.Embedding(vocab_size, config.dim)
        self.position_embedding = nn.Embedding(max_length, config.dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        self.layers = nn.ModuleList(
            EncoderLayer(
                config,
                SparseSelfAttention(
                    sparse_attention.build(config.heads, layer),
                    pruned=sparse_attention.pruned,
                    dropout_p=config.attention_dropout,
                ),
            )
            for layer in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        self.classifier = nn.Sequential(
            nn.Linear(config.dim, config.classifier_dim),
            nn.ReLU(),
            nn.Linear(config.classifier_dim, num_classes),
        )

    @property
    def dropout_places(self) -> int:
        """How many dropout keys a sample needs in one forward pass."""
        return 1 + _PLACES_A_LAYER * len(self.layers)

    @property
    def attentions(self) -> list[SparseSelfAttention]:
        """The attention module of each layer, in order."""
        return [layer.attention for layer in self.layers]  # type: ignore[misc]

    def forward(
        self, input_ids: Tensor, padding_mask: Tensor, dropout_keys: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, classes).

        Args:
            input_ids: (B, L) int64.
            padding_mask: (B, L) bool, True = real token.
            dropout_keys: (dropout_places, B) int32 from ``sample_keys``; None means no dropout on
                the residual stream. Only used in training mode.
        """
        keys = dropout_keys if self.training else None
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        x = _dropper(self.config.dropout if keys is not None else 0.0, keys)(x, 0)
        for index, layer in enumerate(self.layers):
            first = 1 + _PLACES_A_LAYER * index
            inputs = (x, padding_mask, None if keys is None else keys[first : first + 4])
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                # Dropout is counter-based: there is no random state to restore.
                x = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*inputs)
        return self.classifier(self._pool(self.norm(x), padding_mask))

    def _pool(self, x_BLE: Tensor, padding_mask: Tensor) -> Tensor:
        if self.config.pooling == "mean":
            return x_BLE.mean(dim=1)
        weight = padding_mask.to(x_BLE.dtype)[..., None]
        return (x_BLE * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)


def _dropper(p: float, keys: Tensor | None) -> Callable[[Tensor, int], Tensor]:
    """Return f(x, place) that drops with the key of ``place``, or leaves x alone."""
    if p == 0.0 or keys is None:
        return lambda x, place: x
    return lambda x, place: dropout(x, p, keys[place])
