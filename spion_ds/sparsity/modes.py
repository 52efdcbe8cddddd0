"""The modes of a ``sparse_attention`` block beside ``spion``: static patterns, and ``sat``."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from spion_ds.errors import ConfigError, unknown_name
from spion_ds.settings import require
from spion_ds.sparsity.bigbird import BigBirdSparsityConfig
from spion_ds.sparsity.config import DenseSparsityConfig, SparsityConfig
from spion_ds.sparsity.fixed import FixedSparsityConfig
from spion_ds.sparsity.local import LocalSlidingWindowSparsityConfig
from spion_ds.sparsity.longformer import BSLongformerSparsityConfig
from spion_ds.sparsity.sat import SatSparsityConfig
from spion_ds.sparsity.variable import VariableSparsityConfig

BLOCKS = (16, 32, 64, 128)
PRUNED = ("zero", "excluded")


def check_block(block: int, sequence_length: int) -> None:
    """Raise ConfigError unless there are kernels for ``block`` and the input has room for one."""
    require(block in BLOCKS, "sparse_attention.block", block, "16, 32, 64 or 128")
    require(
        block <= sequence_length,
        "sparse_attention.block",
        block,
        f"at most the sequence length, {sequence_length}",
    )


def check_pruned(pruned: str) -> None:
    """Raise ConfigError unless ``pruned`` is one of the two."""
    if pruned not in PRUNED:
        raise ConfigError(unknown_name("sparse_attention.pruned mode", pruned, PRUNED))


@dataclass(frozen=True)
class StaticAttentionConfig:
    """One ``sparse_attention`` block of a mode that needs no dense phase; keys are DeepSpeed's.

    Attributes:
        mode: the mode's name.
        block: side of a block in tokens: 16, 32, 64 or 128.
        different_layout_per_head: one layout a head instead of one a layer.
    """

    mode: str
    block: int = 16
    different_layout_per_head: bool = False

    sparsity_class: ClassVar[type[SparsityConfig]]
    # These layouts mean the usual masked softmax: a pruned key is absent.
    pruned: ClassVar[str] = "excluded"
    restarts_schedule: ClassVar[bool] = False
    restarts_optimizer: ClassVar[bool] = False

    def validate(self, sequence_length: int) -> None:
        """Raise ConfigError unless every value is in range for inputs of ``sequence_length``."""
        check_block(self.block, sequence_length)
        try:
            self.build(1).make_layout(-(-sequence_length // self.block) * self.block)
        except ConfigError as error:  # its message starts with the argument's name
            raise ConfigError(f"sparse_attention.{error}") from error

    def build(self, num_heads: int, layer: int = 0) -> SparsityConfig:
        """Return a new SparsityConfig for one layer; random blocks differ between layers."""
        arguments = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del arguments["mode"]
        return self.sparsity_class(num_heads, **arguments, **self._seed(layer))

    def to_mapping(self) -> dict[str, Any]:
        """Return the block as a plain mapping."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    def _seed(self, layer: int) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class DenseAttentionConfig(StaticAttentionConfig):
    """Mode ``dense``."""

    mode: str = "dense"

    sparsity_class: ClassVar[type[SparsityConfig]] = DenseSparsityConfig


@dataclass(frozen=True)
class FixedAttentionConfig(StaticAttentionConfig):
    """Mode ``fixed``; see :class:`FixedSparsityConfig`."""

    mode: str = "fixed"
    num_local_blocks: int = 4
    num_global_blocks: int = 1
    attention: str = "bidirectional"
    horizontal_global_attention: bool = False
    num_different_global_patterns: int = 1

    sparsity_class: ClassVar[type[SparsityConfig]] = FixedSparsityConfig


@dataclass(frozen=True)
class VariableAttentionConfig(StaticAttentionConfig):
    """Mode ``variable``; see :class:`VariableSparsityConfig`."""

    mode: str = "variable"
    num_random_blocks: int = 0
    local_window_blocks: tuple[int, ...] = (4,)
    global_block_indices: tuple[int, ...] = (0,)
    global_block_end_indices: tuple[int, ...] | None = None
    attention: str = "bidirectional"
    horizontal_global_attention: bool = False

    sparsity_class: ClassVar[type[SparsityConfig]] = VariableSparsityConfig

    def _seed(self, layer: int) -> dict[str, Any]:
        return {"seed": layer}


