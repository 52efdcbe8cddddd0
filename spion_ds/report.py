"""What is installed here, what serves attention on which device, and what missing things cost.

python -m spion_ds.report            # compiles nothing
python -m spion_ds.report --build    # compiles the operators, and says how long that took
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

import spion_ds
from spion_ds import compiling, extension
from spion_ds.attention.available import HAS_TRITON
from spion_ds.attention.hopper import backend as hopper_backend
from spion_ds.errors import ConfigError

_PACKAGES = ("triton", "deepspeed", "mpi4py", "transformers")
_PYTHON_COST = (
    "flood fill runs in Python (1 s a layer at 1024 blocks a side), on CPUs block-sparse "
    "attention is 3 to 4 times and attention maps are 5 to 30 times slower, and an eager call of "
    "Triton's kernels, forward and backward, takes 0.2 ms more"
)


@dataclass
class Report:
    """Sections of (name, what was found), and a line for each missing thing."""

    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def add(self, section: str, name: str, found: str, missing: str | None = None) -> None:
        """Add a line to a section, and one to the missing things."""
        self.sections.setdefault(section, []).append((name, found))
        if missing is not None:
            self.missing.append(f"{name}: {missing}")

    def text(self, colours: bool = False) -> str:
        """Return the report, with bold titles if ``colours``."""
        bold, plain = ("\033[1m", "\033[0m") if colours else ("", "")
        lines = []
        for section, entries in self.sections.items():
            lines += [f"{bold}{section}{plain}"]
            lines += [f"  {name:<{_WIDTH}} {found}" for name, found in entries]
            lines += [""]
        lines += [f"{bold}missing{plain}"]
        lines += [f"  {line}" for line in self.missing or ["nothing"]]
        return "\n".join(lines)


_WIDTH = 18


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report; return 0, or 1 if --build was asked for and failed."""
    parser = argparse.ArgumentParser(
        prog="python -m spion_ds.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--build", action="store_true", help="compile the operators first")
    options = parser.parse_args(arguments)
    failed = options.build and not _build()
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(describe().text(colours))
    return int(failed)


def _build() -> bool:
    """Compile what this machine can use and has not, and say so; return whether all of it loads."""
    nvcc = compiling.find_nvcc() is not None
    libraries = (
        (compiling.CPP, _load_operators, True),
        (compiling.CUDA, _load_cuda_operators, nvcc and torch.cuda.is_available()),
        (compiling.HOPPER, _load_hopper_kernels, nvcc and _has_hopper()),
    )
    built = True
    for library, load, wanted in libraries:
        if not wanted:
            continue
        start = time.perf_counter()
        reason = load()
        took = time.perf_counter() - start
        built &= reason is None
        print(reason or f"the {library.title} are loaded; it took {took:.1f} s")
    print()
    return built


def describe() -> Report:
    """Return what was found; compiles nothing, and writes nothing."""
    report = Report()
    _versions(report)
    _devices(report)
    compiler = _tools(report)
    operators = _operators(report, compiler)
    _gpu_kernels(report, compiler)
    _backends(report, operators)
    return report


