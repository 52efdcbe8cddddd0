"""Launches of the attention's Triton kernels that cost the host little.

A kernel that was compiled before goes past Triton's look-up of arguments. And what a call launched
can be written down, for ``csrc/triton_attention.cpp`` to launch it again without Python.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from spion_ds.attention.triton.tiles import Tiles
from spion_ds.random_bits import keep_threshold

# Kernels by everything that they were compiled for.
_compiled: dict[tuple, Any] = {}

# Parameters that are tensors, in the order of csrc/triton_attention.cpp's Slot.
SLOTS = (
    *("q", "k", "v", "out", "lse_ptr"),
    *("row_ptr", "col_idx", "col_ptr", "row_idx", "col_order", "col_parts"),
    *("padding_ptr", "dropout_ptr", "grad", "dq", "dk", "dv"),
    *("seen_ptr", "spans_ptr", "delta_ptr", "sums_ptr", "done_ptr"),
)
_CONSTANT = -1  # the slot of a number
# What a plain launch does without.
_SPECIAL = ("launch_cooperative_grid", "launch_pdl", "global_scratch_size", "profile_scratch_size")
_INTEGERS = ("i1", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64")


class Launches:
    """What one call launched, written down so that it can be repeated with other tensors."""

    def __init__(self) -> None:
        self._kernels: list[list[int]] = []
        self._repeatable = True

    def add(self, compiled: Any, programs: int, arguments: tuple) -> None:
        """Write down a launch of a compiled kernel; None for one that cannot be repeated."""
        words = None if compiled is None else _words(compiled, programs, arguments)
        if words is None:
            self._repeatable = False
        else:
            self._kernels.append(words)

    def words(self) -> list[int]:
        """Return all launches as integers of 64 bits, none if they cannot be repeated.

        How many there are, and of each: the driver's function, programs, threads of one, bytes of
        its shared memory, how many parameters it has, and for each of them two words: its slot and
        how many bytes the tensor has; or -1 and the bits of a number.
        """
        if not self._repeatable:
            return []
        return [len(self._kernels), *(word for kernel in self._kernels for word in kernel)]


def _words(compiled: Any, programs: int, arguments: tuple) -> list[int] | None:
    about = compiled.metadata
    # Not every release of Triton has all of them.
    special = any(getattr(about, name, 0) for name in _SPECIAL)
    if special or getattr(about, "num_ctas", 1) != 1:
        return None
    parameters: list[int] = []
    for (name, kind), argument in zip(compiled.src.signature.items(), arguments, strict=True):
        for slot, value in _parameters(name, kind, argument):
            parameters += (slot, value)
    threads = 32 * about.num_warps
    head = [compiled.function, programs, threads, about.shared, len(parameters) // 2]
    return head + parameters


def _parameters(name: str, kind: Any, argument: Any) -> Iterator[tuple[int, int]]:
    """Yield slot and value of what a kernel is given of an argument; constants are compiled in."""
    if isinstance(kind, tuple):
        for part_kind, part in zip(kind, argument, strict=True):
            yield from _parameters(name, part_kind, part)
    elif kind.startswith("*"):
        yield SLOTS.index(name), argument.numel() * argument.element_size()
    elif kind == "fp32":
        yield _CONSTANT, struct.unpack("<i", struct.pack("<f", argument))[0]
    elif kind in _INTEGERS:
        yield _CONSTANT, int(argument)
    elif kind != "constexpr":
        raise AssertionError(f"{name}: a parameter of type {kind}")


def launch(
    kernel: Any,
    programs: int,
    strided: tuple[Tensor, ...],
    data: tuple[Tensor | None, ...],
    padding: Tensor | None,
    dropout_key: Tensor | None,
    numbers: tuple[int | float | None, ...],
    constants: tuple[int | bool | str, ...],
    tiles: Tiles,
    dropout_p: float,
    launches: Launches | None = None,
) -> None:
    """Launch one of the attention's kernels.

    Args:
        strided: the (B, H, L, D) tensors, in the kernel's order.
        data: tensors whose place is all that the kernel knows of them.
        numbers, constants: the kernel's further arguments and constexprs, in its order.
        launches: where to write it down.
    """
    threshold, scale = 0, 1.0
    if dropout_key is not None:
        threshold, scale = keep_threshold(dropout_p), 1.0 / (1.0 - dropout_p)
    if padding is not None:
        padding = padding.view(torch.uint8)
    views, usual = [], True
    for x in strided:
        batch, head, token, _ = x.stride()
        views.append((x, batch, head, token))
        usual = usual and (x.data_ptr() | batch | head | token) % 16 == 0
        usual = usual and max(batch, head, token) < 2**31
    arguments = (
        *views,
        *data,
        *(padding, dropout_key, threshold, scale),
        *numbers,
        *constants,
    )
    present = (padding is None, dropout_key is None, *[x is None for x in (*data, *numbers)])
    key = (strided[0].dtype, present, constants, tiles)
    start(kernel, key, programs, arguments, tiles.launch, strided[0], launches, usual)


def start(
    kernel: Any,
    key: tuple,
    programs: int,
    arguments: tuple,
    options: dict[str, int],
    on: Tensor,
    launches: Launches | None = None,
    usual: bool = True,
) -> None:
    """Launch ``programs`` programs on the device of ``on``.

    Args:
        key: what the kernel is compiled for, besides the device.
        launches: where to write it down.
        usual: whether alignment and strides are those that one compiled kernel a key is kept for.
    """
    device = on.device
    if device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            start(kernel, key, programs, arguments, options, on, launches, usual)
        return
    key = (kernel.__name__, device.index, *key)
    compiled = _compiled.get(key)
    if compiled is not None and usual and not hooked():
        # What compiled[(programs, 1, 1)](*arguments) comes to, without hooks and their metadata.
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(programs, 1, 1, stream, function, metadata, None, None, None, *arguments)
    else:
        compiled = kernel[(programs,)](*arguments, **options)
        # Triton compiles for alignment and for strides of more than 32 bits; one case is kept.
        if usual and compiled is not None:
            _compiled[key] = compiled
    if launches is not None:
        launches.add(compiled if usual else None, programs, arguments)


def hooked() -> bool:
    """Return whether somebody, such as a profiler, wants to hear of Triton's launches."""
    runtime = triton.knobs.runtime
    # Older releases have a function or None there, newer ones always a chain of functions.
    return any(
        getattr(hook, "calls", hook)
        for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook)
    )