@dataclass(frozen=True)
class BigBirdAttentionConfig(StaticAttentionConfig):
    """Mode ``bigbird``; see :class:`BigBirdSparsityConfig`. No random blocks unless asked for."""

    mode: str = "bigbird"
    num_random_blocks: int = 0
    num_sliding_window_blocks: int = 3
    num_global_blocks: int = 1
    attention: str = "bidirectional"

    sparsity_class: ClassVar[type[SparsityConfig]] = BigBirdSparsityConfig

    def _seed(self, layer: int) -> dict[str, Any]:
        return {"seed": layer}


@dataclass(frozen=True)
class BSLongformerAttentionConfig(StaticAttentionConfig):
    """Mode ``bslongformer``; see :class:`BSLongformerSparsityConfig`."""

    mode: str = "bslongformer"
    num_sliding_window_blocks: int = 3
    global_block_indices: tuple[int, ...] = (0,)
    global_block_end_indices: tuple[int, ...] | None = None
    attention: str = "bidirectional"

    sparsity_class: ClassVar[type[SparsityConfig]] = BSLongformerSparsityConfig


@dataclass(frozen=True)
class LocalAttentionConfig(StaticAttentionConfig):
    """Mode ``local``; see :class:`LocalSlidingWindowSparsityConfig`."""

    mode: str = "local"
    num_sliding_window_blocks: int = 3
    attention: str = "unidirectional"

    def validate(self, sequence_length: int) -> None:
        """Raise ConfigError unless every value is in range for inputs of ``sequence_length``."""
        require(
            not self.different_layout_per_head,
            "sparse_attention.different_layout_per_head",
            True,
            "false (the window is the same for all heads)",
        )
        super().validate(sequence_length)

    def build(self, num_heads: int, layer: int = 0) -> SparsityConfig:
        """Return a new SparsityConfig for one layer."""
        return LocalSlidingWindowSparsityConfig(
            num_heads, self.block, self.num_sliding_window_blocks, self.attention
        )


@dataclass(frozen=True)
class SatAttentionConfig:
    """Mode ``sat``: dense first, then a block pattern learned meanwhile (IEEE Access 12, 2024).

    Attributes:
        mode: ``"sat"``.
        block: side of a block in tokens: 16, 32, 64 or 128.
        different_layout_per_head: False; a layer's heads share its pattern.
        density: share of blocks kept; published: image .05, listops .04, retrieval .021.
        loss_weight: of the pattern loss beside the task's, times a quarter of the layers.
        pruned: what a pruned entry is in the softmax: ``"zero"`` (logit 0, as published) or
            ``"excluded"``.
    """

    mode: str = "sat"
    block: int = 64
    different_layout_per_head: bool = False
    density: float = 0.04
    loss_weight: float = 0.01
    pruned: str = "zero"

    restarts_schedule: ClassVar[bool] = False
    restarts_optimizer: ClassVar[bool] = True

    def validate(self, sequence_length: int) -> None:
        """Raise ConfigError unless every value is in range for inputs of ``sequence_length``."""
        at = "sparse_attention."
        check_block(self.block, sequence_length)
        blocks = (-(-sequence_length // self.block)) ** 2
        require(
            self.density <= 1.0 and int(blocks * self.density) >= 1,
            f"{at}density",
            self.density,
            f"{1 / blocks:.3g} (one of {blocks} blocks) to 1",
        )
        require(self.loss_weight > 0.0, f"{at}loss_weight", self.loss_weight, "above 0, e.g. 0.01")
        check_pruned(self.pruned)
        require(
            not self.different_layout_per_head,
            "sparse_attention.different_layout_per_head",
            True,
            "false (SAT learns one pattern a layer, which its heads share)",
        )

    def build(self, num_heads: int, layer: int = 0) -> SparsityConfig:
        """Return a new SparsityConfig for one layer."""
        return SatSparsityConfig(num_heads, self.block, density=self.density)

    def to_mapping(self) -> dict[str, Any]:
        """Return the block as a plain mapping."""
        return dataclasses.asdict(self)
