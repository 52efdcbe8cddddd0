"""Errors that are the user's to mend: the command line prints them without a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpionError(Exception):
    """Base of all errors whose message says what was wrong, what is allowed and what to do."""


class ConfigError(SpionError, ValueError):
    """A key or value of a recipe, a DeepSpeed JSON, a command line or a layout is wrong."""


class DataError(SpionError, RuntimeError):
    """A data file or data cache is missing, truncated, damaged or of another format."""


class CheckpointError(SpionError, RuntimeError):
    """A checkpoint is missing, incomplete, or belongs to another model or task."""


def near_matches(word: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the known words closest to ``word``, else ``""``."""
    close = difflib.get_close_matches(word, sorted(known), n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the sentence for an unknown recipe, task, key or mode, listing the known ones."""
    known = sorted(known)
    return f"unknown {kind} {name!r}{near_matches(str(name), known)}; known: {', '.join(known)}"
