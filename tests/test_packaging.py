"""The wheel holds what an installed package needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

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
