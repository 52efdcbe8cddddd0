"""Runs what a library's versions can break, at both ends of the range that setup.py allows.

usage: versions.py [PACKAGE ...]     (make test-versions)

Each end gets an environment of its own, .venv-PACKAGE-VERSION: the library, and what it needs in
another version than is here. Everything else is that of the Python that runs this, so that
gigabytes of PyTorch are not installed again. An environment that is whole is used again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Range:
    """A library whose versions matter.

    Attributes:
        package: its name on the registry, and of its module.
        ends: its oldest and its newest version that work; constraints.txt pins the newest.
        tests: what pytest runs with each.
    """

    package: str
    ends: tuple[str, str]
    tests: tuple[str, ...]


RANGES = (
    Range(
        "deepspeed",
        ("0.19.6", "0.19.8"),
        (
            "tests/training/test_deepspeed_contract.py",
            # Dense to sparse on two ranks at three ZeRO stages, stopped and resumed in each phase.
            "tests/training/test_resume.py::test_stopped_in_each_phase_on_two_ranks",
            # The old interface, which the older version has too.
            "tests/ops/test_install.py::test_every_old_module_is_this_packages_once_asked_for",
        ),
    ),
)

_ASK = """
import importlib, importlib.metadata, json, sys, torch
found = importlib.import_module(sys.argv[1])
versions = importlib.metadata.version(sys.argv[1]), torch.__version__
print(json.dumps([*versions, found.__file__, torch.__file__]))
"""


def make_environment(package: str, version: str) -> Path:
    """Return the Python that has a version of a library before everything that is here."""
    folder = ROOT / f".venv-{package}-{version}"
    python, ready = folder / "bin" / "python", folder / ".ready"
    here = sysconfig.get_path("purelib")
    pins = hashlib.sha256((ROOT / "constraints.txt").read_bytes()).hexdigest()
    built_from = f"{here} {sys.version} {pins}\n"
    if not ready.is_file() or ready.read_text() != built_from:
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=False, symlinks=True)
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = Path(_output(python, "-c", ask).strip())
        # Behind its own packages, with the .pth files there, which a path alone would not read.
        (own / "packages_of_the_base.pth").write_text(f"import site; site.addsitedir({here!r})\n")
        pinned = folder / "constraints.txt"
        torch = _output(python, "-c", "import torch; print(torch.__version__)")
        pinned.write_text(f"torch=={torch}\n")
        install = [python, "-m", "pip", "install", "-q", "--no-build-isolation", "-c", pinned]
        wanted = f"{package}=={version}"
        # The library even where this version is here; then what it needs and is not here.
        for words in (["--no-deps", "--ignore-installed", wanted], [wanted]):
            subprocess.run([*map(str, install), *words], check=True)
        ready.write_text(built_from)
    found, torch, place, torchs_place = json.loads(_output(python, "-c", _ASK, package))
    if found != version or not Path(place).is_relative_to(folder):
        sys.exit(f"error: {python} has {package} {found} at {place}, and {version} was asked for")
    if Path(torchs_place).is_relative_to(folder):
        sys.exit(f"error: {package} {version} brought a PyTorch of its own, {torch}")
    return python


def _output(python: Path, *words: str) -> str:
    return subprocess.run(
        [str(python), *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()[-1]


def main() -> int:
    """Run every range's tests; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [one.package for one in RANGES]
    parser.add_argument("packages", nargs="*", help=f"of {', '.join(known)}; default: all")
    asked = parser.parse_args().packages or known
    if unknown := set(asked) - set(known):
        sys.exit(f"error: no range of {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    results, failed = [], False
    for one in RANGES:
        for version in one.ends if one.package in asked else ():
            python, started = make_environment(one.package, version), time.monotonic()
            paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            words = [str(python), "-m", "pytest", "-q", *one.tests]
            code = subprocess.run(
                words, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, check=False
            ).returncode
            failed = failed or code != 0
            seconds = time.monotonic() - started
            outcome = "passed" if code == 0 else f"failed ({code})"
            results.append(f"{one.package} {version}: {outcome} in {seconds:.0f} s")
    print("\n".join(results))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
