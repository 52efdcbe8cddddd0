"""Pickles of others: arrays in plain containers are read, and whatever a pickle asks for is not."""

from __future__ import annotations

import io
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spion_ds.data.storage import restricted_pickle
from spion_ds.data.storage.restricted_pickle import load_pickle, whole_numbers
from spion_ds.errors import DataError

# Opcodes by hand, in the words of Python 2.
DTYPE = (
    b"cnumpy\ndtype\n(U\x02i8K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)
NDARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"


def read(content: bytes) -> Any:
    return load_pickle(io.BytesIO(content), "file")


def refused(content: bytes, message: str = "") -> None:
    with pytest.raises(DataError, match=f"^file cannot be read as a data pickle: .*{message}"):
        read(content)


ARRAYS = {
    "big-endian": np.arange(5, dtype=">i4"),
    "Fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "empty": np.zeros((0, 3), np.uint8),
    "other axes": np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2),
    "strided": np.arange(10, dtype=np.uint16)[::3],
    "no axes": np.array(True),
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_values_and_arrays_of_every_protocol_are_read(protocol: int) -> None:
    plain = {"a": [1, -1, 2**70, 1.5, None, True], b"b": ("text é", b"\xff\x00", b"", [{}], ())}
    found = read(pickle.dumps({**plain, "arrays": ARRAYS, "label": np.int64(3)}, protocol))
    assert {key: found[key] for key in plain} == plain
    assert found["label"] == 3
    for name, array in ARRAYS.items():
        assert np.array_equal(found["arrays"][name], array), name
        assert found["arrays"][name].dtype == array.dtype


@pytest.mark.parametrize("core", [b"numpy.core.", b"numpy._core."])
def test_both_names_of_the_array_functions_are_read(core: bytes) -> None:
    content = pickle.dumps([np.arange(3), np.float32(2)], 2)
    content = content.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", core)
    array, scalar = read(content)
    assert array.tolist() == [0, 1, 2]
    assert scalar == 2.0


def test_arrays_of_python_2_are_read() -> None:
    data = np.array([7, -7], "<i8").tobytes()
    state = b"(K\x01K\x02\x85" + DTYPE + b"I00\nU\x10" + data + b"tb"
    assert read(b"\x80\x02" + NDARRAY + state + b".").tolist() == [7, -7]
    text = (
        b"cnumpy.core.multiarray\nscalar\n(" + DTYPE + b"S" + repr(data[8:])[1:].encode() + b"\ntR."
    )
    assert read(text) == -7


def test_an_array_that_stands_twice_is_read_twice() -> None:
    array = np.arange(3)[::-1]
    first, second = read(pickle.dumps([array, array], 2))
    assert first.tolist() == second.tolist() == [2, 1, 0]


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pickles_cannot_run_code(protocol: int, capsys: pytest.CaptureFixture[str]) -> None:
    for bad in (Evil(), {"a": [Evil()]}, Path("x"), np.array([Evil()], dtype=object)):
        refused(pickle.dumps(bad, protocol))
    assert capsys.readouterr().out == ""


def array_of(shape: bytes, data: bytes, dtype: bytes = DTYPE) -> bytes:
    size = len(data).to_bytes(1, "little")
    return NDARRAY + b"(K\x01" + shape + dtype + b"I00\nU" + size + data + b"tb."


@pytest.mark.parametrize(
    "content",
    [
        # ndarray(shape, dtype, buffer, offset, strides), which reads and writes where it is told.
        b"cnumpy\nndarray\n(K\x04\x85" + DTYPE + b"U\x08aaaaaaaaJ\xf0\xff\xff\xffK\x08\x85tR.",
        b"cnumpy\nndarray\n)\x81.",  # NEWOBJ
        b"(inumpy\nndarray\n.",  # INST
        b"(cnumpy\nndarray\no.",  # OBJ
        array_of(b"J\x00\x00\x00\x40\x85", b"a" * 8),  # larger than its bytes
        array_of(b"J\xff\xff\xff\xff\x85", b"a" * 8),  # of -1 elements
        array_of(b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86", b"a" * 8),  # of -1 times -1
        array_of(b"I01\n\x85", b"a" * 8),  # True
        array_of(b"K\x01\x85", b"a" * 8, DTYPE.replace(b"i8", b"O8")),  # addresses
        array_of(b"K\x01\x85", b"a" * 8, DTYPE.replace(b"i8", b"V8")),
        array_of(b"K\x01\x85", b"a" * 8, DTYPE.replace(b"<N", b"<I1\n")),  # with a subdtype
        array_of(b"K\x01\x85", b"a" * 8)[:-1] + b"(K\x01tb.",  # the state of a finished array
        DTYPE + b"}b.",  # … of a dtype
        b"cnumpy.core.multiarray\nscalar\nN}U\x0c__defaults__)s\x86b.",  # … of a function of ours
        b"cnumpy\nndarray\nN}U\x0c__defaults__)s\x86b.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aU\x05zlib_tR.",
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aU\x03hextR.",
        b"c__builtin__\nbytes\n(K\x09tR.",
        b"cnumpy\ndtype.__class__\n.",
        b"cbuiltins\neval\n.",
        b"\x82\x01.",  # EXT1
        b"Pname\n.",  # PERSID
        b"\x8f(K\x01\x90.",  # a set
    ],
)
def test_nothing_but_checked_arrays_is_made(content: bytes) -> None:
    refused(content)
    assert read(pickle.dumps(np.arange(3), 2)).tolist() == [0, 1, 2]  # nothing was left changed


@pytest.mark.parametrize(
    "content",
    [
        b"\x96" + (2**40).to_bytes(8, "little") + b".",  # BYTEARRAY8
        b"\x8e" + (2**62).to_bytes(8, "little") + b".",  # BINBYTES8
        b"\x95" + (2**62).to_bytes(8, "little") + b".",  # FRAME
        b"K\x01r\xff\xff\xff\x7f0.",  # LONG_BINPUT
        array_of(b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", b""),
        b"cnumpy.core.multiarray\nscalar\n(" + DTYPE + b"U\x00tR.",
    ],
)
def test_a_small_file_cannot_ask_for_much_memory(content: bytes) -> None:
    tracemalloc.start()
    try:
        refused(content)
        # What Python needs for a few objects and an error with its traceback.
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_calls_on_one_text_do_not_multiply_it() -> None:
    text = b"X" + (2**16).to_bytes(4, "little") + b"a" * 2**16
    calls = b"h\x00(h\x01h\x02tR" * 200
    content = (
        b"](c_codecs\nencode\nq\x00" + text + b"q\x01X\x06\x00\x00\x00latin1q\x02" + calls + b"e."
    )
    found = read(content)
    assert len({id(value) for value in found[3:]}) == 1


def test_deep_nesting_overflows_no_stack() -> None:
    deep = b")" + b"\x85" * 200_000  # a tuple in a tuple in a tuple …
    refused(b"}" + deep + b"K\x01s.", "a dictionary has a key that is not text")
    refused(b"}(" + deep + b"K\x01u.", "a dictionary has a key that is not text")
    refused(b"(" + deep + b"K\x01d.", "a dictionary has a key that is not text")
    refused(b"(" + deep + b"\x91.")  # FROZENSET
    assert whole_numbers(read(b"]" + b"]" * 200_000 + b"a" * 200_000 + b".")) is None


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_is_cut_short_is_refused(protocol: int) -> None:
    content = pickle.dumps([np.arange(3), {"a": np.int64(1)}], protocol)
    for length in range(len(content)):
        refused(content[:length])


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"PK\x03\x04", b"h\x00.", b"R.", b"b.", b"\x80\x09."]
)
def test_what_is_no_pickle_is_refused(content: bytes) -> None:
    refused(content)


def test_whole_numbers_are_a_number_a_flat_list_or_an_array() -> None:
    nested: list[Any] = [1, 2]
    for _ in range(40):
        nested = [nested] * 40  # as an array it would have 40^40 elements
    circular: list[Any] = []
    circular.append(circular)
    for bad in (nested, circular, [2**70], 1.5, "1", None, [True], np.ones(2), {}):
        assert whole_numbers(bad) is None
    for good in (3, [3], np.array([3], np.uint8)):
        found = whole_numbers(good)
        assert found is not None
        assert found.max() == 3


def test_what_is_encoded_is_text_and_is_not_hashed_before_that_is_known() -> None:
    call = b"c_codecs\nencode\n"
    deep = b"(" * 1 + b")" + b"\x85" * 1_000_000  # a tuple in a tuple, a million times
    refused(b"\x80\x02" + call + deep[1:] + b"X\x06\x00\x00\x00latin1\x86R.")
    doubled = b")" + b"q\x00h\x00\x86" * 60  # as a tree it has 2^60 leaves
    refused(b"\x80\x02" + call + doubled + b"X\x06\x00\x00\x00latin1\x86R.")


def test_a_shape_of_huge_numbers_is_refused_before_they_are_multiplied() -> None:
    huge = (1 << 1_000_000,) * 200  # a product of 200 million bits
    with pytest.raises(pickle.UnpicklingError, match="shape does not fit its bytes"):
        restricted_pickle._array(b"x", np.dtype("u1"), huge, "C")
