"""What patterns are made from: maps at either resolution, or SAT's W."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spion_ds import DenseToSparse
from spion_ds.attention import SparseSelfAttention
from spion_ds.patterns import DistanceRule, FixedStepRule, SkewnessRule, sat_pattern
from spion_ds.patterns.spion import VARIANTS
from spion_ds.sparsity import SatSparsityConfig, SpionSparsityConfig
from spion_ds.switching import Event

LENGTH, BLOCK, LAYERS = 64, 16, 2


def attentions(make: Any) -> nn.ModuleList:
    return nn.ModuleList([SparseSelfAttention(make()) for _ in range(LAYERS)])


def look(
    switch: DenseToSparse, model: nn.ModuleList, number: int, mask: Tensor, **options: Any
) -> Event:
    """Show each layer its own queries and keys, in two micro-batches; the event."""
    torch.manual_seed(number)
    parts = [mask[:2], mask[2:]]
    with switch.step(number, padding_masks=parts, **options) as seen:
        for attention in model:
            q, k = 2 * torch.randn(3, 2, LENGTH, 8), torch.randn(3, 2, LENGTH, 8)
            for rows, part in zip((slice(0, 2), slice(2, 3)), parts, strict=True):
                attention(q[rows], k[rows], k[rows], part)
    assert seen.event is not None
    return seen.event


@pytest.mark.parametrize("variant", VARIANTS)
def test_pooled_maps_give_the_masks_of_token_level_maps(variant: str) -> None:
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [40], [20]])
    digests = []
    for resolution in ("token", "block"):
        model = attentions(
            lambda: SpionSparsityConfig(
                2, BLOCK, variant=variant, alpha=0.7, density=0.6, filter_size=5
            )
        )
        switch = DenseToSparse(model, FixedStepRule(), check_every=1, resolution=resolution)
        digests.append(look(switch, model, 1, mask).digest)
    assert digests[0] == digests[1] != ""


def test_the_rule_compares_the_pooled_maps_that_patterns_are_made_from() -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    model = attentions(lambda: SpionSparsityConfig(2, BLOCK))
    switch = DenseToSparse(model, DistanceRule(1), check_every=1)
    first, second = (look(switch, model, number, mask) for number in (1, 2))
    assert second.report is not None
    for before, now, distance in zip(
        first.pooled or [], second.pooled or [], second.report.distances, strict=True
    ):
        assert distance == pytest.approx(float((now - before).norm()))


def test_at_block_resolution_skewness_is_that_of_the_token_level_mean_map() -> None:
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [40], [1]])
    events = []
    for resolution in ("token", "block"):
        model = attentions(lambda: SpionSparsityConfig(2, BLOCK))
        switch = DenseToSparse(model, SkewnessRule(), check_every=1, resolution=resolution)
        events.append(look(switch, model, 1, mask))
    expected, found = (event.report for event in events)
    assert expected is not None
    assert found is not None
    # Maps and cubes are float64; the probabilities and the token-level mean are float32.
    assert found.skewness == pytest.approx(expected.skewness, rel=1e-5)
    assert found.skewness != pytest.approx(
        SkewnessRule().update(events[1].maps or []).skewness, rel=1e-2
    )


def test_sats_masks_are_the_patterns_of_its_weights() -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    weights = [torch.rand(LENGTH // BLOCK, 8) for _ in range(LAYERS)]
    model = attentions(lambda: SatSparsityConfig(2, BLOCK, density=0.3))
    switch = DenseToSparse(
        model, FixedStepRule(), check_every=1, sources=lambda: [w.clone() for w in weights]
    )
    event = look(switch, model, 1, mask)
    assert event.pooled is None
    for found, weight in zip(switch.masks or [], weights, strict=True):
        assert torch.equal(found, sat_pattern(weight, 0.3))
