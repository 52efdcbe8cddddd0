"""Work in other processes: its order, its errors, and that none is left over."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from functools import partial
from operator import truediv
from typing import Any

import pytest

from spion_ds.data.storage import processes
from spion_ds.data.storage.processes import map_in_processes
from spion_ds.errors import DataError

pytestmark = pytest.mark.ranks


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})


def test_results_come_in_order_from_other_processes() -> None:
    # The first is the slowest: all that may be ahead of it have to wait.
    tasks = ["sum(range(10**6)) and 0", *map(str, range(1, 20))]
    assert list(map_in_processes(eval, tasks)) == list(range(20))
    parents = list(map_in_processes(eval, ["__import__('os').getppid()"] * 2))
    assert parents == [os.getpid()] * 2


def test_workers_import_data_code_alone() -> None:
    loaded = "{name.split('.')[0] for name in __import__('sys').modules}"
    for modules in map_in_processes(eval, [loaded, loaded]):
        assert "spion_ds" in modules
        assert not modules & {"torch", "deepspeed", "triton", "mpi4py", "pytest"}


def test_one_item_or_one_core_needs_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes.subprocess, "Popen", None)
    assert list(map_in_processes(math.sqrt, [4])) == [2]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert list(map_in_processes(math.sqrt, [4, 9])) == [2, 3]


def test_an_error_in_a_process_is_raised_here_with_its_place_there() -> None:
    with pytest.raises(ZeroDivisionError) as raised:
        list(map_in_processes(partial(truediv, 1), [1, 0, 2]))
    assert "work(item)" in str(raised.value.__cause__)


@pytest.mark.parametrize(
    ("work", "item", "how"),
    [(signal.raise_signal, signal.SIGKILL, r"signal 9 \(Killed\)"), (os._exit, 3, "exit code 3")],
)
def test_a_process_that_ends_is_named(work: Any, item: int, how: str) -> None:
    with pytest.raises(DataError, match=rf"^process \d+, .* ended with {how}; .* run again"):
        list(map_in_processes(work, [item] * 4))


def test_a_process_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen] = []

    def one(*args: Any, start: Any = subprocess.Popen, **options: Any) -> subprocess.Popen:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(start(*args, **options))
        return started[0]

    monkeypatch.setattr(processes.subprocess, "Popen", one)
    with pytest.raises(DataError, match=r"cannot start .* \(Resource temporarily unavailable\)"):
        list(map_in_processes(eval, ["1", "2"]))
    assert started[0].returncode == 0


# A program without a main module that could be imported, and with endless work.
PROGRAM = """
import os, signal
from contextlib import closing
from spion_ds.data.storage.processes import map_in_processes
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background job
os.sched_getaffinity = lambda pid: {0, 1}
pause = "__import__('signal').pause()"
with closing(map_in_processes(eval, ["'first'", pause, pause])) as results:
    print(next(results), flush=True)
    os.kill(os.getpid(), number)
    next(results)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_program_however_it_ends(number: signal.Signals) -> None:
    # It returns when nobody holds the program's output any more: when all its processes are gone.
    done = subprocess.run(
        [sys.executable, "-"],
        input=f"number = {int(number)}{PROGRAM}",
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == -number
    assert done.stdout == "first\n"
    assert done.stderr.count("Traceback") == (number == signal.SIGINT)  # the program's own
