"""The means of the log are over the samples of the steps that count."""

from __future__ import annotations

import pytest
import torch

from spion_ds.training.reports import metrics as tally
from spion_ds.training.reports.metrics import Tally

LOGITS = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally.dist, "all_reduce", lambda values: None)


@pytest.mark.usefixtures("one_rank")
def test_means_are_over_samples_and_skipped_steps_leave_nothing() -> None:
    counts = Tally(torch.device("cpu"))
    assert counts.take() is None
    counts.begin()
    counts.add(torch.tensor(1.0), LOGITS, torch.tensor([0, 0, 0]))  # two are right
    counts.add(torch.tensor(5.0), LOGITS[:1], torch.tensor([0]))
    counts.add_part("pattern_loss", torch.tensor(8.0), 1)
    counts.keep()
    counts.begin()
    counts.add(torch.tensor(float("nan")), LOGITS, torch.tensor([0, 0, 0]))
    counts.begin()  # the step before was skipped
    counts.keep()
    assert counts.take() == {"loss": 2.0, "accuracy": 0.75, "pattern_loss": 2.0}
    assert counts.take() is None
