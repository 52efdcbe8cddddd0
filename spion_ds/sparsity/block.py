"""The ``sparse_attention`` block, of a DeepSpeed JSON or a recipe: parsed, checked, built."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from spion_ds.errors import ConfigError, unknown_name
from spion_ds.settings import read_dataclass, require
from spion_ds.sparsity.budget import BudgetSparsityConfig
from spion_ds.sparsity.config import SparsityConfig
from spion_ds.sparsity.modes import (
    BigBirdAttentionConfig,
    BSLongformerAttentionConfig,
    DenseAttentionConfig,
    FixedAttentionConfig,
    LocalAttentionConfig,
    SatAttentionConfig,
    StaticAttentionConfig,
    VariableAttentionConfig,
    check_block,
    check_pruned,
)
from spion_ds.sparsity.spion import VARIANTS, SpionSparsityConfig

BUDGET = "budget"


@dataclass(frozen=True)
class SparseAttentionConfig:
    """A ``sparse_attention`` block of mode ``spion``: dense first, then a pattern that was found.

    Attributes:
        mode: ``"spion"``.
        block: side of a block in tokens: 16, 32, 64 or 128.
        different_layout_per_head: one pattern a head, from its own map; as published, the heads
            of a layer share the pattern of their mean map. Needed by budget.
        variant: SPION's ``"cf"``, ``"f"`` or ``"c"``; or ``"budget"``, the blocks of most attention
            mass, for which heads compete.
        alpha: quantile above which flood fill marks a block (cf, f).
        density: share of blocks kept (c, budget).
        filter_size: side of the diagonal convolution, odd (cf, c).
        scope: who competes: ``"head"`` (nobody), ``"layer"`` (its heads) or ``"model"`` (all heads
            of all layers) (budget).
        row_blocks: blocks that each row of each head keeps at least, the diagonal's among them
            (budget).
        head_blocks: blocks that each head keeps at least (budget).
        pruned: what a pruned entry is in the softmax: ``"zero"`` (logit 0, as published) or
            ``"excluded"``.
    """

    mode: str = "spion"
    block: int = 64
    different_layout_per_head: bool = False
    variant: str = "cf"
    alpha: float = 0.98
    density: float = 0.04
    filter_size: int = 31
    scope: str = "layer"
    row_blocks: int = 1
    head_blocks: int = 0
    pruned: str = "zero"

    restarts_optimizer: ClassVar[bool] = False

    @property
    def restarts_schedule(self) -> bool:
        """Whether the learning rate starts anew at the switch: SPION-C's and -CF's does."""
        return self.variant in ("c", "cf")

    def validate(self, sequence_length: int) -> None:
        """Raise ConfigError unless every value is in range for inputs of ``sequence_length``."""
        at = "sparse_attention."
        check_block(self.block, sequence_length)
        if self.variant not in (*VARIANTS, BUDGET):
            raise ConfigError(unknown_name(f"{at}variant", self.variant, (*VARIANTS, BUDGET)))
        require(
            0.0 < self.alpha < 1.0,
            f"{at}alpha",
            self.alpha,
            "between 0 and 1, e.g. 0.98 (quantile)",
        )
        blocks = -(-sequence_length // self.block)
        if self.variant == BUDGET:
            self._validate_budget(blocks)
        # The diagonal is always kept; cf and f do not use the density, and budget was asked above.
        least = 1.0 / blocks if self.variant == "c" else 0.0
        require(
            least <= self.density <= 1.0 and self.density > 0.0,
            f"{at}density",
            self.density,
            f"{least:.3g} (the diagonal of {blocks}×{blocks} blocks alone) to 1"
            if least
            else "above 0, up to 1",
        )
        require(
            self.filter_size % 2 == 1 and self.filter_size >= 1,
            f"{at}filter_size",
            self.filter_size,
            "odd, from 1 up, e.g. 31",
        )
        check_pruned(self.pruned)

    def _validate_budget(self, blocks: int) -> None:
        """Raise ConfigError unless ``blocks`` a side have room for the diagonal and the floors."""
        at = "sparse_attention."
        require(
            self.different_layout_per_head,
            f"{at}different_layout_per_head",
            False,
            "true with variant budget (heads that share a pattern cannot compete)",
        )
        try:
            self._budget(1).check_room(blocks)
        except ConfigError as error:
            raise ConfigError(f"{at}{error}") from error

    def _budget(self, num_heads: int) -> BudgetSparsityConfig:
        return BudgetSparsityConfig(
            num_heads,
            self.block,
            self.different_layout_per_head,
            density=self.density,
            scope=self.scope,
            row_blocks=self.row_blocks,
            head_blocks=self.head_blocks,
        )

    def build(self, num_heads: int, layer: int = 0) -> SparsityConfig:
        """Return a new SparsityConfig for one layer."""
        if self.variant == BUDGET:
            return self._budget(num_heads)
        return SpionSparsityConfig(
            num_heads,
            self.block,
            self.different_layout_per_head,
            variant=self.variant,
            alpha=self.alpha,
            density=self.density,
            filter_size=self.filter_size,
        )

    def to_mapping(self) -> dict[str, Any]:
        """Return the block as a plain mapping."""
        return dataclasses.asdict(self)


AttentionConfig = SparseAttentionConfig | SatAttentionConfig | StaticAttentionConfig

_CLASSES: dict[str, type] = {
    "dense": DenseAttentionConfig,
    "fixed": FixedAttentionConfig,
    "variable": VariableAttentionConfig,
    "bigbird": BigBirdAttentionConfig,
    "bslongformer": BSLongformerAttentionConfig,
    "local": LocalAttentionConfig,
    "spion": SparseAttentionConfig,
    "sat": SatAttentionConfig,
}
MODES = tuple(_CLASSES)
DEFAULT_MODE = "spion"


def mode_keys(mode: str) -> list[str]:
    """Return the keys of a ``sparse_attention`` block of ``mode``."""
    return [field.name for field in dataclasses.fields(_CLASSES[mode])]


def read_sparse_attention(
    block: Mapping[str, Any], default_mode: str = DEFAULT_MODE
) -> AttentionConfig:
    """Return a ``sparse_attention`` block as its mode's dataclass.

    Args:
        block: keys and values; those left out have DeepSpeed's defaults, or SPION's.
        default_mode: the mode of a block that names none.

    Raises:
        ConfigError: not a mapping, an unknown mode, a key that the mode does not have, or a value
            of another type. Ranges are checked by the result's ``validate``.
    """
    if not isinstance(block, Mapping):
        raise ConfigError(f"sparse_attention is {block!r}; a mapping is wanted")
    mode = block.get("mode", default_mode)
    if not isinstance(mode, str):
        raise ConfigError(f"sparse_attention.mode is {mode!r}; wanted: text")
    if mode not in _CLASSES:
        raise ConfigError(unknown_name("sparse_attention.mode", mode, MODES))
    for key in block:
        owners = [other for other in MODES if key in mode_keys(other)]
        if owners and mode not in owners:
            raise ConfigError(
                f"unknown key 'sparse_attention.{key}' in mode {mode!r}: it belongs to "
                f"{', '.join(owners)}; set sparse_attention.mode, or remove the key; known: "
                f"{', '.join(f'sparse_attention.{name}' for name in mode_keys(mode))}"
            )
    return read_dataclass(_CLASSES[mode], {**block, "mode": mode}, "sparse_attention")


def merge_sparse_attention(layers: Sequence[Any]) -> Any:
    """Return several ``sparse_attention`` blocks as one; later ones win, key by key.

    A layer that changes the mode leaves behind what earlier layers said for their mode alone.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        if not isinstance(layer, Mapping):
            return layer  # for the reader to refuse
        before, mode = merged.get("mode", DEFAULT_MODE), layer.get("mode")
        if mode is not None and mode != before and isinstance(mode, str) and mode in _CLASSES:
            merged = {key: merged[key] for key in mode_keys(mode) if key in merged}
        merged |= layer
    return merged


def take_sparse_attention_block(
    ds_config: dict[str, Any], default_mode: str = DEFAULT_MODE
) -> Mapping[str, Any] | None:
    """Take the ``sparse_attention`` block out of a DeepSpeed configuration, in place.

    DeepSpeed refuses the block since 0.19.7 and ignores misspelt ones, so both are ours to catch.

    Args:
        ds_config: the DeepSpeed configuration.
        default_mode: the mode of a block that names none.

    Returns:
        The block as it stood there, checked by :func:`read_sparse_attention`; None without one.

    Raises:
        ConfigError: the block is not a mapping, has an unknown mode or key, or a top-level key
            looks like a misspelt ``sparse_attention``.
    """
    for key in ds_config:
        if key != "sparse_attention" and _looks_like_ours(key):
            raise ConfigError(
                f"unknown key {key!r} in the DeepSpeed configuration; did you mean "
                "'sparse_attention'?"
            )
    block = ds_config.pop("sparse_attention", None)
    if block is not None:
        read_sparse_attention(block, default_mode)
    return block


def _looks_like_ours(key: str) -> bool:
    plain = "".join(letter for letter in key.lower() if letter.isalpha())
    return bool(difflib.get_close_matches(plain, ["sparseattention"], cutoff=0.8))
