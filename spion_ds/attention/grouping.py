"""Blocks that keep about the same number of partners, side by side: what batched products want."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Blocks with about the same number of partners.

    members: (G,) block indices; partners: (G, S) block indices of the other side; filled: (G, S)
    bool, which slots hold a partner, or None when all do.
    """

    members: Tensor
    partners: Tensor
    filled: Tensor | None


@torch.inference_mode(False)  # they are kept, and a training step may come to read them
def group_by_degree(pointers: Tensor, partners: Tensor, device: torch.device) -> list[Group]:
    """Return the members that have partners, in groups of about the same number.

    Args:
        pointers: (members + 1,) where each member's partners start in ``partners``, on the CPU.
        partners: the partners of all members, in the members' order, on the CPU.
        device: where the groups' tensors are to live.
    """
    degrees = (pointers[1:] - pointers[:-1]).long()
    widths = torch.tensor([_slots(int(degree)) for degree in degrees])
    limit = int(degrees.max()) if len(degrees) else 0
    widths = widths.clamp(max=limit)
    groups = []
    for slots in sorted(set(widths.tolist()) - {0}, reverse=True):
        members = (widths == slots).nonzero()[:, 0]
        slot = torch.arange(slots)
        filled = slot < degrees[members][:, None]
        # An empty slot points at the member's own first partner, and is masked.
        offset = pointers[:-1].long()[members][:, None] + torch.where(filled, slot, 0)
        groups.append(
            Group(
                members.to(device),
                partners[offset].long().to(device),
                None if bool(filled.all()) else filled.to(device),
            )
        )
    return groups


def _slots(degree: int) -> int:
    """Return the number of slots for a block with ``degree`` partners: at most a quarter unused.

    0, 1, ..., 4, then 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: four widths between powers of two.
    """
    if degree <= 4:
        return degree
    step = 1 << max(0, (degree - 1).bit_length() - 3)
    return -(-degree // step) * step
