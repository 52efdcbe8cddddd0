"""BudgetSparsityConfig: dense until a pattern is set, then blocks that heads competed for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spion_ds.errors import ConfigError
from spion_ds.patterns.budget import budget_patterns, check_room, check_terms
from spion_ds.sparsity.switching import SwitchingSparsityConfig, check_maps


class BudgetSparsityConfig(SwitchingSparsityConfig):
    """The block patterns of one layer's heads: the blocks of most attention mass.

    On real text a pattern shared by all heads is worse than a sliding window of the same cost;
    where the heads of a layer compete for one budget, the few that need many far blocks get them.

    Args:
        num_heads: (query) heads of the layer; with grouped-query attention a key head serves the
            patterns of its whole group.
        block: side of a block in tokens.
        different_layout_per_head: True; there is a pattern a head.
        density: share of the blocks that may be kept, the diagonal and the floors included.
        scope: who competes: ``"head"`` (nobody), ``"layer"`` (the heads of a layer) or ``"model"``
            (all heads of all layers that have this class and scope).
        causal: whether attention is causal: only blocks on and below the diagonal may be kept, and
            ``density`` is of these; ``SparseSelfAttention(causal=True)`` makes it so.
        row_blocks: blocks that each row of each head keeps at least, the diagonal's among them.
        head_blocks: blocks that each head keeps at least.
    """

    def __init__(
        self,
        num_heads: int,
        block: int = 64,
        different_layout_per_head: bool = True,
        density: float = 0.06,
        scope: str = "layer",
        causal: bool = False,
        row_blocks: int = 1,
        head_blocks: int = 0,
    ) -> None:
        super().__init__(num_heads, block, different_layout_per_head, causal)
        if not different_layout_per_head:
            raise ConfigError(
                "different_layout_per_head is False, and heads that share a pattern cannot compete "
                "for a budget; leave it True, or take SpionSparsityConfig's variant 'c', the "
                "largest blocks of the mean map"
            )
        self.density = check_terms(density, scope, row_blocks, head_blocks)
        self.scope = scope
        self.row_blocks, self.head_blocks = row_blocks, head_blocks

    def check_room(self, blocks: int) -> None:
        """Raise ConfigError unless the density has room for the diagonal and the floors.

        Args:
            blocks: a side of the layer's maps.
        """
        terms = {name: value for name, value in self._terms().items() if name != "scope"}
        check_room(blocks, heads=1 if self.scope == "head" else self.num_heads, **terms)

    def find_pattern(self, source: Tensor) -> Tensor:
        """Return the bool pattern (num_heads, n, n) of pooled maps of that shape; sets nothing.

        Raises:
            ConfigError: another shape, values that are not finite, a density without room for the
                diagonal and the floors, or scope ``"model"``, which needs the maps of all layers.
        """
        if self.scope == "model":
            raise ConfigError(
                "scope is 'model': find the patterns of all layers together, by find_patterns"
            )
        check_maps("pooled", source, self.num_heads)
        return budget_patterns([source], **self._terms())[0]

    @classmethod
    def find_patterns(
        cls, configs: Sequence[SwitchingSparsityConfig], sources: Sequence[Tensor]
    ) -> list[Tensor]:
        """Return the patterns of the layers; those with scope ``"model"`` compete for one budget.

        Raises:
            ConfigError: as :meth:`find_pattern`; or layers with scope ``"model"`` differ in another
                argument or in their blocks.
        """
        found: dict[int, Tensor] = {}
        together: list[int] = []
        for layer, (config, source) in enumerate(zip(configs, sources, strict=True)):
            assert isinstance(config, BudgetSparsityConfig)
            if config.scope == "model":
                check_maps("pooled", source, config.num_heads)
                together.append(layer)
            else:
                found[layer] = config.find_pattern(source)
        if together:
            found.update(zip(together, _compete(configs, sources, together), strict=True))
        return [found[layer] for layer in range(len(configs))]

    def _terms(self) -> dict[str, Any]:
        names = ("density", "scope", "causal", "row_blocks", "head_blocks")
        return {name: getattr(self, name) for name in names}


def _compete(
    configs: Sequence[SwitchingSparsityConfig], sources: Sequence[Tensor], layers: list[int]
) -> list[Tensor]:
    terms = []
    for layer in layers:
        config = configs[layer]
        assert isinstance(config, BudgetSparsityConfig)
        terms.append({"block": config.block, **config._terms()})
    for layer, other in zip(layers, terms, strict=True):
        if differing := [name for name in other if other[name] != terms[0][name]]:
            name = differing[0]
            raise ConfigError(
                f"scope is 'model', and {name} is {terms[0][name]!r} in one layer and "
                f"{other[name]!r} in another ({layer}); allowed: one value in all layers that "
                "compete"
            )
    del terms[0]["block"]
    return budget_patterns([sources[layer] for layer in layers], **terms[0])
