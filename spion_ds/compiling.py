"""Compiles the libraries of ``csrc/``: into a cache on first use, or into a wheel (setup.py).

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
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from spion_ds.durable_files import flush, sha256_of

T = TypeVar("T")

_PACKAGE = Path(__file__).resolve().parent
_SOURCE_FOLDERS = (_PACKAGE / "csrc", _PACKAGE.parent / "csrc")
_ERROR_LINES = 6


@dataclass(frozen=True)
class Library:
    """A library that is compiled from files of ``csrc/``.

    Attributes:
        name: of its file, without what follows the first dot.
        title: what messages call it.
        files: patterns of the files in ``csrc/`` that it depends on.
        takes: how long compiling it takes.
        compile: ``(sources, output)`` compiles .cpp and .cu files into ``output``, whose folder is
            fresh; raises RuntimeError or OSError.
    """

    name: str
    title: str
    files: tuple[str, ...]
    takes: str
    compile: Callable[[list[Path], Path], None]

    def load(self, load: Callable[[Path], T], *, compile: bool = True) -> T:
        """Return what ``load`` makes of the shipped library, else of the compiled one.

        Args:
            load: is called with the library's path.
            compile: whether it is compiled where it was not before.

        Raises:
            RuntimeError: it cannot be compiled, or is not to be.
            OSError: it cannot be loaded.
        """
        shipped = self.shipped()
        if shipped is not None:
            try:
                return load(shipped)
            except OSError:
                # Built against another PyTorch: compiling for this one may still work.
                if compiling_is_off():
                    raise
        if not compile and not self.is_cached():
            raise RuntimeError(f"The {self.title} are not compiled.")
        return load(self.compiled())

    def shipped(self) -> Path | None:
        """Return the library that was built into the package, if there is one."""
        return next(iter(sorted(_PACKAGE.glob(f"{self.name}*.so"))), None)

    def compiled(self) -> Path:
        """Return the library of the cache, which one process compiles if it is not whole there.

        Raises:
            RuntimeError: it cannot be compiled.
        """
        if compiling_is_off():
            raise RuntimeError("SPION_DS_NO_COMPILE is set, so nothing is compiled.")
        library = self.cached()
        if not self.is_cached():
            library.parent.mkdir(parents=True, exist_ok=True)
            with _only_one_process(library.parent / "compiling.lock"):
                if not self.is_cached():
                    self.write(library)
                    _sum_of(library).write_text(sha256_of(library))
        return library

    def is_cached(self) -> bool:
        """Return whether the cache has it as it was compiled: a damaged one may kill Python.

        Raises:
            RuntimeError: the sources are not installed.
        """
        library = self.cached()
        try:
            return _sum_of(library).read_text() == sha256_of(library)
        except (OSError, ValueError):
            return False

    def cached(self) -> Path:
        """Return where the cache keeps it, whether it is there or not.

        That is a folder for exactly these sources under this PyTorch, Python and processor.

        Raises:
            RuntimeError: the sources are not installed.
        """
        digest = hashlib.sha256()
        for source in self.sources():
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
        parts = (
            f"torch{torch.__version__}",
            str(sysconfig.get_config_var("SOABI")),
            platform.machine(),
            digest.hexdigest()[:16],
        )
        root = Path(os.environ.get("SPION_DS_CACHE") or "~/.cache/spion_ds")
        return root.expanduser().absolute() / "-".join(parts) / f"{self.name}.so"

    def sources(self) -> list[Path]:
        """Return the files of an installed package or a checkout that it depends on.

        Raises:
            RuntimeError: there are none.
        """
        for folder in _SOURCE_FOLDERS:
            if found := sorted(path for files in self.files for path in folder.glob(files)):
                return found
        raise RuntimeError(
            f"No sources of the {self.title} in {' or '.join(map(str, _SOURCE_FOLDERS))}."
        )

    def write(self, path: Path) -> None:
        """Compile it in a fresh folder beside ``path`` and rename the result to that.

        Raises:
            RuntimeError: the compiler is missing or fails.
        """
        path = path.absolute()
        sources = [source for source in self.sources() if source.suffix in (".cpp", ".cu")]
        print(
            f"spion_ds: compiling its {self.title} ({', '.join(file.name for file in sources)}); "
            f"this takes {self.takes}, once, and is kept in {path.parent}",
            file=sys.stderr,
            flush=True,
        )
        # Fresh: the lock file that PyTorch leaves behind when it is killed is never met again.
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix="build-", ignore_cleanup_errors=True
        ) as build:
            built = Path(build) / f"{self.name}.so"
            try:
                self.compile(sources, built)
            except subprocess.SubprocessError as error:
                # PyTorch asks a compiler for its version before it builds CUDA sources.
                raise RuntimeError(str(error)) from error
            flush(built)
            os.replace(built, path)


def _sum_of(library: Path) -> Path:
    """Return the path of the file with a library's sha256."""
    return library.with_name(f"{library.name}.sha256")


