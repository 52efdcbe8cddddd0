"""Run as a program: launches that are repeated in C++, with Triton's interpreter for a CUDA driver.

It takes an empty folder, for a library that looks like the driver's, and needs a C++ compiler and
TRITON_INTERPRET=1. It raises where what was repeated does not give the bits of Triton's operators.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from spion_ds.attention import BlockLayout, layout
from spion_ds.attention.triton import backend as triton_backend
from spion_ds.attention.triton import launch as triton_launch

from .cases import Case, Inputs, Results, Size, evaluate, make

CASES = (
    # head_dim 16 and 32 in 16 bits take rows and columns in one launch, the rest in two.
    Case(dtype=torch.float16, lengths="more_keys"),
    Case(dtype=torch.float16, per_head=True, grouped=True, dropout_p=0.3, padding="tail"),
    Case(padding="holes", lengths="odd", zero_padded=True, scale=0.3),
    Case(head_dim=64, dtype=torch.float16, causal=True, pruned="excluded", kept="empty_rows"),
    Case(dtype=torch.float16, causal=True, padding="tail", query_offset=21),
    Case(head_dim=64, causal=True, grouped=True, lengths="more_keys", query_offset=32),
)

_DRIVER = """
extern "C" {
using Start = int (*)(long, unsigned, unsigned, unsigned, void*, void**);
static Start start;
void start_with(Start given) { start = given; }
int cuLaunchKernel(void* function, unsigned x, unsigned, unsigned, unsigned threads, unsigned,
                   unsigned, unsigned shared, void* stream, void** parameters, void**) {
  return start(reinterpret_cast<long>(function), x, threads, shared, stream, parameters);
}
int cuCtxGetCurrent(void** context) { return *context = &start, 0; }
int cuDeviceGet(int*, int) { return 1; }
int cuDevicePrimaryCtxRetain(void**, int) { return 1; }
int cuCtxSetCurrent(void*) { return 1; }
}
"""
_START = ctypes.CFUNCTYPE(
    *(ctypes.c_int, ctypes.c_long, ctypes.c_uint, ctypes.c_uint, ctypes.c_uint),
    *(ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)),
)
THREADS, SHARED = 128, 4096
_METADATA = SimpleNamespace(
    **{"num_warps": THREADS // 32, "shared": SHARED},
    # As Triton 3.4 has them; newer releases have profile_scratch_size too.
    **{"launch_pdl": False, "launch_cooperative_grid": False, "global_scratch_size": 0},
)


class Driver:
    """Interprets what is launched, from Python or through ``cuLaunchKernel``."""

    def __init__(self, folder: Path) -> None:
        self.launched: list[tuple[Any, dict[str, int], tuple]] = []
        self.repeated: list[str] = []
        self._start = _START(self._repeat)
        source, library = folder / "driver.cpp", folder / "driver.so"
        source.write_text(_DRIVER)
        command = [os.environ.get("CXX", "c++"), "-shared", "-fPIC", str(source)]
        subprocess.run([*command, "-Wl,-soname,libcuda.so.1", "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))  # found by its soname from now on
        self._library.start_with(self._start)

    def start(
        self,
        kernel: Any,
        key: tuple,
        programs: int,
        arguments: tuple,
        options: dict[str, int],
        on: Tensor,
        launches: triton_launch.Launches | None = None,
        usual: bool = True,
    ) -> None:
        """Stand for ``triton_launch.start``."""
        kernel[(programs,)](*arguments, **options)
        if launches is not None:
            self.launched.append((kernel, options, arguments))
            compiled = SimpleNamespace(
                function=len(self.launched),
                src=SimpleNamespace(signature=_signature(kernel, arguments)),
                metadata=_METADATA,
            )
            launches.add(compiled if usual else None, programs, arguments)

    def _repeat(
        self, function: int, programs: int, threads: int, shared: int, stream: int, parameters: Any
    ) -> int:
        try:
            assert (threads, shared, stream) == (THREADS, SHARED, None)
            kernel, options, arguments = self.launched[function - 1]
            kinds = _signature(kernel, arguments).values()
            given = iter(parameters[: sum(map(_count, kinds))])
            again = [_given(*pair, given) for pair in zip(kinds, arguments, strict=True)]
            kernel[(programs,)](*again, **options)
            self.repeated.append(kernel.__name__)
        except BaseException as error:  # ctypes would print it and go on
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        return 0


def _signature(kernel: Any, arguments: tuple) -> dict[str, Any]:
    """Return what Triton's compiler would say of the arguments."""
    names = kernel.fn.__annotations__.items()
    pairs = zip([pair for pair in names if pair[0] != "return"], arguments, strict=True)
    return {name: _kind(argument, "constexpr" in kind) for (name, kind), argument in pairs}