def _versions(report: Report) -> None:
    section = "versions"
    report.add(section, "spion_ds", f"{spion_ds.__version__} in {Path(spion_ds.__file__).parent}")
    report.add(section, "python", f"{platform.python_version()} at {sys.executable}")
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    report.add(section, "torch", f"{torch.__version__}, {cuda}")
    lines = {
        "triton": "on GPUs block-sparse attention and maps run through PyTorch operators, "
        "several times slower; pip install 'spion_ds[gpu]'"
        if torch.cuda.is_available()
        else None,
        "deepspeed": "launch/train.py does not run, attention and patterns do; pip install "
        "deepspeed",
        "mpi4py": "runs cannot be started with mpirun, other launchers can; pip install "
        "'spion_ds[mpi]'",
        "transformers": None,
    }
    for package in _PACKAGES:
        version = _version(package)
        missing = lines[package] if version is None else None
        report.add(section, package, version or "not installed", missing)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices(report: Report) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    report.add("devices", "cpu", f"{platform.machine()}, {capability}, {threads} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = properties.total_memory / 2**30
        found = f"{properties.name}, {properties.major}.{properties.minor}, {size:.0f} GiB"
        report.add("devices", f"cuda:{index}", found)
    if torch.cuda.device_count() == 0:
        report.add(
            "devices",
            "cuda",
            "none",
            "everything runs on the CPU; install a PyTorch with CUDA where there is a GPU"
            if torch.version.cuda is None
            else "everything runs on the CPU; if there is a GPU, see what nvidia-smi says",
        )


def _tools(report: Report) -> str | None:
    """Add compiler, ninja and nvcc; return why nothing can be compiled, None if it can."""
    wanted = os.environ.get("CXX") or "c++"
    # CXX may have arguments, or a launcher in front.
    compiler, why = shutil.which(wanted.split()[0]), None
    if compiler is None:
        why = f"there is no C++ compiler ({wanted})"
        report.add("tools", "C++ compiler", f"{wanted} is not on PATH")
    else:
        report.add("tools", "C++ compiler", f"{compiler} ({_first_line(compiler, '--version')})")
    with compiling.ninja_on_path():
        ninja = shutil.which("ninja")
        found = f"{ninja} ({_first_line(ninja, '--version')})" if ninja else "not found"
    report.add("tools", "ninja", found)
    if ninja is None:
        why = why or "there is no ninja"
    nvcc = compiling.find_nvcc()
    missing = (
        "flood fill runs on the CPU (10 ms a layer at 1024 blocks a side), and the Hopper kernels "
        "cannot be compiled; install the CUDA toolkit 12.3 or newer, or a wheel that was built "
        "with it and SPION_DS_PREBUILD=1"
    )
    needed = nvcc is None and torch.cuda.is_available() and compiling.CUDA.shipped() is None
    report.add("tools", "nvcc", nvcc or "not found", missing if needed else None)
    return why


def _operators(report: Report, no_tools: str | None) -> bool:
    """Add the C++ operators; return whether they serve, compiled on first use if need be."""
    section, name = "operators", "C++ operators"
    found, state = _found(compiling.CPP, no_tools)
    if state == "there" and (reason := _load_operators()) is not None:
        found, state = f"{found}, but does not load: {reason}", "broken"
    missing = None
    if state not in ("there", "on first use"):
        missing = f"{_PYTHON_COST}; {_REMEDIES[state]}"
    report.add(section, name, found, missing)
    return missing is None


_REMEDIES = {
    "forbidden": "unset SPION_DS_NO_COMPILE, or install a wheel built with SPION_DS_PREBUILD=1",
    "no sources": "reinstall spion_ds",
    "no tools": "install a C++ compiler and ninja, or a wheel built with SPION_DS_PREBUILD=1",
    "broken": "remove that file, so that it is compiled again",
}


def _found(library: compiling.Library, no_tools: str | None) -> tuple[str, str]:
    """Return what there is of a library, and its state: "there", "on first use", or why not."""
    if (shipped := library.shipped()) is not None:
        return f"built into the package, {shipped}", "there"
    if compiling.compiling_is_off():
        return "SPION_DS_NO_COMPILE is set: not compiled, nor loaded from the cache", "forbidden"
    try:
        cached, there = library.cached(), library.is_cached()
    except RuntimeError as error:
        return str(error), "no sources"
    if there:
        return f"compiled, {cached}", "there"
    if no_tools is not None:
        return f"not compiled, and cannot be: {no_tools}", "no tools"
    return f"compiled on first use, {library.takes}, into {cached.parent}", "on first use"


def _gpu_kernels(report: Report, no_tools: str | None) -> None:
    if not HAS_TRITON:
        found = "Triton is not installed"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        found = "interpreted, for tests (TRITON_INTERPRET=1)"
    elif torch.cuda.is_available():
        cache = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
        found = f"compiled on first use of each, seconds, into {cache}"
    else:
        found = "for CUDA devices, of which there is none"
    report.add("operators", "Triton kernels", found)
    no_nvcc = "there is no nvcc" if compiling.find_nvcc() is None else None
    cuda, hopper = torch.cuda.is_available(), _has_hopper()
    if cuda or compiling.CUDA.shipped() is not None:
        found, _ = _found(compiling.CUDA, no_nvcc)
    else:
        found = "for CUDA devices, of which there is none"
    report.add("operators", "CUDA operators", found)
    missing = None
    if hopper or compiling.HOPPER.shipped() is not None:
        found, state = _found(compiling.HOPPER, no_nvcc or no_tools)
        if state == "on first use":
            found = "not compiled"
        if hopper and state != "there":
            missing = f"{_TRITON_COST}; {_HOPPER_REMEDIES.get(state) or _REMEDIES[state]}"
    else:
        found = "for GPUs of compute capability 9.0, of which there is none"
    report.add("operators", "Hopper kernels", found, missing)


_TRITON_COST = (
    'backend="auto" takes triton where they would be faster: forward + backward take a '
    "seventh to a third longer at head_dim 128, up to a seventh at head_dim 64"
)
_HOPPER_REMEDIES = {
    "on first use": f"python -m spion_ds.report --build compiles them, in {compiling.HOPPER.takes}",
    "no tools": "install the CUDA toolkit 12.3 or newer, a C++ compiler and ninja, or a wheel "
    "that was built with them and SPION_DS_PREBUILD=1",
}


def _backends(report: Report, operators: bool) -> None:
    section = 'attention backend of "auto"'
    if operators:
        report.add(section, "cpu", "cpp: the C++ operators (float64: torch)")
    else:
        report.add(section, "cpu", "torch: the C++ operators are not available")
    if not torch.cuda.is_available():
        return
    if not HAS_TRITON:
        report.add(section, "cuda", "torch: Triton is not installed")
        return
    found = "triton: blocks of 16 to 128, head_dim to 256, bf16, fp16, fp32 (others: torch)"
    report.add(section, "cuda", found)
    if _has_hopper() and _is_there(compiling.HOPPER):
        found = (
            "hopper before it: bf16, fp16, blocks of 64 and 128, head_dim 128, and 64 from 4096 "
            "tokens on; without padding mask, causal mask and dropout"
        )
        report.add(section, "", found)


def _has_hopper() -> bool:
    count = torch.cuda.device_count()
    return any(torch.cuda.get_device_capability(index) == (9, 0) for index in range(count))


def _is_there(library: compiling.Library) -> bool:
    return _found(library, None)[1] == "there"


def _load_operators() -> str | None:
    """Load the C++ operators, compiling them if need be; return why not, None if it worked."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if extension.operators_available():
            return None
    said = [str(warning.message) for warning in caught if warning.category is RuntimeWarning]
    return said[-1] if said else "the C++ operators are not available"


def _load_cuda_operators() -> str | None:
    return None if extension.cuda_operators_available() else "the CUDA operators are not available"


def _load_hopper_kernels() -> str | None:
    try:
        hopper_backend.load()
    except ConfigError as error:
        return str(error)
    return None


def _first_line(*command: str) -> str:
    """Return the first line that a command prints."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return f"does not run: {error}"
    return next(iter((run.stdout or run.stderr).splitlines()), "says nothing")


if __name__ == "__main__":
    sys.exit(main())