# nvcc's, beside those of PyTorch: wgmma is of this architecture alone.
HOPPER_FLAGS = ("-O3", "-gencode=arch=compute_90a,code=sm_90a")


def _compile_operators(sources: list[Path], output: Path) -> None:
    """Compile operators that are registered with PyTorch in C++."""
    from torch.utils import cpp_extension

    with ninja_on_path():
        # It also loads the library, so what enters a cache or a wheel is known to load. Loading it
        # again when it has been renamed is harmless: it is the same file to the dynamic loader.
        cpp_extension.load(
            name=output.stem,
            # Ninja compiles as many at a time as there are processors, or MAX_JOBS.
            sources=[str(source) for source in sources],
            extra_cflags=["-O3", "-fopenmp"],
            extra_cuda_cflags=list(HOPPER_FLAGS),
            extra_ldflags=["-fopenmp", *_shared_standard_library()],
            build_directory=str(output.parent),
            with_cuda=any(source.suffix == ".cu" for source in sources),
            is_python_module=False,
        )


def _compile_functions(sources: list[Path], output: Path) -> None:
    """Compile C functions, which need no PyTorch, for every GPU that nvcc knows."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("There is no nvcc; install the CUDA toolkit, or set CUDA_HOME.")
    command = [nvcc, "-O3", "-std=c++17", "-arch=all-major", "--threads=0"]
    command += ["-shared", "-Xcompiler", "-fPIC", "-o", str(output), *map(str, sources)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{nvcc} failed.\n{result.stderr or result.stdout}")


CPP = Library("_ops", "C++ operators", ("*.cpp", "*.h"), "10 to 60 s", _compile_operators)
CUDA = Library("_cuda", "CUDA operators", ("*.cu", "*.h"), "1 to 10 s", _compile_functions)
HOPPER = Library("_hopper", "Hopper kernels", ("hopper/*",), "minutes", _compile_operators)


def compilable() -> tuple[tuple[Library, ...], str | None]:
    """Return the libraries to build into a wheel here, and why not all of them, None if all.

    The C++ operators are always among them: that there is a compiler is seen when they are built.
    """
    if torch.version.cuda is None:
        return (CPP,), f"PyTorch {torch.__version__} is without CUDA"
    if find_nvcc() is None:
        return (CPP,), "there is no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda"
    return (CPP, CUDA, HOPPER), None


def compiling_is_off() -> bool:
    """Return whether SPION_DS_NO_COMPILE forbids compiling, and using what was compiled."""
    return os.environ.get("SPION_DS_NO_COMPILE", "0") not in ("", "0")


def find_nvcc() -> str | None:
    """Return the CUDA compiler: on PATH, or where CUDA_HOME, CUDA_PATH or the default point."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home) / "bin"))


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


def reason(error: Exception) -> str:
    """Return the first lines of what went wrong, without the commands that ninja repeats."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [
        line for line in lines if " -MMD " not in line and not line.startswith(("FAILED", "ninja:"))
    ]
    start = next((number for number, line in enumerate(said) if "error:" in line), 0)
    shown = said[start : start + _ERROR_LINES] or lines[:1]
    return f"{type(error).__name__}: " + "\n  ".join(shown)


def _shared_standard_library() -> list[str]:
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
def _only_one_process(lock_file: Path) -> Iterator[None]:
    """Hold an exclusive lock that the system releases when its holder dies, however it dies."""
    with lock_file.open("w") as file:
        # Some network file systems have no locks: then several processes may compile, and each
        # one's rename is still atomic.
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
