"""The gate in front of benchmarks/scaling.py's timings can close."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SWITCH = 2
LOSSES = [2.0, 1.9, 1.8, 1.7]
MASK = torch.eye(40, dtype=torch.bool)


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("rank_checks")
    monkeypatch.setattr(module, "masks", lambda run: [torch.load(run / "mask.pt")])
    return module


def write_run(
    folder: Path, losses: list[float] = LOSSES, mask: Tensor = MASK, switch: int = SWITCH
) -> Path:
    folder.mkdir()
    lines = [{"step": n, "kind": "train", "loss": loss} for n, loss in enumerate(losses, 1)]
    lines.append({"step": switch, "kind": "switch"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.save(mask, folder / "mask.pt")
    return folder


def test_only_runs_within_the_tolerances_agree(tmp_path: Path, checks: ModuleType) -> None:
    whole = write_run(tmp_path / "whole")
    assert checks.compare(whole, write_run(tmp_path / "same")).agrees("fp32")

    moved = MASK.clone()
    moved[0, :2] = torch.tensor([False, True])
    found = checks.compare(whole, write_run(tmp_path / "moved", mask=moved))
    assert (found.blocks, found.kept) == (2, 40)
    assert not found.agrees("fp32")
    assert found.agrees("bf16")  # 2 of 40 are the 5 % allowed
    moved[1, 0] = True
    found = checks.compare(whole, write_run(tmp_path / "moved-more", mask=moved))
    assert not found.agrees("bf16")

    found = checks.compare(whole, write_run(tmp_path / "dense", [2.0, 1.95, 1.8, 1.7]))
    assert found.dense == pytest.approx(0.05 / 1.9)
    assert found.sparse == 0.0
    assert not found.agrees("bf16")
    found = checks.compare(whole, write_run(tmp_path / "sparse", [2.0, 1.9, 1.8, 1.75]))
    assert (found.dense, found.sparse) == (0.0, pytest.approx(0.05 / 1.7))
    assert not found.agrees("bf16")

    found = checks.compare(whole, write_run(tmp_path / "later", switch=SWITCH + 1))
    assert not found.agrees("bf16")
    with pytest.raises(SystemExit, match="different steps"):
        checks.compare(whole, write_run(tmp_path / "short", LOSSES[:3]))
