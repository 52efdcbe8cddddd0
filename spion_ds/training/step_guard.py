"""What every rank must know about a step: was it finite everywhere, does anyone want to stop."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class StepReport:
    """A step as all ranks together saw it; the same on every rank.

    Attributes:
        step: its number, from 1.
        stop: whether a rank was asked to stop.
        not_finite: "the loss", and the parts of the model whose gradients were NaN or infinite
            on some rank, nearest to the loss first.
    """

    step: int
    stop: bool
    not_finite: list[str]


class StepGuard:
    """Adds up non-finite values where they arise, and shares them in one all-reduce a step.

    Args:
        model: whose gradients are looked at as autograd makes them.
        device: of the model.
        at_once: whether a step's report is ready before its optimizer step. Otherwise (GPU) it
            comes a step later, so that the host need not wait for the device.
        gradients: whether gradients are looked at; under loss scaling they overflow by design.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, *, at_once: bool, gradients: bool = True
    ) -> None:
        self.at_once = at_once
        names = list(dict.fromkeys(_part(name) for name, _ in model.named_parameters()))
        self.names = ["the loss", *reversed(names)]
        # Sums of 0 × value: zero as long as every value is finite, else NaN.
        self._sums = torch.zeros(len(self.names), device=device)
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        if gradients:
            for name, parameter in model.named_parameters():
                self._look_at(parameter, self._sums[self.names.index(_part(name))])

    def add_loss(self, loss: Tensor) -> None:
        """Look at the loss of a micro-batch."""
        self._add(self._sums[0], loss.detach())

    def close(self, step: int, asked_to_stop: bool) -> list[StepReport]:
        """End a step on all ranks; return the reports that are ready: its own, or the last's."""
        flags = torch.cat([self._sums.new_full((1,), asked_to_stop), ~self._sums.isfinite()])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        self._sums.zero_()
        event = None
        if flags.is_cuda:
            flags = flags.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, flags, event))
        return self.reports(0 if self.at_once else 1)

    def reports(self, leave: int = 0) -> list[StepReport]:
        """Wait for the pending reports, all but the newest ``leave``, and return them."""
        ready = []
        while len(self._pending) > leave:
            step, flags, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            stop, *found = flags.tolist()
            names = [name for name, bad in zip(self.names, found, strict=True) if bad]
            ready.append(StepReport(step, bool(stop), names))
        return ready

    def _look_at(self, parameter: nn.Parameter, total: Tensor) -> None:
        if parameter.requires_grad:
            parameter.register_hook(lambda gradient: self._add(total, gradient.detach()))

    @staticmethod
    def _add(total: Tensor, values: Tensor) -> None:
        total.add_(values.sum(dtype=torch.float32).mul(0.0))


def _part(parameter_name: str) -> str:
    """Return the part of the model a parameter belongs to: layers.3, or its first name."""
    found = re.match(r"layers\.\d+|[^.]+", parameter_name)
    return found.group() if found else parameter_name
