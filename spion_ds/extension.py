"""Loads the C++ operators of ``csrc/``, compiling them on first use; nothing happens at import.

Two environment variables steer it: ``SPION_DS_CACHE`` is the folder that keeps what was compiled
(default ``~/.cache/spion_ds``), and ``SPION_DS_NO_COMPILE=1`` neither compiles nor uses it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

_PACKAGE = Path(__file__).resolve().parent
_SOURCE_FOLDERS = (_PACKAGE / "csrc", _PACKAGE.parent / "csrc")
_ERROR_LINES = 6

_loading = threading.Lock()
_available: bool | None = None


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


def _flood_fill_fake(pooled: Tensor, threshold: float) -> Tensor:
    return torch.empty_like(pooled, dtype=torch.bool, memory_format=torch.contiguous_format)


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


def compiling_is_off() -> bool:
    """Return whether SPION_DS_NO_COMPILE forbids compiling, and using what was compiled."""
    return os.environ.get("SPION_DS_NO_COMPILE", "0") not in ("", "0")


def _find_sources() -> list[Path]:
    """Return the C++ files of an installed package or of a checkout, with their headers."""
    for folder in _SOURCE_FOLDERS:
        if sources := sorted(folder.glob("*.cpp")):
            return sources + sorted(folder.glob("*.h"))
    raise RuntimeError(f"No C++ sources in {' or '.join(map(str, _SOURCE_FOLDERS))}.")


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
            extra_ldflags=["-fopenmp"],
            build_directory=build,
            with_cuda=False,
            is_python_module=False,
        )
        # Already loaded from here, so what enters the cache is known to load. Loading the renamed
        # file again is harmless: it is the same file to the dynamic loader.
        os.replace(Path(build) / "spion_ds_ops.so", library)


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
