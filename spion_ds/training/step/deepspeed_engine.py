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
        groups = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if gradients:  # a rank of ZeRO may own none
            torch._foreach_clamp_min_(gradients, -bound)
            torch._foreach_clamp_max_(gradients, bound)

    optimizer.register_step_pre_hook(clip)


def step_without_waiting(engine: Any) -> None:
    """Let a bf16 engine at ZeRO stage 0 take its step without the host waiting for the device.

    There DeepSpeed asks each gradient whether it is finite and how long it is, one after the
    other, and copies parameter by parameter. StepGuard asks all at once, the recipe clips by
    value, and the rest is the same arithmetic: bf16 gradients to float32, AdamW on the float32
    weights, these to bf16. Everything else (fp16, clipping by norm) is left as it is.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    optimizer = engine.optimizer
    if not isinstance(optimizer, FP16_UnfusedOptimizer) or not engine.bfloat16_enabled():
        return
    if optimizer.clip_grad > 0.0 or optimizer.loss_scale != 1.0:
        return
    masters = [p for group in optimizer.fp32_groups for p in group]
    weights = [p for group in optimizer.fp16_groups for p in group]
    gradients = [torch.zeros_like(master) for master in masters]
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient

    @torch.no_grad()
    def step(closure: None = None) -> bool:
        given = [weight.grad for weight in weights]
        if all(gradient is not None for gradient in given):
            torch._foreach_copy_(gradients, given)
        else:
            for gradient, found in zip(gradients, given, strict=True):
                gradient.zero_() if found is None else gradient.copy_(found)
        optimizer.optimizer.step()
        torch._foreach_copy_(weights, masters)
        return False

    vars(optimizer)["step"] = step
