"""The installation report: says what is there and what is not, and compiles nothing by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spion_ds import compiling, extension, report
from spion_ds.attention.hopper import backend as hopper_backend
from spion_ds.durable_files import sha256_of
from spion_ds.errors import ConfigError

ROOT = Path(__file__).parents[1]


def run(cache: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the report with an empty cache of its own."""
    given = {"SPION_DS_CACHE": str(cache), "SPION_DS_NO_COMPILE": "", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "spion_ds.report", *arguments],
        env={**os.environ, **given, **environment},
        cwd=cache,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_it_says_what_is_there_and_compiles_nothing(tmp_path):
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    result = run(tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    for word in ("versions", "devices", "tools", "operators", "missing", "python", "deepspeed"):
        assert word in result.stdout
    assert f"compiled on first use, 10 to 60 s, into {tmp_path}" in result.stdout
    assert "cpp: the C++ operators (float64: torch)" in result.stdout
    assert "\033" not in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_missing_compiler_is_named_with_its_cost_and_its_remedy(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = run(tmp_path / "empty", PATH=str(empty), CXX="")
    assert result.returncode == 0, result.stderr
    assert "c++ is not on PATH" in result.stdout
    assert "not compiled, and cannot be: there is no C++ compiler (c++)" in result.stdout
    assert "torch: the C++ operators are not available" in result.stdout
    missing = result.stdout.split("missing\n")[1]
    assert "3 to 4 times" in missing
    assert "install a C++ compiler and ninja" in missing


def test_forbidden_compiling_is_the_reason_that_is_given(tmp_path):
    result = run(tmp_path, SPION_DS_NO_COMPILE="1")
    assert result.returncode == 0, result.stderr
    assert "SPION_DS_NO_COMPILE is set" in result.stdout
    assert "unset SPION_DS_NO_COMPILE" in result.stdout.split("missing\n")[1]
    assert list(tmp_path.iterdir()) == []


def test_a_failed_build_says_why_and_is_no_success(tmp_path):
    result = run(tmp_path, "--build", CXX="false")
    assert result.returncode == 1
    assert "the C++ operators are not available" in result.stdout
    # What follows is still the whole report.
    assert "versions" in result.stdout
    assert "missing" in result.stdout


def test_build_says_how_long_it_took(monkeypatch, capsys):
    monkeypatch.setattr(extension, "operators_available", lambda: True)
    assert report.main(["--build"]) == 0
    assert "the C++ operators are loaded; it took 0.0 s" in capsys.readouterr().out


def test_a_library_that_does_not_load_is_reported(tmp_path, monkeypatch):
    monkeypatch.delenv("SPION_DS_NO_COMPILE", raising=False)
    monkeypatch.setenv("SPION_DS_CACHE", str(tmp_path))
    monkeypatch.setattr(extension, "_available", None)
    library = compiling.CPP.cached()
    library.parent.mkdir()
    library.write_bytes(b"no library")
    library.with_name("_ops.so.sha256").write_text(sha256_of(library))
    found = report.Report()
    assert not report._operators(found, None)
    [(_, line)] = found.sections["operators"]
    assert line.startswith(f"compiled, {library}, but does not load:")
    assert "remove that file" in found.missing[0]


def test_it_says_which_libraries_are_prebuilt(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "_PACKAGE", tmp_path)
    monkeypatch.setenv("SPION_DS_NO_COMPILE", "1")
    found = report.Report()
    (tmp_path / "_hopper.so").touch()
    report._gpu_kernels(found, "there is no C++ compiler (c++)")
    lines = dict(found.sections["operators"])
    assert lines["Hopper kernels"] == f"built into the package, {tmp_path / '_hopper.so'}"
    assert "built into the package" not in lines["CUDA operators"]
    (tmp_path / "_cuda.so").touch()
    report._gpu_kernels(found, None)
    lines = dict(found.sections["operators"])
    assert lines["CUDA operators"] == f"built into the package, {tmp_path / '_cuda.so'}"


def test_hopper_kernels_that_are_not_built_have_a_cost_and_a_command(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "_PACKAGE", tmp_path)
    monkeypatch.setattr(compiling, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(report, "_has_hopper", lambda: True)
    monkeypatch.setattr(report, "HAS_TRITON", True)
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("SPION_DS_CACHE", str(tmp_path))
    monkeypatch.delenv("SPION_DS_NO_COMPILE", raising=False)
    found = report.Report()
    report._gpu_kernels(found, None)
    report._backends(found, True)
    assert dict(found.sections["operators"])["Hopper kernels"] == "not compiled"
    [missing] = found.missing
    assert missing.startswith('Hopper kernels: backend="auto" takes triton')
    assert "python -m spion_ds.report --build" in missing
    assert "hopper" not in found.text().split("missing")[0].split("auto")[1]
    (tmp_path / "_hopper.so").touch()
    found = report.Report()
    report._gpu_kernels(found, None)
    report._backends(found, True)
    assert found.missing == []
    assert "hopper before it" in found.text()


def test_build_compiles_hopper_kernels_where_they_can_run(monkeypatch, capsys):
    monkeypatch.setattr(compiling, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(report, "_has_hopper", lambda: True)
    monkeypatch.setattr(extension, "operators_available", lambda: True)

    def fail() -> None:
        raise ConfigError("nvcc is too old")

    monkeypatch.setattr(hopper_backend, "load", fail)
    assert report.main(["--build"]) == 1
    assert "nvcc is too old" in capsys.readouterr().out
    monkeypatch.setattr(hopper_backend, "load", lambda: True)
    assert report.main(["--build"]) == 0
    assert "the Hopper kernels are loaded; it took" in capsys.readouterr().out


def test_nvcc_is_missed_only_where_nothing_is_prebuilt(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "_PACKAGE", tmp_path)
    monkeypatch.setattr(compiling, "find_nvcc", lambda: None)
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: True)
    found = report.Report()
    report._tools(found)
    assert "a wheel that was built with it" in found.missing[-1]
    (tmp_path / "_cuda.so").touch()
    found = report.Report()
    report._tools(found)
    assert not [line for line in found.missing if line.startswith("nvcc")]


def test_titles_are_bold_only_when_asked_for():
    shown = report.Report()
    shown.add("tools", "ninja", "not found", "costs something")
    assert shown.text() == (
        "tools\n  ninja              not found\n\nmissing\n  ninja: costs something"
    )
    assert shown.text(colours=True).startswith("\033[1mtools\033[0m")
