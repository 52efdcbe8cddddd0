"""The layouts that an attention derived from its pattern, for the lengths and devices in use."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

import torch

from spion_ds.errors import ConfigError

# Layouts beyond those that are pinned.
LIMIT = 16
# A BlockLayout, or None for dense attention; or what else is derived from a layout.
T = TypeVar("T")
# Makes the layout for some tokens on a device.
Derive = Callable[[int, torch.device], T]


class Slots:
    """Layouts as attributes: torch.compile guards on those alone that a graph reads."""


def slot_name(blocks: int, device: torch.device) -> str:
    """Return the attribute of a layout of ``blocks`` blocks a side on ``device``."""
    return f"layout_{blocks}_{device.type}_{device.index}"


class DerivedLayouts(Generic[T]):
    """Layouts by blocks a side and device: the last sixteen that were used, and the pinned ones.

    Pinned are those that must outlive their last use in eager mode: a CUDA graph reads their
    memory, or a compiled graph looks for them.

    Args:
        block: side of a block in tokens.

    Attributes:
        slots: what was derived, under each :func:`slot_name`.
    """

    def __init__(self, block: int) -> None:
        self.block = block
        self.slots = Slots()
        self._recent: list[str] = []  # not pinned, the last used at the end
        self._pinned: dict[str, tuple[int, torch.device]] = {}

    def get(
        self,
        length: int,
        device: torch.device,
        derive: Derive[T],
        pin: bool = False,
    ) -> T:
        """Return the layout for ``length`` tokens, derived by ``derive`` unless it is here."""
        name, kept = slot_name(-(-length // self.block), device), vars(self.slots)
        if name not in kept:
            kept[name] = derive(length, device)
        found = kept[name]
        if name in self._pinned or (self._recent and self._recent[-1] == name and not pin):
            return found
        if name in self._recent:
            self._recent.remove(name)
        if pin:
            self._pinned[name] = (length, device)
            return found
        self._recent.append(name)
        if len(self._recent) > LIMIT:
            del kept[self._recent.pop(0)]
        return found

    def replace(self, derive: Derive[T]) -> None:
        """Derive the pinned layouts again, and forget the others.

        One that cannot be derived is left to its next use, which says why.
        """
        kept = vars(self.slots)
        kept.clear()
        self._recent.clear()
        for name, (length, device) in self._pinned.items():
            with suppress(ConfigError):
                kept[name] = derive(length, device)
