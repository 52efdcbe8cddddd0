"""What happens around the step of the optimizer inside DeepSpeed's, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def step_unless(optimizer: torch.optim.Optimizer, skipping: Callable[[], bool]) -> None:
    """Let DeepSpeed take its step as ever, but the optimizer inside it only unless skipping."""
    step = optimizer.step

    def guarded(*arguments: Any, **named: Any) -> Any:
        return None if skipping() else step(*arguments, **named)

    vars(optimizer)["step"] = guarded


def restart(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer inside DeepSpeed's go on as a new one: moments, steps, gradients are 0.

    In place, since DeepSpeed holds references to the state's tensors.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif isinstance(value, int | float):
                state[name] = 0
        # Offload keeps gradients: a parameter that gets none from now on would leave its last one
        # there, and move on.
        if parameter.grad is not None:
            parameter.grad.zero_()
    for group in optimizer.param_groups:
        if "step" in group:  # where fused optimizers count
            group["step"] = 0


def clip_by_value(optimizer: torch.optim.Optimizer, bound: float | None) -> None:
    """Clip every gradient element just before the optimizer uses it.

    Elementwise, so it is as right on ZeRO's flat partitions as on whole gradients.
    """
    if bound is None:
        return

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.clamp_(-bound, bound)

    optimizer.register_step_pre_hook(clip)
