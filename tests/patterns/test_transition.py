"""SPION's and SAT's rules against sequences worked out by hand, and their saved states."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch

from spion_ds.errors import CheckpointError, ConfigError
from spion_ds.patterns import (
    DistanceRule,
    FixedStepRule,
    SkewnessRule,
    TransitionReport,
    transition,
)


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


def test_a_check_that_is_held_counts_as_one_that_did_not_fire():
    values = [0.0, 20.0, 23.0 - 1e-3, 26.0 - 1e-3]  # d = 20, 22.999, then 3 from check 3's map
    rule, free = DistanceRule(), DistanceRule()
    maps = [[torch.tensor([[value]], dtype=torch.float64)] for value in values]
    held = [rule.update(a, hold=True) for a in maps]
    assert [report.fire for report in held] == [False] * 4
    assert [report.held for report in held] == [False, False, True, False]
    assert held[3].distances == [pytest.approx(3.0)]
    reports = [free.update(a) for a in maps[:3]]
    assert [(report.fire, report.held) for report in reports] == [(False, False)] * 2 + [
        (True, False)
    ]


def test_sats_rule_is_held_too():
    rule = SkewnessRule(min_skewness=1.1)
    maps = [[factor * SKEWED.double()] for factor in (0.0, 1000.0, 2000.0)]
    held = [rule.update(a, hold=True) for a in maps]
    assert [(report.fire, report.held) for report in held] == [(False, False)] * 2 + [(False, True)]


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


# Three entries of 0 and one of 4: mean 1, variance 3, third moment (27 − 3)/4 = 6.
SKEWED = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
SKEWNESS_OF_SKEWED = 6.0 / 3.0**1.5


def scaled(*factors: float, rule: SkewnessRule | None = None) -> list[TransitionReport]:
    """Give multiples of one map to a rule: skewness stays, distances are √16 · differences."""
    rule = rule or SkewnessRule(min_skewness=1.1)
    return [rule.update([factor * SKEWED]) for factor in factors]


def test_skewness_is_the_third_standardised_moment():
    for report in scaled(1.0, 3.0):
        assert report.skewness == [pytest.approx(SKEWNESS_OF_SKEWED, rel=1e-14)]
    rule = SkewnessRule()
    assert rule.update([-SKEWED]).skewness == [pytest.approx(-SKEWNESS_OF_SKEWED, rel=1e-14)]
    # Equal entries, whose mean need not be exactly one of them, are not skewed.
    assert SkewnessRule().update([torch.full((3, 3), 0.1)]).skewness == [0.0]


def test_skewness_equals_numpys_for_large_maps(monkeypatch):
    a = np.random.default_rng(0).random((61, 61)) ** 3
    z = (a - a.mean()) / a.std()
    for entries in (1 << 22, 100):
        monkeypatch.setattr(transition, "_ENTRIES_AT_A_TIME", entries)
        [found] = SkewnessRule().update([torch.from_numpy(a)]).skewness
        # 3721 terms in another order: each addition rounds once.
        assert found == pytest.approx((z**3).mean(), rel=3721 * 2**-53 * 10)


def test_sats_rule_compares_consecutive_checks():
    # Differences 10, 20, 20.25, 20.25: unlike SPION's rule, check 2 moves on to its own map.
    reports = scaled(0.0, 10.0, 30.0, 50.25, 70.5)
    assert [report.distances for report in reports] == [[None], [40.0], [80.0], [81.0], [81.0]]
    assert [report.changes for report in reports] == [[None], [None], [1.0], [0.0125], [0.0]]
    assert [report.fire for report in reports] == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("third", "fire"), [(2012.99, True), (2013.0, False), (1987.01, True), (1987.0, False)]
)
def test_a_change_of_exactly_1_3_percent_does_not_fire_sats_rule(third, fire):
    rule = SkewnessRule(min_skewness=1.1)
    factors = [0.0, 1000.0, third]
    reports = [rule.update([factor * SKEWED.double()]) for factor in factors]
    assert reports[-1].fire is fire


@pytest.mark.parametrize(("least", "fire"), [(1.15, True), (1.16, False)])
def test_sats_rule_wants_skewed_maps_in_every_layer(least, fire):
    # 6 / 3^1.5 = 1.1547
    rule = SkewnessRule(min_skewness=least)
    more_skewed = torch.eye(5)[:, :1]  # one entry of five: 1.5
    for factor in (0.0, 1.0):
        rule.update([factor * more_skewed, factor * SKEWED])
    report = rule.update([2 * more_skewed, 2 * SKEWED])
    assert report.skewness == pytest.approx([1.5, SKEWNESS_OF_SKEWED])
    assert report.changes == [0.0, 0.0]
    assert report.fire is fire


def test_sats_rule_does_not_fire_when_the_maps_stood_still():
    reports = scaled(1.0, 1.0, 1.0)
    assert reports[2].distances == [0.0]
    assert reports[2].changes == [math.inf]
    assert not reports[2].fire


@pytest.mark.parametrize("stop", range(6))
def test_a_restored_skewness_rule_continues_bit_for_bit(stop):
    generator = torch.Generator().manual_seed(stop)
    checks = [[torch.rand(9, 9, generator=generator) ** 4 for _ in range(2)] for _ in range(6)]
    whole = SkewnessRule()
    expected = [whole.update(maps) for maps in checks]
    rule = SkewnessRule()
    reports = [rule.update(maps) for maps in checks[:stop]]
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    restored = SkewnessRule()
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert reports + [restored.update(maps) for maps in checks[stop:]] == expected


def test_sats_rule_names_what_is_wrong_and_stays_as_it_was():
    rule = SkewnessRule()
    rule.update([SKEWED])
    with pytest.raises(ConfigError, match="layer 0 has NaN or infinite"):
        rule.update([SKEWED / 0.0])
    assert rule.state_dict()["check"] == 1
    for name, wrong in (("min_skewness", float("nan")), ("max_change_percent", "1")):
        with pytest.raises(ConfigError, match=f"{name} is .*; allowed: a number"):
            SkewnessRule(**{name: wrong})
    with pytest.raises(ConfigError, match=r"max_change_percent is 0.0; allowed: above 0"):
        SkewnessRule(max_change_percent=0.0)


def test_neither_map_rule_takes_the_others_state():
    with pytest.raises(CheckpointError, match="the skewness rule saves"):
        SkewnessRule().load_state_dict(DistanceRule().state_dict())
    with pytest.raises(CheckpointError, match="the distance rule saves"):
        DistanceRule().load_state_dict(SkewnessRule().state_dict())
