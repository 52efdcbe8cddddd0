"""The wheel holds what an installed package needs."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from spion_ds import compiling
from tests.versions import RANGES, Range

ROOT = Path(__file__).parents[1]


def test_wheel_has_recipes_and_sources_and_no_tests(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for name in ("spion_ds", "csrc"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    words = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    subprocess.run([*words, "-w", str(tmp_path), str(source)], check=True, capture_output=True)
    [wheel] = tmp_path.glob("spion_ds-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {str(path.relative_to(ROOT)) for path in ROOT.glob("spion_ds/recipes/**/*.yaml")}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("spion_ds/**/*.py")}
    assert {"spion_ds/recipes/listops.yaml", "spion_ds/recipes/attention/sat.yaml"} <= recipes
    sources = {f"spion_ds/csrc/{path.name}" for path in ROOT.glob("csrc/*.[ch]*")}
    assert {"spion_ds/csrc/flood_fill.cpp", "spion_ds/csrc/attention_tiles.h"} <= sources
    assert recipes | modules | sources <= names
    assert not [name for name in names if name.startswith(("tests", "launch"))]


def test_a_prebuilt_wheel_gets_its_libraries_from_the_code_of_the_first_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[str] = []

    def write(library: compiling.Library, path: Path) -> None:
        written.append(library.name)
        path.write_bytes(b"a library")

    monkeypatch.setattr(compiling.Library, "write", write)
    monkeypatch.setenv("SPION_DS_PREBUILD", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT)
    every = (compiling.CPP, compiling.CUDA, compiling.HOPPER)
    for libraries, left_out in ((every, None), (every[:1], "there is no nvcc")):
        monkeypatch.setattr(compiling, "compilable", lambda found=(libraries, left_out): found)
        folder = tmp_path / f"{len(libraries)}"
        words = ["-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["setup.py", *words])
        runpy.run_path("setup.py")
        names = sorted(path.name.split(".")[0] for path in (folder / "spion_ds").iterdir())
        assert names == sorted(library.name for library in libraries)
        said = capsys.readouterr().err
        assert ("only the C++ operators are built: there is no nvcc" in said) == bool(left_out)
    assert written == ["_ops", "_cuda", "_hopper", "_ops"]


def test_another_value_of_prebuild_is_an_error() -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "SPION_DS_PREBUILD": "cuda"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "SPION_DS_PREBUILD is 'cuda'; allowed: 1" in result.stderr


@pytest.mark.parametrize("tested", RANGES, ids=lambda tested: tested.package)
def test_the_tested_ends_of_a_range_are_those_that_setup_allows(tested: Range) -> None:
    oldest, newest = tested.ends
    assert f'"{tested.package}>={oldest},<={newest}"' in (ROOT / "setup.py").read_text()
    pins = re.findall(
        rf"^{tested.package}==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE
    )
    assert newest in pins
    for test in tested.tests:
        path, _, name = test.partition("::")
        assert f"def {name}" in (ROOT / path).read_text()
