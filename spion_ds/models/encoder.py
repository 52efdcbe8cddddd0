"""The Transformer encoder of the published runs, with a classifier on its pooled output.

Shape suffixes: B batch, L tokens, E model dim, H heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spion_ds.attention import LearnedPattern, SparseSelfAttention
from spion_ds.models.config import ModelConfig
from spion_ds.models.embedding import Embedding
from spion_ds.models.inputs import check_ids, check_shapes
from spion_ds.models.layers import PLACES_A_LAYER, AttentionPooling, EncoderLayer, dropper
from spion_ds.models.rotary import rotations
from spion_ds.random_bits import combine
from spion_ds.settings import require
from spion_ds.sparsity import AttentionConfig, SatAttentionConfig

# Queries, keys and padding mask of a layer.
Seen = tuple[Tensor, Tensor, Tensor | None]


class EncoderClassifier(nn.Module):
    """Embedding, positions, encoder layers, pooling, two-layer classifier.

    With two documents a sample it is a dual encoder: the same layers pool each document to x₀ and
    x₁, and the classifier sees [x₀, x₁, x₀∘x₁, x₀ − x₁].

    Args:
        config: sizes.
        sparse_attention: each layer gets a SparsityConfig of its own from it.
        vocab_size: token ids.
        num_classes: outputs.
        max_length: longest input, in tokens.
        documents: sequences of a sample, 1 or 2.
        brackets: the first and the last token id that opens a bracket, and the one that closes it;
            needed for ``nesting_levels``.
        padded: whether inputs may have padding. False, where all are ``max_length`` long, spares
            attention the mask: it may take kernels that know none, and need not look for padding.

    Attributes:
        keeps_seen: whether a pass in training mode leaves behind what its attention saw, in
            ``seen``, and lets patterns learn later, from :meth:`learn_patterns`.
        seen: of the last such pass, for each layer queries and keys, (B, H, L, D) each without
            gradient, and the padding mask (B, L) or None.
    """

    def __init__(
        self,
        config: ModelConfig,
        sparse_attention: AttentionConfig,
        vocab_size: int,
        num_classes: int,
        max_length: int,
        documents: int = 1,
        brackets: Sequence[int] | None = None,
        padded: bool = True,
    ) -> None:
        super().__init__()
        self.config, self.sparse_attention = config, sparse_attention
        self.documents = documents
        self._reads_mask = padded or config.zero_is_padding
        # The other arguments: what a saved model is built from again.
        self.sizes: dict[str, Any] = {
            "vocab_size": vocab_size,
            "num_classes": num_classes,
            "max_length": max_length,
            "documents": documents,
            "brackets": None if brackets is None else list(brackets),
            "padded": padded,
        }
        # A mask is one more token.
        tokens = vocab_size + (config.masked_token_loss > 0.0)
        self.token_embedding = Embedding(tokens, config.dim)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(max_length, config.dim)
            nn.init.normal_(self.position_embedding.weight, std=0.02)
        if config.nesting_levels > 0:
            require(
                brackets is not None,
                "model.nesting_levels",
                config.nesting_levels,
                "0 without brackets",
            )
            self.nesting_embedding = Embedding(config.nesting_levels, config.dim)
            nn.init.normal_(self.nesting_embedding.weight, std=0.02)
        self.layers = nn.ModuleList(
            EncoderLayer(
                config,
                SparseSelfAttention(
                    sparse_attention.build(config.heads, layer),
                    pruned=sparse_attention.pruned,
                    dropout_p=config.attention_dropout,
                    # Nobody reads them but a mean over the padding too.
                    zero_padded_queries=config.pooling != "mean",
                ),
            )
            for layer in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim)
        if config.pooling == "attention":
            self.pooling = AttentionPooling(config)
        self.classifier = nn.Sequential(
            nn.Linear(config.dim if documents == 1 else 4 * config.dim, config.classifier_dim),
            nn.ReLU(),
            nn.Linear(config.classifier_dim, num_classes),
        )
        if config.masked_token_loss > 0.0:
            self.token_head = nn.Linear(config.dim, vocab_size)
        self.keeps_seen = False
        self.seen: list[Seen] = []
        self._pattern_loss: Tensor | None = None
        self._pattern_weight = 0.0
        if isinstance(sparse_attention, SatAttentionConfig):
            block = sparse_attention.block
            self._pattern_weight = sparse_attention.loss_weight * config.layers / 4
            # Drawn last: the other weights are those of every other mode.
            for layer in self.layers:
                layer.pattern = LearnedPattern(-(-max_length // block), config.head_dim, block)

    @property
    def patterns(self) -> list[LearnedPattern]:
        """SAT's learned pattern of each layer, in order; [] in other modes."""
        return [layer.pattern for layer in self.layers if layer.pattern is not None]  # type: ignore[misc]

    def take_pattern_loss(self) -> Tensor | None:
        """Return what the last pass adds to the task's loss, () float32, once; None for nothing.

        In mode ``sat`` a pass in training mode adds ``loss_weight`` times a quarter of the layers
        (IEEE Access 12, 2024) times the sum of the layers' pattern losses, until the patterns are
        frozen.
        """
        loss, self._pattern_loss = self._pattern_loss, None
        return loss

    @property
    def learns_patterns(self) -> bool:
        """Whether a pass in training mode gives a pattern loss."""
        return any(pattern.learning for pattern in self.patterns)

    def learn_patterns(self, seen: Sequence[Seen]) -> None:
        """Have the pattern loss of a pass that saw ``seen`` ready to be taken; none once frozen."""
        if self.learns_patterns:
            losses = [pattern(*one) for pattern, one in zip(self.patterns, seen, strict=True)]
            self._pattern_loss = self._pattern_weight * torch.stack(losses).sum()

    @property
    def names_subexpressions(self) -> bool:
        """Whether a pass classifies every token, for the loss of sub-expressions."""
        return self.training and self.config.subexpression_loss > 0.0

    @property
    def dropout_places(self) -> int:
        """How many dropout keys a sample needs in one forward pass."""
        return 1 + PLACES_A_LAYER * len(self.layers)

    @property
    def attentions(self) -> list[SparseSelfAttention]:
        """The attention module of each layer, in order."""
        return [layer.attention for layer in self.layers]  # type: ignore[misc]

    def prepare(self, samples: int, device: torch.device) -> None:
        """Derive now what passes over ``samples`` inputs on ``device`` need of the patterns.

        A pass does that itself, but a compiled or captured one cannot.
        """
        config, dtype = self.config, next(self.parameters()).dtype
        length, queries = self.sizes["max_length"], None
        if not self._reads_mask:  # with a mask, nothing depends on the number of samples
            shape = (samples * self.documents, config.heads, length, config.head_dim)
            queries = torch.empty(1, dtype=dtype, device=device).expand(shape)
        for attention in self.attentions:
            attention.prepare(length, device, queries)

    def forward(
        self,
        input_ids: Tensor,
        padding_mask: Tensor,
        dropout_keys: Tensor | None = None,
        guess_tokens: bool = False,
    ) -> Tensor:
        """Return logits (B, classes), or guesses of every token, (B, L, vocab_size).

        With ``subexpression_loss`` training mode returns the classifier's logits at every token,
        (B, L, classes), of which the first token's are the sample's.

        Args:
            input_ids: (B, L) int64; (B, 2, L) with two documents.
            padding_mask: bool of the same shape, True = real token; not read by a model whose
                inputs have no padding.
            dropout_keys: (dropout_places, B) int32 from ``sample_keys``; None means no dropout on
                the residual stream. Only used in training mode.
            guess_tokens: ask for the tokens; vocab_size itself is the id of a masked one.

        Raises:
            DataError: inputs of another shape or longer than the model takes; in evaluation mode
                also token ids that it does not have, which training has no time to look for.
        """
        check_shapes(input_ids, padding_mask, self.documents, self.sizes["max_length"])
        if not self.training:
            check_ids(input_ids, self.token_embedding.num_embeddings)
        shape = input_ids.shape
        keys = dropout_keys if self.training else None
        input_ids, real = self.seen_by_attention(input_ids, padding_mask)
        mask = real if self._reads_mask else None
        if keys is not None and self.documents > 1:
            document = torch.arange(self.documents, dtype=torch.int32, device=keys.device)
            keys = combine(keys[..., None], document).flatten(-2)
        length, device = input_ids.shape[1], input_ids.device
        x, rotation = self.token_embedding(input_ids), None
        if self.config.nesting_levels > 0:
            x = x + self.nesting_embedding(self._nesting(input_ids))
        if self.config.positions == "rotary":
            rotation = rotations(length, self.config.head_dim, device)
        else:
            x = x + self.position_embedding(torch.arange(length, device=device))
        x = dropper(self.config.dropout if keys is not None else 0.0, keys)(x, 0)
        # A pass that guesses tokens gives no pattern loss.
        shown = self.training and not guess_tokens and (self.keeps_seen or self.learns_patterns)
        seen = []
        for index, layer in enumerate(self.layers):
            first = 1 + PLACES_A_LAYER * index
            inputs = (x, mask, None if keys is None else keys[first : first + 4], rotation, shown)
            if self.config.activation_checkpointing and torch.is_grad_enabled():
                # Dropout is counter-based: there is no random state to restore.
                x, qk = checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x, qk = layer(*inputs)
            if qk is not None:
                seen.append((qk[0].detach(), qk[1].detach(), mask))
        x = self.norm(x)
        if guess_tokens:
            return self.token_head(x).view(*shape, -1)
        if self.keeps_seen and shown:
            self.seen = seen
        elif shown:
            # Outside of checkpoints, which would make the maps twice.
            self.learn_patterns(seen)
        pooled = self._pool(x, mask)
        if self.names_subexpressions:
            return self.classifier(torch.cat([pooled[:, None], x[:, 1:]], dim=1))
        if self.documents > 1:
            first, second = pooled.unflatten(0, (-1, self.documents)).unbind(dim=1)
            pooled = torch.cat([first, second, first * second, first - second], dim=-1)
        return self.classifier(pooled)

    def seen_by_attention(self, input_ids: Tensor, padding_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return ids and padding mask as the layers see them.

        (B, L) each; (2·B, L) with two documents, which go through the same layers.
        """
        padding_mask = self.real_tokens(input_ids, padding_mask)
        if self.documents > 1:
            return input_ids.flatten(0, 1), padding_mask.flatten(0, 1)
        return input_ids, padding_mask

    def real_tokens(self, input_ids: Tensor, padding_mask: Tensor) -> Tensor:
        """Return the padding mask, in its shape, without what ``zero_is_padding`` hides."""
        return padding_mask & (input_ids != 0) if self.config.zero_is_padding else padding_mask

    def _nesting(self, input_ids: Tensor) -> Tensor:
        """Return how deep each token is nested, (B, L) int64, the outermost brackets at 0.

        Brackets are as deep as each other, what is between them one deeper.
        """
        first, last, close = self.sizes["brackets"]
        opens = (input_ids >= first) & (input_ids <= last)
        around = opens.long().cumsum(1) - (input_ids == close).long().cumsum(1)
        return (around - opens.long()).clamp(0, self.config.nesting_levels - 1)

    def _pool(self, x_BLE: Tensor, padding_mask: Tensor | None) -> Tensor:
        if self.config.pooling == "attention":
            return self.pooling(x_BLE, padding_mask)
        if self.config.pooling == "mean" or padding_mask is None:
            return x_BLE.mean(dim=1)
        weight = padding_mask.to(x_BLE.dtype)[..., None]
        return (x_BLE * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
