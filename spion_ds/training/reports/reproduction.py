"""Trains recipes × attentions × seeds, one process after the other, and puts them in one table.

Every run is what launch/train.py does with --resume auto: what is finished is left alone, what
was interrupted goes on, and a time limit ends the present run with a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from spion_ds.distributed.process_group import discover_ranks
from spion_ds.distributed.stopping import Stopped, StopRequest
from spion_ds.durable_files import replace_text
from spion_ds.errors import ConfigError, SpionError
from spion_ds.settings import read_dataclass, require
from spion_ds.training.config.recipe_files import read_deepspeed_json, read_recipe
from spion_ds.training.config.run import RunConfig, build_run_config
from spion_ds.training.config.strict_files import read_yaml
from spion_ds.training.reports.results import RunResult, read_result, results_table


@dataclass(frozen=True)
class Plan:
    """Which runs: every recipe with every attention and every seed.

    Attributes:
        recipes: names or paths, as ``launch/train.py --recipe`` takes them.
        attentions: names, as its ``--attention`` takes them; without any, the recipes' own.
        seeds: of ``training.seed``.
        overrides: for all runs.
    """

    recipes: tuple[str, ...]
    attentions: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    overrides: tuple[str, ...] = ()

    def validate(self) -> None:
        """Raise ConfigError unless there is something to run."""
        for name in ("recipes", "seeds"):
            require(bool(getattr(self, name)), name, getattr(self, name), "at least one")


@dataclass(frozen=True)
class ReproduceOptions:
    """What ``launch/reproduce.py`` was asked to do.

    Attributes:
        plan: the runs.
        train: the script that trains, launch/train.py.
        run_dir: folder that holds the runs, and the table.
        data_dir: folder that holds the data caches.
        ds_config: DeepSpeed JSON of all runs, None for the recipes' own.
        launcher: words before the script, e.g. ``"torchrun --nproc_per_node 4"``; None is one
            process.
        minutes: after how many the present run is asked to save and stop; None for no limit.
        table_only: whether nothing is trained, and only the table is written.
    """

    plan: Plan
    train: Path
    run_dir: Path = Path("runs/reproduce")
    data_dir: Path = Path("data")
    ds_config: str | None = None
    launcher: str | None = None
    minutes: float | None = None
    table_only: bool = False


@dataclass(frozen=True)
class Run:
    """One run of a plan.

    Attributes:
        recipe, attention, seed: where it stands in the plan; no attention is the recipe's own.
        folder: where it is or will be.
        config: its configuration; with a launcher, on a number of ranks that fits.
        overrides: as the command line takes them.
    """

    recipe: str
    attention: str | None
    seed: int
    folder: Path
    config: RunConfig
    overrides: tuple[str, ...]


def read_plan(
    path: str | None,
    recipes: Sequence[str] = (),
    attentions: Sequence[str] = (),
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
) -> Plan:
    """Return the plan of a YAML file, with what the command line gives in its place.

    Args:
        path: the file, None for none.
        recipes, attentions, seeds: instead of the file's.
        overrides: after the file's.

    Raises:
        ConfigError: the file cannot be read or has an unknown key, or there is nothing to run.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = read_yaml(Path(path), f"the plan {path!r}")
    given = {"recipes": list(recipes), "attentions": list(attentions), "seeds": list(seeds)}
    values = {**values, **{name: value for name, value in given.items() if value}}
    values["overrides"] = [*(values.get("overrides") or []), *overrides]
    if not values.get("recipes"):
        raise ConfigError("there are no recipes to run; name some with --recipes, or in a plan")
    plan = read_dataclass(Plan, values, "")
    plan.validate()
    return plan


def reproduce(options: ReproduceOptions) -> None:
    """Train what the plan has and is not finished, and write ``run_dir/results.md``.

    Raises:
        SpionError: the plan is wrong, or this is one of several ranks, before anything starts; or
            some runs failed, at the end.
        Stopped: the time was over, or a signal came; the same command goes on.
    """
    require(
        options.minutes is None or options.minutes > 0.0, "--minutes", options.minutes, "above 0"
    )
    ranks = discover_ranks().world_size
    if ranks > 1:
        raise ConfigError(
            f"launch/reproduce.py was started on {ranks} ranks; start one process, and name what "
            "starts the ranks of each run with --launcher"
        )
    runs = plan_runs(options)
    deadline = None if options.minutes is None else time.monotonic() + 60.0 * options.minutes
    failed, stopped = [], False
    with StopRequest() as request:
        for number, run in enumerate(runs if not options.table_only else [], start=1):
            if read_result(run.folder, run.config).finished:
                continue
            over = deadline is not None and time.monotonic() >= deadline
            if request.asked or over:
                stopped = True
                break
            print(f"run {number} of {len(runs)}: {run.folder.name}", flush=True)
            code = _train(_words(run, options), run.folder, deadline, lambda: request.asked)
            if code is None:
                stopped = True
                break
            if not read_result(run.folder, run.config).finished:
                failed.append(f"{run.folder.name} (exit code {code})")
            _write_table(options, runs)
    table = _write_table(options, runs)
    print(f"\n{table}\nwritten to {options.run_dir / 'results.md'}")
    if failed:
        raise SpionError(
            f"these runs did not finish: {', '.join(failed)}; the end of each one's output.log "
            "says why"
        )
    if stopped:
        print("stopped; start the same command again to go on")
        raise Stopped


