"""A process finds its place among its ranks under every launcher."""

from __future__ import annotations

import pytest

from spion_ds.errors import ConfigError
from spion_ds.training.ranks import Ranks, discover_ranks, join

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


def test_srun_without_an_address_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SLURM)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR.*launch/slurm\.sh"):
        join(discover_ranks())
