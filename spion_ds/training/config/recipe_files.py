"""The files that a run configuration comes from: recipes, named attentions, DeepSpeed's JSON."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spion_ds.errors import ConfigError, unknown_name
from spion_ds.training.config.strict_files import parse_yaml, read_json, read_yaml

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    return _yaml_names(importlib.resources.files("spion_ds.recipes"))


def attention_names() -> list[str]:
    """Return the names that ``--attention`` knows: each replaces a recipe's attention."""
    return _yaml_names(_attention_folder())


def read_attention(name: str) -> dict[str, Any]:
    """Return the ``sparse_attention`` block called ``name``, as in ``recipes/attention/``.

    A value that is a mapping holds one value a task.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in attention_names():
        raise ConfigError(unknown_name("--attention", name, attention_names()))
    text = _attention_folder().joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return parse_yaml(text, f"the attention {name!r}")


def for_task(block: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return a named attention's block for one task; what it does not say is the recipe's."""
    return {
        key: value[task] if isinstance(value, Mapping) else value
        for key, value in block.items()
        if not isinstance(value, Mapping) or task in value
    }


def read_recipe(name: str) -> dict[str, Any]:
    """Return a recipe of the package by its name, or a YAML file by its path.

    Raises:
        ConfigError: neither is there, or the file is not a YAML mapping.
    """
    if name in recipe_names():
        file = importlib.resources.files("spion_ds.recipes").joinpath(f"{name}.yaml")
        text = file.read_text(encoding="utf-8")
        return {"recipe": name, **parse_yaml(text, f"recipe {name!r}")}
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"there is no recipe file {name!r}; give its path from here")
        return {"recipe": path.stem, **read_yaml(path, f"recipe {name!r}")}
    raise ConfigError(unknown_name("recipe", name, recipe_names()) + "; or give a .yaml file")


def read_deepspeed_json(path: str | None) -> dict[str, Any]:
    """Return the DeepSpeed configuration at ``path``, {} without one.

    Raises:
        ConfigError: no such file, or not a JSON object.
    """
    if path is None:
        return {}
    return read_json(Path(path), f"--ds_config {path!r}")


def _attention_folder() -> Traversable:
    return importlib.resources.files("spion_ds.recipes").joinpath("attention")


def _yaml_names(folder: Traversable) -> list[str]:
    names = [entry.name for entry in folder.iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))
