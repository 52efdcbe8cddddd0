"""Checkpoints: DeepSpeed's own files, the weights alone, and where the run stands.

    checkpoints/latest                       name of the newest one
    checkpoints/best                         name of the one with the best validation accuracy
    checkpoints/step-000500/                 written under a temporary name, then renamed
        state.pt                             TrainingState
        weights.pt                           the model's state dict on the CPU
        …                                    DeepSpeed's files: parameters, optimizer state, ranks

state.pt and weights.pt hold tensors and plain values, and are read with weights_only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spion_ds.attention.layout import pack_mask, unpack_mask
from spion_ds.errors import CheckpointError
from spion_ds.training.config import RunConfig
from spion_ds.training.deepspeed_config import zero_stage
from spion_ds.training.ranks import Agreement, Ranks, import_deepspeed

FORMAT = 1
_INCOMPLETE = ".incomplete"
# What a resumed run must share with the run that saved: the rest may be overridden.
_IDENTITY = ("task", "data", "model", "sparse_attention")


@dataclass
class TrainingState:
    """What a run needs to go on as if it had not stopped, beside weights and optimizer.

    Attributes:
        step: optimizer steps taken.
        samples_seen: the data position: samples drawn from the shuffled order.
        seed: with ``step``, the state of all random draws (they are counter-based).
        switch_step: how many steps were dense; None in the dense phase.
        masks: one (n, n) bool mask a layer, None in the dense phase.
        rule: the transition rule's memory.
        best_step, best_accuracy: of the best evaluation of the present phase.
    """

    step: int = 0
    samples_seen: int = 0
    seed: int = 0
    switch_step: int | None = None
    masks: list[Tensor] | None = None
    rule: dict[str, Any] = field(default_factory=dict)
    best_step: int | None = None
    best_accuracy: float = -1.0

    @property
    def phase(self) -> str:
        """``"dense"`` or ``"sparse"``."""
        return "dense" if self.masks is None else "sparse"


def identity(config: RunConfig) -> dict[str, Any]:
    """Return what a checkpoint must share with the run that loads it."""
    plain = config.to_mapping()
    return {key: plain[key] for key in _IDENTITY}


def save_checkpoint(
    engine: Any,
    root: Path,
    state: TrainingState,
    config: RunConfig,
    ranks: Ranks,
    agreement: Agreement,
) -> Path:
    """Save on all ranks; the checkpoint appears under its name only when it is whole.

    Returns:
        The checkpoint's folder, ``root / "step-<step>"``.
    """
    name = f"step-{state.step:06d}"
    incomplete = root / _INCOMPLETE
    if ranks.is_first:
        incomplete.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(incomplete / name, ignore_errors=True)
    agreement.barrier()
    engine.save_checkpoint(str(incomplete), tag=name, save_latest=False)
    weights = gather_weights(engine, config)
    if ranks.is_first:
        torch.save(weights, incomplete / name / "weights.pt")
        torch.save(_pack(state, config, ranks), incomplete / name / "state.pt")
    agreement.barrier()
    if ranks.is_first:
        _sync_tree(incomplete / name)
        if (root / name).exists():
            os.rename(root / name, incomplete / f"{name}.replaced")
        os.rename(incomplete / name, root / name)
        for extra in incomplete.glob("*.py"):  # DeepSpeed's recovery script belongs beside them
            os.replace(extra, root / extra.name)
        shutil.rmtree(incomplete)
        write_pointer(root, "latest", name)
    agreement.barrier()
    return root / name


def write_pointer(root: Path, pointer: str, name: str) -> None:
    """Make ``root/pointer`` ("latest" or "best") name a checkpoint, atomically."""
    temporary = root / f".{pointer}"
    temporary.write_text(name)
    os.replace(temporary, root / pointer)


def prune_checkpoints(root: Path, keep: int) -> None:
    """Remove the run's own checkpoints except the newest ``keep`` and the best."""
    names = sorted(path.name for path in root.glob("step-*"))
    spared = set(names[-keep:])
    with contextlib.suppress(OSError):
        spared.add((root / "best").read_text())
    for name in set(names) - spared:
        shutil.rmtree(root / name)


