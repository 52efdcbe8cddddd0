"""What the log says of looks at attention: checks, the switch, and a rule that is held back."""

from __future__ import annotations

from torch import Tensor

from spion_ds.switching import Event
from spion_ds.training.config.sections import TransitionConfig
from spion_ds.training.reports.run_log import RunLog


class SwitchLog:
    """Writes events to a run's log.

    Args:
        log: the run's.
        transition: when it switches.
        log_every: steps between two rows; checks may come more often, pictures need not.
        majority: accuracy of always naming the most frequent class.
    """

    def __init__(
        self, log: RunLog, transition: TransitionConfig, log_every: int, majority: float
    ) -> None:
        self.log, self.transition, self.log_every = log, transition, log_every
        self.majority = majority
        self._told_held = False

    def write(self, event: Event, masks: list[Tensor] | None) -> None:
        """Write an event down; ``masks`` are the layers' after it, None while dense."""
        log, step = self.log, event.step
        if event.kind == "skipped":
            return  # the step's own row says so
        if event.report is not None:
            log.row(
                step,
                "check",
                distance=event.report.distances,
                change=event.report.changes,
                **({"skewness": event.report.skewness} if event.report.skewness else {}),
                seconds=event.seconds,
            )
            if event.report.held and not event.forced and not self._told_held:
                self._told_held = True
                log.say(
                    f"step {step}: the maps are steady, but no validation accuracy was "
                    f"{self.transition.min_gain_percent:g} points above the majority class's "
                    f"{self.majority:.1%} yet (transition.min_gain_percent): attention stays dense"
                )
        if event.densities:
            log.row(
                step,
                event.kind,
                density=event.densities,
                digest=event.digest,
                forced=event.forced,
            )
            shown = ", ".join(f"{density:.1%}" for density in event.densities)
            log.say(f"step {step}: switched to sparse attention; densities {shown}")
        rare = self.transition.check_every >= self.log_every
        if event.densities or rare or step % self.log_every == 0:
            log.pictures(step, event.maps, masks if event.densities else None)
