"""Standard streams that a process can write to, whatever it was started with."""

from __future__ import annotations

import contextlib
import io
import os
import sys


def mend_streams() -> None:
    """Replace closed standard streams, and let the others take any character.

    A closed one goes nowhere; otherwise the next file to be opened would get its number, and what
    libraries print. Where the encoding lacks a character (ASCII), its escape is printed.
    """
    for number in (0, 1, 2):
        if not _is_open(number):
            # It gets the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (for the process's life)
        elif isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(ValueError):  # closed by Python's own means
                stream.reconfigure(errors="backslashreplace")


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
