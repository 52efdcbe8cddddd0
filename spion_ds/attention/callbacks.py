"""Operators through which compiled code reaches a SparseSelfAttention when it runs.

torch.compile traces a pass once: what an observer is to see, or what somebody wrote into a buffer
meanwhile, only a call at run time can tell. A module is found by its ticket, a CPU tensor that
holds its number. The operators say that they write to the ticket, so nothing drops them; and a
tensor on the CPU is what a CUDA graph cannot hold, so ``mode="reduce-overhead"`` leaves them out.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from spion_ds.errors import ConfigError


class Reachable(Protocol):
    """What the operators call."""

    def show_pass(self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None) -> None:
        """Show a pass to the module's observer."""

    def check_unchanged(self) -> None:
        """Raise ConfigError where the module's mask is not the one that was compiled."""


_modules: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def ticket_for(module: Reachable) -> Tensor:
    """Return the ticket of a module, (1,) int64 on the CPU; the module is held weakly."""
    number = next(_numbers)
    _modules[number] = module
    return torch.tensor([number], dtype=torch.int64, device="cpu")


def _module(ticket: Tensor) -> Reachable:
    module = _modules.get(int(ticket[0]))
    if module is None:
        raise ConfigError(
            "a compiled graph looks for a SparseSelfAttention that this process does not have: a "
            "graph of a module with an observer or with max_seq_length cannot be exported"
        )
    return module


def _show_attention(q: Tensor, k: Tensor, key_padding_mask: Tensor | None, ticket: Tensor) -> None:
    _module(ticket).show_pass(q, k, key_padding_mask)


def _check_packed_mask(ticket: Tensor) -> None:
    _module(ticket).check_unchanged()


def _fake(*_: Any) -> None:
    return None


_TAGS = [torch.Tag.pt2_compliant_tag]
if hasattr(torch.Tag, "cudagraph_unsafe"):  # from PyTorch 2.9 on
    _TAGS.append(torch.Tag.cudagraph_unsafe)
_library = torch.library.Library("spion_ds", "FRAGMENT")
for _name, _arguments, _function in (
    (
        "show_attention",
        "Tensor q, Tensor k, Tensor? key_padding_mask, Tensor(a!) ticket",
        _show_attention,
    ),
    ("check_packed_mask", "Tensor(a!) ticket", _check_packed_mask),
):
    _library.define(f"{_name}({_arguments}) -> ()", tags=_TAGS)
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"spion_ds::{_name}", _fake, lib=_library)
