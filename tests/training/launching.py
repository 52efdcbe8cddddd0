"""Starts training as a user would, on CPU ranks, and reads what a run left."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parent / "tiny.yaml"
DRIVE = Path(__file__).parent / "drive.py"
TRAIN = ROOT / "launch" / "train.py"
# A hang is a failure; far above what a loaded two-core machine needs.
LIMIT_SECONDS = 280


def command(launcher: str, ranks: int) -> list[str]:
    """Return the words that stand before the script."""
    port = str(free_port())
    if launcher == "torchrun":
        words = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        return [sys.executable, *words, f"--master_port={port}"]
    if launcher == "deepspeed":
        words = ["--num_accelerators", str(ranks), "--master_port", port]
        return [_program("deepspeed"), *words]
    if launcher == "mpirun":
        # Where there are fewer cores than ranks, mpirun must be told that this is meant.
        return [_program("mpirun"), "--oversubscribe", "-np", str(ranks), sys.executable]
    return [sys.executable]


def _program(name: str) -> str:
    """Return a launcher's path: beside the interpreter, else on PATH."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is neither beside {sys.executable} nor on PATH")
    return found


def environment(*, gpu: bool = False) -> dict[str, str]:
    """Return this process's environment without a launcher's, one thread a rank, GPUs hidden."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMPI_", "PMIX_", "PMI_", "MASTER_", "LOCAL_", "TORCHELASTIC_"))
        and name not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")
    }
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": ""}),
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        # Open MPI looks for it even when all ranks are here.
        **({} if shutil.which("ssh") or shutil.which("rsh") else {"OMPI_MCA_plm": "isolated"}),
    }


def launch(words: list[str], cwd: Path, *, gpu: bool = False) -> subprocess.CompletedProcess[str]:
    """Run to the end and return the result; the output is in the failure message."""
    result = subprocess.run(
        words,
        cwd=cwd,
        env=environment(gpu=gpu),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert result.returncode == 0, f"{words}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result


def start_ranks(count: int, words: list[str], cwd: Path, log: Path) -> list[subprocess.Popen]:
    """Start a script's ranks as a cluster's scheduler would, each a process of ours.

    Their output goes to ``log``.
    """
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with log.open("w") as output:
        return [
            subprocess.Popen(
                [sys.executable, *words],
                cwd=cwd,
                env={
                    **environment(),
                    **place,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(count),
                },
                stdout=output,
                stderr=output,
            )
            for rank in range(count)
        ]


def drive(
    launcher: str, ranks: int, sessions: list[dict[str, Any]], folder: Path, *, gpu: bool = False
) -> None:
    """Train several sessions one after the other in one process group."""
    plan = folder / f"plan-{launcher}-{ranks}.json"
    plan.write_text(json.dumps([session(folder, **values) for values in sessions]))
    launch([*command(launcher, ranks), str(DRIVE), str(plan)], folder, gpu=gpu)


def session(folder: Path, **values: Any) -> dict[str, Any]:
    """Return TrainOptions as a mapping, with the tiny recipe and folders below ``folder``."""
    plain: dict[str, Any] = {"run_dir": str(folder / "runs"), "data_dir": str(folder / "data")}
    if values.get("resume") is None:
        plain["recipe"] = str(TINY)
    if "stage" in values:
        plain["ds_config"] = str(ROOT / "ds_configs" / f"zero{values.pop('stage')}.json")
    return {**plain, **values}


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the rows of a kind in a run's metrics.jsonl."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    """Return the training loss of each step."""
    return {row["step"]: row["loss"] for row in rows(run, "train")}


def digest(run: Path) -> str:
    """Return the digest of the masks that the run switched to."""
    [switch] = rows(run, "switch")
    return switch["digest"]


def summary(run: Path) -> dict[str, Any]:
    """Return a finished run's summary."""
    return json.loads((run / "summary.json").read_text())


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
