"""One compile for the whole folder: two processes start it at once, the tests load its result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from spion_ds import compiling, extension

ROOT = Path(__file__).resolve().parents[2]
SAY_AVAILABLE = "from spion_ds.extension import operators_available; print(operators_available())"


@dataclass(frozen=True)
class Finished:
    """What a process printed."""

    stdout: str
    stderr: str


def start(code: str, **environment: str) -> subprocess.Popen[str]:
    """Start Python on ``code`` at the top of the checkout."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Finished:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return Finished(stdout, stderr)


@pytest.fixture(scope="session")
def compiled_together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Finished]]:
    """The cache folder and output of two processes that both needed the operators at once.

    The folder holds what a compile that was killed leaves behind.
    """
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPION_DS_CACHE", str(cache))
        folder = compiling.CPP.cached().parent
    (folder / "build-killed").mkdir(parents=True)
    (folder / "build-killed" / "lock").touch()
    (folder / "compiling.lock").touch()
    environment = {"SPION_DS_CACHE": str(cache), "SPION_DS_NO_COMPILE": ""}
    processes = [start(SAY_AVAILABLE, **environment) for _ in range(2)]
    return folder, [finish(process) for process in processes]


@pytest.fixture(scope="session")
def operators(compiled_together: tuple[Path, list[Finished]]) -> None:
    """The C++ operators are loaded in this process."""
    folder, _ = compiled_together
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPION_DS_CACHE", str(folder.parent))
        patch.delenv("SPION_DS_NO_COMPILE", raising=False)
        assert extension.operators_available()
