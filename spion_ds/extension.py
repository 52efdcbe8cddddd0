"""Loads the C++ and CUDA operators of ``csrc/``, compiling them on first use, not at import."""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from spion_ds import compiling

_loading = threading.Lock()
_available: bool | None = None
_cuda_available: bool | None = None
_cuda_library: ctypes.CDLL | None = None


def operators_available() -> bool:
    """Return whether ``torch.ops.spion_ds`` has the C++ operators, loading them if need be.

    The first call loads the library that ships in the package, else the one compiled earlier,
    else compiles it. When none of that works it warns once (RuntimeWarning) with the reason and
    what it costs, and the Python versions do the work. Never raises.
    """
    global _available
    with _loading:
        if _available is None:
            _available = _load()
    return _available


def when_available(register: Callable[[], None]) -> Callable[[], bool]:
    """Return a function that says whether the C++ operators are there, and can be traced.

    It runs ``register`` once, when it first finds them: what torch.compile and autograd are to
    know of some of them, by the module that uses these.
    """
    lock, registered = threading.Lock(), False

    @torch.compiler.assume_constant_result  # tracing cannot follow locks
    def ready() -> bool:
        nonlocal registered
        if not operators_available():
            return False
        with lock:
            if not registered:
                register()
                registered = True
        return True

    return ready


def _load() -> bool:
    try:
        compiling.CPP.load(torch.ops.load_library)
        torch.library.register_fake("spion_ds::flood_fill", _flood_fill_fake)
    except Exception as error:  # a toolchain fails in many ways, and none may end a run
        warnings.warn(
            f"the C++ operators are not available, so flood fill runs in Python (the same result; "
            f"about 5 ms a layer at 64 blocks a side, 1 s at 1024), block-sparse attention and "
            f"attention maps on CPUs through PyTorch operators (3 to 4 and 5 to 30 times slower), "
            f"and an eager call of Triton's kernels, forward and backward, takes 0.2 ms more. "
            f"{compiling.reason(error)}",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    return True


def cuda_operators_available() -> bool:
    """Return whether ``torch.ops.spion_ds`` serves CUDA devices, loading what does if need be.

    Like :func:`operators_available`, which it needs: it warns once when it does not work, and the
    C++ operators do the work on the CPU. Never raises.
    """
    global _cuda_available, _cuda_library
    if not operators_available():
        return False
    with _loading:
        if _cuda_available is None:
            _cuda_library = _load_cuda()
            _cuda_available = _cuda_library is not None
    return _cuda_available


def _load_cuda() -> ctypes.CDLL | None:
    try:
        library = compiling.CUDA.load(lambda path: ctypes.CDLL(str(path)))
        library.spion_flood_fill.argtypes = (
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_double),
            *(ctypes.c_void_p, ctypes.c_void_p),
        )
        torch.library.impl("spion_ds::flood_fill", "cuda", _flood_fill_cuda)
    except Exception as error:
        warnings.warn(
            f"the CUDA operators are not available, so pooled maps move to the CPU for flood fill "
            f"(the same result; about 10 ms a layer at 1024 blocks a side). "
            f"{compiling.reason(error)}",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    return library


def _flood_fill_cuda(pooled: Tensor, threshold: float) -> Tensor:
    if pooled.dim() != 2 or len(set(pooled.shape)) != 1 or not pooled.is_floating_point():
        raise RuntimeError(
            f"flood_fill: pooled must be a square (n, n) map and floating point, got "
            f"{tuple(pooled.shape)} {pooled.dtype}"
        )
    device, n = pooled.device, pooled.shape[0]
    assert _cuda_library is not None  # it registered this function
    pooled = pooled.to(torch.float64).contiguous()
    marks = torch.zeros((n, n), dtype=torch.bool, device=device)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        error = _cuda_library.spion_flood_fill(
            device.index, pooled.data_ptr(), n, threshold, marks.data_ptr(), stream
        )
    if error:
        raise RuntimeError(f"flood_fill: CUDA error {error}")
    return marks


def _flood_fill_fake(pooled: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(pooled, dtype=torch.bool, memory_format=torch.contiguous_format)
