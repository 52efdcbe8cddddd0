"""launch/evaluate.py and stopping by a signal, as a user meets them."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.training.launching import (
    LIMIT_SECONDS,
    ROOT,
    TINY,
    TRAIN,
    command,
    drive,
    environment,
    launch,
    losses,
    summary,
)

pytestmark = pytest.mark.ranks


def test_evaluate_reports_what_training_reported(tmp_path: Path) -> None:
    drive("python", 1, [{"run_name": "r", "stage": 3}], tmp_path)
    run = tmp_path / "runs" / "r"
    for launcher, ranks in (("python", 1), ("torchrun", 2)):
        words = [*command(launcher, ranks), str(ROOT / "launch" / "evaluate.py"), str(run)]
        out = launch(words, tmp_path).stdout
        best = summary(run)["best_step"]
        assert f"phase        sparse, step {best}" in out
        assert f"test accuracy {summary(run)['test_accuracy']:.2%} of 22 samples" in out
        for word in ("density", "tokens/s", "majority class", "root operator only"):
            assert word in out


def test_a_signal_ends_the_run_with_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    drive("python", 1, [{"run_name": "whole"}], tmp_path)
    words = [*command("torchrun", 2), str(TRAIN), "--recipe", str(TINY), "--run_name", "r"]
    # Long enough that the signal comes before the end.
    words += ["training.steps=100000", "training.evaluate_every=100000"]
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "runs" / "r" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and losses(metrics.parent)):
        pass
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert "go on with --resume" in out, out
    stopped = max(losses(metrics.parent))
    assert (metrics.parent / "checkpoints" / "latest").read_text() == f"step-{stopped:06d}"
