"""The short table at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def summary_table(summary: Mapping[str, Any]) -> str:
    """Return the table of a run's summary (the content of summary.json) as text."""
    lines = ["phase    steps   ms/step   tokens/s   density a layer"]
    for phase in ("dense", "sparse"):
        row = summary[phase]
        speed = row["seconds_per_step"]
        time, tokens = ("–", "–")
        if speed is not None:
            time, tokens = f"{1000 * speed:.1f}", f"{row['tokens_per_second']:,.0f}"
        densities = ", ".join(f"{density:.1%}" for density in row["density"])
        lines.append(f"{phase:<7} {row['steps']:>6} {time:>9} {tokens:>10}   {densities or '–'}")
    ratio = summary["speed_up"]
    lines.append(
        _without_ratio(summary)
        if ratio is None
        else f"a sparse step is {ratio:.2f}× as fast as a dense one"
    )
    lines.append("")
    lines.append(
        f"accuracy of the best checkpoint (step {summary['best_step']}, {summary['phase']})"
    )
    lines.append(f"  validation            {summary['validation_accuracy']:>7.2%}")
    lines.append(f"  test                  {summary['test_accuracy']:>7.2%}")
    for name, accuracy in summary["baselines"].items():
        lines.append(f"  {name:<22}{accuracy:>7.2%}  (baseline, test)")
    return "\n".join(lines)


def _without_ratio(summary: Mapping[str, Any]) -> str:
    if summary["phase"] == "dense":
        return "the run stayed dense"
    if summary["dense"]["steps"] == 0:
        return "the run was sparse from its first step"
    return "no steps were timed in one of the phases"
