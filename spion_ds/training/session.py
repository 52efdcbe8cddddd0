"""From command-line options to a finished run: check everything, join the ranks, train, sum up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from spion_ds.data.baselines import majority_baseline
from spion_ds.data.storage.cache import Dataset
from spion_ds.data.tasks import get_task
from spion_ds.distributed.agreement import Agreement
from spion_ds.distributed.heartbeat import Watch
from spion_ds.distributed.meeting import prepare_together
from spion_ds.distributed.process_group import Ranks, check_devices, discover_ranks, join
from spion_ds.distributed.stopping import Stopped, StopRequest
from spion_ds.durable_files import read_json, replace_text
from spion_ds.errors import CheckpointError, ConfigError
from spion_ds.extension import cuda_operators_available, operators_available
from spion_ds.training.checkpoints.checkpoint import check_harmless, load_state
from spion_ds.training.checkpoints.files import find_checkpoint, has_checkpoint, is_checkpoint
from spion_ds.training.checkpoints.resuming import Resume, check_switch_state, plan_resume
from spion_ds.training.config.deepspeed import check_with_deepspeed, rehearse
from spion_ds.training.config.map_memory import check_map_memory
from spion_ds.training.config.recipe_files import read_deepspeed_json, read_recipe
from spion_ds.training.config.run import RunConfig, build_run_config
from spion_ds.training.config.strict_files import read_yaml
from spion_ds.training.reports.run_log import seconds_per_step
from spion_ds.training.reports.summary import summary_table
from spion_ds.training.run_folder import RunLock, continue_folder, new_folder
from spion_ds.training.step.evaluation import Evaluation, evaluate, load_checkpoint_model
from spion_ds.training.trainer import Trainer

DEFAULT_RECIPE = "listops_small"
AUTO = "auto"


@dataclass(frozen=True)
class TrainOptions:
    """What ``launch/train.py`` was asked to do.

    Attributes:
        recipe: name or path; None takes the resumed run's own, or the default.
        attention: name of an attention that replaces the recipe's; None keeps it.
        ds_config: path of a DeepSpeed JSON; None takes the run's own, or ZeRO stage 0.
        overrides: ``section.key=value`` texts.
        run_dir: folder that holds the runs.
        run_name: the run's name; None takes the recipe's.
        if_taken: ``"suffix"`` (the next free name) or ``"error"`` when the name is taken.
        data_dir: folder that holds the data caches.
        resume: run or checkpoint to go on from; "" means run_dir/run_name; "auto" means that too,
            and starts it there if it has no checkpoint yet; None starts a new run.
        stop_at: step after which to save and stop, None for the last.
    """

    recipe: str | None = None
    attention: str | None = None
    ds_config: str | None = None
    overrides: Sequence[str] = ()
    run_dir: Path = Path("runs")
    run_name: str | None = None
    if_taken: str = "suffix"
    data_dir: Path = Path("data")
    resume: str | None = None
    stop_at: int | None = None


def train(options: TrainOptions, request: StopRequest | None = None) -> None:
    """Train as ``options`` say, on this rank; every launcher calls it once a rank.

    Args:
        options: what to do.
        request: notes signals already; None for one of its own.

    Raises:
        SpionError: before training starts and before any file is written, for every mistake
            that can be seen by then; later, if training cannot go on.
        Stopped: a signal ended the run.
    """
    stopping = StopRequest() if request is None else contextlib.nullcontext(request)
    with stopping as request, RunLock() as lock:
        ranks = discover_ranks()
        checkpoint, config = prepare_together(
            ranks, lambda: _prepare(options, ranks, lock, request)
        )
        join(ranks)
        agreement = Agreement()
        with Watch(ranks, agreement, config.training.rank_timeout_seconds) as watch:
            if agreement.differing(checkpoint is None):
                raise ConfigError(
                    f"some ranks see a checkpoint to go on from and some do not; {options.run_dir} "
                    "must be a folder that all nodes share; if it is, start again"
                )
            if agreement.from_first(lambda: _finished(options, checkpoint, config)):
                return
            rehearse(config.resolved)
            resume = None if checkpoint is None else _verify(options, config, ranks, agreement)
            dataset = prepare_data(config.task, config.data, options.data_dir, ranks, agreement)
            agreement.from_first(lambda: check_samples(config, dataset))
            if config.switches:
                majority = majority_baseline(dataset.train, dataset.validation)
                config.transition.check_gain(majority)
            if ranks.is_first and config.switches:
                _compile_operators(ranks)
            folder = agreement.from_first(lambda: _run_folder(options, config, checkpoint, lock))
            if ranks.is_first:
                _introduce(config, folder, ranks, resume)
            trainer = Trainer(config, dataset, ranks, agreement, watch, request, folder, resume)
            try:
                finished = trainer.train(options.stop_at)
                if finished:
                    _sum_up(trainer, config, dataset, ranks, folder)
                elif ranks.is_first:
                    print(f"stopped at step {trainer.state.step}; go on with --resume {folder}")
            finally:
                trainer.log.close()
    if trainer.stopped_by_signal and not finished:
        raise Stopped


def _prepare(
    options: TrainOptions, ranks: Ranks, lock: RunLock, request: StopRequest
) -> tuple[Path | None, RunConfig]:
    """Return the checkpoint to go on from and the configuration, checked on this rank alone."""
    if ranks.is_first:
        _take_resumed(options, lock)
    checkpoint = _checkpoint_to_resume(options)
    request.end_at_once(has_checkpoint=checkpoint is not None)
    config = _configure(options, checkpoint, ranks)
    get_task(config.task).check_source(config.data)
    check_devices(ranks)
    return checkpoint, config


def _take_resumed(options: TrainOptions, lock: RunLock) -> None:
    """Take the folder of a run to go on with, where there is one, before anything is read there."""
    if options.resume is None:
        return
    place = _place_to_resume(options)
    run = place.parent.parent if is_checkpoint(place) else place
    if (run / "checkpoints").is_dir() or (options.resume == AUTO and run.is_dir()):
        lock.take(run)


def _finished(options: TrainOptions, checkpoint: Path | None, config: RunConfig) -> bool:
    """Return whether ``--resume auto`` has nothing left to do; print the run's summary then."""
    if options.resume != AUTO or checkpoint is None:
        return False
    step, folder = load_state(checkpoint)[0].step, checkpoint.parent.parent
    try:
        summary = read_json(folder / "summary.json")
        summed_up = sum(summary[phase]["steps"] for phase in ("dense", "sparse"))
        table = summary_table(summary)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False  # it was killed after its last step, or while it wrote this
    if step < config.training.steps or summed_up != step:
        return False
    print(f"{table}\n\nrun folder: {folder}, finished before", flush=True)
    return True


