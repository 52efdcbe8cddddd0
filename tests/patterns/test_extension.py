"""Loading the C++ operators: compiled once, by one process, and never in the way of a run."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from spion_ds import extension

from .conftest import finish, start

FILL = """
import torch
from spion_ds.patterns import flood_fill
pooled = torch.tensor([[0.0, 2.0], [2.0, 1.0]])
print(flood_fill(pooled, 0.5).tolist(), flood_fill(pooled, 1.5).tolist())
print(hasattr(torch.ops.spion_ds, "flood_fill"))
"""
FILLED = "[[False, True], [False, True]] [[False, True], [False, False]]\n"


def test_two_processes_compile_once_and_a_killed_compile_blocks_neither(compiled_together):
    folder, processes = compiled_together
    assert [process.stdout for process in processes] == ["True\n", "True\n"]
    messages = [process.stderr.count("compiling its C++ operators") for process in processes]
    assert sorted(messages) == [0, 1]
    assert all("Warning" not in process.stderr for process in processes)
    assert {path.name for path in folder.iterdir()} == {
        "_ops.so",
        "compiling.lock",
        "build-killed",
    }


def test_a_compiled_library_is_used_again_without_a_word(compiled_together):
    folder, _ = compiled_together
    again = finish(start(FILL, SPION_DS_CACHE=str(folder.parent), SPION_DS_NO_COMPILE=""))
    assert again.stdout == FILLED + "True\n"
    assert again.stderr == ""


def test_a_shipped_library_is_used_first(compiled_together, tmp_path):
    folder, _ = compiled_together
    shutil.copy(folder / "_ops.so", tmp_path / "_ops.abi3.so")
    code = f"import pathlib, spion_ds.extension as e; e._PACKAGE = pathlib.Path({str(tmp_path)!r})"
    assert finish(start(code + FILL, SPION_DS_NO_COMPILE="1")).stdout == FILLED + "True\n"


def test_a_shipped_library_of_another_pytorch_is_passed_over(compiled_together, tmp_path):
    folder, _ = compiled_together
    (tmp_path / "_ops.so").write_bytes(b"no library")
    code = f"import pathlib, spion_ds.extension as e; e._PACKAGE = pathlib.Path({str(tmp_path)!r})"
    environment = {"SPION_DS_CACHE": str(folder.parent), "SPION_DS_NO_COMPILE": ""}
    assert finish(start(code + FILL, **environment)).stdout == FILLED + "True\n"


def test_without_compiling_python_gives_the_same_result(tmp_path):
    result = finish(start(FILL, SPION_DS_NO_COMPILE="1", SPION_DS_CACHE=str(tmp_path)))
    assert result.stdout == FILLED + "False\n"
    assert result.stderr.count("RuntimeWarning") == 1
    assert "SPION_DS_NO_COMPILE is set" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compiler", ["false", "complains"])
def test_a_broken_compiler_is_one_warning_and_python_does_the_work(compiler, tmp_path):
    if compiler == "complains":
        script = tmp_path / "complains"
        script.write_text("#!/bin/sh\necho 'here.h:1:2: error: it is broken' >&2\nexit 1\n")
        script.chmod(0o755)
        compiler = str(script)
    cache = tmp_path / "cache"
    result = finish(start(FILL, CXX=compiler, SPION_DS_CACHE=str(cache), SPION_DS_NO_COMPILE=""))
    assert result.stdout == FILLED + "False\n"
    assert result.stderr.count("RuntimeWarning") == 1
    assert "flood fill runs in Python" in result.stderr
    assert [path.name for path in next(cache.iterdir()).iterdir()] == ["compiling.lock"]


CUDA = """
from spion_ds.extension import cuda_operators_available
print(cuda_operators_available((9, 0)))
print(cuda_operators_available((9, 0)))
"""


def test_cuda_operators_compile_once_without_a_gpu(compiled_together):
    if extension.find_nvcc() is None:
        pytest.skip("no nvcc")
    folder, _ = compiled_together
    environment = {"SPION_DS_CACHE": str(folder.parent), "SPION_DS_NO_COMPILE": ""}
    results = [finish(process) for process in [start(CUDA, **environment) for _ in range(2)]]
    assert [result.stdout for result in results] == ["True\nTrue\n"] * 2
    messages = [result.stderr.count("compiling its CUDA operators") for result in results]
    assert sorted(messages) == [0, 1]
    assert finish(start(CUDA, **environment)).stderr == ""


@pytest.mark.parametrize("nvcc", [None, "fails"])
def test_without_a_cuda_compiler_one_warning_says_what_it_costs(nvcc, compiled_together, tmp_path):
    folder, _ = compiled_together
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copytree(folder, cache / folder.name)  # the C++ operators
    (tmp_path / "bin").mkdir()
    if nvcc is not None:
        script = tmp_path / "bin" / "nvcc"
        script.write_text("#!/bin/sh\necho 'a.cu(1): error: it is broken' >&2\nexit 1\n")
        script.chmod(0o755)
    result = finish(
        start(
            CUDA + FILL,
            CUDA_HOME=str(tmp_path),
            PATH=str(tmp_path),
            SPION_DS_CACHE=str(cache),
            SPION_DS_NO_COMPILE="",
        )
    )
    assert result.stdout == "False\nFalse\n" + FILLED + "True\n"
    assert result.stderr.count("RuntimeWarning") == 1
    assert "pooled maps move to the CPU" in result.stderr
    assert ("There is no nvcc" if nvcc is None else "a.cu(1): error: it is broken") in result.stderr


def test_importing_loads_no_operator_and_no_compiler():
    code = (
        "import sys, torch, spion_ds.patterns; "
        "print('torch.utils.cpp_extension' in sys.modules, "
        "hasattr(torch.ops.spion_ds, 'flood_fill'))"
    )
    assert finish(start(code)).stdout == "False False\n"


def test_the_compilers_own_words_are_shown():
    output = (
        "Error building extension 'x': [1/2] c++ -MMD -MF a.o.d -c a.cpp\nFAILED: a.o\n"
        "c++ -MMD -MF a.o.d -c a.cpp\na.cpp:1:1: error: no such thing\n  1 | thing\n"
        "ninja: build stopped: subcommand failed.\n"
    )
    expected = "RuntimeError: a.cpp:1:1: error: no such thing\n  1 | thing"
    assert extension._reason(RuntimeError(output)) == expected
    assert extension._reason(OSError("No space left")) == "OSError: No space left"


def test_a_ninja_beside_the_interpreter_is_found(tmp_path, monkeypatch):
    ninja = tmp_path / "bin" / "ninja"
    ninja.parent.mkdir()
    ninja.write_text("#!/bin/sh\n")
    ninja.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(ninja.parent / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with extension.ninja_on_path():
        assert Path(str(shutil.which("ninja"))) == ninja
    assert os.environ["PATH"] == str(tmp_path)


def test_the_cache_depends_on_sources_and_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("SPION_DS_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "a.cpp"
    source.write_text("int a;")
    folder = extension._cache_folder([source])
    assert folder.parent == tmp_path / "cache"
    assert extension._cache_folder([source]) == folder
    source.write_text("int b;")
    assert extension._cache_folder([source]) != folder
    header = tmp_path / "a.h"
    header.write_text("int a;")
    assert extension._cache_folder([source, header]) != extension._cache_folder([source])
    source.write_text("int a;")
    monkeypatch.setattr(extension.torch, "__version__", "0.0.0")
    assert extension._cache_folder([source]) != folder
