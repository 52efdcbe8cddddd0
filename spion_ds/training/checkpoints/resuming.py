"""How a run goes on from a checkpoint: exactly, through DeepSpeed's universal form, or anew.

DeepSpeed's optimizer files fit the number of ranks and the ZeRO stage that wrote them. Its
universal checkpoint carries them to another number of ranks at stages 1 and 2 (and between these)
and at stage 3; between other stages weights, masks and position move, and the optimizer starts
anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spion_ds.distributed.agreement import Agreement
from spion_ds.distributed.process_group import Ranks
from spion_ds.errors import CheckpointError
from spion_ds.training.checkpoints.checkpoint import IDENTITY, TrainingState, identity
from spion_ds.training.config.deepspeed import zero_stage
from spion_ds.training.config.run import RunConfig
from spion_ds.training.step.deepspeed_engine import DeepSpeedEngine

_UNIVERSAL = ".universal"


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from.

    Attributes:
        folder: the checkpoint.
        way: ``"exact"``, ``"universal"`` or ``"weights"`` (the optimizer starts anew).
        note: a sentence for the user where the way is not exact, else "".
    """

    folder: Path
    way: str = "exact"
    note: str = ""


def plan_resume(folder: Path, run: dict[str, Any], config: RunConfig, ranks: Ranks) -> Resume:
    """Return how ``config`` can go on from a checkpoint.

    Args:
        folder: the checkpoint.
        run: what its run was, from ``load_state``.
        config: the configuration to go on with.
        ranks: this process among those that go on.

    Raises:
        CheckpointError: it is another task, data, model, pattern, seed or batch size.
    """
    _check_same_run(folder, run, config)
    theirs, ours = run["zero_stage"], zero_stage(config.resolved)
    there = f"{run['world_size']} rank(s) at ZeRO stage {theirs}"
    here = f"{ranks.world_size} rank(s) at stage {ours}"
    same_precision = run["precision"] == config.training.precision
    if theirs == ours and same_precision and (ours == 0 or run["world_size"] == ranks.world_size):
        return Resume(folder, note=_threads_note(folder, run, ranks))
    if same_precision and (theirs == ours or {theirs, ours} == {1, 2}):
        return Resume(
            folder,
            "universal",
            f"{folder.name} was saved by {there}, and this is {here}: it goes through DeepSpeed's "
            "universal checkpoint, so rounding differs from an undisturbed run",
        )
    if not same_precision:
        there, here = f"{run['precision']}, {there}", f"{config.training.precision}, {here}"
    return Resume(
        folder,
        "weights",
        f"{folder.name} was saved by {there}, and this is {here}: weights, masks, learning rate "
        "and data position go on, but DeepSpeed cannot carry the optimizer's state over, so the "
        "optimizer starts anew",
    )


def _threads_note(folder: Path, run: dict[str, Any], ranks: Ranks) -> str:
    """Return a sentence where another number of threads, which adds in another order, goes on."""
    ours = torch.get_num_threads()
    theirs = run.get("threads", ours)
    if theirs == ours or ranks.device.type != "cpu":
        return ""
    return (
        f"{folder.name} was saved by ranks of {theirs} thread(s), and these have {ours}: on a CPU "
        "sums are rounded accordingly, so the bits differ from an undisturbed run's; "
        f"OMP_NUM_THREADS={theirs} avoids it"
    )


def check_switch_state(folder: Path, state: TrainingState, config: RunConfig) -> None:
    """Raise CheckpointError if the driver of the switch cannot go on from what it remembers.

    That is so where the rule remembers maps of another resolution than it will get, and where an
    earlier version saved the run.
    """
    if config.switches and not state.switch:
        raise CheckpointError(
            f"the checkpoint {folder} was saved by an earlier version, whose state of the switch "
            "this one cannot go on with; test or export it with launch/evaluate.py, or go on with "
            "the version that saved it"
        )
    before = state.switch.get("rule", {}).get("before")
    if not before:
        return
    found = "token" if before[0].shape[-1] == config.data.sequence_length else "block"
    if found != config.transition.resolution:
        raise CheckpointError(
            f"transition.resolution is {config.transition.resolution}, and the checkpoint {folder} "
            f"remembers maps of resolution {found}, with which the rule goes on; resume "
            f"it with transition.resolution={found}"
        )


def load_engine(engine: DeepSpeedEngine, resume: Resume, agreement: Agreement) -> None:
    """Let the engine go on from a checkpoint's files, in the way that was planned."""
    if resume.way == "exact":
        engine.load_checkpoint(resume.folder)
    elif resume.way == "universal":
        folder = make_universal(resume.folder, agreement)
        engine.load_checkpoint(folder)
        agreement.barrier()
        if agreement.is_first:
            drop_universal(folder)


def make_universal(folder: Path, agreement: Agreement) -> Path:
    """Convert a checkpoint on rank 0 and return the universal one, ``drop_universal``'s to remove.

    Raises:
        CheckpointError: on all ranks, if DeepSpeed cannot convert it.
    """
    target = folder.parent / _UNIVERSAL / folder.name
    agreement.from_first(lambda: _convert(folder, target))
    return target


def drop_universal(folder: Path) -> None:
    """Remove the universal form of a checkpoint."""
    shutil.rmtree(folder.parent, ignore_errors=True)


def _convert(folder: Path, target: Path) -> None:
    shutil.rmtree(target.parent, ignore_errors=True)
    words = [sys.executable, "-m", "spion_ds.training.checkpoints.universal"]
    words += ["--inject_missing_state", "--input_folder", str(folder)]
    words += ["--output_folder", str(target)]
    # Reads and writes files only, beside the ranks: without a GPU, few workers.
    words += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        shutil.rmtree(target.parent, ignore_errors=True)
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"DeepSpeed cannot make a universal checkpoint of {folder} ({last}); resume it with "
            "the ranks and the ZeRO stage that saved it"
        )


def check_identity(folder: Path, run: dict[str, Any], config: RunConfig) -> None:
    """Raise CheckpointError unless a checkpoint is of this task, data, model and pattern.

    Args:
        folder: the checkpoint.
        run: what its run was, from ``load_state``.
        config: what it is taken for, perhaps from a file that was edited.
    """
    ours = identity(config)
    for section in IDENTITY:
        if run["identity"][section] != ours[section]:
            raise CheckpointError(
                f"the checkpoint {folder} is of another {section}: "
                f"{_difference(run['identity'][section], ours[section])}; take it with its own "
                "recipe (config.yaml as the run wrote it, no --recipe), or start a new run"
            )


def _check_same_run(folder: Path, run: dict[str, Any], config: RunConfig) -> None:
    check_identity(folder, run, config)
    if run["batch_size"] != config.batches.total or run["seed"] != config.training.seed:
        raise CheckpointError(
            f"the checkpoint {folder} was saved with training.batch_size={run['batch_size']} and "
            f"training.seed={run['seed']}; the data order depends on both, so resume with these"
        )


def _difference(theirs: Any, ours: Any) -> str:
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return f"{theirs} there, {ours} here"
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return ", ".join(f"{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in keys)
