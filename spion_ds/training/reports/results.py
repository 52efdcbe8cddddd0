"""What finished runs came to, as one Markdown table beside baselines and published figures."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from spion_ds.durable_files import read_json
from spion_ds.errors import DataError
from spion_ds.training.config.run import RunConfig
from spion_ds.training.reports.published import published
from spion_ds.training.reports.run_log import read_rows, seconds_per_step

_PHASES = ("dense", "sparse")


@dataclass(frozen=True)
class RunResult:
    """What a run has come to, finished or not.

    Attributes:
        name: of the run's folder.
        task: its task.
        step, steps: taken, and wanted.
        finished: whether it has its summary.
        test_accuracy, validation_accuracy: of the best checkpoint, 0 to 1; None until finished.
        switch_step: dense steps before the switch; None without a switch.
        density: mean share of blocks that the layers keep; None while dense.
        step_seconds, memory_bytes: median and peak of each phase; None where there was none.
        baselines: test accuracies of trivial readers.
    """

    name: str
    task: str
    step: int
    steps: int
    finished: bool = False
    test_accuracy: float | None = None
    validation_accuracy: float | None = None
    switch_step: int | None = None
    density: float | None = None
    step_seconds: dict[str, float | None] = field(default_factory=dict)
    memory_bytes: dict[str, float | None] = field(default_factory=dict)
    baselines: dict[str, float] = field(default_factory=dict)


def read_result(folder: Path, config: RunConfig) -> RunResult:
    """Return what the run in ``folder`` has come to; there need not be any.

    Raises:
        DataError: its log or its summary is damaged.
    """
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        return RunResult(folder.name, config.task, 0, config.training.steps)
    try:
        return _read(folder, config)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(
            f"{metrics} or summary.json is damaged ({error!r:.200}); move {folder} away and run it "
            "again, or bring both back from a copy"
        ) from error


def _read(folder: Path, config: RunConfig) -> RunResult:
    steps, rows = config.training.steps, read_rows(folder)
    trained = [row for row in rows if row["kind"] == "train"]
    switch = [row for row in rows if row["kind"] == "switch"][-1:]
    memory = {
        phase: max((row["memory_bytes"] for row in trained if row["phase"] == phase), default=None)
        for phase in _PHASES
    }
    known: dict[str, Any] = {
        "step": max((row["step"] for row in trained), default=0),
        "switch_step": switch[0]["step"] if switch else None,
        "density": statistics.fmean(switch[0]["density"]) if switch else None,
        "step_seconds": seconds_per_step(folder),
        "memory_bytes": memory,
    }
    summary = _summary(folder)
    if summary is not None:
        kept = summary["sparse"]["density"]
        known |= {
            "finished": True,
            "test_accuracy": summary["test_accuracy"],
            "validation_accuracy": summary["validation_accuracy"],
            "density": statistics.fmean(kept) if kept else None,
            "baselines": summary["baselines"],
        }
    return RunResult(folder.name, config.task, steps=steps, **known)


def results_table(
    groups: Mapping[tuple[str, str], Sequence[RunResult]], overrides: Sequence[str] = ()
) -> str:
    """Return a Markdown page.

    Args:
        groups: the runs of each (recipe, attention), one a seed.
        overrides: of all runs, to be told.
    """
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    lines = ["# Results", "", f"{date.today()} · {device} · {versions}", ""]
    if overrides:
        lines += [f"All runs with {' '.join(f'`{text}`' for text in overrides)}", ""]
    for task in dict.fromkeys(runs[0].task for runs in groups.values()):
        here = {key: runs for key, runs in groups.items() if runs[0].task == task}
        lines += [f"## {task}", "", *_task_lines(here), "", *_reference_lines(task, here)]
    lines += [*_unfinished_lines([run for runs in groups.values() for run in runs])]
    return "\n".join(lines).rstrip() + "\n"


_HEAD = (
    "| recipe | attention | test accuracy, % | validation, % | runs | switch step | blocks kept, % "
    "| ms/step dense | ms/step sparse | memory dense, GiB | memory sparse, GiB |"
)


def _task_lines(groups: Mapping[tuple[str, str], Sequence[RunResult]]) -> list[str]:
    lines = [_HEAD, "|" + " --- |" * (_HEAD.count("|") - 1)]
    for (recipe, attention), runs in groups.items():
        done = [run for run in runs if run.finished]
        cells = [
            Path(recipe).stem,
            attention,
            _spread([run.test_accuracy for run in done], 100.0, "{:.2f}"),
            _spread([run.validation_accuracy for run in done], 100.0, "{:.2f}"),
            f"{len(done)} of {len(runs)}",
            _spread([run.switch_step for run in runs], 1.0, "{:.0f}"),
            _spread([run.density for run in runs], 100.0, "{:.1f}"),
            *(_of_phases(runs, lambda run: run.step_seconds, 1e3, "{:.1f}")),
            *(_of_phases(runs, lambda run: run.memory_bytes, 2.0**-30, "{:.2f}")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _of_phases(
    runs: Sequence[RunResult],
    of: Callable[[RunResult], Mapping[str, float | None]],
    scale: float,
    form: str,
) -> list[str]:
    return [_middle([of(run).get(phase) for run in runs], scale, form) for phase in _PHASES]


def _reference_lines(task: str, groups: Mapping[tuple[str, str], Sequence[RunResult]]) -> list[str]:
    baselines: dict[str, float] = {}
    for run in (run for runs in groups.values() for run in runs):
        baselines = run.baselines or baselines
    figures = published(task)
    if not baselines and not figures:
        return []
    lines = ["| to compare with | test accuracy, % | source |", "| --- | --- | --- |"]
    for name, accuracy in baselines.items():
        lines.append(f"| {name} | {100.0 * accuracy:.2f} | trivial reader, same test set |")
    lines += [f"| {model} | {accuracy} | {source} |" for model, accuracy, source in figures]
    if figures:
        lines += ["", "Published figures are of the published data, model sizes and schedules."]
    return [*lines, ""]


def _unfinished_lines(runs: Sequence[RunResult]) -> list[str]:
    left = [run for run in runs if not run.finished]
    if not left:
        return []
    lines = ["## Not finished", "", "| run | step |", "| --- | --- |"]
    return lines + [f"| {run.name} | {run.step} of {run.steps} |" for run in left]


def _spread(values: Sequence[float | None], scale: float, form: str) -> str:
    """Return mean ± sample standard deviation, the mean alone of one value, or a dash."""
    known = [scale * value for value in values if value is not None]
    if not known:
        return "–"
    mean = form.format(statistics.fmean(known))
    return mean if len(known) == 1 else f"{mean} ± {form.format(statistics.stdev(known))}"


def _middle(values: Sequence[float | None], scale: float, form: str) -> str:
    known = [scale * value for value in values if value is not None]
    return form.format(statistics.median(known)) if known else "–"


def _summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    return read_json(path) if path.exists() else None