def check_samples(config: RunConfig, dataset: Dataset) -> None:
    """Let the task look at its training samples, for what the run wants to do with them."""
    check = get_task(config.task).check_samples
    if check is not None:
        check(
            dataset,
            {
                "model.nesting_levels": (config.model.nesting_levels, 0),
                "model.subexpression_loss": (config.model.subexpression_loss, 0),
                "training.augment": (config.training.augment, False),
            },
        )


def prepare_data(
    task: str, data: Any, data_dir: Path, ranks: Ranks, agreement: Agreement
) -> Dataset:
    """Return a task's data; one rank a node makes what is missing, the others wait."""
    prepare = get_task(task).prepare
    made = agreement.together(lambda: prepare(data, data_dir) if ranks.local_rank == 0 else None)
    return agreement.together(
        lambda: prepare(data, data_dir, verify=False) if made is None else made
    )


def _compile_operators(ranks: Ranks) -> None:
    """Compile what rank 0 makes patterns with now, if need be, and not at the switch."""
    if ranks.device.type == "cuda":
        cuda_operators_available()
    else:
        operators_available()


def _configure(options: TrainOptions, checkpoint: Path | None, ranks: Ranks) -> RunConfig:
    if options.if_taken not in ("suffix", "error"):
        raise ConfigError(f"--if_taken is {options.if_taken!r}; allowed: suffix or error")
    attention = options.attention
    if checkpoint is None or options.recipe is not None:
        recipe = read_recipe(options.recipe or DEFAULT_RECIPE)
    else:
        recipe, attention = saved_recipe(checkpoint), None
        if options.attention and not str(recipe.get("recipe")).endswith(f"-{options.attention}"):
            raise ConfigError(
                f"--attention is {options.attention!r}, but the run to go on with is "
                f"{recipe.get('recipe')!r}; leave it out, or start another run"
            )
    deepspeed = read_deepspeed_json(options.ds_config) if options.ds_config else None
    config = build_run_config(
        recipe,
        deepspeed,
        options.overrides,
        world_size=ranks.world_size,
        device_type=ranks.device.type,
        attention=attention,
    )
    name = config.recipe if options.run_name is None else options.run_name
    if name != Path(name).name or name in ("", ".."):
        raise ConfigError(f"--run_name is {name!r}; allowed: a folder's name, in --run_dir")
    check_with_deepspeed(config.resolved)
    check_map_memory(config, ranks)
    if checkpoint is not None:
        state, run = load_state(checkpoint)
        plan_resume(checkpoint, run, config, ranks)
        check_switch_state(checkpoint, state, config)
        # Going on by itself, a run that was killed after its last step still gets its summary.
        if state.step >= config.training.steps and options.resume != AUTO:
            raise CheckpointError(
                f"the checkpoint {checkpoint} is at step {state.step} and training.steps is "
                f"{config.training.steps}: nothing is left to do; evaluate it with "
                "launch/evaluate.py, or raise training.steps"
            )
    if options.stop_at is not None and options.stop_at < 1:
        raise ConfigError(f"--stop_at is {options.stop_at}; allowed: a step from 1 up")
    return config


