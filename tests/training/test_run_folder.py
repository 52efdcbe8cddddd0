"""A run's folder has one writer at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from spion_ds.errors import ConfigError
from spion_ds.training.run_folder import RunLock, continue_folder, new_folder
from tests.training.launching import TINY
from tests.training.test_bad_input import run_script

FORK = multiprocessing.get_context("fork")
LIMIT_SECONDS = 60


def hold(folder: Path, ready: Connection, then: Callable[[], object]) -> None:
    with RunLock() as lock:
        lock.take(folder)
        ready.send(then())
        signal.pause()


@contextlib.contextmanager
def owner(folder: Path, then: Callable[[], object] = int) -> Iterator[tuple[BaseProcess, object]]:
    """Let another process have a run, which also does ``then``; yield it and what that gave."""
    folder.mkdir(parents=True, exist_ok=True)
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=hold, args=(folder, theirs, then))
    process.start()
    assert ours.poll(LIMIT_SECONDS)
    try:
        yield process, ours.recv()
    finally:
        process.kill()
        process.join()


def test_the_second_writer_is_told_who_the_first_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1234")
    with (
        owner(tmp_path) as (process, _),
        RunLock() as lock,
        pytest.raises(ConfigError) as refused,
    ):
        lock.take(tmp_path)
    told = str(refused.value)
    assert told.startswith(f"the run {tmp_path} is being trained by another process (host ")
    assert f"host {socket.gethostname()}, process {process.pid}, job 1234, since 20" in told


def test_a_dead_owner_releases_the_run_though_its_children_live(tmp_path: Path) -> None:
    def spawn() -> int:
        if child := os.fork():
            return child
        signal.pause()
        os._exit(0)

    with owner(tmp_path, spawn) as (process, child):
        process.kill()
        process.join()
        with RunLock() as lock:
            lock.take(tmp_path)
        assert isinstance(child, int)
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    "words",
    [
        ["--resume", "auto"],
        ["--resume"],
        ["--resume", "runs/tiny"],
        ["--resume", "runs/tiny/checkpoints/step-000003"],
    ],
    ids=lambda words: "-".join(words),
)
def test_a_second_start_on_a_run_ends_with_one_sentence_and_changes_nothing(
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "runs" / "tiny" / "checkpoints" / "step-000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.pt").touch()  # not read, or it would be found damaged
    with owner(tmp_path / "runs" / "tiny"):
        before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
        assert run_script("train", "--recipe", TINY, *words) == 2
        assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    error = capsys.readouterr().err
    assert error.startswith("error: the run runs/tiny is being trained by another process")
    assert len(error.splitlines()) == 1


def test_a_new_run_beside_one_that_trains_takes_the_next_name(tmp_path: Path) -> None:
    with owner(tmp_path / "r"), RunLock() as lock:
        assert new_folder(tmp_path, "r", "suffix", lock) == tmp_path / "r-2"


def test_a_start_does_not_begin_anew_what_another_has_trained_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000003").mkdir(parents=True)
    with RunLock() as lock, pytest.raises(ConfigError, match="start again to go on from its"):
        continue_folder(tmp_path, lock)


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    with RunLock() as lock:
        lock.take(tmp_path)
    assert "writer.lock cannot be locked (Operation not supported)" in capsys.readouterr().err
