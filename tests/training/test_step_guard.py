"""What is not finite in a step is named, whichever micro-batch and way of looking finds it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spion_ds.training.step import step_guard
from spion_ds.training.step.step_guard import StepGuard, StepReport

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(3, 3, bias=False)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.classifier = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x).sum()


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_guard.dist, "get_world_size", lambda: 1)


def step(model: Model, guard: StepGuard, number: int, stop: bool, *factors: float) -> list:
    """Take a step of micro-batches whose losses are multiplied; return the reports."""
    model.zero_grad()
    for factor in factors:
        loss = model(torch.ones(2, 3)) * factor
        loss.backward()
        guard.add_loss(loss)
    return guard.close(number, stop)


@pytest.mark.parametrize("whole", [True, False])
def test_parts_are_named_from_the_loss_on_in_any_micro_batch(whole: bool) -> None:
    model = Model()
    guard = StepGuard(model, CPU, at_once=True, whole=whole)
    everywhere = ["the loss", "classifier", "layers.1", "layers.0", "embedding"]
    nan = float("nan")
    assert step(model, guard, 1, False, 1.0, 1.0) == [StepReport(1, False, [])]
    assert step(model, guard, 2, False, nan, 1.0) == [StepReport(2, False, everywhere)]
    assert step(model, guard, 3, True, 1.0, float("inf")) == [StepReport(3, True, everywhere)]
    assert step(model, guard, 4, False, 1.0) == [StepReport(4, False, [])]
    # One part alone, and a parameter without a gradient.
    model.layers[0].requires_grad_(False)
    model.layers[1].bias.register_hook(lambda gradient: gradient * nan)
    with_bias = StepGuard(model, CPU, at_once=True, whole=whole)
    assert step(model, with_bias, 5, False, 1.0) == [StepReport(5, False, ["layers.1"])]
    model.embedding.requires_grad_(False)
    assert step(model, with_bias, 6, False, 1.0) == [StepReport(6, False, ["layers.1"])]


def test_a_report_comes_a_step_later_where_the_host_does_not_wait() -> None:
    model = Model()
    guard = StepGuard(model, CPU, at_once=False, gradients=False)
    assert step(model, guard, 1, False, float("inf")) == []
    assert step(model, guard, 2, True, 1.0) == [StepReport(1, False, ["the loss"])]
    assert guard.reports() == [StepReport(2, True, [])]
