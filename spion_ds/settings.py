"""Reads plain mappings (YAML, JSON, command line) into typed dataclasses, strictly."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from spion_ds.errors import ConfigError, unknown_name

T = TypeVar("T")


def read_dataclass(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    """Return ``cls`` filled from ``values``; nested dataclasses are read from nested mappings.

    Args:
        cls: a dataclass.
        values: keys are field names; fields left out keep their defaults.
        path: the mapping's dotted place, for messages ("" at the top).

    Raises:
        ConfigError: an unknown key (near matches are offered), a missing key without a default,
            or a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'the configuration'} is {values!r}; a mapping is wanted")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(
                unknown_name("key", _join(path, key), [_join(path, f) for f in fields])
            )
    read = {}
    for name, field in fields.items():
        place = _join(path, name)
        if name in values:
            read[name] = _read_value(hints[name], values[name], place)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{place} is missing; add it ({_describe(hints[name])})")
    return cls(**read)


def require(condition: bool, key: str, value: object, allowed: str) -> None:
    """Raise a ConfigError naming ``key``, its ``value`` and what is ``allowed``, unless true."""
    if not condition:
        raise ConfigError(f"{key} is {value!r}; allowed: {allowed}")


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _read_value(hint: Any, value: Any, place: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return read_dataclass(hint, value, place)  # type: ignore[arg-type]
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    for option in options:
        converted = _convert(option, value)
        if converted is not _NO:
            return converted
    raise ConfigError(f"{place} is {value!r}; wanted: {_describe(hint)}")


_NO = object()


def _convert(hint: Any, value: Any) -> Any:
    """Return ``value`` as ``hint``, or ``_NO``. Only 3 → 3.0, '1e-4' → 0.0001 and lists convert."""
    if hint is type(None):
        return None if value is None else _NO
    if hint is Any:
        return value
    if hint is bool:
        return value if isinstance(value, bool) else _NO
    if hint is int:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return value if whole and abs(value) < 2**31 else _NO
    if hint is float:
        return _to_float(value)
    if hint is str:
        return value if isinstance(value, str) else _NO
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and isinstance(value, list | tuple):
        items = [_convert(arguments[0], item) for item in value]
        fits = (len(arguments) == 2 and arguments[1] is Ellipsis) or len(arguments) == len(items)
        return tuple(items) if fits and _NO not in items else _NO
    if origin is dict or hint is dict:
        return dict(value) if isinstance(value, Mapping) else _NO
    return _NO


def _to_float(value: Any) -> Any:
    if isinstance(value, bool):
        return _NO
    # YAML 1.1 reads 1e-4 (no dot) as a string.
    if isinstance(value, int | float | str):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return _NO
        return number if math.isfinite(number) else _NO
    return _NO


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _describe(hint: Any) -> str:
    names = {
        int: "a whole number below 2^31",
        float: "a finite number",
        bool: "true or false",
        str: "text",
    }
    names[type(None)] = "null"
    if typing.get_origin(hint) is tuple:
        return f"a list, of {_describe(typing.get_args(hint)[0])} each"
    if _is_union(hint):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    return names.get(hint, str(hint).replace("typing.", ""))
