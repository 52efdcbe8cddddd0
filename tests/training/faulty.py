"""Training with faults put into it; started by a launcher, once a rank.

usage: faulty.py FILE, a JSON list of sessions: TrainOptions as mappings, with a "fault" beside
them: {"kind": …, "rank": …, "place": …, "at": …}. Each rank writes how a session ended to
FILE.<rank>, one line a session. A fault of kind "kill" or "freeze" ends or stops its process.
"others", if given, is a kind too: that of the other ranks' fault at the same call.

Places: step, loss, map, broadcast, save, weights, publish, evaluate; "at" counts the calls from 1.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from spion_ds.distributed.ending import run_command
from spion_ds.distributed.process_group import discover_ranks, end_process, leave
from spion_ds.distributed.stopping import Stopped
from spion_ds.errors import SpionError
from spion_ds.switching import dense_to_sparse, gathering
from spion_ds.training import trainer
from spion_ds.training.checkpoints import checkpoint
from spion_ds.training.session import TrainOptions, train
from spion_ds.training.step import losses
from spion_ds.training.step.deepspeed_engine import DeepSpeedEngine

PLACES: dict[str, tuple[Any, str]] = {
    "step": (trainer.Trainer, "_step"),
    "loss": (losses.F, "cross_entropy"),
    "map": (gathering, "_mean"),
    "broadcast": (dense_to_sparse, "share_masks"),
    "layouts": (trainer, "layouts_digest"),
    "save": (trainer, "save_checkpoint"),
    "weights": (DeepSpeedEngine, "weights"),
    "write": (checkpoint, "_save"),
    "publish": (checkpoint, "publish"),
    "prune": (trainer, "prune_checkpoints"),
    "evaluate": (trainer, "evaluate"),
}


def act(fault: dict[str, Any], result: Callable[[], Any]) -> Any:
    """Do what a fault does instead of a call, or before it; the call's true result is at hand."""
    kind = fault["kind"]
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "hang":
        signal.pause()
    if kind == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    if kind == "usr1":
        os.kill(os.getpid(), signal.SIGUSR1)
    if kind == "unplug":  # the host's network, in its namespace
        subprocess.run(["ip", "link", "set", "eth0", "down"], check=True)
    if kind == "fill":  # the disk, but for some bytes
        size = shutil.disk_usage(Path(fault["path"]).parent).free - fault["but"]
        Path(fault["path"]).write_bytes(bytes(size))
    if kind == "free":
        Path(fault["path"]).unlink()
    if kind == "crash":
        raise RuntimeError("a fault was put here")
    if kind == "full":
        raise OSError(28, "No space left on device")
    if kind == "nan":
        return result() * float("nan")
    if kind == "other":
        return "something else"
    return result()


def put(fault: dict[str, Any]) -> Any:
    """Return a context in which the fault comes at its call of its place, on its rank."""
    owner, name = PLACES[fault["place"]]
    original, calls = getattr(owner, name), 0

    def faulty(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        here = fault["at"] <= calls < fault["at"] + fault.get("times", 1)
        chosen = discover_ranks().rank == fault["rank"]
        kind = fault["kind"] if chosen else fault.get("others")
        if here and kind is not None:
            return act({**fault, "kind": kind}, lambda: original(*arguments, **named))
        return original(*arguments, **named)

    return mock.patch.object(owner, name, faulty)


def run(values: dict[str, Any]) -> None:
    """Run one session."""
    fault = values.pop("fault", None)
    for name in ("run_dir", "data_dir"):
        values[name] = Path(values[name])
    if fault is None:
        train(TrainOptions(**values))
        return
    with put(fault):
        train(TrainOptions(**values))


def main(plan: Path) -> int:
    sessions = json.loads(plan.read_text())
    if len(sessions) == 1:  # as launch/train.py does it
        return run_command(lambda: run(sessions[0]))
    endings = plan.with_suffix(f".{discover_ranks().rank}").open("w")
    for number, values in enumerate(sessions):
        torch.manual_seed(1000 + number)
        ending = "finished"
        try:
            run(values)
        except (SpionError, OSError, Stopped) as error:
            ending = f"{type(error).__name__}: {error}"
        endings.write(json.dumps(ending) + "\n")
        endings.flush()
    leave()
    return 0


if __name__ == "__main__":
    end_process(main(Path(sys.argv[-1])))
