"""The ``sparse_attention`` block, of a DeepSpeed JSON or a recipe: parsed, checked, built."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spion_ds.errors import ConfigError, unknown_name
from spion_ds.settings import read_dataclass, require
from spion_ds.sparsity.config import DenseSparsityConfig, SparsityConfig
from spion_ds.sparsity.spion import VARIANTS, SpionSparsityConfig

BLOCKS = (16, 32, 64, 128)
MODES = ("dense", "spion")
PRUNED = ("zero", "excluded")


@dataclass(frozen=True)
class SparseAttentionConfig:
    """One ``sparse_attention`` block.

    Attributes:
        mode: ``"spion"`` or ``"dense"``.
        block: side of a block in tokens: 16, 32, 64 or 128.
        different_layout_per_head: False; SPION's pattern is shared by a layer's heads.
        variant: ``"cf"``, ``"f"`` or ``"c"``.
        alpha: quantile above which flood fill marks a block (cf, f).
        density: share of blocks kept by top-k (c).
        filter_size: side of the diagonal convolution, odd (cf, c).
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
    pruned: str = "zero"

    def validate(self, sequence_length: int) -> None:
        """Raise ConfigError unless every value is in range for inputs of ``sequence_length``."""
        at = "sparse_attention."
        if self.mode not in MODES:
            raise ConfigError(unknown_name(f"{at}mode", self.mode, MODES))
        require(self.block in BLOCKS, f"{at}block", self.block, "16, 32, 64 or 128")
        require(
            self.block <= sequence_length,
            f"{at}block",
            self.block,
            f"at most the sequence length, {sequence_length}",
        )
        if self.variant not in VARIANTS:
            raise ConfigError(unknown_name(f"{at}variant", self.variant, VARIANTS))
        require(
            0.0 < self.alpha < 1.0,
            f"{at}alpha",
            self.alpha,
            "between 0 and 1, e.g. 0.98 (quantile)",
        )
        blocks = -(-sequence_length // self.block)
        # The diagonal is always kept; cf and f do not use the density.
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
        if self.pruned not in PRUNED:
            raise ConfigError(unknown_name(f"{at}pruned mode", self.pruned, PRUNED))
        require(
            not self.different_layout_per_head,
            f"{at}different_layout_per_head",
            True,
            "false (SPION makes one pattern a layer)",
        )

    def build(self, num_heads: int) -> SparsityConfig:
        """Return a new SparsityConfig for one layer."""
        if self.mode == "dense":
            return DenseSparsityConfig(num_heads, self.block)
        return SpionSparsityConfig(
            num_heads,
            self.block,
            variant=self.variant,
            alpha=self.alpha,
            density=self.density,
            filter_size=self.filter_size,
        )


def take_sparse_attention_block(ds_config: dict[str, Any]) -> Mapping[str, Any] | None:
    """Take the ``sparse_attention`` block out of a DeepSpeed configuration, in place.

    DeepSpeed refuses the block since 0.19.7 and ignores misspelt ones, so both are ours to catch.

    Raises:
        ConfigError: the block is not a mapping, has an unknown key, or a top-level key looks like
            a misspelt ``sparse_attention``.
    """
    for key in ds_config:
        if key != "sparse_attention" and _looks_like_ours(key):
            raise ConfigError(
                f"unknown key {key!r} in the DeepSpeed configuration; did you mean "
                "'sparse_attention'?"
            )
    block = ds_config.pop("sparse_attention", None)
    if block is not None:
        read_dataclass(SparseAttentionConfig, block, "sparse_attention")
    return block


def _looks_like_ours(key: str) -> bool:
    plain = "".join(letter for letter in key.lower() if letter.isalpha())
    return bool(difflib.get_close_matches(plain, ["sparseattention"], cutoff=0.8))
