"""The order of the rooms: who may import whom, read from the sources."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spion_ds"
# What each room may import beside itself. Files at the top of the package serve every room.
FOUNDATION = {
    *("errors", "settings", "compiling", "extension"),
    *("random_bits", "durable_files", "recipes"),
}
_MODELS = {"patterns", "sparsity", "attention", "switching"}
_TRAINING = {*_MODELS, "distributed", "models", "data"}
ALLOWED: dict[str, set[str]] = {
    "patterns": set(),
    "sparsity": {"patterns"},
    "distributed": set(),
    "attention": {"patterns", "sparsity"},
    "switching": {"patterns", "sparsity", "attention", "distributed"},
    "ops": {"patterns", "sparsity", "attention"},
    "integrations": {"patterns", "sparsity", "attention", "distributed", "switching"},
    "models": _MODELS,
    "data": set(),
    "training": _TRAINING,
    "inference": {*_TRAINING, "training"},
}


@cache
def modules() -> dict[str, Path]:
    """Return the files of the package by the names of their modules."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Return the modules of the package that a module imports anywhere, functions included."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(known[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            source = node.module or ""
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                if inner in known:
                    found.add(inner)
                elif source in known:
                    found.add(source)
    return frozenset(found - {module})


def room(module: str) -> str:
    """Return the first folder or file below the package."""
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_a_room_imports_only_rooms_below_it(name: str) -> None:
    allowed = ALLOWED[name] | FOUNDATION | {name}
    wrong = [
        f"{module} imports {other}"
        for module in modules()
        if room(module) == name
        for other in imports(module)
        if room(other) not in allowed
    ]
    assert not wrong


def test_every_folder_is_a_room_with_a_place_in_the_order() -> None:
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert folders - {"recipes"} == set(ALLOWED) & folders


def test_no_module_imports_itself_through_others() -> None:
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> None:
        assert module not in path, " → ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for other in sorted(imports(module)):
            walk(other, [*path, module])
        done.add(module)

    for module in modules():
        walk(module, [])


@pytest.mark.parametrize("device", ["triton", "hopper", "cpu"])
def test_devices_do_not_know_each_other(device: str) -> None:
    others = {"triton", "hopper", "cpu"} - {device}
    wrong = [
        f"{module} imports {other}"
        for module in modules()
        if module.startswith(f"spion_ds.attention.{device}")
        for other in imports(module)
        if other.split(".")[2:3] and other.split(".")[2] in others
    ]
    assert not wrong


def test_switching_knows_no_engine() -> None:
    for module, path in modules().items():
        if room(module) in ("patterns", "sparsity", "attention", "switching"):
            assert "deepspeed" not in {
                name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                for name in (
                    [alias.name for alias in node.names]
                    if isinstance(node, ast.Import)
                    else [node.module or ""]
                    if isinstance(node, ast.ImportFrom)
                    else []
                )
            }, module
