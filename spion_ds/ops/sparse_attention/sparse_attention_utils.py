"""SparseAttentionUtils: sparse attention in BERT and RoBERTa, Hugging Face's or one's own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spion_ds.errors import ConfigError
from spion_ds.ops.sparse_attention.bert_sparse_self_attention import BertSparseSelfAttention
from spion_ds.ops.sparse_attention.masks import same_rows
from spion_ds.sparsity import FixedSparsityConfig, SparsityConfig

M = TypeVar("M", bound=nn.Module)
# RoBERTa's positions start after two reserved ones.
_RESERVED = {"bert": 0, "roberta": 2}
_IMPLEMENTATION = "spion_ds_sparse"


class SparseAttentionUtils:
    """Functions that give a Transformer sparse attention and longer inputs."""

    @staticmethod
    def extend_position_embedding(model: M, max_position: int) -> M:
        """Repeat the position embedding up to ``max_position`` positions, in place.

        Args:
            model: BERT or RoBERTa, with or without a head.
            max_position: positions wanted; more than there are.

        Returns:
            ``model``; its configuration, and what it counts positions with, are extended too.

        Raises:
            ConfigError: (a ValueError) another model, or no more positions than there are.
        """
        encoder, reserved = _encoder_of(model)
        embeddings = encoder.embeddings
        old = embeddings.position_embeddings.weight.data
        have = old.shape[0] - reserved
        if max_position <= have:
            raise ConfigError(
                f"max_position is {max_position}; allowed: more than the model's {have} positions"
            )
        repeats = -(-max_position // have)
        positions = old[reserved:].repeat(repeats, 1)[:max_position]
        table = embeddings.position_embeddings
        table.weight.data = torch.cat([old[:reserved], positions])
        table.num_embeddings = max_position + reserved
        for name in ("position_ids", "token_type_ids"):
            counted = getattr(embeddings, name, None)
            if isinstance(counted, Tensor):
                longer = counted.new_zeros((1, max_position + reserved))
                if name == "position_ids":
                    longer = torch.arange(max_position + reserved, device=counted.device)[None]
                setattr(embeddings, name, longer)
        config: Any = model.config
        config.max_position_embeddings = max_position + reserved
        return model

    @staticmethod
    def update_tokenizer_model_max_length(tokenizer: Any, max_position: int) -> Any:
        """Let a tokenizer give up to ``max_position`` tokens, and return it."""
        tokenizer.model_max_length = max_position
        tokenizer.init_kwargs["model_max_length"] = max_position
        return tokenizer

    @staticmethod
    def replace_model_self_attention_with_sparse_self_attention(
        model: M, max_position: int, sparsity_config: SparsityConfig | None = None
    ) -> M:
        """Replace the self-attention of every encoder layer, in place; weights are kept.

        Args:
            model: BERT or RoBERTa, with or without a head.
            max_position: positions of the model's configuration from now on.
            sparsity_config: None takes FixedSparsityConfig for the model's heads.

        Returns:
            ``model``.

        Raises:
            ConfigError: (a ValueError) another model, a decoder, or another number of heads.
        """
        encoder, reserved = _encoder_of(model)
        SparseAttentionUtils.replace_self_attention_layer_with_sparse_self_attention_layer(
            model.config, encoder.encoder.layer, sparsity_config
        )
        config: Any = model.config
        config.max_position_embeddings = max_position + reserved
        if hasattr(model, "set_attn_implementation"):
            _ask_for_padding_masks(model)
        return model

    @staticmethod
    def replace_self_attention_layer_with_sparse_self_attention_layer(
        config: Any, layers: Iterable[nn.Module], sparsity_config: SparsityConfig | None = None
    ) -> Iterable[nn.Module]:
        """Replace ``layer.attention.self`` of every layer, in place; weights are kept.

        Args:
            config: the model's configuration.
            layers: encoder layers whose ``attention.self`` has query, key and value.
            sparsity_config: None takes FixedSparsityConfig for the model's heads.

        Returns:
            ``layers``.

        Raises:
            ConfigError: (a ValueError) a decoder, or another number of heads.
        """
        if getattr(config, "is_decoder", False):
            raise ConfigError(
                "the model is a decoder (is_decoder is True), whose attention is causal and keeps "
                "a cache; only encoders can be replaced"
            )
        if sparsity_config is None:
            sparsity_config = FixedSparsityConfig(num_heads=config.num_attention_heads)
        for layer in layers:
            attention: Any = layer.attention
            dense = attention.self
            hugging_face = type(dense).__module__.startswith("transformers.")
            sparse_class = _HuggingFaceSelfAttention if hugging_face else BertSparseSelfAttention
            sparse = sparse_class(config, sparsity_config)
            sparse.to(dense.query.weight.device)
            sparse.query, sparse.key, sparse.value = dense.query, dense.key, dense.value
            sparse.train(dense.training)
            attention.self = sparse
        return layers

    @staticmethod
    def pad_to_block_size(
        block_size: int,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        token_type_ids: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pad_token_id: int,
        model_embeddings: Callable[[Tensor], Tensor] | None,
    ) -> tuple[int, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Pad a model's inputs to whole blocks; padded positions are masked.

        The attention here takes any length; whoever pads may go on doing so.

        Args:
            block_size: tokens of a block.
            input_ids, attention_mask, token_type_ids, position_ids: (batch, L), or None.
            inputs_embeds: (batch, L, hidden_size), or None.
            pad_token_id: what input_ids and position_ids are padded with.
            model_embeddings: embeds padding tokens, for inputs_embeds.

        Returns:
            pad_len, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds.

        Raises:
            ConfigError: (a ValueError) neither input_ids nor inputs_embeds, or inputs_embeds
                without model_embeddings.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ConfigError("input_ids and inputs_embeds are both None; give one of them")
        batch, length = tokens.shape[:2]
        pad_len = -length % block_size
        if pad_len == 0:
            return 0, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds

        def padded(x: Tensor | None, value: int) -> Tensor | None:
            return None if x is None else F.pad(x, (0, pad_len), value=value)

        if inputs_embeds is not None:
            if model_embeddings is None:
                raise ConfigError("inputs_embeds is given without model_embeddings to pad it with")
            padding = torch.full((batch, pad_len), pad_token_id, device=inputs_embeds.device)
            inputs_embeds = torch.cat([inputs_embeds, model_embeddings(padding)], dim=1)
        return (
            pad_len,
            padded(input_ids, pad_token_id),
            padded(attention_mask, 0),
            padded(token_type_ids, 0),
            padded(position_ids, pad_token_id),
            inputs_embeds,
        )

    @staticmethod
    def unpad_sequence_output(pad_len: int, sequence_output: Tensor) -> Tensor:
        """Return (batch, L, ...) without its last ``pad_len`` positions."""
        return sequence_output[:, : sequence_output.shape[1] - pad_len]


class _HuggingFaceSelfAttention(BertSparseSelfAttention):
    """The same, called and answering as the attention of transformers' BERT and RoBERTa."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Return the context (batch, L, hidden_size), and None for the probabilities."""
        length = hidden_states.shape[1]
        if attention_mask is not None and tuple(attention_mask.shape[1:]) == (1, length, length):
            if length > 1 and not same_rows(attention_mask):
                raise ConfigError(
                    "the model passes an attention mask (batch, 1, L, L) that differs between "
                    "queries; sparse attention in an encoder takes a padding mask (batch, L)"
                )
            attention_mask = attention_mask[:, 0, 0]
        return super().forward(hidden_states, attention_mask), None


