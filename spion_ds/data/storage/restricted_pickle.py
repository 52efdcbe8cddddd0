"""Unpickles files of other people's: NumPy arrays in plain containers, and nothing that runs."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spion_ds.errors import DataError


def _encode(text: str, encoding: str) -> bytes:
    # How Python 3 writes bytes into pickles that Python 2 shall read.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding!r} is not allowed")
    return text.encode(encoding)


# NumPy 2 moved what arrays are pickled with.
_CORE = "numpy._core" if hasattr(np, "_core") else "numpy.core"
_REBUILDERS = (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))

_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    **{
        (f"{core}.{module}", name): getattr(importlib.import_module(f"{_CORE}.{module}"), name)
        for core in ("numpy.core", "numpy._core")
        for module, name in _REBUILDERS
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it wants {module}.{name}, which no data file needs"
            ) from None


def load_pickle(file: BinaryIO, where: str | Path) -> Any:
    """Return the content of a pickle of plain Python values and NumPy arrays.

    Strings that Python 2 wrote come back as bytes.

    Args:
        file: open for reading, binary.
        where: its name, for messages.

    Raises:
        DataError: the file is not a whole pickle, or names anything else: it is not executed.
    """
    try:
        return _Unpickler(file, encoding="bytes").load()
    except MemoryError:
        raise
    except Exception as error:  # a damaged pickle raises whatever it stumbles on
        raise DataError(
            f"{where} cannot be read as a data pickle: {error}; get the file again"
        ) from error
