"""Loads the C++ and CUDA operators of ``csrc/``, compiling them on first use, not at import.

Two environment variables steer it: ``SPION_DS_CACHE`` is the folder that keeps what was compiled
(default ``~/.cache/spion_ds``), and ``SPION_DS_NO_COMPILE=1`` neither compiles nor uses it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

_PACKAGE = Path(__file__).resolve().parent
_SOURCE_FOLDERS = (_PACKAGE / "csrc", _PACKAGE.parent / "csrc")
_ERROR_LINES = 6

_loading = threading.Lock()
_available: bool | None = None
# By compute capability: the library with the CUDA operators, None where there is none.
_cuda_libraries: dict[tuple[int, int], ctypes.CDLL | None] = {}


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
        _load_library()
        torch.library.register_fake("spion_ds::flood_fill", _flood_fill_fake)
    except Exception as error:  # a toolchain fails in many ways, and none may end a run
        warnings.warn(
            f"the C++ operators are not available, so flood fill runs in Python (the same result; "
            f"about 5 ms a layer at 64 blocks a side, 1 s at 1024), and block-sparse attention and "
            f"attention maps on CPUs through PyTorch operators (3 to 4 and 5 to 30 times slower). "
            f"{_reason(error)}",
            RuntimeWarning,
            stacklevel=4,
        )
        return False
    return True


def cuda_operators_available(capability: tuple[int, int]) -> bool:
    """Return whether ``torch.ops.spion_ds`` serves GPUs of this capability, compiling if need be.

    Like :func:`operators_available`, which it needs: it warns once when it does not work, and the
    C++ operators do the work on the CPU. Never raises.
    """
    if not operators_available():
        return False
    with _loading:
        if capability not in _cuda_libraries:
            _cuda_libraries[capability] = _load_cuda(capability)
        return _cuda_libraries[capability] is not None


def _load_cuda(capability: tuple[int, int]) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(_cuda_library(capability)))
        library.spion_flood_fill.argtypes = (
            *(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64, ctypes.c_double),
            *(ctypes.c_void_p, ctypes.c_void_p),
        )
        _register_cuda()
    except Exception as error:
        warnings.warn(
            f"the CUDA operators are not available, so pooled maps move to the CPU for flood fill "
            f"(the same result; about 10 ms a layer at 1024 blocks a side). {_reason(error)}",
            RuntimeWarning,
            stacklevel=4,
        )
        return None
    return library


@functools.cache
def _register_cuda() -> None:
    torch.library.impl("spion_ds::flood_fill", "cuda", _flood_fill_cuda)


def _flood_fill_cuda(pooled: Tensor, threshold: float) -> Tensor:
    if pooled.dim() != 2 or len(set(pooled.shape)) != 1 or not pooled.is_floating_point():
        raise RuntimeError(
            f"flood_fill: pooled must be a square (n, n) map and floating point, got "
            f"{tuple(pooled.shape)} {pooled.dtype}"
        )
    device, n = pooled.device, pooled.shape[0]
    capability = torch.cuda.get_device_capability(device)
    if not cuda_operators_available(capability):
        raise RuntimeError(f"flood_fill: no CUDA operators for {device} (a warning has said why)")
    library = _cuda_libraries[capability]
    assert library is not None
    pooled = pooled.to(torch.float64).contiguous()
    marks = torch.zeros((n, n), dtype=torch.bool, device=device)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream().cuda_stream
        error = library.spion_flood_fill(
            device.index, pooled.data_ptr(), n, threshold, marks.data_ptr(), stream
        )
    if error:
        raise RuntimeError(f"flood_fill: CUDA error {error}")
    return marks


def _flood_fill_fake(pooled: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(pooled, dtype=torch.bool, memory_format=torch.contiguous_format)


def find_nvcc() -> str | None:
    """Return the CUDA compiler: on PATH, or where CUDA_HOME, CUDA_PATH or the default point."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


def _cuda_library(capability: tuple[int, int]) -> Path:
    """Return the library with the CUDA operators for GPUs of this capability, compiled by now."""
    if compiling_is_off():
        raise RuntimeError("SPION_DS_NO_COMPILE is set, so nothing is compiled.")
    library = compiled_cuda_library(capability)
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with _only_one_process(library.parent / "compiling.lock"):
            if not library.exists():
                _compile_cuda(capability, library)
    return library


