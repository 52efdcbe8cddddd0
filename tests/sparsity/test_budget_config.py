"""BudgetSparsityConfig, the recipes' variant ``budget``, and patterns of causal attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from spion_ds.attention import SparseSelfAttention
from spion_ds.errors import ConfigError
from spion_ds.patterns import budget_patterns, pattern_from_pooled, sat_pattern
from spion_ds.sparsity import (
    BudgetSparsityConfig,
    SatSparsityConfig,
    SpionSparsityConfig,
    find_patterns,
    read_sparse_attention,
)

HEADS, N = 3, 8
BLOCK = {"mode": "spion", "variant": "budget", "block": 16, "density": 0.25}


def maps(layer: int = 0, heads: int = HEADS) -> Tensor:
    generator = torch.Generator().manual_seed(layer)
    return torch.rand(heads, N, N, generator=generator).double()


def equal(found: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_layers_are_each_alone_unless_the_scope_is_the_model(scope: str) -> None:
    configs = [BudgetSparsityConfig(HEADS, density=0.3, scope=scope) for _ in range(2)]
    found = find_patterns(configs, [maps(0), maps(1)])
    assert equal(found, budget_patterns([maps(0), maps(1)], 0.3, scope=scope))
    assert torch.equal(found[1], configs[1].find_pattern(maps(1)))


def test_layers_of_scope_model_compete_and_others_stand_aside() -> None:
    terms = {"density": 0.6, "scope": "model", "causal": True, "row_blocks": 2}
    configs = [
        BudgetSparsityConfig(HEADS, **terms),
        SpionSparsityConfig(HEADS, variant="c", density=0.5),
        BudgetSparsityConfig(2, **terms),
        BudgetSparsityConfig(HEADS, density=0.5),
    ]
    sources = [maps(0), maps(1)[0], 3.0 * maps(2, 2), maps(3)]
    found = find_patterns(configs, sources)
    assert equal([found[0], found[2]], budget_patterns([sources[0], sources[2]], **terms))
    assert torch.equal(found[3], configs[3].find_pattern(sources[3]))


@pytest.mark.parametrize("other", [{"density": 0.4}, {"block": 32}, {"row_blocks": 2}])
def test_layers_that_compete_have_one_set_of_terms(other: dict[str, Any]) -> None:
    terms = {"density": 0.3, "scope": "model"}
    configs = [BudgetSparsityConfig(2, **terms), BudgetSparsityConfig(2, **{**terms, **other})]
    with pytest.raises(ConfigError, match=f"scope is 'model', and {next(iter(other))} is"):
        find_patterns(configs, [maps(0, 2), maps(1, 2)])


def test_heads_that_share_a_pattern_cannot_compete() -> None:
    with pytest.raises(ConfigError, match="heads that share a pattern cannot compete"):
        BudgetSparsityConfig(2, 16, different_layout_per_head=False)
    with pytest.raises(ConfigError, match="different_layout_per_head is False; allowed: true"):
        read_sparse_attention(BLOCK).validate(128)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"density": 0.1}, r"sparse_attention\.density is 0\.1; allowed: from 0\.125 up"),
        ({"row_blocks": 3}, r"sparse_attention\.density is 0\.25; allowed: from 0\.375 up"),
        ({"scope": "all"}, r"sparse_attention\.unknown scope 'all'; known: head, layer, model"),
        ({"row_blocks": -1}, r"sparse_attention\.row_blocks is -1"),
    ],
)
def test_a_recipe_says_what_does_not_fit(changed: dict[str, Any], message: str) -> None:
    block = {**BLOCK, "different_layout_per_head": True}
    read_sparse_attention(block).validate(128)
    with pytest.raises(ConfigError, match=message):
        read_sparse_attention({**block, **changed}).validate(128)


def test_a_recipe_builds_the_configuration_that_it_names() -> None:
    keys = {"scope": "model", "row_blocks": 2, "head_blocks": 9}
    block = read_sparse_attention({**BLOCK, **keys, "different_layout_per_head": True})
    config = block.build(4)
    assert isinstance(config, BudgetSparsityConfig)
    assert (config.num_heads, config.block, config.density) == (4, 16, 0.25)
    assert {name: getattr(config, name) for name in keys} == keys


# Causal attention.


def test_causal_attention_tells_its_configuration_which_blocks_may_be_kept() -> None:
    config = BudgetSparsityConfig(HEADS, 16, density=0.5)
    SparseSelfAttention(config, causal=True)
    assert torch.equal(config.find_pattern(maps()), budget_patterns([maps()], 0.5, causal=True)[0])


def test_a_causal_configuration_is_refused_by_attention_that_is_not() -> None:
    with pytest.raises(ConfigError, match="sparsity_config has causal=True, and causal is False"):
        SparseSelfAttention(BudgetSparsityConfig(HEADS, 16, causal=True))


def test_the_share_of_a_causal_pattern_is_of_what_may_be_kept() -> None:
    pooled = maps()[0].tril()
    found = pattern_from_pooled(pooled, "c", density=0.5, causal=True)
    assert torch.equal(
        found, SpionSparsityConfig(2, variant="c", density=0.5, causal=True).find_pattern(pooled)
    )
    # int(36 · 0.5 − 8) largest blocks of the 36, and the diagonal.
    largest = pooled.flatten().topk(10).indices
    wanted = torch.zeros(N * N, dtype=torch.bool)
    wanted[largest] = True
    assert torch.equal(found, wanted.view(N, N) | torch.eye(N, dtype=torch.bool))
    weight = torch.randn(N, 4, generator=torch.Generator().manual_seed(1))
    learned = SatSparsityConfig(2, density=0.5, causal=True).find_pattern(weight)
    assert torch.equal(learned, sat_pattern(weight, 0.5, causal=True))
    assert int(learned.sum()) == 18
    assert not learned.triu(1).any()


@pytest.mark.parametrize("variant", ["f", "cf"])
def test_the_quantile_of_a_causal_map_is_of_what_may_be_kept(variant: str) -> None:
    pooled = maps()[0].tril()
    below = pooled[torch.ones(N, N).tril().bool()]
    # The threshold is a quantile of these alone: with the zeros above the diagonal it is lower.
    among_all = pattern_from_pooled(pooled, variant, alpha=0.6)
    found = pattern_from_pooled(pooled, variant, alpha=0.6, causal=True)
    assert found.sum() < among_all.sum()
    marked = found & ~torch.eye(N, dtype=torch.bool)
    assert (pooled[marked] > below.quantile(0.6)).all()
    assert not found.triu(1).any()


def test_a_configuration_serves_attention_of_one_kind() -> None:
    config = BudgetSparsityConfig(HEADS, 16)
    SparseSelfAttention(config)
    with pytest.raises(ConfigError, match="belongs to attention that is not causal already"):
        SparseSelfAttention(config, causal=True)
    assert not config.causal


def test_a_density_without_room_is_named_before_anything_is_trained() -> None:
    config = BudgetSparsityConfig(HEADS, 16, density=0.06)
    with pytest.raises(
        ConfigError, match=r"density is 0\.06; allowed: from 0\.0667 up: .* 30 head"
    ):
        BudgetSparsityConfig(30, 16, density=0.06).check_room(15)
    with pytest.raises(ConfigError, match=r"density is 0\.06; allowed: from 0\.1177 up"):
        SparseSelfAttention(config, causal=True, max_seq_length=256)
