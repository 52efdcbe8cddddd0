"""How ranks agree: small objects over the control channel, errors raised on all alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from spion_ds.distributed.process_group import TIMEOUT
from spion_ds.errors import SpionError

T = TypeVar("T")


class Agreement:
    """The control channel: small objects between ranks, on the CPU whatever the device."""

    def __init__(self) -> None:
        gloo = dist.get_backend() == "gloo"
        self.group = dist.group.WORLD if gloo else dist.new_group(backend="gloo", timeout=TIMEOUT)

    def from_first(self, make: Callable[[], T]) -> T:
        """Return on every rank what ``make`` returns on rank 0; its error is raised everywhere."""
        box: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                box[0] = make()
            except SpionError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; if it fails on one, the same error is raised on all."""
        box: list[Any] = [None, None]  # result, error
        try:
            box[0] = work()
        except SpionError as error:
            box[1] = error
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, box[1], group=self.group)
        for failed in errors:
            if failed is not None:
                raise failed
        return box[0]

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on any rank."""
        box = torch.tensor([int(flag)])
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.group)
        return bool(box.item())

    def differing(self, value: object) -> list[int]:
        """Return the ranks whose ``value`` is not rank 0's."""
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return [rank for rank, other in enumerate(values) if other != values[0]]

    def broadcast(self, payload: torch.Tensor) -> torch.Tensor:
        """Broadcast a CPU tensor from rank 0, in place, and return it."""
        dist.broadcast(payload, src=0, group=self.group)
        return payload

    def barrier(self) -> None:
        """Wait for every rank."""
        dist.barrier(group=self.group)
