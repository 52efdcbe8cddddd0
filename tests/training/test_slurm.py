"""launch/slurm.sh: what it asks Slurm to do, with srun and scontrol that stand for Slurm's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.launching import (
    LIMIT_SECONDS,
    ROOT,
    TINY,
    environment,
    losses,
    session,
)

FAULTY = Path(__file__).parent / "faulty.py"
SCONTROL = """#!/bin/sh
echo "$@" >> "$CALLS"
[ "$1" = show ] && echo localhost && echo node8
exit 0
"""
SRUN = """#!/bin/sh
echo srun "$@" >> "$CALLS"
echo "$MASTER_ADDR:$MASTER_PORT" >> "$CALLS"
exec {command}
"""


def run_batch_script(folder: Path, command: str, restarts: int = 0) -> tuple[int, list[str]]:
    """Run the script once, with ``command`` as its job; return exit code and calls of Slurm."""
    calls = folder / "calls"
    calls.write_text("")
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN.format(command=command))):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    place = {"SLURM_JOB_ID": "1234", "SLURM_JOB_NODELIST": "localhost,node8", "CALLS": str(calls)}
    place["SLURM_RESTART_COUNT"] = str(restarts)
    path = f"{folder}:{os.environ['PATH']}"
    result = subprocess.run(
        [str(ROOT / "launch" / "slurm.sh"), "--recipe", "listops"],
        cwd=ROOT,
        env={**environment(), **place, "PATH": path},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    return result.returncode, calls.read_text().splitlines()


REQUEUE = "requeue 1234"


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, 0, False),  # finished
        (2, 0, False),  # an error to mend
        (75, 0, True),  # stopped by the signal
        (75, 40, True),
        (3, 0, True),  # a rank was lost
        (137, 4, True),
        (3, 5, False),  # again and again
    ],
)
def test_the_job_is_requeued_where_it_can_go_on(
    code: int, restarts: int, requeued: bool, tmp_path: Path
) -> None:
    ended, calls = run_batch_script(tmp_path, f"sh -c 'exit {code}'", restarts)
    assert ended == code
    assert (REQUEUE in calls) == requeued
    [srun] = [call for call in calls if call.startswith("srun")]
    assert "--kill-on-bad-exit=0 python launch/train.py" in srun
    assert srun.endswith("--run_name job-1234 --resume auto --recipe listops")
    assert "localhost:21234" in calls


@pytest.mark.ranks
def test_a_job_goes_on_in_its_next_time_slot(tmp_path: Path) -> None:
    values = {"run_name": "r", "resume": "auto", "recipe": str(TINY)}
    signal = {"kind": "usr1", "place": "step", "rank": 0, "at": 4}
    for name, more in (("first", {"fault": signal}), ("second", {})):
        plan = tmp_path / f"{name}.json"
        plan.write_text(json.dumps([session(tmp_path, **values, **more)]))
    first = run_batch_script(tmp_path, f"{sys.executable} {FAULTY} {tmp_path}/first.json")
    assert (first[0], REQUEUE in first[1]) == (75, True)
    run = tmp_path / "runs" / "r"
    assert (run / "checkpoints" / "latest").read_text() == "step-000004"
    second = run_batch_script(tmp_path, f"{sys.executable} {FAULTY} {tmp_path}/second.json", 1)
    assert (second[0], REQUEUE in second[1]) == (0, False)
    assert sorted(losses(run)) == list(range(1, 13))
