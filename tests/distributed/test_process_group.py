"""A process finds its place among its ranks under every launcher."""

from __future__ import annotations

import datetime

import pytest

from spion_ds.distributed import process_group as ranks
from spion_ds.distributed.ending import USER_ERROR_EXIT, run_command
from spion_ds.distributed.heartbeat import LOST_RANK_EXIT
from spion_ds.distributed.process_group import Ranks, discover_ranks, join
from spion_ds.errors import ConfigError
from tests.training.launching import free_port

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}
MPICH = {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
UNEVEN = {**SLURM, "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "1,3,4"}
# In a batch script, outside srun, Slurm tells the job's size too; the process is still alone.
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {**TORCHRUN, **OPEN_MPI, **MPICH, **SLURM, **BATCH, "MASTER_ADDR": ""}:
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "environment",
    [TORCHRUN, OPEN_MPI, MPICH, SLURM, UNEVEN],
    ids=["torchrun", "openmpi", "mpich", "slurm", "slurm-uneven"],
)
def test_a_launcher_tells_the_place(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, environment)
    assert discover_ranks() == Ranks(5, 8, 1, 4)


@pytest.mark.parametrize("environment", [{}, BATCH], ids=["python", "batch-script"])
def test_without_a_launcher_a_process_is_alone(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, environment)
    assert discover_ranks() == Ranks(0, 1, 0, 1)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({**TORCHRUN, "WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'; allowed: a whole number"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK is '-1'"),
        ({**TORCHRUN, "RANK": "8"}, "RANK is 8, and WORLD_SIZE is 8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "LOCAL_RANK is 4 of 4 rank"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "LOCAL_RANK is 1 of 9 rank"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, "RANK is 5, and WORLD_SIZE is 0"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": ""}, "OMPI_COMM_WORLD_RANK is ''"),
        ({**SLURM, "SLURM_NODEID": "2"}, "SLURM_NODEID is 2, and SLURM_STEP_TASKS_PER_NODE"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else None,
)
def test_a_place_that_cannot_be_is_one_sentence(
    change: dict[str, str],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    set_all(monkeypatch, change)
    assert run_command(discover_ranks) == USER_ERROR_EXIT
    error = capsys.readouterr().err
    assert error.startswith(f"error: {expected}")
    assert len(error.splitlines()) == 1


def test_srun_without_an_address_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**SLURM, "DS_ACCELERATOR": "cpu"})
    with pytest.raises(ConfigError, match=r"MASTER_ADDR.*launch/slurm\.sh"):
        join(discover_ranks())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_in_vain_says_where(
    rank: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    set_all(monkeypatch, {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", **place})
    monkeypatch.setattr(ranks, "MEETING_TIMEOUT", datetime.timedelta(seconds=1))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert run_command(lambda: join(Ranks(rank, 2, 0, 1))) == LOST_RANK_EXIT
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: rank {rank} did not meet the other 1 at 127.0.0.1:")
    assert f"{place['MASTER_PORT']} within 1 s" in error
