"""Who this process is among its ranks, under any launcher, and how they start together."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import socket
import sys
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from spion_ds.errors import ConfigError, SpionError

T = TypeVar("T")

# Long enough for one rank to generate the data of a task while the others wait.
TIMEOUT = datetime.timedelta(hours=2)
# Between the start of the first rank and of the last: nodes that read Python from a slow disk.
MEETING_TIMEOUT = datetime.timedelta(minutes=15)
# The store where the ranks met: rank 0 serves it for as long as this holds it.
_met: list[Any] = []


class MissingRankError(SpionError, RuntimeError):
    """The ranks did not all come to the place where they meet."""


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together.

    Attributes:
        rank: 0 to world_size - 1.
        world_size: processes in all.
        local_rank: 0 to local_world_size - 1 on this node.
        local_world_size: processes on this node.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which decides, logs and saves."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The GPU of this rank's local number, or the CPU where there is no GPU."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank)
        return torch.device("cpu")


def discover_ranks() -> Ranks:
    """Return this process's place, read from the launcher's environment.

    torchrun and the deepspeed launcher set RANK and WORLD_SIZE; Open MPI's and MPICH's mpirun
    and Slurm's srun set their own variables; without any, the process is alone.

    Raises:
        ConfigError: a variable is no whole number, or they contradict one another.
    """
    env = os.environ
    for rank, size, local_rank, local_sizes in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
        (
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ),
        ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", ("MPI_LOCALNRANKS",)),
    ):
        if rank in env and size in env:
            world, number = _number(size), _number(rank)
            local_size = next((name for name in local_sizes if name in env), None)
            local_world = world if local_size is None else _number(local_size)
            alone = 0 if rank == "RANK" else number
            local = _number(local_rank) if local_rank in env else alone
            return _checked(Ranks(number, world, local, local_world), rank, size, local_rank)
    if "SLURM_STEP_NUM_TASKS" in env:  # under srun, not in a batch script itself
        world, number = _number("SLURM_STEP_NUM_TASKS"), _number("SLURM_PROCID")
        # "2(x3),1": two tasks on each of three nodes, then one
        counts = re.sub(
            r"(\d+)\(x(\d+)\)",
            lambda found: ",".join([found[1]] * int(found[2])),
            env.get("SLURM_STEP_TASKS_PER_NODE", str(world)),
        ).split(",")
        node = _number("SLURM_NODEID") if "SLURM_NODEID" in env else 0
        if node >= len(counts) or not counts[node].isdecimal():
            raise ConfigError(
                f"SLURM_NODEID is {node}, and SLURM_STEP_TASKS_PER_NODE "
                f"({env.get('SLURM_STEP_TASKS_PER_NODE')!r}) has no such node; {_MEND}"
            )
        place = Ranks(number, world, _number("SLURM_LOCALID"), int(counts[node]))
        return _checked(place, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    return Ranks(0, 1, 0, 1)


_MEND = "leave these variables to one launcher (torchrun, deepspeed, mpirun, srun), or unset them"


def _number(name: str) -> int:
    """Return a variable of a launcher's, a whole number from 0 up."""
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ConfigError(f"{name} is {text!r}; allowed: a whole number from 0 up; {_MEND}")
    return int(text)


def _checked(ranks: Ranks, rank: str, size: str, local_rank: str) -> Ranks:
    """Return a place, after comparing what the variables of these names said."""
    if ranks.rank >= ranks.world_size:
        raise ConfigError(
            f"{rank} is {ranks.rank}, and {size} is {ranks.world_size}; allowed: ranks from 0 to "
            f"{size} - 1; {_MEND}"
        )
    if not ranks.local_rank < ranks.local_world_size <= ranks.world_size:
        raise ConfigError(
            f"{local_rank} is {ranks.local_rank} of {ranks.local_world_size} rank(s) on this node, "
            f"and {size} is {ranks.world_size}; allowed: local ranks below the node's number of "
            f"ranks, and no more of these than ranks; {_MEND}"
        )
    return ranks


def join(ranks: Ranks) -> None:
    """Start the process group (NCCL on GPUs, gloo on CPUs) that DeepSpeed then uses, once.

    Raises:
        ConfigError: more ranks on this node than GPUs, or mpirun without mpi4py.
        MissingRankError: the others did not come within a quarter of an hour.
    """
    if dist.is_initialized():
        return
    check_devices(ranks)
    meet(ranks)
    gpus = torch.cuda.device_count()
    if not gpus and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // ranks.local_world_size))
    deepspeed = import_deepspeed()
    if gpus:
        torch.cuda.set_device(ranks.local_rank)
    backend = "nccl" if gpus else "gloo"
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        _start_again(ranks, backend)  # DeepSpeed takes a group that is there
    deepspeed.init_distributed(
        dist_backend=backend,
        auto_mpi_discovery=False,
        timeout=TIMEOUT,
        rank=ranks.rank,
        world_size=ranks.world_size,
        verbose=False,
    )


