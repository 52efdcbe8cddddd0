"""An error that a rank finds before training is told once, whoever finds it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from spion_ds.distributed import ending, meeting, process_group
from spion_ds.distributed.ending import USER_ERROR_EXIT, run_command
from spion_ds.distributed.meeting import prepare_together
from spion_ds.distributed.process_group import Ranks
from spion_ds.errors import ConfigError
from tests.training.launching import free_port

FORK = multiprocessing.get_context("fork")
LIMIT_SECONDS = 60


def be_rank(rank: int, count: int, port: int, work: Callable[[int], Any], log: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.stderr = log.open("a")
    ranks = Ranks(rank, count, rank, count)
    os._exit(run_command(lambda: prepare_together(ranks, lambda: work(rank))))


def launched(
    work: Callable[[int], Any], count: int, log: Path
) -> tuple[list[int | None], list[str]]:
    """Start ranks as launchers do, which end all when one has left; return codes and errors."""
    port = free_port()
    log.touch()
    ranks = [
        FORK.Process(target=be_rank, args=(rank, count, port, work, log)) for rank in range(count)
    ]
    for process in ranks:
        process.start()
    left = multiprocessing.connection.wait([process.sentinel for process in ranks], LIMIT_SECONDS)
    first = [process for process in ranks if process.sentinel in left]
    for process in ranks:
        if process not in first:
            process.kill()
        process.join()
    lines = log.read_text().splitlines()
    return [process.exitcode for process in first], [
        line for line in lines if line.startswith("error: ")
    ]


def test_an_error_of_all_ranks_is_printed_once_though_rank_1_finds_it_first(
    tmp_path: Path,
) -> None:
    found = FORK.Event()

    def work(rank: int) -> None:
        if rank == 0:
            found.wait(LIMIT_SECONDS)
        found.set()
        raise ConfigError("a batch of 7 does not divide")

    codes, errors = launched(work, 3, tmp_path / "log")
    assert set(codes) == {USER_ERROR_EXIT}
    assert errors == ["error: a batch of 7 does not divide"]


def test_an_error_of_one_rank_is_printed_once_and_names_it(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise ConfigError("nowhere.json cannot be read")

    codes, errors = launched(work, 2, tmp_path / "log")
    assert set(codes) == {USER_ERROR_EXIT}
    assert errors == ["error: on rank 1: nowhere.json cannot be read"]


def test_different_errors_are_printed_in_one_sentence(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        raise ConfigError("no file" if rank else "no folder")

    _, errors = launched(work, 3, tmp_path / "log")
    assert errors == ["error: no folder; on rank 1, 2: no file"]


def test_ranks_without_an_error_go_on(tmp_path: Path) -> None:
    codes, errors = launched(lambda _: None, 2, tmp_path / "log")
    assert (set(codes), errors) == ({0}, [])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_meets_nobody_prints_its_own_error(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(meeting, "_PATIENCE", timedelta(seconds=1))

    def work() -> None:
        raise ConfigError("a batch of 7 does not divide")

    assert run_command(lambda: prepare_together(Ranks(rank, 2, rank, 2), work)) == USER_ERROR_EXIT
    assert capsys.readouterr().err == "error: a batch of 7 does not divide\n"
    assert process_group.store() is None


def test_a_fault_of_ours_on_one_rank_is_told_and_nobody_waits(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise TypeError("a fault of ours")

    launched(work, 2, tmp_path / "log")
    # By rank 0 as a sentence or by rank 1 as a traceback, whoever comes first.
    assert "TypeError: a fault of ours" in (tmp_path / "log").read_text()


def test_a_rank_that_is_alone_with_its_error_prints_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ending, "_speaks", lambda _: False)  # rank 1, after the meeting
    monkeypatch.setattr(ending, "let_first_speak", lambda: False)  # rank 0 has no error

    def work() -> None:
        raise ConfigError("its share is damaged")

    assert run_command(work) == USER_ERROR_EXIT
    assert capsys.readouterr().err == "error: its share is damaged\n"
