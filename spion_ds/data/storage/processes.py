"""Maps a function over items in other processes: for work of many small calls, each of which holds
the interpreter's lock, so that threads would wait for each other.

A worker is a new interpreter, as multiprocessing's "spawn" starts it, but imports the function's
module alone, never the program's main module: that may be training code, or standard input.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, TypeVar

from spion_ds.errors import DataError

T = TypeVar("T")
R = TypeVar("R")

_START = (
    "import sys; descriptor, *sys.path = sys.argv[1:]; "
    "from spion_ds.data.storage.processes import serve; serve(int(descriptor))"
)
# There is a worker for each core already.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def map_in_processes(work: Callable[[T], R], items: Sequence[T]) -> Generator[R, None, None]:
    """Yield ``work(item)`` in order, from a process for each core, but no more than items.

    With one core or one item the work is done here. Close the iterator to end the processes early:
    work that is being done gets a KeyboardInterrupt, also when this process dies.

    Args:
        work: a function at the top of a module, or a ``functools.partial`` of one. It, the items
            and the results are pickled.
        items: what it is called with.

    Raises:
        DataError: a process could not be started, or was ended from outside.
        Exception: what ``work`` raised.
    """
    count = min(len(os.sched_getaffinity(0)), len(items))
    if count <= 1 or not sys.executable:  # an interpreter inside another program has none
        yield from map(work, items)
        return
    workers: list[_Worker] = []
    try:
        workers.extend(_Worker(work) for _ in range(count))
        yield from _results(workers, items)
    finally:
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.process.wait()


def _results(workers: list[_Worker], items: Sequence[Any]) -> Iterator[Any]:
    """Yield the results in order; a few may wait for an earlier one."""
    idle, given = list(workers), 0
    busy: dict[Any, tuple[_Worker, int]] = {}
    done: dict[int, Any] = {}
    for number in range(len(items)):
        while number not in done:
            while idle and given < min(len(items), number + 2 * len(workers)):
                worker = idle.pop()
                worker.give(items[given])
                busy[worker.connection] = worker, given
                given += 1
            for connection in wait(list(busy)):
                worker, index = busy.pop(connection)
                done[index] = worker.result()
                idle.append(worker)
        yield done.pop(number)


class _Worker:
    """A process that does ``work`` on one item at a time."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.connection, theirs = Pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs.fileno()), *map(str, sys.path)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **_ONE_THREAD},
                # A signal to the program's group is for this process to answer.
                start_new_session=True,
            )
        except OSError as error:
            raise DataError(
                f"cannot start a process to make data in ({error.strerror}); allow more processes "
                "and memory (ulimit -u, ulimit -v) or fewer cores (taskset), and run again"
            ) from error
        finally:
            theirs.close()
        self.give(work)

    def give(self, item: object) -> None:
        try:
            self.connection.send(item)
        except ConnectionError:
            raise self._lost() from None

    def result(self) -> Any:
        try:
            value, error, told = self.connection.recv()
        except (EOFError, OSError):
            raise self._lost() from None
        if error is not None:
            raise error from RuntimeError(f"in process {self.process.pid}:\n{told}")
        return value

    def _lost(self) -> DataError:
        code = self.process.wait()
        how = f"exit code {code}" if code >= 0 else f"signal {-code} ({signal.strsignal(-code)})"
        return DataError(
            f"process {self.process.pid}, which was making data, ended with {how}; if memory is "
            "short, allow fewer cores (taskset); run again: what is finished is kept"
        )


def serve(descriptor: int) -> None:
    """Do another process's work until it closes the connection; does not return."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    connection: Any = Connection(descriptor)
    try:
        threading.Thread(target=_interrupt_at_hang_up, args=(descriptor,), daemon=True).start()
        work = connection.recv()
        while True:
            connection.send(_answer(work, connection.recv()))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        os._exit(0)


def _answer(work: Callable[[Any], Any], item: object) -> tuple[Any, Exception | None, str]:
    try:
        return work(item), None, ""
    except Exception as error:
        return None, error, traceback.format_exc()


def _interrupt_at_hang_up(descriptor: int) -> None:
    hang_up = select.poll()
    hang_up.register(descriptor, 0)  # a hang-up is reported without being asked for
    hang_up.poll()
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