def _checkpoint_to_resume(
    options: TrainOptions, *, checksums: bool = False, passed_over: list[str] | None = None
) -> Path | None:
    """Return the checkpoint that ``--resume`` means, None to start."""
    if options.resume is None:
        return None
    place = _place_to_resume(options)
    if options.resume == AUTO and not has_checkpoint(place):
        return None
    return find_checkpoint(place, checksums=checksums, passed_over=passed_over)


def _place_to_resume(options: TrainOptions) -> Path:
    if options.resume in (None, "", AUTO):
        return options.run_dir / _run_name(options)
    place = Path(options.resume)
    # Its run is two folders above, also where it was given from inside or through a link.
    away = is_checkpoint(place) and place.parent.parent.resolve() != place.resolve().parent.parent
    return place.resolve() if away else place


def _run_name(options: TrainOptions) -> str:
    recipe = Path(options.recipe or DEFAULT_RECIPE).stem
    return options.run_name or "-".join([recipe, *filter(None, [options.attention])])


def _verify(options: TrainOptions, config: RunConfig, ranks: Ranks, agreement: Agreement) -> Resume:
    """Let rank 0 check every byte of the checkpoint, and return how all ranks go on from it."""

    def choose() -> Path | None:
        passed_over: list[str] = []
        folder = _checkpoint_to_resume(options, checksums=True, passed_over=passed_over)
        for sentence in passed_over:
            print(f"note: {sentence}; using {folder and folder.name}", file=sys.stderr, flush=True)
        if folder is not None:
            check_harmless(folder)
        return folder

    folder = agreement.from_first(choose)
    assert folder is not None
    return plan_resume(folder, load_state(folder)[1], config, ranks)


def saved_recipe(checkpoint: Path) -> dict[str, Any]:
    """Return the configuration of a checkpoint's run, as ``build_run_config`` reads it."""
    saved = checkpoint.parent.parent / "config.yaml"
    try:
        return read_yaml(saved, str(saved))
    except ConfigError as error:
        raise CheckpointError(
            f"{error}; so the run's configuration is unknown: name it with --recipe"
        ) from error


