"""Patterns known from the start: such a run is sparse from its first step, on any ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from spion_ds.distributed.process_group import discover_ranks
from spion_ds.errors import CheckpointError
from spion_ds.training.checkpoints.checkpoint import load_state
from spion_ds.training.checkpoints.files import find_checkpoint
from spion_ds.training.step.evaluation import load_checkpoint_model
from tests.training.launching import ROOT, TINY, command, drive, launch, losses, rows, summary
from tests.training.test_config import build

pytestmark = pytest.mark.ranks

MODES = {
    "fixed": ["different_layout_per_head=true", "num_different_global_patterns=2"],
    "variable": ["num_random_blocks=1", "local_window_blocks=[1, 2]"],
    "bigbird": ["num_random_blocks=1"],
    "bslongformer": [],
    "local": ["attention=bidirectional"],
}


def overrides(mode: str) -> list[str]:
    return [f"sparse_attention.{text}" for text in (f"mode={mode}", *MODES[mode])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every mode on two ranks under ZeRO-2; bigbird also stopped and resumed."""
    folder = tmp_path_factory.mktemp("static")
    sessions = [
        {"run_name": mode, "stage": 2, "overrides": [*overrides(mode), "training.steps=6"]}
        for mode in MODES
    ]
    stopped = {**sessions[2], "run_name": "stopped", "stop_at": 3}
    runs = folder / "runs"
    sessions += [stopped, {"resume": str(runs / "stopped"), "overrides": ["training.steps=6"]}]
    drive("torchrun", 2, sessions, folder)
    return folder


@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_sparse_from_its_first_step(mode: str, trained: Path) -> None:
    run = trained / "runs" / mode
    assert [row["phase"] for row in rows(run, "train")] == ["sparse"] * 6
    assert not rows(run, "check")
    assert not rows(run, "switch")
    result = summary(run)
    assert (result["phase"], result["dense"]["steps"], result["sparse"]["steps"]) == (
        "sparse",
        0,
        6,
    )
    assert result["speed_up"] is None
    assert all(0.0 < density < 1.0 for density in result["sparse"]["density"])
    state, _ = load_state(find_checkpoint(run))
    assert state.switch_step == 0
    assert [mask.dim() for mask in state.masks] == [3 if mode == "fixed" else 2] * 2


def test_layers_draw_random_blocks_of_their_own(trained: Path) -> None:
    state, _ = load_state(find_checkpoint(trained / "runs" / "bigbird"))
    assert not state.masks[0].equal(state.masks[1])


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(trained: Path) -> None:
    whole = losses(trained / "runs" / "bigbird")
    assert losses(trained / "runs" / "stopped") == whole


def test_evaluate_says_what_training_said(trained: Path) -> None:
    run = trained / "runs" / "fixed"
    out = launch([*command("python", 1), str(ROOT / "launch" / "evaluate.py"), str(run)], trained)
    assert "phase        sparse, step 6" in out.stdout
    assert f"test accuracy {summary(run)['test_accuracy']:.2%}" in out.stdout
    assert "density      62.5% (62.5% to 62.5% over 2 heads), 62.5%" in out.stdout


def test_a_checkpoint_of_another_layout_is_refused(trained: Path) -> None:
    folder = find_checkpoint(trained / "runs" / "bigbird")
    assert load_state(folder)[1]["identity"]["sparse_attention"]["mode"] == "bigbird"
    config = build(str(TINY), {}, tuple(overrides("bslongformer")))
    with pytest.raises(
        CheckpointError, match="layer 0 is another one than the layer's BSLongformer"
    ):
        load_checkpoint_model(folder, config, discover_ranks().device)
