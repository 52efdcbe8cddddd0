"""What DeepSpeed can combine trains through the switch, with the same masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.launching import ROOT, digest, drive, losses, summary

pytestmark = pytest.mark.ranks

OFFLOAD = {"device": "cpu"}
ZERO = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero1-optimizer": {"stage": 1, "offload_optimizer": OFFLOAD},
    "zero2-optimizer": {"stage": 2, "offload_optimizer": OFFLOAD},
    "zero3-optimizer": {"stage": 3, "offload_optimizer": OFFLOAD},
    "zero3-param": {"stage": 3, "offload_param": OFFLOAD},
    "zero3-both": {"stage": 3, "offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
}
CHECKPOINTING = "model.activation_checkpointing=true"
# One of each way to hold parameters and optimizer.
CHECKPOINTED = ("zero0", "zero2-optimizer", "zero3-both")


def sessions(folder: Path, precision: str) -> list[dict[str, Any]]:
    given = json.loads((ROOT / "ds_configs" / "zero0.json").read_text())
    plan = []
    for name, zero in ZERO.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps({**given, "zero_optimization": zero}))
        ways = [("", []), ("-checkpointing", [CHECKPOINTING])]
        for suffix, more in ways if name in CHECKPOINTED else ways[:1]:
            overrides = [f"training.precision={precision}", *more]
            plan.append({"run_name": name + suffix, "ds_config": str(path), "overrides": overrides})
    return plan


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offload_and_activation_checkpointing_at_every_stage(
    precision: str, tmp_path: Path
) -> None:
    plan = sessions(tmp_path, precision)
    drive("torchrun", 2, plan, tmp_path)
    runs = {values["run_name"]: tmp_path / "runs" / values["run_name"] for values in plan}
    for name, run in runs.items():
        assert summary(run)["phase"] == "sparse", name
        assert summary(run)["sparse"]["steps"] == 6, name
        if precision == "fp32":
            assert digest(run) == digest(runs["zero0"]), name
            # Stages sum in other orders: about 1e-7 a step, amplified by training.
            assert losses(run) == pytest.approx(losses(runs["zero0"]), rel=1e-4), name


def test_compiled_steps_train_through_the_switch(tmp_path: Path) -> None:
    compiled = ["training.compile=true"]
    plan = [
        {"run_name": "plain", "stage": 2},
        {"run_name": "compiled", "stage": 2, "overrides": compiled},
        {"run_name": "both", "stage": 2, "overrides": [*compiled, CHECKPOINTING]},
    ]
    drive("python", 1, plan, tmp_path)
    plain = tmp_path / "runs" / "plain"
    for name in ("compiled", "both"):
        run = tmp_path / "runs" / name
        assert digest(run) == digest(plain)
        assert losses(run) == pytest.approx(losses(plain), rel=1e-4)
        # Fused kernels round otherwise; equal bits would mean that nothing was compiled.
        assert every_loss(run) != every_loss(plain)


def every_loss(run: Path) -> list[float]:
    """Return the losses of training and evaluation; a few of them alone may agree bit by bit."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]
