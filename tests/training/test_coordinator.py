"""The rank-0 coordinator: one decision, the same on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from spion_ds.attention import AttentionMapAccumulator, PooledMapAccumulator
from spion_ds.attention.layout import pack_mask
from spion_ds.attention.map_request import mean_row_weights, row_counts
from spion_ds.distributed.agreement import Agreement
from spion_ds.patterns import DistanceRule, FixedStepRule, SkewnessRule, sat_pattern, spion_cf
from spion_ds.patterns.spion import VARIANTS
from spion_ds.sparsity import SatSparsityConfig, SpionSparsityConfig
from spion_ds.switching.coordinator import CoordinationError, Coordinator

LENGTH, BLOCK = 64, 16


@pytest.fixture(autouse=True)
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def configs() -> list[SpionSparsityConfig]:
    return [SpionSparsityConfig(2, BLOCK, alpha=0.7, filter_size=5) for _ in range(2)]


def observed(seed: int) -> list[AttentionMapAccumulator]:
    torch.manual_seed(seed)
    layers = [AttentionMapAccumulator() for _ in range(2)]
    for layer in layers:
        layer.add(torch.randn(3, 2, LENGTH, 8), torch.randn(3, 2, LENGTH, 8))
    return layers


def test_masks_are_the_patterns_of_the_mean_maps() -> None:
    coordinator = Coordinator(FixedStepRule(), configs(), LENGTH // BLOCK, Agreement())
    layers = observed(0)
    decision = coordinator.check(layers, force=False)
    assert decision.masks is not None
    assert decision.maps is not None
    for mask, layer, attention in zip(decision.masks, layers, decision.maps, strict=True):
        assert layer.total is not None
        assert layer.count is not None
        expected = (layer.total / layer.count[:, None]).float()
        assert torch.equal(attention, expected)
        assert torch.equal(mask, spion_cf(expected, BLOCK, 0.7, 5))
    packed = b"".join(pack_mask(mask) for mask in decision.masks)
    body = packed.ljust(1000, b"\0")
    assert decision.digest == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("variant", VARIANTS)
def test_pooled_maps_give_the_masks_of_token_level_maps(variant: str) -> None:
    layers = [
        SpionSparsityConfig(2, BLOCK, variant=variant, alpha=0.7, density=0.6, filter_size=5)
        for _ in range(2)
    ]
    coordinator = Coordinator(DistanceRule(), layers, LENGTH // BLOCK, Agreement())
    weights = torch.full((LENGTH,), 1 / 6)
    reports, pooled = [], []
    for seed in range(2):
        torch.manual_seed(seed)
        token = [AttentionMapAccumulator() for _ in range(2)]
        block = [PooledMapAccumulator(BLOCK, c.convolution, weights) for c in layers]
        for pair in zip(token, block, strict=True):
            q, k = torch.randn(3, 2, LENGTH, 8), torch.randn(3, 2, LENGTH, 8)
            for accumulator in pair:  # in two micro-batches
                accumulator.add(q[:2], k[:2])
                accumulator.add(q[2:], k[2:])
        expected = Coordinator(FixedStepRule(), layers, LENGTH // BLOCK, Agreement())
        found = coordinator.check(block, force=True)
        assert found.digest == expected.check(token, force=True).digest != ""
        assert found.report is not None
        assert found.pooled is not None
        reports.append(found.report)
        pooled.append(found.pooled)
    # The rule compares the pooled maps that the patterns are made from.
    for now, before, distance in zip(pooled[1], pooled[0], reports[1].distances, strict=True):
        assert distance == pytest.approx(float((now - before).norm()))


def test_at_block_resolution_skewness_is_that_of_the_token_level_mean_map() -> None:
    layers = [SatSparsityConfig(2, BLOCK, density=0.3) for _ in range(2)]
    weights = [torch.rand(LENGTH // BLOCK, 8) for _ in layers]
    torch.manual_seed(0)
    real = torch.arange(LENGTH) < torch.tensor([[LENGTH], [40], [1]])
    row_weights = mean_row_weights(row_counts(real, 2))
    token = [AttentionMapAccumulator() for _ in layers]
    block = [PooledMapAccumulator(BLOCK, None, row_weights, keep_batches=True) for _ in layers]
    for pair in zip(token, block, strict=True):
        q, k = 2 * torch.randn(3, 2, LENGTH, 8), torch.randn(3, 2, LENGTH, 8)
        for accumulator in pair:  # in two micro-batches
            accumulator.add(q[:2], k[:2], real[:2])
            accumulator.add(q[2:], k[2:], real[2:])
    expected, found = (
        Coordinator(SkewnessRule(), layers, LENGTH // BLOCK, Agreement()).check(
            observed, force=False, weights=weights
        )
        for observed in (token, block)
    )
    assert expected.report is not None
    assert found.report is not None
    assert found.maps is not None
    # Maps and cubes are float64; the probabilities and the token-level mean are float32.
    assert found.report.skewness == pytest.approx(expected.report.skewness, rel=1e-5)
    pooled = SkewnessRule().update(found.maps).skewness
    assert found.report.skewness != pytest.approx(pooled, rel=1e-2)


def test_stays_dense_until_the_rule_fires_or_is_forced() -> None:
    coordinator = Coordinator(DistanceRule(), configs(), LENGTH // BLOCK, Agreement())
    first = coordinator.check(observed(0), force=False)
    assert (first.masks, first.digest) == (None, "")
    assert first.report is not None
    assert first.report.check == 1
    forced = coordinator.check(observed(1), force=True)
    assert forced.masks is not None


def test_a_failure_on_rank_0_is_raised_with_its_reason() -> None:
    coordinator = Coordinator(DistanceRule(), configs(), LENGTH // BLOCK, Agreement())
    layers = observed(0)
    assert layers[1].total is not None
    layers[1].total[3, 4] = float("nan")
    with pytest.raises(CoordinationError, match=r"rank 0 could not.*layer 1.*NaN"):
        coordinator.check(layers, force=False)


def test_masks_that_changed_on_the_way_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    agreement = Agreement()

    def flip_a_bit(payload: torch.Tensor) -> torch.Tensor:
        payload[33] ^= 1
        return payload

    monkeypatch.setattr(agreement, "broadcast", flip_a_bit)
    coordinator = Coordinator(FixedStepRule(), configs(), LENGTH // BLOCK, agreement)
    with pytest.raises(CoordinationError, match="differ"):
        coordinator.check(observed(0), force=False)


def test_sats_masks_are_the_patterns_of_its_weights() -> None:
    layers = [SatSparsityConfig(2, BLOCK, density=0.3) for _ in range(2)]
    weights = [torch.rand(LENGTH // BLOCK, 8) for _ in range(2)]
    coordinator = Coordinator(SkewnessRule(), layers, LENGTH // BLOCK, Agreement())
    stay = coordinator.check(observed(0), force=False, weights=weights)
    assert stay.masks is None
    assert stay.report is not None
    assert len(stay.report.skewness) == 2
    forced = coordinator.check(observed(1), force=True, weights=weights)
    assert forced.masks is not None
    for mask, weight in zip(forced.masks, weights, strict=True):
        assert torch.equal(mask, sat_pattern(weight, 0.3))