def _ask_for_padding_masks(model: Any) -> None:
    """Let transformers hand on its padding mask instead of making (batch, 1, L, L) of it."""
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError:  # an older version: what it makes is understood as well
        return
    AttentionInterface.register(_IMPLEMENTATION, _no_attention)
    AttentionMaskInterface.register(_IMPLEMENTATION, _padding_mask)
    model.set_attn_implementation(_IMPLEMENTATION)


def _padding_mask(*_: Any, attention_mask: Tensor | None = None, **__: Any) -> Tensor | None:
    """Return the (batch, L) bool mask as it came."""
    return attention_mask


def _no_attention(module: nn.Module, *_: Any, **__: Any) -> None:
    raise ConfigError(
        f"{type(module).__name__} computes its own attention in a model whose attention was "
        "replaced; load the model anew, and replace the layers that you mean with "
        "replace_self_attention_layer_with_sparse_self_attention_layer"
    )


def _encoder_of(model: nn.Module) -> tuple[Any, int]:
    """Return the BERT inside a model, and how many of its positions are reserved."""
    for name, reserved in _RESERVED.items():
        if hasattr(model, name):
            return getattr(model, name), reserved
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _RESERVED and hasattr(model, "encoder"):
        return model, _RESERVED[kind]
    raise ConfigError(
        f"{type(model).__name__} is neither BERT nor RoBERTa; for another model replace its layers "
        "with replace_self_attention_layer_with_sparse_self_attention_layer, or write a "
        "SparseSelfAttention into its attention"
    )
