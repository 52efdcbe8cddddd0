"""What several ranks must show before they are timed: one rank's numbers, and life after a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rank_runs import Job, Killed, Workplace, losses, masks, rows

from spion_ds.distributed.heartbeat import LOST_RANK_EXIT
from spion_ds.training.config.recipe_files import read_recipe
from spion_ds.training.config.run import RunConfig, build_run_config

STAGES = (0, 1, 2, 3)
EVERY_STEP = ("training.log_every=1",)
KILL_STAGE = 2
# Relative difference of a step's loss. fp32: sums in another order, which AdamW spreads, as its
# first steps are as long as the learning rate whatever the gradient's size. Half precision: five
# times the rounding of a bfloat16 (2^-8), for the same reason.
LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}
# Blocks that one run keeps and the other does not, to those that one rank keeps. fp32: none. Half
# precision: blocks whose value is within rounding of the quantile, or of the neighbour beside which
# the flood fill passes, may fall on either side.
BLOCK_TOLERANCE = {"fp32": 0.0, "bf16": 0.05, "fp16": 0.05}


@dataclass(frozen=True)
class Subject:
    """A recipe to train, on how many ranks.

    Attributes:
        overrides: of the recipe, all that every run of it has.
        config: of one rank.
        counts: numbers of ranks, rising.
    """

    recipe: str
    overrides: tuple[str, ...]
    config: RunConfig
    counts: tuple[int, ...]

    def job(self, name: str, ranks: int, *overrides: str, stage: int = 0) -> Job:
        """Return a run of it."""
        return Job(name, ranks, stage, self.recipe, (*self.overrides, *overrides))


@dataclass(frozen=True)
class Comparison:
    """How a run differs from the one it should equal.

    Attributes:
        same_step: whether both switched after the same step.
        blocks: that one keeps and the other does not, over all layers.
        kept: blocks that the first keeps.
        dense, sparse: largest relative difference of a step's loss in each phase.
    """

    same_step: bool
    blocks: int
    kept: int
    dense: float
    sparse: float

    def agrees(self, precision: str) -> bool:
        """Return whether the differences are within the tolerances."""
        return (
            self.same_step
            and self.blocks <= BLOCK_TOLERANCE[precision] * self.kept
            and max(self.dense, self.sparse) <= LOSS_TOLERANCE[precision]
        )

    def cells(self, precision: str) -> list[str]:
        """Return the table's cells."""
        return [
            f"{self.blocks} of {self.kept}",
            f"{self.dense:.1e}",
            f"{self.sparse:.1e}",
            "yes" if self.agrees(precision) else "**no**",
        ]


def compare(whole: Path, other: Path) -> Comparison:
    """Compare two finished runs of the same steps.

    Raises:
        SystemExit: one has other steps in its log.
    """
    theirs, ours = losses(whole), losses(other)
    if theirs.keys() != ours.keys():
        raise SystemExit(f"{whole} and {other} have logged different steps; remove both, run again")
    [first], [second] = rows(whole, "switch"), rows(other, "switch")
    difference = {step: abs(ours[step] - loss) / abs(loss) for step, loss in theirs.items()}
    pairs = list(zip(masks(whole), masks(other), strict=True))
    return Comparison(
        first["step"] == second["step"],
        sum(int((a ^ b).sum()) for a, b in pairs),
        sum(int(a.sum()) for a, _ in pairs),
        max(value for step, value in difference.items() if step <= first["step"]),
        max(value for step, value in difference.items() if step > first["step"]),
    )


def agreement(place: Workplace, subject: Subject) -> tuple[list[str], bool]:
    """Train on one rank and on several at each ZeRO stage; return the table, and if all agree.

    One rank takes its batch in the micro-batches that the others have, so that every sample meets
    the same kernels and only sums over samples have another order.
    """
    precision = subject.config.training.precision
    lines = table("ZeRO", "ranks", "blocks that differ", "dense loss", "sparse loss", "agree")
    ranks, sound = subject.counts[-1], True
    micro = configure(subject.recipe, subject.overrides, ranks, place.device).batches.micro
    in_parts = f"training.micro_batch_size={micro}"
    for stage in STAGES:
        alone = subject.job(f"one-zero{stage}", 1, *EVERY_STEP, in_parts, stage=stage)
        many = subject.job(f"all-zero{stage}", ranks, *EVERY_STEP, stage=stage)
        found = compare(place.train(alone), place.train(many))
        sound &= found.agrees(precision)
        lines.append(row(stage, ranks, *found.cells(precision)))
        place.say(lines[-1])
    return lines, sound


def survival(place: Workplace, subject: Subject) -> tuple[list[str], bool]:
    """Kill a rank in the sparse phase; go on with all ranks, and with half of them."""
    ranks, training = subject.counts[-1], subject.config.training
    precision = training.precision
    switch = subject.config.transition.max_dense_steps or 0
    sparse_steps = training.steps - switch
    every = max(1, sparse_steps // 4)
    overrides = (*EVERY_STEP, f"training.checkpoint_every={every}")
    job = subject.job("killed", ranks, *overrides, stage=KILL_STAGE)
    # Between two checkpoints.
    killed = _kill_once(place, job, switch + sparse_steps // 2 + every // 2)
    whole = place.run_folder(f"all-zero{KILL_STAGE}")
    sound = set(killed.codes) == {LOST_RANK_EXIT}
    lines = [
        f"Rank {ranks - 1} of {ranks} got SIGKILL in the sparse phase (ZeRO {KILL_STAGE}, a "
        f"checkpoint every {every} steps). The last logged step was "
        f"{killed.reached}, the last checkpoint of step {killed.saved}: "
        f"{max(0, killed.reached - killed.saved)} logged step(s) lost, which are taken again. The "
        f"others ended in {killed.seconds:.1f} s with codes {sorted(set(killed.codes))} "
        f"({LOST_RANK_EXIT}: another rank was lost). Against the undisturbed run (other ranks "
        "go on through DeepSpeed's universal checkpoint):",
        "",
        *table("gone on with", "blocks that differ", "dense loss", "sparse loss", "agree"),
    ]
    for count in (ranks, ranks // 2):
        name = f"killed-on-{count}"
        _copy(place.run_folder("killed"), place.run_folder(name))
        resumed = place.train(dataclasses.replace(job, name=name, ranks=count))
        found = compare(whole, resumed)
        sound &= found.agrees(precision)
        lines.append(row(f"{count} rank(s)", *found.cells(precision)))
        place.say(lines[-1])
    return lines, sound


def _kill_once(place: Workplace, job: Job, at: int) -> Killed:
    """Return what the kill did, from the folder if it was done before."""
    kept = place.folder / "killed.json"
    if not kept.is_file():
        shutil.rmtree(place.run_folder(job.name), ignore_errors=True)
        write_json(kept, dataclasses.asdict(place.kill(job, job.ranks - 1, at)))
    return Killed(**json.loads(kept.read_text()))


def _copy(run: Path, target: Path) -> None:
    if not target.exists():
        partial = target.with_name(f".{target.name}")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(run, partial)
        partial.rename(target)


def configure(recipe: str, overrides: Sequence[str], ranks: int, device: str) -> RunConfig:
    """Return the configuration of a run on ``ranks`` ranks."""
    return build_run_config(
        read_recipe(recipe), None, overrides, world_size=ranks, device_type=device
    )


def table(*names: str) -> list[str]:
    """Return a table's head."""
    return [row(*names), "|" + " --- |" * len(names)]


def row(*cells: object) -> str:
    """Return a table's row."""
    return f"| {' | '.join(map(str, cells))} |"


def write_json(path: Path, value: object) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(partial, path)
