"""Loading the C++ operators: compiled once, by one process, and never in the way of a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spion_ds import compiling

from .conftest import ROOT, finish, start

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
        "_ops.so.sha256",
        "compiling.lock",
        "build-killed",
    }


def test_a_compiled_library_is_used_again_without_a_word(compiled_together):
    folder, _ = compiled_together
    again = finish(start(FILL, SPION_DS_CACHE=str(folder.parent), SPION_DS_NO_COMPILE=""))
    assert again.stdout == FILLED + "True\n"
    assert again.stderr == ""


@pytest.mark.parametrize("damage", ["cut off", "empty", "one bit", "no sum"])
def test_a_damaged_library_is_compiled_again_and_not_loaded(damage, monkeypatch, tmp_path):
    monkeypatch.setenv("SPION_DS_CACHE", str(tmp_path))
    monkeypatch.delenv("SPION_DS_NO_COMPILE", raising=False)
    content = b"a library"
    library = compiling.Library(
        "_ops", "operators", ("*.cpp",), "no time", lambda _, output: output.write_bytes(content)
    )
    path = library.compiled()
    assert library.is_cached()
    total = path.with_name("_ops.so.sha256")
    if damage == "no sum":
        total.unlink()
    else:
        damaged = {"cut off": content[:4], "empty": b"", "one bit": b"a librari"}[damage]
        path.write_bytes(damaged)
    loaded = []
    library.load(lambda found: loaded.append(found.read_bytes()))
    assert loaded == [content]
    assert library.is_cached()


def test_a_shipped_library_is_used_first(compiled_together, tmp_path):
    folder, _ = compiled_together
    shutil.copy(folder / "_ops.so", tmp_path / "_ops.abi3.so")
    code = f"import pathlib, spion_ds.compiling as c; c._PACKAGE = pathlib.Path({str(tmp_path)!r})"
    assert finish(start(code + FILL, SPION_DS_NO_COMPILE="1")).stdout == FILLED + "True\n"


def test_a_shipped_library_of_another_pytorch_is_passed_over(compiled_together, tmp_path):
    folder, _ = compiled_together
    (tmp_path / "_ops.so").write_bytes(b"no library")
    code = f"import pathlib, spion_ds.compiling as c; c._PACKAGE = pathlib.Path({str(tmp_path)!r})"
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
print(cuda_operators_available())
print(cuda_operators_available())
"""


def test_cuda_operators_compile_once_without_a_gpu(compiled_together):
    if compiling.find_nvcc() is None:
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
    assert compiling.reason(RuntimeError(output)) == expected
    assert compiling.reason(OSError("No space left")) == "OSError: No space left"


