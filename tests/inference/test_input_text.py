"""What ``--input`` reads: UTF-8 text, with or without a byte order mark, whatever the locale."""

from __future__ import annotations

import codecs
import io
from pathlib import Path

import pytest

from spion_ds.errors import DataError
from spion_ds.inference import commands

TEXT = "[MAX 2 3 ]\n"


def read(content: bytes, source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the lines of a file, or of standard input as a process in the C locale has it."""
    if source == commands.STDIN:
        stream = io.TextIOWrapper(io.BytesIO(content), "ascii", errors="surrogateescape")
        monkeypatch.setattr("sys.stdin", stream)
    else:
        source = str(folder / source)
        Path(source).write_bytes(content)
    with commands._open(source) as lines:
        return list(commands._decoded(lines, "inputs"))


@pytest.mark.parametrize("source", ["file", "-"])
def test_utf_8_is_read_with_and_without_a_byte_order_mark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    text = f"{TEXT}é\n"
    for content in (text.encode(), codecs.BOM_UTF8 + text.encode()):
        assert read(content, source, tmp_path, monkeypatch) == [TEXT, "é\n"]


@pytest.mark.parametrize("source", ["file", "-"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_text_in_another_encoding_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, encoding: str
) -> None:
    content = (TEXT if encoding.startswith("utf") else "é\n").encode(encoding)
    with pytest.raises(DataError, match=r"^inputs is not UTF-8 text: .*; save it as UTF-8"):
        read(content, source, tmp_path, monkeypatch)


def test_a_closed_standard_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(DataError, match="standard input is closed"):
        commands._open(commands.STDIN)
