"""The distance rule against sequences worked out by hand, and its saved state."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

from spion_ds.errors import CheckpointError, ConfigError
from spion_ds.patterns import DistanceRule, FixedStepRule, TransitionReport, transition


def run(values: list[float], rule: DistanceRule | None = None) -> list[TransitionReport]:
    """Give one layer's 1×1 maps to a rule: distances are then absolute differences."""
    rule = rule or DistanceRule()
    return [rule.update([torch.tensor([[value]], dtype=torch.float64)]) for value in values]


def test_the_third_check_is_the_first_that_can_fire():
    first, second, third = run([5.0, 5.0, 5.0])
    assert first == TransitionReport(1, [None], [None], False)
    assert second == TransitionReport(2, [0.0], [None], False)
    assert third == TransitionReport(3, [0.0], [0.0], True)


def test_the_map_before_is_replaced_from_check_3_on_only():
    reports = run([0.0, 20.0, 30.0, 34.0, 39.0, 43.6])
    # d(1,2) = 20, d(1,3) = 30: check 2 left A_before alone. Then d(3,4) = 4, d(4,5) = 5, …
    assert [report.distances for report in reports] == [
        [None],
        [20.0],
        [30.0],
        [4.0],
        [5.0],
        [pytest.approx(4.6)],
    ]
    expected = [None, None, 0.5, 26 / 30, 0.25, pytest.approx(0.08)]
    assert [report.changes[0] for report in reports] == expected
    assert [report.fire for report in reports] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("third", "fire"),
    [(23.0, False), (17.0, False), (22.999, True), (17.001, True), (20.0, True), (40.0, False)],
)
def test_a_change_of_exactly_15_percent_does_not_fire(third, fire):
    report = run([0.0, 20.0, third])[-1]
    assert report.fire is fire


def test_percents_are_cut_not_rounded():
    report = run([0.0, 1000.0, 1149.9])[-1]  # 14.99 %
    assert int(100 * report.changes[0]) == 14
    assert report.fire


def test_the_threshold_can_be_set():
    assert run([0.0, 20.0, 23.0], DistanceRule(threshold_percent=16))[-1].fire
    assert not run([0.0, 20.0, 20.25], DistanceRule(threshold_percent=1))[-1].fire
    for wrong in (0, -3, 1.5, True, None):
        with pytest.raises(ConfigError, match="threshold_percent is"):
            DistanceRule(threshold_percent=wrong)


def test_all_layers_must_have_settled():
    rule = DistanceRule()
    for a, b in ((0.0, 0.0), (10.0, 10.0)):
        rule.update([torch.tensor([[a]]), torch.tensor([[b]])])
    report = rule.update([torch.tensor([[10.0]]), torch.tensor([[20.0]])])
    assert report.changes == [0.0, 1.0]
    assert not report.fire


def test_a_distance_after_none_is_an_infinite_change():
    reports = run([1.0, 1.0, 2.0, 3.0])
    assert reports[2].changes == [math.inf]
    assert not reports[2].fire
    assert reports[3].changes == [0.0]
    assert reports[3].fire


def test_distances_are_frobenius_norms_in_float64(monkeypatch):
    generator = np.random.default_rng(0)
    a = generator.random((37, 37)).astype(np.float32)
    b = generator.random((37, 37)).astype(np.float32)
    expected = float(np.linalg.norm(a.astype(np.float64) - b.astype(np.float64)))
    for entries in (1 << 22, 100):
        monkeypatch.setattr(transition, "_ENTRIES_AT_A_TIME", entries)
        rule = DistanceRule()
        rule.update([torch.from_numpy(a)])
        report = rule.update([torch.from_numpy(b)])
        # 1369 positive terms in another order: each addition rounds once.
        assert report.distances[0] == pytest.approx(expected, rel=1369 * 2**-53)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_distances_are_the_same_bits_on_a_gpu():
    maps = [torch.rand(300, 300, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    on_cpu, on_gpu = DistanceRule(), DistanceRule()
    for a in maps:
        assert on_cpu.update([a]) == on_gpu.update([a.cuda()])


def test_maps_are_copied():
    a = torch.zeros(2, 2)
    rule = DistanceRule()
    rule.update([a])
    a.fill_(3.0)
    assert rule.update([a]).distances == [6.0]


def test_maps_keep_their_dtype():
    rule = DistanceRule()
    rule.update([torch.rand(4, 4).bfloat16(), torch.rand(4, 4)])
    assert [a.dtype for a in rule.state_dict()["before"]] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("stop", range(7))
def test_a_restored_rule_continues_bit_for_bit(stop):
    generator = torch.Generator().manual_seed(stop)
    checks = [[torch.rand(9, 9, generator=generator) / (t + 1) for _ in range(2)] for t in range(7)]
    whole = DistanceRule()
    expected = [whole.update(maps) for maps in checks]

    rule = DistanceRule()
    reports = [rule.update(maps) for maps in checks[:stop]]
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    restored = DistanceRule()
    restored.load_state_dict(torch.load(file, weights_only=True))
    reports += [restored.update(maps) for maps in checks[stop:]]
    assert reports == expected


def test_a_saved_state_does_not_change_with_the_rule():
    rule = DistanceRule()
    rule.update([torch.zeros(2, 2)])
    rule.update([torch.ones(2, 2)])
    state = rule.state_dict()
    rule.update([torch.full((2, 2), 9.0)])
    assert state["check"] == 2
    assert torch.equal(state["before"][0], torch.zeros(2, 2))
    assert state["distances"] == [2.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_map_is_named_and_changes_nothing(bad):
    rule = DistanceRule()
    rule.update([torch.zeros(2, 2), torch.zeros(2, 2)])
    with pytest.raises(ConfigError, match="layer 1 has NaN or infinite"):
        rule.update([torch.ones(2, 2), torch.full((2, 2), bad)])
    assert rule.state_dict()["check"] == 1
    assert rule.update([torch.ones(2, 2), torch.ones(2, 2)]).distances == [2.0, 2.0]
    with pytest.raises(ConfigError, match="layer 0 has NaN or infinite"):
        DistanceRule().update([torch.full((2, 2), bad)])


def test_other_layers_or_shapes_are_refused():
    with pytest.raises(ConfigError, match="maps has 0 layers; allowed: at least one"):
        DistanceRule().update([])
    rule = DistanceRule()
    rule.update([torch.zeros(2, 2)])
    with pytest.raises(ConfigError, match="maps has 2 layers; allowed: 1 as before"):
        rule.update([torch.zeros(2, 2)] * 2)
    with pytest.raises(ConfigError, match=r"layer 0 has shape \(3, 3\); allowed: \(2, 2\)"):
        rule.update([torch.zeros(3, 3)])
    with pytest.raises(ConfigError, match=r"layer 0 is torch\.int64"):
        rule.update([torch.zeros(2, 2).long()])


def test_the_fixed_step_rule_fires_at_the_first_check():
    rule = FixedStepRule()
    assert rule.update([torch.zeros(2, 2)] * 2) == TransitionReport(1, [None] * 2, [None] * 2, True)
    restored = FixedStepRule()
    restored.load_state_dict(rule.state_dict())
    assert restored.state_dict() == {"check": 1}


def test_the_state_of_another_rule_is_refused():
    with pytest.raises(CheckpointError, match="the distance rule saves"):
        DistanceRule().load_state_dict(FixedStepRule().state_dict())
    with pytest.raises(CheckpointError, match="the fixed-step rule saves"):
        FixedStepRule().load_state_dict(DistanceRule().state_dict())