def test_a_ninja_beside_the_interpreter_is_found(tmp_path, monkeypatch):
    ninja = tmp_path / "bin" / "ninja"
    ninja.parent.mkdir()
    ninja.write_text("#!/bin/sh\n")
    ninja.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(ninja.parent / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with compiling.ninja_on_path():
        assert Path(str(shutil.which("ninja"))) == ninja
    assert os.environ["PATH"] == str(tmp_path)


def test_the_cache_depends_on_sources_and_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("SPION_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "_SOURCE_FOLDERS", (tmp_path / "none", tmp_path))
    library = compiling.Library("_x", "x", ("*.cpp", "*.h"), "long", lambda sources, output: None)
    source = tmp_path / "a.cpp"
    source.write_text("int a;")
    first = library.cached()
    assert (first.parent.parent, first.name) == (tmp_path / "cache", "_x.so")
    assert library.cached() == first
    source.write_text("int b;")
    assert library.cached() != first
    source.write_text("int a;")
    (tmp_path / "b.cu").write_text("int a;")
    assert library.cached() == first  # not one of its files
    (tmp_path / "a.h").write_text("int a;")
    assert library.cached() != first
    (tmp_path / "a.h").unlink()
    monkeypatch.setattr(compiling.torch, "__version__", "0.0.0")
    assert library.cached() != first


@pytest.fixture
def fake_nvcc(tmp_path: Path) -> Path:
    """The home of an nvcc that notes its arguments in a file; its library does nothing.

    So finding, calling and loading can be tested without CUDA's compiler.
    """
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    stub, script = home / "stub.c", home / "bin" / "nvcc"
    stub.write_text("int spion_flood_fill(void) { return 0; }")
    script.write_text(
        f'#!/bin/sh\nPATH={os.environ["PATH"]}\necho "$@" >> {home / "arguments"}\n'
        'while [ "$1" != -o ]; do shift; done\n'
        f'exec {shutil.which("cc")} -shared -fPIC -o "$2" {stub}\n'
    )
    script.chmod(0o755)
    return home


def test_nvcc_compiles_once_for_all_gpus(fake_nvcc, monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "find_nvcc", lambda: str(fake_nvcc / "bin" / "nvcc"))
    monkeypatch.setattr(compiling, "_PACKAGE", tmp_path)
    monkeypatch.setenv("SPION_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPION_DS_NO_COMPILE", raising=False)
    library = compiling.CUDA.load(lambda path: path)
    assert library == compiling.CUDA.cached()
    files = {path.name for path in library.parent.iterdir()}
    assert files == {"_cuda.so", "_cuda.so.sha256", "compiling.lock"}
    assert compiling.CUDA.load(lambda path: path) == library
    [arguments] = (fake_nvcc / "arguments").read_text().splitlines()
    assert "-arch=all-major" in arguments
    assert arguments.endswith("flood_fill.cu")


def test_shipped_cuda_operators_are_used_before_any_compiler(
    compiled_together, fake_nvcc, tmp_path
):
    folder, _ = compiled_together
    package = tmp_path / "package"
    package.mkdir()
    shutil.copy(folder / "_ops.so", package / "_ops.cpython-311-x86_64-linux-gnu.so")
    script = fake_nvcc / "bin" / "nvcc"
    wheel_part = package / "_cuda.cpython-311-x86_64-linux-gnu.so"
    subprocess.run([script, "-o", wheel_part], check=True)
    code = f"import pathlib, spion_ds.compiling as c; c._PACKAGE = pathlib.Path({str(package)!r})"
    environment = {"CUDA_HOME": str(fake_nvcc), "PATH": str(tmp_path)}
    cache = {"SPION_DS_CACHE": str(tmp_path / "cache")}
    result = finish(start(code + CUDA, SPION_DS_NO_COMPILE="1", **environment, **cache))
    assert result.stdout == "True\nTrue\n"
    assert result.stderr == ""
    wheel_part.write_bytes(b"no library")  # then it is compiled, where that is allowed
    result = finish(start(code + CUDA, SPION_DS_NO_COMPILE="", **environment, **cache))
    assert result.stdout == "True\nTrue\n"
    assert result.stderr.count("compiling its CUDA operators") == 1


@pytest.mark.parametrize(
    ("cuda", "nvcc", "names", "words"),
    [
        ("13.0", "/bin/nvcc", ["_ops", "_cuda", "_hopper"], None),
        ("13.0", None, ["_ops"], "there is no nvcc"),
        (None, "/bin/nvcc", ["_ops"], "is without CUDA"),
    ],
)
def test_a_wheel_gets_what_can_be_compiled_and_says_what_not(cuda, nvcc, names, words, monkeypatch):
    monkeypatch.setattr(compiling.torch.version, "cuda", cuda)
    monkeypatch.setattr(compiling, "find_nvcc", lambda: nvcc)
    libraries, left_out = compiling.compilable()
    assert [library.name for library in libraries] == names
    assert (left_out is None) if words is None else (words in str(left_out))


def test_every_source_belongs_to_one_library():
    sources = [
        source
        for library in (compiling.CPP, compiling.CUDA, compiling.HOPPER)
        for source in library.sources()
        if source.suffix in (".cpp", ".cu")
    ]
    there = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".cu")]
    assert sorted(sources) == sorted(there)