def _compile_cuda(capability: tuple[int, int], library: Path) -> None:
    """Compile the CUDA files in a fresh folder beside ``library`` and rename the result to it."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("There is no nvcc; install the CUDA toolkit, or set CUDA_HOME.")
    sources = [source for source in _find_sources(".cu") if source.suffix == ".cu"]
    print(
        f"spion_ds: compiling its CUDA operators ({', '.join(file.name for file in sources)}); "
        f"this takes 1 to 10 s, once, and is kept in {library.parent}",
        file=sys.stderr,
        flush=True,
    )
    architecture = f"{capability[0]}{capability[1]}"
    with tempfile.TemporaryDirectory(
        dir=library.parent, prefix="build-", ignore_cleanup_errors=True
    ) as build:
        built = Path(build) / library.name
        command = [nvcc, "-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-o", str(built)]
        command += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
        result = subprocess.run(
            [*command, *map(str, sources)], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise RuntimeError(f"{nvcc} failed.\n{result.stderr or result.stdout}")
        os.replace(built, library)


def _load_library() -> None:
    shipped = shipped_library()
    if shipped is not None:
        try:
            torch.ops.load_library(str(shipped))
            return
        except OSError:
            # Built against another PyTorch: compiling for this one may still work.
            if compiling_is_off():
                raise
    if compiling_is_off():
        raise RuntimeError("SPION_DS_NO_COMPILE is set, so nothing is compiled.")
    sources = _find_sources()
    library = _cache_folder(sources) / "_ops.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with _only_one_process(library.parent / "compiling.lock"):
            if not library.exists():
                _compile(sources, library)
    torch.ops.load_library(str(library))


def shipped_library() -> Path | None:
    """Return the library that was built into the package, if there is one."""
    return next(iter(sorted(_PACKAGE.glob("_ops*.so"))), None)


def compiled_library() -> Path:
    """Return where the library compiled from these sources is kept, whether it is there or not.

    Raises:
        RuntimeError: the sources are not installed.
    """
    return _cache_folder(_find_sources()) / "_ops.so"


def compiled_cuda_library(capability: tuple[int, int]) -> Path:
    """Return where the CUDA library for a compute capability is kept, whether it is there or not.

    Raises:
        RuntimeError: the sources are not installed.
    """
    name = f"_cuda_{capability[0]}{capability[1]}.so"
    return _cache_folder(_find_sources(".cu")) / name


def compiling_is_off() -> bool:
    """Return whether SPION_DS_NO_COMPILE forbids compiling, and using what was compiled."""
    return os.environ.get("SPION_DS_NO_COMPILE", "0") not in ("", "0")


def _find_sources(suffix: str = ".cpp") -> list[Path]:
    """Return the files of a kind of an installed package or a checkout, with the headers."""
    for folder in _SOURCE_FOLDERS:
        if sources := sorted(folder.glob(f"*{suffix}")):
            return sources + sorted(folder.glob("*.h"))
    raise RuntimeError(f"No {suffix} sources in {' or '.join(map(str, _SOURCE_FOLDERS))}.")


def _cache_folder(sources: list[Path]) -> Path:
    """Return the folder for exactly these sources under this PyTorch, Python and processor."""
    root = os.environ.get("SPION_DS_CACHE") or "~/.cache/spion_ds"
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    parts = (
        f"torch{torch.__version__}",
        str(sysconfig.get_config_var("SOABI")),
        platform.machine(),
        digest.hexdigest()[:16],
    )
    return Path(root).expanduser().absolute() / "-".join(parts)


@contextlib.contextmanager
def _only_one_process(lock_file: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system releases when its holder dies, however it dies."""
    with lock_file.open("w") as file:
        # Some network file systems have no locks: then several processes may compile, and each
        # one's rename is still atomic.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(sources: list[Path], library: Path) -> None:
    """Compile ``sources`` in a fresh folder beside ``library`` and rename the result to it."""
    from torch.utils import cpp_extension

    compiled = [source for source in sources if source.suffix == ".cpp"]
    print(
        f"spion_ds: compiling its C++ operators ({', '.join(file.name for file in compiled)}); "
        f"this takes 10 to 60 s, once, and is kept in {library.parent}",
        file=sys.stderr,
        flush=True,
    )
    # A fresh folder: the lock file that PyTorch leaves behind when it is killed is never met again.
    with (
        tempfile.TemporaryDirectory(
            dir=library.parent, prefix="build-", ignore_cleanup_errors=True
        ) as build,
        ninja_on_path(),
    ):
        cpp_extension.load(
            name="spion_ds_ops",
            # Ninja compiles as many at a time as there are processors, or MAX_JOBS.
            sources=[str(source) for source in compiled],
            extra_cflags=["-O3", "-fopenmp"],
            extra_ldflags=["-fopenmp", *shared_standard_library()],
            build_directory=build,
            with_cuda=False,
            is_python_module=False,
        )
        # Already loaded from here, so what enters the cache is known to load. Loading the renamed
        # file again is harmless: it is the same file to the dynamic loader.
        os.replace(Path(build) / "spion_ds_ops.so", library)


def shared_standard_library() -> list[str]:
    """Return linker arguments for the C++ library that PyTorch itself has loaded.

    Where a tool chain prefers the static one, an operator gets a copy of it whose streams crash
    on the first number, as in the message of an error.
    """
    compiler = os.environ.get("CXX", "c++")
    asked = [compiler, "-print-file-name=libstdc++.so.6"]
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return []
    return [found] if Path(found).is_absolute() else []  # a bare name: there is none


@contextlib.contextmanager
def ninja_on_path() -> Iterator[None]:
    """Let PyTorch find a ninja that is installed beside the interpreter but is not on PATH."""
    before = os.environ.get("PATH", os.defpath)
    if shutil.which("ninja") is None:
        beside = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
        os.environ["PATH"] = os.pathsep.join([before, *beside])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _reason(error: Exception) -> str:
    """Return the first lines of what went wrong, without the commands that ninja repeats."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [
        line for line in lines if " -MMD " not in line and not line.startswith(("FAILED", "ninja:"))
    ]
    start = next((number for number, line in enumerate(said) if "error:" in line), 0)
    shown = said[start : start + _ERROR_LINES] or lines[:1]
    return f"{type(error).__name__}: " + "\n  ".join(shown)
