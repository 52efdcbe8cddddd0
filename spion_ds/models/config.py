"""The sizes and choices that make up an encoder."""

from __future__ import annotations

from dataclasses import dataclass

from spion_ds.settings import require

POOLINGS = ("masked_mean", "mean", "attention")
POSITIONS = ("learned", "rotary")


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
        positions: ``"learned"``, a vector for each that is added to the embedding, or
            ``"rotary"``, which turns queries and keys.
        pooling: ``"masked_mean"`` averages the real tokens, ``"mean"`` the padding too, as the
            published code does, ``"attention"`` takes the first token, after it has attended to
            all real tokens once more: one row, whatever the layers' patterns keep. In ListOps it
            is the root operator.
        zero_is_padding: whether token 0 counts as padding wherever it stands, as in the published
            code, which so hides the black pixels of images.
        masked_token_loss: weight of the loss of guessing masked input tokens, beside the task's; 0
            leaves out the pass and the layer for it.
        nesting_levels: depths of nesting in brackets that have a vector each, added to the
            embedding; what is deeper shares the last. ListOps only; 0 for none.
        subexpression_loss: weight of the loss of naming the value of every ListOps sub-expression
            at its operator, by the classifier of the first token, in the same pass; 0 for none.
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
    positions: str = "learned"
    pooling: str = "masked_mean"
    zero_is_padding: bool = False
    masked_token_loss: float = 0.0
    nesting_levels: int = 0
    subexpression_loss: float = 0.0
    activation_checkpointing: bool = False

    def validate(self) -> None:
        """Raise ConfigError unless every value is in range."""
        for name in ("dim", "ffn_dim", "layers", "heads", "head_dim", "classifier_dim"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}", value, "a whole number from 1 up")
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            require(0.0 <= value < 1.0, f"model.{name}", value, "0 up to, not including, 1")
        for name in ("masked_token_loss", "subexpression_loss"):
            value = getattr(self, name)
            require(value >= 0.0, f"model.{name}", value, "from 0 up")
        levels = self.nesting_levels
        require(levels >= 0, "model.nesting_levels", levels, "a whole number from 0 up")
        require(
            levels == 0 or self.masked_token_loss == 0.0,
            "model.nesting_levels",
            levels,
            "0 where model.masked_token_loss is above 0: a mask may hide a bracket",
        )
        known = " or ".join(POSITIONS)
        require(self.positions in POSITIONS, "model.positions", self.positions, known)
        even = self.positions != "rotary" or self.head_dim % 2 == 0
        require(even, "model.head_dim", self.head_dim, "an even number, for rotary positions")
        require(self.pooling in POOLINGS, "model.pooling", self.pooling, " or ".join(POOLINGS))
        require(
            self.subexpression_loss == 0.0 or self.pooling == "attention",
            "model.subexpression_loss",
            self.subexpression_loss,
            "0 where model.pooling is not attention, whose classifier reads single tokens",
        )
