"""Unpickles files of other people's: NumPy arrays in plain containers, and nothing that runs.

No function or class that a pickle names is ever called. The names that arrays are pickled with
stand for functions of this file, which make an array from a checked dtype, shape and bytes. The
opcodes on the allow-list are read by Python's unpickler that is written in Python: the one in C
reserves as much memory as a number in the file says, and cannot be kept from hashing tuples that
are nested so deeply that its stack overflows.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np

from spion_ds.errors import DataError

_DTYPES = {
    name: np.dtype(name)
    for name in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
}
_NDARRAY = object()  # a name in the arguments of ``_reconstruct``; never called


class _Unfinished:
    """What a BUILD opcode makes a value of."""

    __slots__ = ("finish", "value")

    def __init__(self, finish: Callable[[Any], Any]) -> None:
        self.finish = finish
        self.value: Any = self


class _Memo(dict[int, Any]):
    """The unpickler's memo: gives the finished value of what it got unfinished."""

    def __getitem__(self, key: int) -> Any:
        value = super().__getitem__(key)
        return value.value if type(value) is _Unfinished else value


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise pickle.UnpicklingError(what)


def _dtype(code: Any, *_: object) -> _Unfinished:
    name = _text(code)
    _require(name in _DTYPES, "an array is not of plain numbers")

    def finish(state: Any) -> np.dtype[Any]:
        _require(isinstance(state, tuple) and len(state) >= 5, "a dtype is of another format")
        order: Any = _text(state[1])
        _require(order in ("<", ">", "|", "="), "a dtype is of another format")
        _require(state[2:5] == (None, None, None), "an array is not of plain numbers")
        return _DTYPES[name].newbyteorder(order)

    return _Unfinished(finish)


def _text(value: Any) -> str:
    # Python 2 wrote bytes where Python 3 writes text.
    text = value.decode("latin1") if isinstance(value, bytes) else value
    _require(isinstance(text, str), "a dtype is of another format")
    return text


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    """Return ``data`` as an array, without a copy, if the shape and dtype have as many bytes."""
    _require(isinstance(data, bytes) and isinstance(dtype, np.dtype), "an array has no bytes")
    whole = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    _require(whole and order in ("C", "F"), "an array has no shape")
    # Numbers of any length, any number of them, would be multiplied for ever.
    short = len(shape) <= 32 and all(size < 1 << 40 for size in shape)
    _require(short, "an array's shape does not fit its bytes")
    size = math.prod(shape) * dtype.itemsize
    _require(size == len(data), f"an array of {size} bytes comes with {len(data)}")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def _reconstruct(kind: object, *_: object) -> _Unfinished:
    """As NumPy pickles arrays, but for some in protocol 5."""
    _require(kind is _NDARRAY, "an array is of no plain kind")

    def finish(state: Any) -> np.ndarray:
        _require(isinstance(state, tuple) and len(state) == 5, "an array is of another format")
        _, shape, dtype, is_fortran, data = state
        return _array(data, dtype, shape, "F" if is_fortran else "C")

    return _Unfinished(finish)


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    """As NumPy pickles arrays in protocol 5; "K" are axes in another order."""
    if axes is None:
        return _array(data, dtype, shape, order)
    _require(order == "K" and isinstance(axes, tuple), "an array is of another format")
    return _array(data, dtype, shape, "C").transpose(axes)


def _scalar(dtype: Any, data: Any) -> Any:
    return _array(data, dtype, (), "C").item()


def _no_bytes() -> bytes:
    # How Python 3 writes b"" in protocols 0 to 2.
    return b""


_NAMES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _dtype,
    ("__builtin__", "bytes"): _no_bytes,
    # NumPy 2 moved what arrays are pickled with.
    **{
        (f"{core}.{module}", name): function
        for core in ("numpy.core", "numpy._core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}
# Numbers, text, bytes, lists, tuples, dicts, the memo, and calls, which only _NAMES answer to.
_OPCODES = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT
    BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
    BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE TUPLE TUPLE1
    TUPLE2 TUPLE3 EMPTY_DICT GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE GLOBAL
    STACK_GLOBAL REDUCE
"""
_PythonUnpickler: Any = pickle._Unpickler


def _opcode(name: str) -> int:
    return ord(getattr(pickle, name))


class _Unpickler(_PythonUnpickler):
    stack: list[Any]

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="bytes")
        self.memo = _Memo()
        self._encoded: dict[str, bytes] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encode
        if (module, name) not in _NAMES:
            shown = f"{module}.{name}"[:80]
            raise pickle.UnpicklingError(f"it wants {shown!r}, which no data file needs")
        return _NAMES[module, name]

    def _encode(self, text: str, encoding: object) -> bytes:
        # How Python 3 writes bytes into pickles that Python 2 shall read.
        # Hashing a tuple that is nested deeply would overflow the stack.
        _require(type(text) is str, "it encodes something else than text")
        _require(encoding in ("latin1", b"latin1"), "an encoding is not latin1")
        # The same text again is the same bytes: calls alone must not fill the memory.
        if text not in self._encoded:
            self._encoded[text] = text.encode("latin1")
        return self._encoded[text]

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        _require(type(target) is _Unfinished, "it sets the state of a plain value")
        self.stack[-1] = target.value = target.finish(state)

    def _set_items(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        # Other keys can be made to take for ever, or to overflow the stack.
        simple = type(target) is dict and all(type(key) in (str, bytes) for key in keys)
        _require(simple, "a dictionary has a key that is not text")
        target.update(zip(keys, items[1::2], strict=True))

    def _set_item(self) -> None:
        items = [self.stack.pop(), self.stack.pop()]
        self._set_items(items[::-1])

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set_items(items)

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it has more than numbers, text and arrays in lists and dicts")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **dict.fromkeys(range(256), _refuse),
        **{code: _PythonUnpickler.dispatch[code] for code in map(_opcode, _OPCODES.split())},
        # As bytes: a bytearray is filled with zeros before the file is found to be too short.
        _opcode("BYTEARRAY8"): _PythonUnpickler.dispatch[_opcode("BINBYTES8")],
        _opcode("BUILD"): _build,
        _opcode("SETITEM"): _set_item,
        _opcode("SETITEMS"): lambda self: self._set_items(self.pop_mark()),
        _opcode("DICT"): _dict,
    }


def load_pickle(file: IO[bytes], where: str | Path) -> Any:
    """Return the content of a pickle of plain Python values and NumPy arrays of numbers.

    Strings that Python 2 wrote come back as bytes, and NumPy's scalars as Python's. Arrays are
    read-only.

    Args:
        file: open for reading, binary.
        where: its name, for messages.

    Raises:
        DataError: the file is not a whole pickle, has anything else in it, which is not executed,
            or does not fit the memory.
    """
    try:
        return _Unpickler(file).load()
    except Exception as error:  # a damaged pickle raises whatever it stumbles on
        what = "it ends too early" if isinstance(error, EOFError) else str(error) or repr(error)
        raise DataError(
            f"{where} cannot be read as a data pickle: {what[:200]}; get the file again"
        ) from error


def whole_numbers(value: object) -> np.ndarray | None:
    """Return a whole number, a flat list of them or an array of them as an array, else None."""
    if type(value) is int or (isinstance(value, list) and all(type(x) is int for x in value)):
        try:
            return np.array(value, np.int64)
        except OverflowError:
            return None
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        return value
    return None
