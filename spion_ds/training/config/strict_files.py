"""Reads YAML and JSON files of a user's: one mapping, no key twice, nothing that executes."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from spion_ds.errors import ConfigError


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Return the mapping in a YAML file; ``what`` names the file in messages.

    Raises:
        ConfigError: it cannot be read, is no YAML mapping, has a key twice or a tag.
    """
    return parse_yaml(_read(path, what), what)


def parse_yaml(text: str, what: str) -> dict[str, Any]:
    """Return the mapping that a YAML text is, as ``read_yaml`` does."""
    try:
        values = yaml.load(text, Loader=_StrictLoader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not YAML: {_yaml_problem(error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what} is not a YAML mapping")
    return values


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file; ``what`` names the file in messages.

    Raises:
        ConfigError: it cannot be read, is no JSON object, has a key twice, NaN or infinity.
    """
    text = _read(path, what)
    try:
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{what} is not a JSON object")
    return values


class _StrictLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _read(path: Path, what: str) -> str:
    if path.exists() and not path.is_file():
        raise ConfigError(f"{what} is not a regular file; write it to one")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{what} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{what} is not text in UTF-8 (byte {error.start})") from error


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        return f"{error.problem}{where}"
    return str(error).splitlines()[0]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} is there twice")
    return dict(pairs)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it has {constant}, which is not a number")
