"""What follows from what all ranks together found about a step: go on, skip it, stop."""

from __future__ import annotations

from spion_ds.errors import SpionError
from spion_ds.training.reports.run_log import RunLog
from spion_ds.training.step.step_guard import StepReport

# Skipping more steps than this without one that counts is no training.
_MOST_SKIPPED = 10


class TrainingError(SpionError, RuntimeError):
    """Training cannot go on: a loss, gradient or attention map is not finite."""


class StepVerdict:
    """Acts on reports, on every rank alike.

    Args:
        log: of the run.
        on_nonfinite: ``"stop"`` or ``"skip"``.

    Attributes:
        stopping: whether a rank was asked to stop.
    """

    def __init__(self, log: RunLog, on_nonfinite: str) -> None:
        self.log, self.on_nonfinite = log, on_nonfinite
        self.stopping = False
        self._skipped = 0  # steps in a row

    def obey(self, reports: list[StepReport], phase: str) -> bool:
        """Do what the reports ask for; return whether to skip the present step.

        Raises:
            TrainingError: a value is not finite, and steps are not, or no longer, skipped.
        """
        skips = False
        for report in reports:
            self.stopping = self.stopping or report.stop
            self._skipped = self._skipped + 1 if report.not_finite else 0
            if not report.not_finite:
                continue
            where = f"{' and '.join(report.not_finite[:2])}" + (
                f" and {len(report.not_finite) - 2} more" if len(report.not_finite) > 2 else ""
            )
            found = f"step {report.step} ({phase} phase): {where} not finite"
            if self.on_nonfinite == "stop" or self._skipped > _MOST_SKIPPED:
                raise TrainingError(
                    f"{found}; lower optimizer.lr, train in fp32 or set training.on_nonfinite to "
                    "skip, and go on with --resume, from the last checkpoint"
                )
            skips = True
            self.log.row(report.step, "skipped", parts=", ".join(report.not_finite))
            self.log.say(f"{found}; the step is skipped")
        return skips
