"""What every rank must know about a step: was it finite everywhere, does anyone want to stop."""

from __future__ import annotations

import math
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
    """Looks at values where they arise, and shares what is not finite in one all-reduce a step.

    Args:
        model: whose gradients are looked at as autograd makes them.
        device: of the model.
        at_once: whether a step's report is ready before its optimizer step. Otherwise (GPU) it
            comes a step later, so that the host need not wait for the device.
        gradients: whether gradients are looked at; under loss scaling they overflow by design.
        whole: whether every parameter holds its whole gradient after the backward pass, as at
            ZeRO stage 0. They are then looked at there, all in one operator; at other stages each
            one is where autograd makes it, before DeepSpeed takes it apart.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        at_once: bool,
        gradients: bool = True,
        whole: bool = False,
    ) -> None:
        self.at_once = at_once
        looked_at = [named for named in model.named_parameters() if named[1].requires_grad]
        # Backward passes reach the last parameters first.
        self.names = [_part(name) for name, _ in looked_at] + ["the loss"]
        self._no, self._yes = torch.zeros((), device=device), torch.ones((), device=device)
        # A value () float32 of each name, finite only if what it stands for is: of the present
        # micro-batch, and of the step's earlier ones one after the other.
        self._row = [self._no] * len(self.names)
        self._rows: list[Tensor] = []
        self._pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._whole = [p for _, p in looked_at] if gradients and whole else []
        if gradients and not whole:
            for place, (_, parameter) in enumerate(looked_at):
                parameter.register_hook(lambda gradient, place=place: self._add(place, gradient))

    def add_loss(self, loss: Tensor) -> None:
        """Look at the loss of a micro-batch, after its backward pass."""
        self._row[-1] = loss.detach()
        self._rows += self._row
        self._row = [self._no] * len(self.names)

    def close(self, step: int, asked_to_stop: bool) -> list[StepReport]:
        """End a step on all ranks; return the reports that are ready: its own, or the last's."""
        self._look_at_whole()
        values = torch.stack([self._yes if asked_to_stop else self._no, *self._rows])
        self._rows = []
        if dist.get_world_size() > 1:
            dist.all_reduce(values)  # what is not finite stays so in any sum
        event = None
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending.append((step, values, event))
        return self.reports(0 if self.at_once else 1)

    def reports(self, leave: int = 0) -> list[StepReport]:
        """Wait for the pending reports, all but the newest ``leave``, and return them."""
        ready = []
        while len(self._pending) > leave:
            step, found, event = self._pending.popleft()
            if event is not None:
                event.synchronize()
            stop, *values = found.tolist()
            ready.append(StepReport(step, stop > 0.0, self._not_finite(values)))
        return ready

    def _not_finite(self, values: list[float]) -> list[str]:
        if math.isfinite(sum(values)):  # almost always
            return []
        width = len(self.names)
        bad = [
            name
            for place, name in enumerate(self.names)
            if not all(map(math.isfinite, values[place::width]))
        ]
        return list(dict.fromkeys(reversed(bad)))

    def _look_at_whole(self) -> None:
        found = [(place, p.grad) for place, p in enumerate(self._whole) if p.grad is not None]
        if found:
            # The largest magnitude is NaN or infinite if and only if an element is. Gradients add
            # up over micro-batches, so they have the first one's places.
            gradients = [gradient for _, gradient in found]
            peaks = torch._foreach_norm(gradients, float("inf"), dtype=torch.float32)
            for (place, _), peak in zip(found, peaks, strict=True):
                self._rows[place] = peak

    def _add(self, place: int, gradient: Tensor) -> None:
        self._row[place] = gradient.sum(dtype=torch.float32)


def _part(parameter_name: str) -> str:
    """Return the part of the model a parameter belongs to: layers.3, or its first name."""
    found = re.match(r"layers\.\d+|[^.]+", parameter_name)
    return found.group() if found else parameter_name