def plan_runs(options: ReproduceOptions) -> list[Run]:
    """Return the runs of a plan, seed by seed, after checking all configurations.

    How many ranks a launcher starts is seen by the runs alone: they check that the batch divides
    among those.

    Raises:
        ConfigError: a configuration is wrong, two runs have one folder, or a finished run was
            made with another configuration.
    """
    plan = options.plan
    runs: list[Run] = []
    deepspeed = read_deepspeed_json(options.ds_config) if options.ds_config else None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started_alone = options.launcher is None and not options.table_only
    for seed in plan.seeds:
        for recipe in plan.recipes:
            for attention in plan.attentions or (None,):
                words = (*plan.overrides, f"training.seed={seed}")
                config = build_run_config(
                    read_recipe(recipe),
                    deepspeed,
                    words,
                    world_size=1 if started_alone else None,
                    device_type=device,
                    attention=attention,
                )
                folder = options.run_dir / f"{config.recipe}-seed{seed}"
                if folder in [run.folder for run in runs]:
                    raise ConfigError(
                        f"two runs of the plan would be {folder}; name each recipe, attention and "
                        "seed once, and give recipe files different names"
                    )
                _check_same(folder, config)
                runs.append(Run(recipe, attention, seed, folder, config, words))
    return runs


def _check_same(folder: Path, config: RunConfig) -> None:
    """Raise ConfigError if a run that is finished had another configuration."""
    if not (folder / "summary.json").is_file():
        return  # launch/train.py compares what it resumes
    theirs = read_yaml(folder / "config.yaml", str(folder / "config.yaml"))
    ours = config.to_mapping()
    for section in ours:
        if theirs.get(section) == ours[section] or section == "recipe":
            continue
        where = section
        if isinstance(ours[section], dict) and isinstance(theirs.get(section), dict):
            keys = [k for k in ours[section] if theirs[section].get(k) != ours[section][k]]
            where = ", ".join(f"{section}.{key}" for key in keys) or section
        raise ConfigError(
            f"{folder} is a finished run with another {where}; choose another --run_dir, or plan "
            "what it was"
        )


def _words(run: Run, options: ReproduceOptions) -> list[str]:
    launcher = [sys.executable] if options.launcher is None else shlex.split(options.launcher)
    words = [*launcher, str(options.train), "--recipe", run.recipe, "--resume", "auto"]
    words += ["--run_dir", str(options.run_dir), "--run_name", run.folder.name]
    words += ["--data_dir", str(options.data_dir)]
    if run.attention is not None:
        words += ["--attention", run.attention]
    if options.ds_config is not None:
        words += ["--ds_config", options.ds_config]
    return [*words, *run.overrides]


def _train(
    words: list[str], folder: Path, deadline: float | None, asked: Callable[[], bool]
) -> int | None:
    """Run one training process; return its exit code, None if it was asked to stop and did.

    Args:
        words: the command.
        folder: the run's, where output.log goes.
        deadline: when it is asked to stop, on the monotonic clock; None for never.
        asked: whether a signal asks to stop.
    """
    folder.mkdir(parents=True, exist_ok=True)
    told = False
    with (folder / "output.log").open("a") as log:
        # In a group of its own: Ctrl-C at the terminal reaches it through here, once.
        process = subprocess.Popen(
            words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1.0)
                over = deadline is not None and time.monotonic() >= deadline
                if (over or asked()) and not told:
                    told = True
                    _ask_to_stop(process)
        finally:
            _ask_to_stop(process)
    # Training that was just ending is not stopped by being asked to.
    return None if told and process.returncode != 0 else process.returncode


def _ask_to_stop(process: subprocess.Popen) -> None:
    """Send SIGTERM to a process and those it started, if it still runs."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def _write_table(options: ReproduceOptions, runs: Sequence[Run]) -> str:
    groups: dict[tuple[str, str], list[RunResult]] = {}
    for run in runs:
        result = read_result(run.folder, run.config)
        attention = run.attention or run.config.sparse_attention.mode
        groups.setdefault((run.recipe, attention), []).append(result)
    table = results_table(groups, options.plan.overrides)
    options.run_dir.mkdir(parents=True, exist_ok=True)
    replace_text(options.run_dir / "results.md", table)
    return table
