"""The device of the attention tests; without a GPU, Triton's kernels run under its interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton chooses the interpreter when it is imported and a kernel is decorated: after this.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Fresh memory holds NaN (integers: their smallest value); returns the shapes asked for."""
    asked: list[torch.Size] = []
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoning(getattr(torch, name), asked))
    return asked


def _poisoning(make, asked):
    def poisoned_memory(*args, **kwargs):
        fresh = make(*args, **kwargs)
        asked.append(fresh.shape)
        if fresh.is_floating_point():
            return fresh.fill_(float("nan"))
        return fresh.fill_(True if fresh.dtype == torch.bool else torch.iinfo(fresh.dtype).min)

    return poisoned_memory
