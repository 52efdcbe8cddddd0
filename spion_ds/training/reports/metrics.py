"""What training steps add up between two rows of the log: losses and correct predictions."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

# Of which a row has the mean over samples; the parts only where a step had them.
_MEANS = ("loss", "accuracy")
_PARTS = ("masked_token_loss", "subexpression_loss", "pattern_loss")


class Tally:
    """Sums of one rank, on its device, which the host does not wait for until ``take``.

    A step that is skipped is not counted: what its micro-batches add waits for ``keep``.
    """

    def __init__(self, device: torch.device) -> None:
        # The means' sums, the parts', and, when they are taken, how many samples.
        self._sums = torch.zeros(len(_MEANS) + len(_PARTS) + 1, dtype=torch.float64, device=device)
        self._places = dict(zip(_MEANS + _PARTS, self._sums, strict=False))
        self._samples = 0
        self._step: list[tuple[str, Tensor, int]] = []  # a sum is to grow by value × weight
        self._step_samples = 0

    def begin(self) -> None:
        """Begin a step; what an earlier one added and was not kept is forgotten."""
        self._step, self._step_samples = [], 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a micro-batch: its mean loss (), logits (B, classes) and labels (B,)."""
        self._step_samples += len(labels)
        self._step.append(("loss", loss.detach(), len(labels)))
        self._step.append(("accuracy", (logits.argmax(dim=-1) == labels).sum(), 1))

    def add_part(self, name: str, loss: Tensor, samples: int) -> None:
        """Add a part of the loss of a micro-batch: its mean () over so many samples."""
        self._step.append((name, loss.detach(), samples))

    def keep(self) -> None:
        """Count the present step."""
        self._samples += self._step_samples
        for name, value, weight in self._step:
            self._places[name].add_(value, alpha=weight)

    def take(self) -> dict[str, float] | None:
        """Return the means over the samples of all ranks since the last take, by name.

        Parts that no step had are left out. None without a step that counts.
        """
        self._sums[-1] = self._samples
        self._samples = 0
        dist.all_reduce(self._sums)
        *sums, samples = self._sums.tolist()
        self._sums.zero_()
        if samples == 0:
            return None
        means = {name: total / samples for name, total in zip(_MEANS + _PARTS, sums, strict=True)}
        return {name: mean for name, mean in means.items() if name in _MEANS or mean}
