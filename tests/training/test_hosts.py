"""The launch files over two hosts, played by network namespaces: the run is one host's.

Each host has its own network, address and name. `ssh` and `pdsh` stand for a login there: they pass
on what a login shell would have, and nothing else. The file system is shared, as on a cluster.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from spion_ds.distributed.heartbeat import LOST_RANK_EXIT
from tests.training.launching import (
    LIMIT_SECONDS,
    ROOT,
    TINY,
    digest,
    drive,
    environment,
    losses,
    session,
    summary,
)

pytestmark = pytest.mark.ranks
HOSTS = Path(__file__).parent / "hosts" / "two_hosts.sh"
FAULTY = Path(__file__).parent / "faulty.py"
LAUNCH = {
    "torchrun": "on node2 launch/torchrun.sh node1:29400 2 1 {arguments} & "
    "on node1 launch/torchrun.sh node1:29400 2 1 {arguments} && wait $!",
    "mpirun": "HOSTFILE={hostfile} on node1 launch/mpirun.sh 2 {arguments}",
    "deepspeed": "on node1 launch/deepspeed.sh {hostfile} {arguments}",
}
# Prints the exit codes of rank 0 on node1 and of rank 1 on node2.
START_RANKS = """
start() {{
    on node$(($1 + 1)) env RANK=$1 LOCAL_RANK=0 WORLD_SIZE=2 LOCAL_WORLD_SIZE=1 MASTER_ADDR=node1 \
        MASTER_PORT=29500 python {faulty} {plan}
}}
start 1 & start 0; first=$?; wait $!; echo codes $first $?
"""


def on_two_hosts(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(HOSTS), "bash", "-c", script],
        cwd=ROOT,
        env={**environment(), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


def missing(*programs: str) -> str:
    """Return what this machine lacks, "" if nothing."""
    if torch.cuda.is_available():
        return "a machine without a GPU: deepspeed would give it to both hosts"
    for program in ("ip", "unshare", *programs):
        if shutil.which(program, path=environment()["PATH"]) is None:
            return f"{program}, which is not installed"
    tried = on_two_hosts("on node1 true")
    return f"network namespaces: {tried.stderr.strip()[-200:]}" if tried.returncode else ""


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    drive("python", 1, [{"run_name": "r", "stage": 2}], folder)
    return folder / "runs" / "r"


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun", "deepspeed"])
def test_two_hosts_train_as_one(launcher: str, alone: Path, tmp_path: Path) -> None:
    if reason := missing(launcher):
        pytest.skip(f"needs {reason}")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    arguments = f"--recipe {TINY} --run_dir {tmp_path}/runs --data_dir {tmp_path}/data --run_name r"
    result = on_two_hosts(LAUNCH[launcher].format(hostfile=hostfile, arguments=arguments))
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    assert "2 rank(s) on cpu" in result.stdout
    run = tmp_path / "runs" / "r"
    assert digest(run) == digest(alone)
    # Sums over ranks are rounded in another order: about 1e-7 a step, amplified by training.
    assert losses(run) == pytest.approx(losses(alone), rel=1e-4)
    assert summary(run)["test_accuracy"] == summary(alone)["test_accuracy"]


def test_a_host_that_loses_its_network_is_named_and_both_end(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(f"needs {reason}")
    fault = {"kind": "unplug", "place": "step", "rank": 1, "at": 4}
    overrides = ["training.rank_timeout_seconds=3", "training.checkpoint_every=2"]
    plan = tmp_path / "plan.json"
    values = session(tmp_path, run_name="r", fault=fault, overrides=overrides)
    plan.write_text(json.dumps([values]))
    result = on_two_hosts(START_RANKS.format(faulty=FAULTY, plan=plan))
    assert f"codes {LOST_RANK_EXIT} {LOST_RANK_EXIT}" in result.stdout, result.stderr
    assert "error: rank 1 gave no more signs of life; the last: rank 1 at step" in result.stderr
    assert "error: rank 0 is gone" in result.stderr
    assert "Traceback" not in result.stderr
    assert (tmp_path / "runs" / "r" / "checkpoints" / "latest").read_text() == "step-000002"
