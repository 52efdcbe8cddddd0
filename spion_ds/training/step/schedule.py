"""The learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

from dataclasses import dataclass

# PyTorch's OneCycleLR defaults, which the published runs use.
_DIVISOR = 25.0
_FINAL_DIVISOR = 1e4


@dataclass(frozen=True)
class OneCycle:
    """Linear one-cycle schedule, restarted at the switch from dense to sparse if asked.

    Attributes:
        max_lr: peak learning rate.
        warmup_steps: steps of the rise in a run without a restart.
        steps: steps of the whole run.
        restart_at_switch: whether the switch starts a second cycle over the steps that remain,
            with the same share of warm-up (SPION-C and -CF).
        sparse_lr: constant rate after the switch, None for the cycle's (all but SAT).
    """

    max_lr: float
    warmup_steps: int
    steps: int
    restart_at_switch: bool
    sparse_lr: float | None = None

    def at(self, step: int, switch_step: int | None) -> float:
        """Return the learning rate of optimizer step ``step`` (from 0).

        Args:
            step: how many optimizer steps were taken before this one.
            switch_step: how many steps were dense, None while the run is.
        """
        if self.sparse_lr is not None and switch_step is not None:
            return self.sparse_lr
        start = switch_step if self.restart_at_switch and switch_step is not None else 0
        return one_cycle(
            step - start, self.steps - start, self.warmup_steps / self.steps, self.max_lr
        )


def one_cycle(step: int, total: int, warmup_share: float, max_lr: float) -> float:
    """Return the rate of ``step`` in a linear one-cycle of ``total`` steps.

    From max_lr / 25 up to max_lr over ``warmup_share`` of the steps, then down to
    max_lr / 250 000: torch.optim.lr_scheduler.OneCycleLR(anneal_strategy="linear").
    """
    low = max_lr / _DIVISOR
    final = low / _FINAL_DIVISOR
    peak = warmup_share * total - 1.0
    if step <= peak:
        return low + (max_lr - low) * step / peak if peak > 0.0 else max_lr
    fall = max(total - 1.0 - peak, 1.0)
    return max_lr + (final - max_lr) * min((step - peak) / fall, 1.0)