def _run_folder(
    options: TrainOptions, config: RunConfig, checkpoint: Path | None, lock: RunLock
) -> Path:
    """Return the run's folder: the resumed run's, or a new one that no run had; taken."""
    if checkpoint is not None:
        return checkpoint.parent.parent  # taken before it was read
    if options.resume == AUTO:
        return continue_folder(options.run_dir / _run_name(options), lock)
    name = options.run_name or config.recipe
    return new_folder(options.run_dir, name, options.if_taken, lock)


def _introduce(config: RunConfig, folder: Path, ranks: Ranks, resume: Resume | None) -> None:
    """Print the run configuration and save it with the run."""
    text = yaml.safe_dump(config.to_mapping(), sort_keys=False)
    replace_text(folder / "config.yaml", text)
    replace_text(folder / "ds_config.json", json.dumps(config.resolved, indent=2) + "\n")
    batches = config.batches
    print(text)
    print(
        f"{ranks.world_size} rank(s) on {ranks.device.type}, {torch.get_num_threads()} thread(s) "
        f"each; a step is {batches.total} samples = "
        f"{ranks.world_size} rank(s) × {batches.accumulation} accumulation step(s) × "
        f"micro-batch {batches.micro}"
    )
    print(f"run folder: {folder}" + (f", resumed from {resume.folder.name}" if resume else ""))
    if resume and resume.note:
        print(f"note: {resume.note}")
    if note := check_map_memory(config, ranks):
        print(f"note: {note}")
    sys.stdout.flush()


def _sum_up(
    trainer: Trainer, config: RunConfig, dataset: Dataset, ranks: Ranks, folder: Path
) -> None:
    """Test the best checkpoint on all ranks, as a newly loaded model, and print the table."""
    best = find_checkpoint(folder, "best")
    model = load_checkpoint_model(best, config, ranks.device)
    test = evaluate(
        trainer.watched(model),
        dataset.test,
        config.batches.micro,
        ranks,
        ranks.device,
        "testing the best",
    )
    if not ranks.is_first:
        return
    summary = _summary(trainer, config, dataset, test, folder)
    trainer.log.row(trainer.state.step, "test", accuracy=test.accuracy, loss=test.loss)
    table = summary_table(summary)
    trainer.log.text("summary", table)
    trainer.log.close()
    replace_text(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    print(f"\n{table}\n\nrun folder: {folder}\nlook at it: tensorboard --logdir {folder.parent}")


def _summary(
    trainer: Trainer, config: RunConfig, dataset: Dataset, test: Evaluation, folder: Path
) -> dict[str, Any]:
    state, tokens = trainer.state, config.tokens_per_step
    densities = [float(mask.double().mean()) for mask in state.masks or []]
    dense_steps = state.step if state.switch_step is None else state.switch_step
    times = seconds_per_step(folder)
    rows: dict[str, Any] = {}
    for phase, steps in (("dense", dense_steps), ("sparse", state.step - dense_steps)):
        seconds = times[phase]
        rows[phase] = {
            "steps": steps,
            "seconds_per_step": seconds,
            "tokens_per_second": tokens / seconds if seconds else None,
            "density": [1.0] * config.model.layers if phase == "dense" else densities,
        }
    dense, sparse = rows["dense"]["seconds_per_step"], rows["sparse"]["seconds_per_step"]
    return {
        **rows,
        "speed_up": dense / sparse if dense and sparse else None,
        "phase": state.phase,
        "best_step": state.best_step,
        "validation_accuracy": state.best_accuracy,
        "test_accuracy": test.accuracy,
        "baselines": get_task(config.task).baselines(dataset.train, dataset.test),
        "batches": dataclasses.asdict(config.batches),
        "threads": torch.get_num_threads(),
    }
