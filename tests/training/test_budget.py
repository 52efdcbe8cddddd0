"""Heads and layers compete for blocks in a run of the trainer's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from spion_ds.training.checkpoints.checkpoint import load_state
from spion_ds.training.checkpoints.files import find_checkpoint
from tests.training.launching import digest, drive, losses, summary

pytestmark = pytest.mark.ranks

DENSITY, HEADS, LAYERS, BLOCKS = 0.3, 2, 2, 8
BUDGET = [
    "sparse_attention.variant=budget",
    "sparse_attention.different_layout_per_head=true",
    "sparse_attention.scope=model",
    "transition.resolution=block",
    "training.steps=9",
]


def test_a_run_keeps_its_budget_on_any_ranks_and_after_a_stop(tmp_path: Path) -> None:
    whole = {"overrides": BUDGET, "stage": 2}
    runs = tmp_path / "runs"
    sessions = [
        {**whole, "run_name": "whole"},
        {**whole, "run_name": "stopped", "stop_at": 7},
        {"resume": str(runs / "stopped")},
    ]
    drive("python", 1, sessions, tmp_path)
    drive("torchrun", 2, [{**whole, "run_name": "two"}], tmp_path)
    masks = load_state(find_checkpoint(runs / "whole"))[0].masks
    assert masks is not None
    assert [tuple(mask.shape) for mask in masks] == [(HEADS, BLOCKS, BLOCKS)] * LAYERS
    assert sum(int(mask.sum()) for mask in masks) == int(DENSITY * LAYERS * HEADS * BLOCKS**2)
    heads = [int(head.sum()) for mask in masks for head in mask]
    assert len(set(heads)) > 1, "no head got more than another"
    assert digest(runs / "two") == digest(runs / "stopped") == digest(runs / "whole")
    assert losses(runs / "stopped") == losses(runs / "whole")
    assert summary(runs / "two")["phase"] == "sparse"
