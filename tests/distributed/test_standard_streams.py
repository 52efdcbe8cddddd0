"""A process prints wherever it was started, and a closed stream's number goes to no file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
from spion_ds.distributed.standard_streams import mend_streams
mend_streams()
import os, sys
number = os.open(os.devnull, os.O_RDONLY)
print("3 × 3", flush=True)
print("3 × 3", file=sys.stderr, flush=True)
sys.exit(0 if number > 2 else 1)
"""


@pytest.mark.parametrize("redirection", ["", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_and_ascii_streams_can_be_printed_to(redirection: str) -> None:
    result = subprocess.run(
        ["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, SCRIPT],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for text in (result.stdout, result.stderr):
        assert text in ("3 \\xd7 3\n", "")
