"""Checkpoints: DeepSpeed's own files, the weights alone, and where the run stands.

    checkpoints/latest                       name of the newest one
    checkpoints/best                         name of the one with the best validation accuracy
    checkpoints/step-000500/                 written under a temporary name, then renamed
        manifest.json                        sizes and checksums of the files
        state.pt                             TrainingState
        weights.pt                           the model's state dict on the CPU
        …                                    DeepSpeed's files: parameters, optimizer state, ranks

state.pt and weights.pt hold tensors and plain values, and are read with weights_only.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spion_ds.distributed.agreement import Agreement
from spion_ds.distributed.process_group import Ranks
from spion_ds.errors import CheckpointError
from spion_ds.models.weights import check_weights
from spion_ds.switching.masks import pack_entry, unpack_entry
from spion_ds.training.checkpoints.files import (
    checkpoint_name,
    publish,
    read_checked,
    write_manifest,
)
from spion_ds.training.config.deepspeed import zero_stage
from spion_ds.training.config.run import RunConfig
from spion_ds.training.step.deepspeed_engine import (
    DeepSpeedEngine,
    could_run_code,
    restricted_loads,
)

# 1 had one shape for the masks of all layers, and a rule's memory in place of a driver's state.
FORMAT, _READABLE = 2, (1, 2)
_INCOMPLETE = ".incomplete"
# What a resumed run must share with the run that saved: the rest may be overridden.
IDENTITY = ("task", "data", "model", "sparse_attention")


@dataclass
class TrainingState:
    """What a run needs to go on as if it had not stopped, beside weights and optimizer.

    Attributes:
        step: optimizer steps taken.
        samples_seen: the data position: samples drawn from the shuffled order.
        seed: with ``step``, the state of all random draws (they are counter-based).
        switch_step: how many steps were dense; None in the dense phase.
        masks: one bool mask a layer, (n, n) or (heads, n, n); None in the dense phase.
        switch: the state of the driver of the switch: the rule's memory, and masks; {} without one.
        best_step, best_accuracy: of the best evaluation of the present phase.
    """

    step: int = 0
    samples_seen: int = 0
    seed: int = 0
    switch_step: int | None = None
    masks: list[Tensor] | None = None
    switch: dict[str, Any] = field(default_factory=dict)
    best_step: int | None = None
    best_accuracy: float = -1.0

    @property
    def phase(self) -> str:
        """``"dense"`` or ``"sparse"``."""
        return "dense" if self.masks is None else "sparse"


def identity(config: RunConfig) -> dict[str, Any]:
    """Return what a checkpoint must share with the run that loads it."""
    plain = config.to_mapping()
    del plain["model"]["activation_checkpointing"]  # changes no result
    return {key: plain[key] for key in IDENTITY}


def save_checkpoint(
    engine: DeepSpeedEngine,
    root: Path,
    state: TrainingState,
    config: RunConfig,
    ranks: Ranks,
    agreement: Agreement,
) -> Path:
    """Save on all ranks; the checkpoint appears under its name only when it is whole.

    Returns:
        The checkpoint's folder, ``root / "step-<step>"``.

    Raises:
        CheckpointError: on all ranks, if one of them cannot write; earlier checkpoints stay.
    """
    name = checkpoint_name(state.step)
    incomplete = root / _INCOMPLETE
    agreement.from_first(lambda: _writing(root, lambda: _start_anew(incomplete / name)))
    failures = engine.save_checkpoint(incomplete / name)
    weights = engine.weights()

    def finish() -> None:
        _save(weights, incomplete / name / "weights.pt")
        _save(_pack(state, config, ranks), incomplete / name / "state.pt")
        write_manifest(incomplete / name, state.step, state.best_step)
        for extra in incomplete.glob("*.py"):  # DeepSpeed's recovery script belongs beside them
            os.replace(extra, root / extra.name)
        publish(incomplete / name, root / name)
        shutil.rmtree(incomplete, ignore_errors=True)

    try:
        agreement.together(lambda: _raise_first(root, failures))
        agreement.from_first(lambda: _writing(root, finish))
    except CheckpointError:
        if ranks.is_first:  # makes room on a full disk
            shutil.rmtree(incomplete, ignore_errors=True)
        raise
    return root / name


def load_state(folder: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Return the training state of a checkpoint, and what its run was.

    The second value has ``identity``, ``batch_size``, ``micro_batch_size``, ``seed``,
    ``world_size``, ``zero_stage``, ``precision`` and, unless an older version saved it,
    ``threads``.

    Raises:
        CheckpointError: the file is damaged or of another format.
    """
    values = _load(folder, "state.pt")
    if not isinstance(values, dict) or values.get("format") not in _READABLE:
        raise CheckpointError(
            f"{folder / 'state.pt'} is not a spion_ds checkpoint of format "
            f"{' or '.join(map(str, _READABLE))}"
        )
    try:
        packed = values.pop("masks")
        if values["format"] == 1:  # its rule's memory is no driver's state
            del values["state"]["rule"]
        state = TrainingState(**values["state"])
        _check_types(state, values["run"])
        if packed is not None:
            if values["format"] == 1:
                packed = [{"shape": packed["shape"], "bits": bits} for bits in packed["bits"]]
            state.masks = [unpack_entry(entry) for entry in packed]
        return state, values["run"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / 'state.pt'} does not hold a training state ({_first_line(error)})"
        ) from error


