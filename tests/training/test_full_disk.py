"""A disk that is really full: what is saved stays, and the run goes on when there is room."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spion_ds.distributed.ending import USER_ERROR_EXIT, run_command
from spion_ds.training.reports.run_log import RunLog
from tests.training.launching import LIMIT_SECONDS, ROOT, TINY, environment, session

FAULTY = Path(__file__).parent / "faulty.py"
# A disk of a few MB, seen by this command alone and gone with it; its files are copied out.
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=4M tmpfs {disk} && {python} {faulty} {plan} && cp -r {disk}/. {copy}
"""


def on_a_small_disk(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", script],
        cwd=ROOT,
        env={**environment(), "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )


@pytest.mark.ranks
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on(tmp_path: Path) -> None:
    disk, copy = tmp_path / "runs", tmp_path / "copy"
    disk.mkdir()
    tried = on_a_small_disk(f"mount -t tmpfs -o size=4M tmpfs {disk}")
    if tried.returncode:
        pytest.skip(f"needs user namespaces: {tried.stderr.strip()[-200:]}")
    filler = str(disk / "filler")
    # Room for a part of a checkpoint: 100 KB of weights, twice that of optimizer state.
    fill = {"kind": "fill", "rank": 0, "path": filler, "but": 150_000}
    auto = {"run_name": "r", "resume": "auto", "recipe": str(TINY)}
    auto["overrides"] = ["training.checkpoint_every=2", "training.keep_checkpoints=10"]
    free = {"kind": "free", "place": "step", "rank": 0, "at": 1, "path": filler}
    sessions = [
        {**auto, "fault": {**fill, "place": "save", "at": 3}},
        {**auto, "fault": free},
        # A row of the log, or an event of TensorBoard's, is the first that finds no room.
        {"run_name": "log", "fault": {**fill, "place": "step", "at": 3, "but": 0}},
    ]
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps([session(tmp_path, **values) for values in sessions]))
    names = {"disk": disk, "python": sys.executable, "faulty": FAULTY, "plan": plan, "copy": copy}
    result = on_a_small_disk(ON_A_SMALL_DISK.format(**names))
    assert result.returncode == 0, result.stderr[-5000:]
    saving, gone_on, logging = map(json.loads, plan.with_suffix(".0").read_text().splitlines())
    assert saving.startswith(f"CheckpointError: a checkpoint cannot be written to {disk}/r/check")
    assert "0.0 MiB are free there; the ones before it are untouched" in saving
    assert "resumed from step-000004" in result.stdout
    assert gone_on == "finished"
    assert not list((copy / "r" / "checkpoints").glob(".incomplete*"))
    assert logging == "OSError: [Errno 28] No space left on device"
    assert "Traceback" not in result.stderr


def test_an_operating_systems_error_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    log = RunLog(tmp_path, 12, 0)
    assert run_command(lambda: log.row(1, "train", loss=1.0)) == USER_ERROR_EXIT
    error = capsys.readouterr().err.strip()
    assert error == (
        "error: No space left on device; make room, and go on with --resume, from the last "
        "checkpoint"
    )
    assert run_command(lambda: (tmp_path / "none" / "file").read_text()) == USER_ERROR_EXIT
    assert f"error: {tmp_path}/none/file: No such file" in capsys.readouterr().err