def check_devices(ranks: Ranks) -> None:
    """Raise ConfigError if there are more ranks on this node than GPUs, and there are GPUs."""
    gpus = torch.cuda.device_count()
    if gpus and ranks.local_world_size > gpus:
        raise ConfigError(
            f"{ranks.local_world_size} ranks were started on a node with {gpus} GPUs, and ranks "
            f"cannot share one; start {gpus} (or hide the GPUs with CUDA_VISIBLE_DEVICES= to "
            "train on the CPU)"
        )


def meet(ranks: Ranks, timeout: datetime.timedelta | None = None) -> Any:
    """Wait for all ranks, before there is a process group, and return a store that they share.

    Args:
        ranks: this process among all.
        timeout: how long to wait for the others, by default a quarter of an hour; later they wait
            for one another as long as it takes.

    Raises:
        ConfigError: nobody says where to meet.
        MissingRankError: the others did not come.
    """
    if not _met:
        _set_rendezvous(ranks)
        timeout = timeout or MEETING_TIMEOUT
        try:
            store, *_ = next(
                dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=timeout)
            )
        except (dist.DistError, RuntimeError, ValueError) as error:
            raise missing(ranks, timeout, str(error).splitlines()[0]) from error
        # torchrun may keep its store for all its attempts.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _met.append(dist.PrefixStore(f"spion_ds/attempt{attempt}", store))
    return _met[0]


def store() -> Any:
    """Return the store where the ranks met, None where they have not."""
    return _met[0] if _met else None


def missing(ranks: Ranks, timeout: datetime.timedelta, reason: str) -> MissingRankError:
    """Return the error of a rank that waited in vain."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return MissingRankError(
        f"rank {ranks.rank} did not meet the other {ranks.world_size - 1} at {place} within "
        f"{timeout.total_seconds():g} s ({reason}); MASTER_ADDR must be the host of rank 0, "
        "MASTER_PORT a port that is free there, and all ranks must start"
    )


def _start_again(ranks: Ranks, backend: str) -> None:
    """Start the process group apart from what an earlier attempt left in torchrun's store.

    Without a rendezvous of its own (an id) torchrun keeps one store for all attempts, where the
    new ranks would find the dead ones' addresses and wait for them.
    """
    store, *_ = next(dist.rendezvous("env://", ranks.rank, ranks.world_size, timeout=TIMEOUT))
    if os.environ.get("TORCHELASTIC_RUN_ID", "none") == "none":
        store = dist.PrefixStore(f"attempt{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(
        backend, store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=TIMEOUT
    )


def import_deepspeed() -> Any:
    """Return the deepspeed module, quiet, and without its CPU collectives.

    On a CPU DeepSpeed would compile shared-memory collectives (ninja and a compiler, half a
    minute) before training starts; gloo serves as well. The name that spares them is no public one
    of DeepSpeed's, and is needed here, before there is an engine;
    tests/training/test_deepspeed_contract.py watches it.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import logging

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    deepspeed.utils.logger.setLevel(logging.WARNING)
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def leave() -> None:
    """End the process group; safe to call when there is none."""
    _met.clear()
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def end_process(code: int) -> NoReturn:
    """End this rank with ``code`` and without the interpreter's teardown.

    There the threads of gloo abort a process now and then whose work is done and saved.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()  # mpirun takes a rank that leaves without it for lost
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _set_rendezvous(ranks: Ranks) -> None:
    """Fill in what the launcher left out of the environment: ranks, address and port."""
    env = os.environ
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        if ranks.world_size == 1:
            address = ("127.0.0.1", _free_port())
        elif "OMPI_COMM_WORLD_SIZE" in env or "PMI_SIZE" in env:
            address = _agree_through_mpi()
        else:
            raise ConfigError(
                f"{ranks.world_size} ranks were started, and MASTER_ADDR and MASTER_PORT are not "
                "set; export them as launch/slurm.sh does: the first node's name and a free port"
            )
        env.setdefault("MASTER_ADDR", address[0])
        env.setdefault("MASTER_PORT", str(address[1]))
    env.setdefault("RANK", str(ranks.rank))
    env.setdefault("WORLD_SIZE", str(ranks.world_size))
    env.setdefault("LOCAL_RANK", str(ranks.local_rank))
    env.setdefault("LOCAL_SIZE", str(ranks.local_world_size))


def _agree_through_mpi() -> tuple[str, int]:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise ConfigError(
            "mpirun started this run, but mpi4py is not installed, so the ranks cannot find each "
            "other; install mpi4py, or set MASTER_ADDR and MASTER_PORT (mpirun -x)"
        ) from error
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_node = local.Get_size() == world.Get_size()
    host = "127.0.0.1" if one_node else socket.gethostbyname(socket.gethostname())
    return world.bcast((host, _free_port()) if world.Get_rank() == 0 else None, root=0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
