"""Starts training on ranks of this machine, kills one on request, and reads what runs left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spion_ds.training.checkpoints.checkpoint import load_state
from spion_ds.training.checkpoints.files import find_checkpoint
from spion_ds.training.reports.run_log import read_rows

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "launch" / "train.py"
COLLECTIVES = Path(__file__).resolve().parent / "collectives.py"
# Far above what any of these runs needs: a hang is a failure.
LIMIT_SECONDS = 600.0
# Multicast over NVLink needs a fabric manager's leave, which a container seldom has.
_NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
_LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "MASTER_", "LOCAL_", "TORCHELASTIC_", "SLURM_")


@dataclass(frozen=True)
class Job:
    """A run to make: its folder's name, ranks, ZeRO stage, recipe and overrides."""

    name: str
    ranks: int
    stage: int
    recipe: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Killed:
    """What a kill did.

    Attributes:
        reached: last step in the log.
        saved: step of the latest checkpoint.
        seconds: until the other ranks had ended.
        codes: exit codes of the other ranks.
    """

    reached: int
    saved: int
    seconds: float
    codes: list[int]


@dataclass(frozen=True)
class Workplace:
    """Where runs, logs and data are, and on what ranks train.

    Attributes:
        folder: of everything.
        device: ``"cuda"`` or ``"cpu"``.
        say: prints a line of progress.
    """

    folder: Path
    device: str
    say: Callable[[str], None]

    def run_folder(self, name: str) -> Path:
        """Return the folder of the run of that name."""
        return self.folder / "runs" / name

    def train(self, job: Job) -> Path:
        """Train to the end, unless that was done before, and return the run's folder.

        Raises:
            SystemExit: it failed; the message has its last words.
        """
        run = self.run_folder(job.name)
        if (run / "summary.json").is_file():
            self.say(f"{job.name}: kept from before")
            return run
        began = time.monotonic()
        self.torchrun(job.name, job.ranks, [str(TRAIN), *self._words(job)])
        self.say(f"{job.name}: {job.ranks} rank(s), {time.monotonic() - began:.0f} s")
        return run

    def torchrun(self, name: str, ranks: int, words: list[str]) -> None:
        """Run a script on ``ranks`` ranks, its output in ``logs/name.log``.

        Raises:
            SystemExit: it failed or hung; the message has its last words.
        """
        log = self._log(name)
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
        with log.open("w") as output:
            process = subprocess.Popen(
                [*launcher, f"--master_port={_free_port()}", *words],
                env=self._environment(),
                stdout=output,
                stderr=output,
            )
            try:
                code = process.wait(LIMIT_SECONDS)
            except subprocess.TimeoutExpired:
                raise SystemExit(f"{name} took more than {LIMIT_SECONDS:g} s; see {log}") from None
            finally:
                # SIGTERM: torchrun ends its ranks, and a run saves. Without effect on a dead one.
                process.terminate()
                process.wait()
        if code != 0:
            raise SystemExit(f"{name} ended with code {code}:\n{_last_words(log)}\nsee {log}")

    def kill(self, job: Job, victim: int, at: int) -> Killed:
        """Train, send SIGKILL to a rank once step ``at`` is logged, and wait for the others.

        The ranks are started without a launcher, which would end them itself.

        Raises:
            SystemExit: the ranks failed, or had ended, before the kill.
        """
        run, log = self.run_folder(job.name), self._log(job.name)
        processes = self._start(job, log)
        try:
            while _reached(run) < at:
                if any(process.poll() is not None for process in processes):
                    raise SystemExit(f"{job.name} ended before the kill:\n{_last_words(log)}")
                time.sleep(0.005)
            processes[victim].kill()
            if processes[victim].wait() != -signal.SIGKILL:
                raise SystemExit(f"{job.name} ended before the kill; set more training.steps")
            died = time.monotonic()
            others = [process for rank, process in enumerate(processes) if rank != victim]
            codes = [process.wait(LIMIT_SECONDS) for process in others]
            seconds = time.monotonic() - died
        except subprocess.TimeoutExpired:
            raise SystemExit(
                f"{job.name}: ranks hang {LIMIT_SECONDS:g} s after rank {victim} died; see {log}"
            ) from None
        finally:
            for process in processes:
                process.kill()
        saved = find_checkpoint(run).name.removeprefix("step-")
        self.say(f"{job.name}: rank {victim} killed, the others ended in {seconds:.1f} s")
        return Killed(_reached(run), int(saved), seconds, codes)

    def _start(self, job: Job, log: Path) -> list[subprocess.Popen]:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        place |= {"WORLD_SIZE": str(job.ranks), "LOCAL_WORLD_SIZE": str(job.ranks)}
        with log.open("w") as output:
            return [
                subprocess.Popen(
                    [sys.executable, str(TRAIN), *self._words(job)],
                    env={
                        **self._environment(),
                        **place,
                        "RANK": str(rank),
                        "LOCAL_RANK": str(rank),
                    },
                    stdout=output,
                    stderr=output,
                )
                for rank in range(job.ranks)
            ]

    def _words(self, job: Job) -> list[str]:
        words = ["--recipe", job.recipe, "--run_name", job.name, "--resume", "auto"]
        words += ["--run_dir", str(self.folder / "runs"), "--data_dir", str(self.folder / "data")]
        words += ["--ds_config", str(ROOT / "ds_configs" / f"zero{job.stage}.json")]
        return [*words, *job.overrides]

    def _log(self, name: str) -> Path:
        folder = self.folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.log"

    def _environment(self) -> dict[str, str]:
        """Return this process's environment without a launcher's, multicast off."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(_LAUNCHERS)
            and name not in ("RANK", "WORLD_SIZE", "DS_ACCELERATOR")
        }
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
        # The same with any number of ranks: on a CPU, sums are cut up by threads.
        kept["OMP_NUM_THREADS"] = "1"
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {}
        return {**kept, **_NO_MULTICAST, **hidden}


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return a run's rows of one kind."""
    return [row for row in read_rows(run) if row["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    """Return the training loss of each logged step."""
    return {row["step"]: row["loss"] for row in rows(run, "train")}


def summary(run: Path) -> dict[str, Any]:
    """Return a finished run's summary."""
    return json.loads((run / "summary.json").read_text())


def masks(run: Path) -> list[Tensor]:
    """Return the (n, n) bool mask of each layer of a run that is in its sparse phase."""
    found = load_state(find_checkpoint(run))[0].masks
    assert found is not None
    return found


def _reached(run: Path) -> int:
    if not (run / "metrics.jsonl").is_file():
        return 0
    return max((row["step"] for row in rows(run, "train")), default=0)


def _last_words(log: Path) -> str:
    """Return the errors that the program told, else the end of its output."""
    lines = log.read_text(errors="replace").splitlines()
    told = [line for line in lines if line.startswith("error: ")]
    return "\n".join(told[:3] or lines[-15:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