def find_checkpoint(place: Path, pointer: str = "latest") -> Path:
    """Return the checkpoint folder that ``place`` means: a run, or a checkpoint itself.

    Raises:
        CheckpointError: there is none.
    """
    if (place / "state.pt").is_file():
        return place
    root = place / "checkpoints"
    if (root / pointer).is_file():
        found = root / (root / pointer).read_text().strip()
        if (found / "state.pt").is_file():
            return found
        raise CheckpointError(
            f"{root / pointer} names {found.name}, which is not there or not whole; name another "
            f"checkpoint of {root} outright"
        )
    raise CheckpointError(
        f"there is no checkpoint in {place}; give a run's folder (runs/NAME, with checkpoints/"
        f"{pointer}) or a checkpoint's (with state.pt), or start anew without --resume"
    )


def load_state(folder: Path) -> tuple[TrainingState, dict[str, Any]]:
    """Return the training state of a checkpoint, and what its run was.

    The second value has ``identity``, ``batch_size``, ``world_size`` and ``zero_stage``.

    Raises:
        CheckpointError: the file is damaged or of another format.
    """
    values = _load(folder / "state.pt")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(
            f"{folder / 'state.pt'} is not a spion_ds checkpoint of format {FORMAT}"
        )
    packed = values.pop("masks")
    state = TrainingState(**values["state"])
    if packed is not None:
        shape = tuple(packed["shape"])
        state.masks = [unpack_mask(bytes(bits.tolist()), shape) for bits in packed["bits"]]
    return state, values["run"]


def load_weights(folder: Path) -> dict[str, Tensor]:
    """Return the model's state dict on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    return _load(folder / "weights.pt")


def check_resumable(folder: Path, run: dict[str, Any], config: RunConfig, ranks: Ranks) -> None:
    """Raise CheckpointError unless ``config`` can go on from this checkpoint exactly."""
    ours = identity(config)
    for section in _IDENTITY:
        if run["identity"][section] != ours[section]:
            raise CheckpointError(
                f"the checkpoint {folder} is of another {section}: "
                f"{_difference(run['identity'][section], ours[section])}; resume it with its own "
                "recipe (leave --recipe out), or start a new run"
            )
    if run["batch_size"] != config.batches.total or run["seed"] != config.training.seed:
        raise CheckpointError(
            f"the checkpoint {folder} was saved with training.batch_size={run['batch_size']} and "
            f"training.seed={run['seed']}; the data order depends on both, so resume with these"
        )
    stage = zero_stage(config.resolved)
    if (run["zero_stage"], run["world_size"]) != (stage, ranks.world_size) and not (
        run["zero_stage"] == stage == 0
    ):
        raise CheckpointError(
            f"the checkpoint {folder} was saved by {run['world_size']} rank(s) at ZeRO stage "
            f"{run['zero_stage']}, and this is {ranks.world_size} rank(s) at stage {stage}; its "
            "optimizer state fits only the same number and stage (at stage 0, any number)"
        )


def gather_weights(engine: Any, config: RunConfig) -> dict[str, Tensor]:
    """Return the whole model's state dict on the CPU; call it on all ranks, use it on rank 0."""
    parameters = list(engine.module.parameters())
    gathered: Any = contextlib.nullcontext()
    if zero_stage(config.resolved) == 3:
        gathered = import_deepspeed().zero.GatheredParameters(parameters)
    with gathered:
        return {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in engine.module.state_dict().items()
        }


def _pack(state: TrainingState, config: RunConfig, ranks: Ranks) -> dict[str, Any]:
    plain = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    masks = plain.pop("masks")
    packed = None
    if masks is not None:
        bits = [torch.frombuffer(bytearray(pack_mask(m)), dtype=torch.uint8) for m in masks]
        packed = {"shape": list(masks[0].shape), "bits": bits}
    run = {
        "identity": identity(config),
        "batch_size": config.batches.total,
        "seed": config.training.seed,
        "world_size": ranks.world_size,
        "zero_stage": zero_stage(config.resolved),
    }
    return {"format": FORMAT, "state": plain, "masks": packed, "run": run}


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; use another checkpoint") from error
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint ({str(error).splitlines()[0]}); use another "
            "checkpoint of the run"
        ) from error


def _difference(theirs: Any, ours: Any) -> str:
    if not isinstance(theirs, dict) or not isinstance(ours, dict):
        return f"{theirs} there, {ours} here"
    keys = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    return ", ".join(f"{key} is {theirs.get(key)} there and {ours.get(key)} here" for key in keys)


def _sync_tree(folder: Path) -> None:
    """Flush a folder's files and names to disk, so that the rename cannot outrun them."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