def _check_types(state: TrainingState, run: Any) -> None:
    """Raise TypeError unless the values are of the types that are saved."""
    whole, optional = ("step", "samples_seen", "seed"), ("switch_step", "best_step")
    numbers = [getattr(state, name) for name in whole]
    numbers += [value for name in optional if (value := getattr(state, name)) is not None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise TypeError("its steps and counts are no whole numbers")
    if not isinstance(state.best_accuracy, float) or not isinstance(state.switch, dict):
        raise TypeError("best_accuracy is no number, or switch no mapping")
    counts = ("batch_size", "world_size", "zero_stage", "seed")
    if not all(type(run[name]) is int for name in counts) or not isinstance(run["precision"], str):
        raise TypeError("its run has sizes of another type")
    if run["world_size"] < 1 or run["batch_size"] < 1:
        raise ValueError("its run has no rank, or no sample a step")
    rule = state.switch.get("rule", {})
    before = rule.get("before") if isinstance(rule, dict) else rule
    if not isinstance(rule, dict) or not all(isinstance(x, Tensor) for x in before or []):
        raise TypeError("the memory of its rule is of another type")
    if not all(isinstance(run["identity"][section], dict | str) for section in IDENTITY):
        raise TypeError("its run has no identity")


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the model's state dict on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, or holds weights that are not finite.
    """
    weights = _load(folder, "weights.pt")
    check_weights(weights, str(folder / "weights.pt"))
    return weights


def check_harmless(folder: Path) -> None:
    """Read a checkpoint's files with a restricted unpickler, before any work starts.

    DeepSpeed reads them in the same way later: what is swapped in meanwhile does not run either.

    Raises:
        CheckpointError: one names anything but tensors, plain values and DeepSpeed's own records,
            so that reading it could run code.
    """
    with restricted_loads():
        for path in sorted(folder.rglob("*.pt")):
            _check_harmless_file(path)


def _check_harmless_file(path: Path) -> None:
    try:  # mapped: the tensors themselves are not read
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises many kinds
        # The machine's, not the file's; EINVAL is what a file that is cut off gives.
        is_file = isinstance(error, OSError) and error.errno == errno.EINVAL
        if isinstance(error, OSError | MemoryError) and not is_file:
            raise
        raise could_run_code(str(path), error) from error


def _pack(state: TrainingState, config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    plain = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    masks = plain.pop("masks")
    packed = None if masks is None else [pack_entry(mask) for mask in masks]
    run = {
        "identity": identity(config),
        "batch_size": config.batches.total,
        "micro_batch_size": config.batches.micro,
        "seed": config.training.seed,
        "world_size": ranks.world_size,
        "zero_stage": zero_stage(config.resolved),
        "precision": config.training.precision,
        "threads": torch.get_num_threads(),
    }
    return {"format": FORMAT, "state": plain, "masks": packed, "run": run}


def _load(folder: Path, name: str) -> Any:
    content = io.BytesIO(read_checked(folder, name))  # what is checked is what is used
    try:
        return torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(
            f"{folder / name} is damaged or not a checkpoint ({_first_line(error)}); use another "
            "checkpoint of the run"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _start_anew(folder: Path) -> None:
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)


def _save(values: Any, path: Path) -> None:
    # Through a file of Python's, which reports a full disk as what it is.
    with path.open("wb") as file:
        torch.save(values, file)


def _writing(root: Path, work: Callable[[], None]) -> None:
    try:
        work()
    except (OSError, RuntimeError) as error:
        _raise_first(root, [str(error)])


def _raise_first(root: Path, failures: list[str]) -> None:
    if failures:
        # A writer of PyTorch's does not say that the disk is full.
        free = f"{shutil.disk_usage(root).free / 2**20:,.1f} MiB are free there"
        raise CheckpointError(
            f"a checkpoint cannot be written to {root}: {failures[0].splitlines()[0]}; {free}; the "
            "ones before it are untouched: make room, and go on with --resume"
        )
