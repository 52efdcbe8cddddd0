"""Signals: before there is anything to save they end a process at once, whatever it does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from spion_ds.distributed.stopping import STOPPED_EXIT, StopRequest
from tests.training.launching import TRAIN

FORK = multiprocessing.get_context("fork")
LIMIT_SECONDS = 60


def code_after(number: int, body: Callable[[Connection], None]) -> int | None:
    """Fork ``body``, send a signal when it says that it is ready, and return its exit code."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=body, args=(theirs,))
    process.start()
    assert ours.poll(LIMIT_SECONDS)
    ours.recv()
    os.kill(process.pid or 0, number)
    ours.send("sent")
    process.join(LIMIT_SECONDS)
    code = process.exitcode
    process.kill()
    return code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_signal_ends_a_rank_that_waits_for_others_with_75_only_if_there_is_a_checkpoint(
    number: signal.Signals, has_checkpoint: bool
) -> None:
    def body(ready: Connection) -> None:
        with StopRequest() as request:
            request.end_at_once(has_checkpoint=has_checkpoint)
            with socket.create_server(("127.0.0.1", 0)) as silent:  # which never answers
                ready.send(None)
                port = silent.getsockname()[1]
                dist.TCPStore("127.0.0.1", port, timeout=timedelta(seconds=LIMIT_SECONDS))

    assert code_after(number, body) == (STOPPED_EXIT if has_checkpoint else 128 + number)


def test_a_signal_that_came_too_early_is_obeyed_later() -> None:
    def body(ready: Connection) -> None:
        with StopRequest() as request:
            ready.send(None)
            ready.recv()
            request.end_at_once(has_checkpoint=True)
            ready.recv()

    assert code_after(signal.SIGUSR1, body) == STOPPED_EXIT


def test_a_signal_to_a_forked_child_is_not_its_parents() -> None:
    def body(ready: Connection) -> None:
        with StopRequest() as request:
            child = FORK.Process(target=signal.pause)
            child.start()
            os.kill(child.pid or 0, signal.SIGTERM)
            child.join()
            assert child.exitcode == -signal.SIGTERM
            ready.send(None)
            ready.recv()
            request.end_at_once(has_checkpoint=False)
            ready.recv()

    assert code_after(signal.SIGUSR1, body) == 128 + signal.SIGUSR1


def test_a_signal_during_the_first_imports_is_noted(tmp_path: Path) -> None:
    # Whatever imports it first, PyTorch is what takes seconds.
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGUSR1)\nraise SystemExit(9)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(TRAIN.parents[1])])
    environment = {**os.environ, "PYTHONPATH": path}
    result = subprocess.run([sys.executable, str(TRAIN)], env=environment, check=False)
    assert result.returncode == 9
