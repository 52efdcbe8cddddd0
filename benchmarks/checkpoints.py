"""What a checkpoint costs: seconds a save against seconds a step, of a recipe as it is trained.

    python benchmarks/checkpoints.py --recipe listops --ds_config ds_configs/zero2.json
    python benchmarks/checkpoints.py --recipe listops model.dim=1024 model.ffn_dim=4096 …

Takes 24 steps, dense then sparse, with a checkpoint every 4, and prints the share of time that
saving takes at the recipe's checkpoint_every. Each save is timed from the end of the step before it
to the beginning of the next, on rank 0: gathering, writing, checksums, flushing, pruning.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timing import machine_lines

from spion_ds.distributed.ending import run_command
from spion_ds.distributed.process_group import discover_ranks, end_process
from spion_ds.training.config.recipe_files import read_recipe
from spion_ds.training.config.run import build_run_config
from spion_ds.training.session import TrainOptions, train
from spion_ds.training.trainer import Trainer

SHORT = [
    "training.steps=24",
    "training.checkpoint_every=4",
    "training.evaluate_every=24",
    "training.log_every=2",
    "transition.rule=distance",
    "transition.check_every=4",
    "transition.switch_step=null",
    "transition.max_dense_steps=12",
    "optimizer.warmup_steps=2",
    "data.validation=8",
    "data.test=8",
]


def main() -> int:
    """Train and report; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="listops")
    parser.add_argument("--ds_config")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    saves: list[float] = []
    original = Trainer._save

    def timed(trainer: Trainer, best: bool) -> None:
        _finish_device()
        began = time.perf_counter()
        original(trainer, best)
        saves.append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory(prefix="checkpoints-", dir=".") as name:
        overrides = [*SHORT, *options.overrides]
        run = TrainOptions(
            recipe=options.recipe,
            ds_config=options.ds_config,
            overrides=overrides,
            run_dir=Path(name),
            run_name="r",
        )
        with mock.patch.object(Trainer, "_save", timed):
            code = run_command(lambda: train(run))
        if code == 0 and discover_ranks().is_first:
            report(options.recipe, options.overrides, saves, Path(name) / "r")
    return code


def report(recipe: str, overrides: list[str], saves: list[float], run: Path) -> None:
    """Print the table."""
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    config = build_run_config(
        read_recipe(recipe), None, overrides, world_size=1, device_type=_device()
    )
    every = config.training.checkpoint_every
    checkpoint = sorted((run / "checkpoints").glob("step-*"))[-1]
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    # The first save makes folders and warms the files' caches up.
    save = statistics.median(saves[1:])
    print("\n".join(machine_lines()))
    print("| phase | step, ms | a save, ms | MB | checkpoint_every | share of time saving |")
    print("| --- | --- | --- | --- | --- | --- |")
    for phase in ("dense", "sparse"):
        step = summary[phase]["seconds_per_step"]
        share = save / (save + every * step)
        print(
            f"| {phase} | {1000 * step:.1f} | {1000 * save:.0f} ({1000 * min(saves):.0f} to "
            f"{1000 * max(saves):.0f}) | {size / 1e6:.1f} | {every} | {share:.2%} |"
        )


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _finish_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    end_process(main())
