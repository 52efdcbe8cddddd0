"""How ranks agree: small objects over the control channel, errors raised on all alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from spion_ds.distributed.process_group import TIMEOUT
from spion_ds.errors import ConfigError, SpionError

T = TypeVar("T")


class Agreement:
    """The control channel: small objects between ranks, on the CPU whatever the device.

    Without a process group the process is alone, and agrees with itself. All ranks make it
    together: where the process group is not gloo's, it starts a group of its own.

    Raises:
        ConfigError: a launcher started several ranks, and there is no process group.
    """

    def __init__(self) -> None:
        self.rank, self.world_size = 0, 1
        self.group: dist.ProcessGroup | None = None
        if not dist.is_initialized():
            ranks = os.environ.get("WORLD_SIZE", "1")
            if ranks != "1":
                raise ConfigError(
                    f"WORLD_SIZE is {ranks}, and there is no process group, so the ranks cannot "
                    "agree; start it before the first step, e.g. with "
                    "torch.distributed.init_process_group()"
                )
            return
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        gloo = dist.get_backend() == "gloo"
        self.group = dist.group.WORLD if gloo else dist.new_group(backend="gloo", timeout=TIMEOUT)

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """Return on every rank what ``make`` returns on rank 0; its error is raised everywhere."""
        box: list[Any] = [None, None]
        if self.is_first:
            try:
                box[0] = make()
            except SpionError as error:
                box[1] = error
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        if box[1] is not None:
            raise box[1]
        return box[0]

    def together(self, work: Callable[[], T]) -> T:
        """Run ``work`` on every rank; if it fails on one, the same error is raised on all."""
        box: list[T] = []
        self.gather_from(lambda: box.append(work()))
        return box[0]

    def gather_from(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` on every rank, and return what it returned on each, a small object.

        If it fails on one, the same error is raised on all.
        """
        result: Any = None
        failure: SpionError | None = None
        try:
            result = work()
        except SpionError as error:
            failure = error
        told = self.gather((result, failure))
        for _, failed in told:
            if failed is not None:
                raise failed
        return [each for each, _ in told]

    def gather(self, value: T) -> list[T]:
        """Return every rank's ``value``, a small object, in the order of ranks."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` is true on any rank."""
        box = torch.tensor([int(flag)])
        if self.group is not None:
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.group)
        return bool(box.item())

    def differing(self, value: object) -> list[int]:
        """Return the ranks whose ``value`` is not rank 0's."""
        values = self.gather(value)
        return [rank for rank, other in enumerate(values) if other != values[0]]

    def broadcast(self, payload: torch.Tensor) -> torch.Tensor:
        """Broadcast a CPU tensor from rank 0, in place, and return it."""
        if self.group is not None:
            dist.broadcast(payload, src=0, group=self.group)
        return payload

    def send(self, payload: torch.Tensor) -> None:
        """Send a CPU tensor to rank 0, which calls ``receive``."""
        dist.send(payload, dst=0, group=self.group)

    def receive(self, payload: torch.Tensor, source: int) -> torch.Tensor:
        """Fill a CPU tensor with what rank ``source`` sends, and return it; on rank 0."""
        dist.recv(payload, src=source, group=self.group)
        return payload

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.group is not None:
            dist.barrier(group=self.group)