def _kind(argument: Any, constant: bool) -> Any:
    if isinstance(argument, tuple):
        # As Triton does, a stride of 1 is compiled in.
        return tuple(_kind(part, isinstance(part, int) and part == 1) for part in argument)
    if constant or argument is None:
        return "constexpr"
    return {Tensor: "*i8", float: "fp32", int: "i64"}[type(argument)]


def _count(kind: Any) -> int:
    return sum(map(_count, kind)) if isinstance(kind, tuple) else int(kind != "constexpr")


def _given(kind: Any, argument: Any, given: Any) -> Any:
    """Return a kernel's argument, read from the addresses of parameters that are next in line."""
    if isinstance(kind, tuple):
        return tuple(_given(*pair, given) for pair in zip(kind, argument, strict=True))
    if kind == "constexpr":
        return argument
    types = {"i64": ctypes.c_int64, "fp32": ctypes.c_float, "*i8": ctypes.c_uint64}
    value = types[kind].from_address(next(given)).value
    if kind != "*i8":
        return value
    size = argument.numel() * argument.element_size()
    if size == 0:
        return torch.empty_like(argument)
    return torch.frombuffer((ctypes.c_char * size).from_address(value), dtype=argument.dtype)


def another_draw(inputs: Inputs) -> Inputs:
    """The same kind of call, with every tensor in another place and other values."""
    tensors = {name: torch.randn_like(getattr(inputs, name)) for name in ("q", "k", "v", "grad")}
    options = dict(inputs.options)
    if options["key_padding_mask"] is not None:
        options["key_padding_mask"] = options["key_padding_mask"].roll(1, dims=1)
    if options["dropout_key"] is not None:
        options["dropout_key"] = options["dropout_key"] + 1
    same = BlockLayout.from_mask(inputs.layout.to_mask().cpu(), inputs.layout.block)
    return replace(inputs, layout=same.to(inputs.q.device), options=options, **tensors)


def by_operators(inputs: Inputs) -> Results:
    """What Triton's operators make of it."""
    ready = triton_backend.operators_available
    triton_backend.operators_available = lambda: False
    try:
        return evaluate(inputs, "triton")
    finally:
        triton_backend.operators_available = ready


def main(folder: str) -> None:
    """Launch each case, then repeat it with other tensors."""
    driver = Driver(Path(folder))
    triton_launch.start = triton_backend.start = driver.start
    size, parts = Size(batch=2, heads=2, length=48, blocks=5), 0
    for case in CASES:
        layout.LONGEST_PART = 2 * case.block  # so that hot columns are cut
        inputs = make(case, size, torch.device("cpu"))
        parts += inputs.layout.col_parts.shape[1]
        launched = len(driver.launched)
        evaluate(inputs, "triton")
        launches = len(driver.launched) - launched
        again = another_draw(inputs)
        expected = by_operators(again)
        driver.repeated.clear()
        results = evaluate(again, "triton")
        assert len(driver.repeated) == launches > 0, driver.repeated
        assert len(driver.launched) == launched + launches
        for name, a, b in zip(Results._fields, results, expected, strict=True):
            assert torch.equal(a, b), f"{case}: {name}"
        print(case, driver.repeated)
    assert parts > 0


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1])
