"""A run that was stopped at any step and resumed gives the bits of one that was not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spion_ds.distributed.process_group import Ranks
from spion_ds.training.checkpoints.checkpoint import identity, load_state, load_weights
from spion_ds.training.checkpoints.files import find_checkpoint
from spion_ds.training.checkpoints.resuming import Resume, plan_resume
from spion_ds.training.config.recipe_files import read_recipe
from spion_ds.training.config.run import build_run_config
from tests.training.launching import TINY, digest, drive, losses, rows, summary

pytestmark = pytest.mark.ranks

STEPS, SWITCH = 12, 6


def sessions_of_a_stopped_run(folder: Path, stop_at: int, name: str, **values: Any) -> list[dict]:
    run = str(folder / "runs" / name)
    return [
        {"run_name": name, "stop_at": stop_at, **values},
        {"resume": run},
    ]


def test_going_on_with_another_number_of_threads_is_said_in_one_line() -> None:
    config = build_run_config(read_recipe(str(TINY)), None, (), world_size=1, device_type="cpu")
    run = {
        "identity": identity(config),
        "batch_size": config.batches.total,
        "seed": config.training.seed,
        "world_size": 1,
        "zero_stage": 0,
        "precision": "fp32",
        "threads": torch.get_num_threads() + 1,
    }
    alone, folder = Ranks(0, 1, 0, 1), Path("step-000003")
    told = plan_resume(folder, run, config, alone)
    if alone.device.type == "cpu":
        assert f"OMP_NUM_THREADS={run['threads']}" in told.note
    else:
        assert not told.note
    run["threads"] = torch.get_num_threads()
    assert plan_resume(folder, run, config, alone).note == ""
    del run["threads"]  # an older version's
    assert plan_resume(folder, run, config, alone) == Resume(folder)


def assert_same_bits(run: Path, undisturbed: Path) -> None:
    assert losses(run) == losses(undisturbed)
    assert digest(run) == digest(undisturbed)
    for kind in ("validation", "test"):
        assert rows(run, kind) == rows(undisturbed, kind)
    assert summary(run)["test_accuracy"] == summary(undisturbed)["test_accuracy"]
    ours, theirs = (load_weights(find_checkpoint(r)) for r in (run, undisturbed))
    for name, weight in theirs.items():
        assert torch.equal(ours[name], weight), name


def test_stopped_at_any_step_on_one_rank(tmp_path: Path) -> None:
    sessions: list[dict] = [{"run_name": "whole"}]
    for stop in range(1, STEPS):
        sessions += sessions_of_a_stopped_run(tmp_path, stop, f"stop{stop}")
    drive("python", 1, sessions, tmp_path)
    for stop in range(1, STEPS):
        assert_same_bits(tmp_path / "runs" / f"stop{stop}", tmp_path / "runs" / "whole")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_stopped_in_each_phase_on_two_ranks(stage: int, tmp_path: Path) -> None:
    sessions: list[dict] = [{"run_name": "whole", "stage": stage}]
    stops = (SWITCH - 3, SWITCH, SWITCH + 3)
    for stop in stops:
        sessions += sessions_of_a_stopped_run(tmp_path, stop, f"stop{stop}", stage=stage)
    drive("torchrun", 2, sessions, tmp_path)
    for stop in stops:
        assert_same_bits(tmp_path / "runs" / f"stop{stop}", tmp_path / "runs" / "whole")


def test_stopped_and_resumed_by_new_processes(tmp_path: Path) -> None:
    drive("python", 1, [{"run_name": "whole"}], tmp_path)
    for values in sessions_of_a_stopped_run(tmp_path, SWITCH - 1, "stopped"):
        drive("python", 1, [values], tmp_path)
    assert_same_bits(tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole")


def test_a_checkpoint_says_where_the_run_stands(tmp_path: Path) -> None:
    drive("python", 1, [{"run_name": "dense", "stop_at": SWITCH - 1}], tmp_path)
    state, run = load_state(find_checkpoint(tmp_path / "runs" / "dense"))
    assert (state.step, state.phase, state.masks) == (SWITCH - 1, "dense", None)
    assert state.samples_seen == (SWITCH - 1) * 8
    assert state.switch["rule"]["check"] == 2
    assert (run["world_size"], run["zero_stage"]) == (1, 0)

    drive("python", 1, [{"resume": str(tmp_path / "runs" / "dense"), "stop_at": SWITCH}], tmp_path)
    state, _ = load_state(find_checkpoint(tmp_path / "runs" / "dense"))
    assert (state.step, state.phase, state.switch_step) == (SWITCH, "sparse", SWITCH)
    assert state.masks is not None
    assert [tuple(mask.shape) for mask in state.masks] == [(8, 8), (8, 8)]
    assert all(mask.diagonal().all() for mask in state.masks)


def test_resumed_with_other_ranks_and_stages(tmp_path: Path) -> None:
    """Sessions of two ranks, then of one, then of two: each resumes what the one before left."""
    runs = tmp_path / "runs"
    # To one rank; from one rank to two; from stage to stage. Stage 1 is as stage 2.
    stages = (0, 2, 3)
    down = [{"run_name": f"down{s}", "stage": s, "stop_at": SWITCH - 1} for s in stages]
    moved = {"moved21": (2, 1), "moved20": (2, 0), "moved31": (3, 1), "moved03": (0, 3)}
    leave = [
        {"run_name": name, "stage": there, "stop_at": SWITCH - 1}
        for name, (there, _) in moved.items()
    ]
    up = [{"run_name": f"up{s}", "stage": s, "stop_at": SWITCH + 1} for s in (0, 2, 3)]

    def go_on(name: str, stage: int) -> dict[str, Any]:
        return {"resume": str(runs / name), "stage": stage}

    arrive = [go_on(name, here) for name, (_, here) in moved.items()]
    drive("torchrun", 2, [{"run_name": "whole"}, *down, *leave, *arrive], tmp_path)
    drive("python", 1, [*(go_on(f"down{s}", s) for s in stages), *up], tmp_path)
    drive("torchrun", 2, [go_on(f"up{s}", s) for s in (0, 2, 3)], tmp_path)

    whole = losses(runs / "whole")
    for name in [f"down{s}" for s in stages] + [f"up{s}" for s in (0, 2, 3)] + ["moved21"]:
        assert digest(runs / name) == digest(runs / "whole"), name
        # The optimizer's state moves: only sums over ranks are rounded in another order.
        assert losses(runs / name) == pytest.approx(whole, rel=1e-4), name
    for name in ("moved20", "moved31", "moved03"):
        # Weights, masks and position move, a new optimizer starts: the next loss is the same.
        ours = losses(runs / name)
        assert ours.keys() == whole.keys()
        assert ours[SWITCH] == pytest.approx(whole[SWITCH], rel=1e-4), name
        assert summary(runs / name)["phase"] == "sparse"
        assert not list((runs / name / "checkpoints").glob(".*"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("to_gpu", [False, True], ids=["gpu-to-cpu", "cpu-to-gpu"])
def test_resumed_on_another_device(to_gpu: bool, tmp_path: Path) -> None:
    stages, runs = (0, 1, 2, 3), tmp_path / "runs"
    whole = [{"run_name": f"whole{s}", "stage": s} for s in stages]
    stopped = [{"run_name": f"moved{s}", "stage": s, "stop_at": SWITCH - 1} for s in stages]
    drive("python", 1, [*whole, *stopped], tmp_path, gpu=not to_gpu)
    gone_on = [{"resume": str(runs / f"moved{s}"), "stage": s} for s in stages]
    drive("python", 1, gone_on, tmp_path, gpu=to_gpu)
    for stage in stages:
        ours, theirs = losses(runs / f"moved{stage}"), losses(runs / f"whole{stage}")
        assert ours.keys() == theirs.keys()
        # The devices round differently, about 1e-6 a step, amplified by training.
        assert ours == pytest.approx(theirs, rel=1e-3), stage
        assert summary(runs / f"moved{stage}")["phase"] == "sparse"
