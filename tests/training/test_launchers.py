"""The masks, losses and accuracies do not depend on ranks, ZeRO stage, launcher, accumulation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.launching import (
    ROOT,
    TINY,
    TRAIN,
    command,
    digest,
    drive,
    launch,
    losses,
    summary,
)

pytestmark = pytest.mark.ranks

STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, started as a user would."""
    folder = tmp_path_factory.mktemp("alone")
    launch([*command("python", 1), str(TRAIN), "--recipe", str(TINY), "--run_name", "r"], folder)
    return folder / "runs" / "r"


def assert_same_run(run: Path, alone: Path) -> None:
    assert digest(run) == digest(alone)
    ours, theirs = losses(run), losses(alone)
    assert ours.keys() == theirs.keys()
    # Sums over ranks are rounded in another order: about 1e-7 a step, amplified by training.
    assert ours == pytest.approx(theirs, rel=1e-4)
    for key in ("validation_accuracy", "test_accuracy", "best_step"):
        assert summary(run)[key] == summary(alone)[key]


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "mpirun"])
def test_launch_lines_work_as_written(launcher: str, alone: Path, tmp_path: Path) -> None:
    config = str(ROOT / "ds_configs" / "zero2.json")
    words = [*command(launcher, 2), str(TRAIN), "--ds_config", config]
    words += ["--recipe", str(TINY), "--run_name", "r"]
    launch(words, tmp_path)
    assert_same_run(tmp_path / "runs" / "r", alone)


@pytest.mark.parametrize(("launcher", "ranks"), [("torchrun", 4), ("deepspeed", 2), ("mpirun", 2)])
def test_masks_do_not_depend_on_world_size_stage_or_launcher(
    launcher: str, ranks: int, alone: Path, tmp_path: Path
) -> None:
    sessions = [{"stage": stage, "run_name": f"stage{stage}"} for stage in STAGES]
    drive(launcher, ranks, sessions, tmp_path)
    for stage in STAGES:
        assert_same_run(tmp_path / "runs" / f"stage{stage}", alone)


def test_masks_do_not_depend_on_accumulation(alone: Path, tmp_path: Path) -> None:
    sessions = [
        {
            "stage": stage,
            "run_name": f"stage{stage}",
            "overrides": ["training.micro_batch_size=1"],
        }
        for stage in (0, 2)
    ]
    drive("torchrun", 2, sessions, tmp_path)
    for stage in (0, 2):
        assert_same_run(tmp_path / "runs" / f"stage{stage}", alone)


def test_bf16_trains_through_the_switch_at_every_stage(tmp_path: Path) -> None:
    sessions = [
        {"stage": stage, "run_name": f"stage{stage}", "overrides": ["training.precision=bf16"]}
        for stage in STAGES
    ]
    drive("torchrun", 2, sessions, tmp_path)
    runs = [tmp_path / "runs" / f"stage{stage}" for stage in STAGES]
    for run in runs:
        assert summary(run)["phase"] == "sparse"
        assert summary(run)["sparse"]["steps"] == 6
    # Stages 1 and 2 keep the same float32 master weights. Stage 0 starts with a step of its own,
    # and DeepSpeed's own linear layers of stage 3 round product and bias apart.
    assert digest(runs[1]) == digest(runs[2])
    first = {stage: losses(run)[1] for stage, run in zip(STAGES, runs, strict=True)}
    assert first[3] == pytest.approx(first[1], rel=2**-8)
