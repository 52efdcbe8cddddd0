"""What a run leaves to look at: metrics.jsonl, TensorBoard events, progress bar, summary."""

from __future__ import annotations

import contextlib
import json
import resource
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from spion_ds.durable_files import replace_text
from spion_ds.training.reports.pictures import map_picture, mask_picture


class RunLog:
    """Writes on rank 0; on other ranks every call does nothing.

    Args:
        folder: the run's folder, None on other ranks.
        steps: steps of the whole run.
        start: steps already taken.
    """

    def __init__(self, folder: Path | None, steps: int, start: int) -> None:
        self.folder = folder
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _unless_os_error
        _drop_rows_after(folder / "metrics.jsonl", start)
        self._rows = (folder / "metrics.jsonl").open("a")
        self._writer = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        self._bar = progress_bar(total=steps, initial=start, unit="step", ncols=110)

    def row(self, step: int, kind: str, **values: Any) -> None:
        """Append a row to metrics.jsonl and its numbers to TensorBoard as ``kind/name``."""
        if self.folder is None:
            return
        self._rows.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self._rows.flush()
        for name, value in values.items():
            if isinstance(value, list):
                for layer, number in enumerate(value):
                    if number is not None:
                        self._writer.add_scalar(f"{kind}/{name}_layer{layer}", number, step)
            elif isinstance(value, int | float):
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, **shown: str) -> None:
        """Move the bar to ``step``; ``shown`` stands behind it."""
        if self.folder is not None:
            self._bar.set_postfix(refresh=False, **shown)
            self._bar.update(step - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.folder is not None:
            tqdm.write(text, file=sys.stderr)

    def pictures(self, step: int, maps: list[Tensor] | None, masks: list[Tensor] | None) -> None:
        """Add each layer's map and mask to TensorBoard."""
        if self.folder is None:
            return
        for layer, attention in enumerate(maps or []):
            picture = map_picture(attention)
            self._writer.add_image(f"map/layer{layer}", picture, step, dataformats="HWC")
        for layer, mask in enumerate(masks or []):
            picture = mask_picture(mask)
            self._writer.add_image(f"mask/layer{layer}", picture, step, dataformats="HWC")

    def text(self, name: str, text: str) -> None:
        """Add a text to TensorBoard."""
        if self.folder is not None:
            self._writer.add_text(name, f"```\n{text}\n```", 0)

    def close(self) -> None:
        """Flush and close everything."""
        if self.folder is not None:
            self._bar.close()
            with contextlib.suppress(OSError):  # said when it was written
                self._writer.close()
            self._rows.close()


class StepTimer:
    """Times plain training steps; checks, evaluations and saves stay outside.

    A stopwatch: ``start`` and ``stop`` as often as needed, ``take`` the mean since the last take.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._started: float | None = None
        self._elapsed = 0.0
        self._steps = 0

    def start(self) -> None:
        """Start unless it is running."""
        if self._started is None:
            self._wait()
            self._started = time.perf_counter()

    def count(self) -> None:
        """Count one step."""
        self._steps += 1

    def stop(self) -> None:
        """Stop if it is running."""
        if self._started is not None:
            self._wait()
            self._elapsed += time.perf_counter() - self._started
            self._started = None

    def take(self) -> float | None:
        """Stop, and return the seconds a step since the last take, None without a step."""
        self.stop()
        seconds = self._elapsed / self._steps if self._steps else None
        self._elapsed, self._steps = 0.0, 0
        return seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics.jsonl, without one that a crash cut off."""
    rows = (_parse(line) for line in _lines(folder / "metrics.jsonl"))
    return [row for row in rows if row is not None]


def seconds_per_step(folder: Path) -> dict[str, float | None]:
    """Return the median step time of each phase of a run, over all its sessions.

    The first row of a phase, which warms up, counts only if there is no other.
    """
    rows: dict[str, list[float]] = {"dense": [], "sparse": []}
    for row in read_rows(folder):
        if row["kind"] == "train" and "step_seconds" in row:
            rows[row["phase"]].append(row["step_seconds"])
    return {
        phase: statistics.median(times[1:] or times) if times else None
        for phase, times in rows.items()
    }


def progress_bar(**arguments: Any) -> tqdm:
    """Return a tqdm bar that redraws rarely where a redraw is a new line (a file, a CI log)."""
    if not sys.stderr.isatty():
        arguments = {"mininterval": 15.0, "delay": 5.0, **arguments}
    return tqdm(**arguments)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory held so far: allocated on the GPU, or resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Let ``peak_memory_bytes`` count from here on; without effect where the system cannot."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the resident set's peak


def _unless_os_error(failure: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread meets a full disk; the next event that it is given raises the same error.
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def _drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of steps that a resumed run takes again, and of a test at its last step."""
    if not path.is_file():
        return
    rows = [row for row in _lines(path) if _stays(row, step)]
    replace_text(path, "".join(row + "\n" for row in rows))


def _stays(row: str, step: int) -> bool:
    parsed = _parse(row)
    if parsed is None:
        return False
    return parsed["step"] < step or (parsed["step"] == step and parsed.get("kind") != "test")


def _lines(path: Path) -> list[str]:
    # A crash leaves anything behind: such a line is none of ours.
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _parse(line: str) -> dict[str, Any] | None:
    """Return a row, None for a line cut off by a crash."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    known = isinstance(row, dict) and type(row.get("step")) is int and "kind" in row
    return row if known else None
