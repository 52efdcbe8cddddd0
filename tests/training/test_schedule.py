"""The learning rate: PyTorch's one-cycle in each phase, restarted at the switch where asked."""

from __future__ import annotations

import pytest
import torch

from spion_ds.training.step.schedule import OneCycle, one_cycle


@pytest.mark.parametrize(("total", "warmup"), [(100, 10), (30, 15), (1000, 175)])
def test_equals_pytorchs_linear_one_cycle(total: int, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=7e-4,
        total_steps=total,
        pct_start=warmup / total,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    for step in range(total):
        # Both evaluate the same line segments in float64.
        assert one_cycle(step, total, warmup / total, 7e-4) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15
        )
        optimizer.step()
        if step < total - 1:
            scheduler.step()


def test_restart_begins_a_cycle_over_the_remaining_steps() -> None:
    schedule = OneCycle(max_lr=1.0, warmup_steps=20, steps=100, restart_at_switch=True)
    assert schedule.at(40, None) == one_cycle(40, 100, 0.2, 1.0)
    assert schedule.at(40, 40) == pytest.approx(1.0 / 25.0)
    for step in range(40, 100):
        assert schedule.at(step, 40) == one_cycle(step - 40, 60, 0.2, 1.0)
    assert schedule.at(99, 40) == pytest.approx(1.0 / 25.0 / 1e4)


def test_without_restart_the_switch_changes_nothing() -> None:
    schedule = OneCycle(max_lr=1.0, warmup_steps=20, steps=100, restart_at_switch=False)
    assert [schedule.at(step, 40) for step in range(100)] == [
        schedule.at(step, None) for step in range(100)
    ]


def test_a_sparse_rate_is_constant_from_the_switch_on() -> None:
    schedule = OneCycle(1.0, warmup_steps=20, steps=100, restart_at_switch=False, sparse_lr=0.5)
    assert [schedule.at(step, None) for step in (0, 40)] == [
        one_cycle(step, 100, 0.2, 1.0) for step in (0, 40)
    ]
    assert {schedule.at(step, 40) for step in range(40, 100)} == {0.5}


def test_no_warmup_starts_at_the_peak() -> None:
    assert one_cycle(0, 10, 0.0, 0.5) <= 0.5
    rates = [one_cycle(step, 10, 0.0, 0.5) for step in range(10)]
    assert rates == sorted(rates, reverse=True)
