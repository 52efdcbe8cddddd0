"""Notices a rank that dies, hangs or fails, and ends the others with a message that names it.

A thread of every rank writes signs of life to a store of rank 0's, whose thread reads them all, and
sees when a process has ended. A second one notices when the first hears nothing of the store.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from spion_ds.distributed.agreement import Agreement
from spion_ds.distributed.lifelines import Lifelines
from spion_ds.distributed.process_group import Ranks
from spion_ds.errors import SpionError

LOST_RANK_EXIT = 3
_PACKAGE = str(Path(__file__).parents[1])
# Between hearing of a failure and ending: a rank that fails for the same reason ends by itself.
_GRACE_SECONDS = 5.0
_VERDICT = "verdict"


class LostRankError(SpionError, RuntimeError):
    """Another rank died, hung or failed, so this one cannot go on."""


class Watch:
    """A context in which ranks look after one another.

    If a rank dies or fails, all others end within seconds; if it is silent or does not move for the
    timeout, within about that time: by a LostRankError where Python gets to run, else by leaving
    the process with exit code 3.
    Left without an error, it waits for all ranks.

    Args:
        ranks: this process among all.
        agreement: the control channel.
        timeout_seconds: after which a silent or motionless rank counts as lost. A rank is not
            expected to move before its first ``tick``.
    """

    def __init__(self, ranks: Ranks, agreement: Agreement, timeout_seconds: float) -> None:
        self.ranks, self.agreement, self.timeout = ranks, agreement, timeout_seconds
        self._interval = min(1.0, timeout_seconds / 5)
        self._polls = max(2, round(timeout_seconds / self._interval))
        self._ticks, self._step = 0, 0
        self._heard: str | None = None
        self._main = threading.main_thread().ident
        self._left = threading.Event()
        self._rounds = 0  # that the thread has made
        self._thread = threading.Thread(target=self._look, name="spion-watch", daemon=True)

    def tick(self, step: int) -> None:
        """Say that this rank moves, and at which step it is."""
        self._ticks, self._step = self._ticks + 1, step

    def __enter__(self) -> Watch:
        self._store = _open_store(self.ranks, self.agreement, self.timeout)
        self._lifelines = Lifelines(self.ranks, self.agreement)
        self._beat(0)
        self.agreement.barrier()  # every rank's first sign of life is in the store
        self._thread.start()
        threading.Thread(target=self._oversee, name="spion-watch-answer", daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.agreement.barrier()
            elif lost_contact(error, trace):
                raise LostRankError(self._cause()) from error
            else:
                what = f"{type(error).__name__}: {error}".splitlines()[0]
                self._report(f"rank {self.ranks.rank} failed: {what}")
        finally:
            self._lifelines.say_farewell()
            self._left.set()
            self._thread.join(self.timeout)  # it may hear nothing of a store that is cut off

    def _look(self) -> None:
        judge = _Judge(self.ranks.world_size, self._polls, self.timeout)
        number = 0
        while not self._left.wait(self._interval):
            number += 1
            try:
                self._beat(number)
                verdict = self._verdict()
                if verdict is None and self.ranks.is_first:
                    signs, dead = self._beats(), self._lifelines.cut()
                    verdict = _gone(dead, signs) if dead else judge.verdict(signs)
                    if verdict is not None:
                        self._store.set(_VERDICT, verdict)
            except RuntimeError:
                verdict = "rank 0 is gone or does not answer"
            self._rounds += 1
            self._heard = self._heard or verdict
            if verdict is not None and not self._left.wait(_GRACE_SECONDS):
                self._end(verdict)

    def _oversee(self) -> None:
        """End this rank if the store does not answer: over a dead network a call never returns."""
        rounds = polls = 0
        while not self._left.wait(self._interval):
            polls = polls + 1 if self._rounds == rounds and self._heard is None else 0
            rounds = self._rounds
            if polls >= self._polls:
                self._end("rank 0 is gone or does not answer")

    def _end(self, verdict: str) -> None:
        if speaks(self.ranks, verdict):
            # Below the progress bar, which nobody can close any more.
            print(f"\nerror: {verdict}; {ADVICE}", file=sys.stderr, flush=True)
        os._exit(LOST_RANK_EXIT)

    def _beat(self, number: int) -> None:
        place, waits = _where(sys._current_frames().get(self._main or 0))
        sign = [number, self._ticks, self._step, place, waits]
        self._store.set(f"rank{self.ranks.rank}", json.dumps(sign))

    def _beats(self) -> list[list[Any]]:
        keys = [f"rank{rank}" for rank in range(self.ranks.world_size)]
        return [json.loads(value) for value in self._store.multi_get(keys)]

    def _verdict(self) -> str | None:
        return self._store.get(_VERDICT).decode() if self._store.check([_VERDICT]) else None

    def _report(self, verdict: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_VERDICT, "", verdict)
            if self.ranks.is_first and self.ranks.world_size > 1:
                time.sleep(3 * self._interval)  # the store ends with this process

    def _cause(self) -> str:
        """Return why a collective failed: what a rank reported, or whose heart stopped."""
        try:
            before = self._beats()
            time.sleep(4 * self._interval)
            verdict = self._verdict()
            if verdict is None:
                after = self._beats()
                gone = [r for r, sign in enumerate(after) if sign[0] == before[r][0]]
                verdict = _gone(gone, after) if gone else "the ranks lost contact with one another"
        except RuntimeError:
            verdict = self._heard or "rank 0 is gone"
        self._report(verdict)
        return f"{verdict}; {ADVICE}"


ADVICE = "all ranks end: go on with --resume, from the last checkpoint"


def speaks(ranks: Ranks, message: str) -> bool:
    """Return whether this rank prints a message about a lost rank: rank 0, unless it is that."""
    return ranks.is_first or (
        message.startswith("rank 0") and 0 in (ranks.local_rank, ranks.rank - 1)
    )


class _Judge:
    """Counts for how many polls of its own each rank has been silent or motionless.

    Polls, not seconds: a job that is suspended as a whole polls as little as it beats.
    """

    def __init__(self, world_size: int, limit: int, timeout: float) -> None:
        self._limit, self._timeout = limit, timeout
        self._last: list[list[Any]] = [[-1, -1]] * world_size
        self._silent, self._still = [0] * world_size, [0] * world_size

    def verdict(self, signs: list[list[Any]]) -> str | None:
        for rank, (sign, last) in enumerate(zip(signs, self._last, strict=True)):
            self._silent[rank] = self._silent[rank] + 1 if sign[0] == last[0] else 0
            moves = sign[1] != last[1] or sign[1] == 0
            self._still[rank] = 0 if moves else self._still[rank] + 1
        self._last = signs
        gone = [rank for rank, polls in enumerate(self._silent) if polls >= self._limit]
        if gone:
            return _gone(gone, signs)
        still = [rank for rank, polls in enumerate(self._still) if polls >= self._limit]
        if not still:
            return None
        # The others wait for it in a collective operation, and may have come there a poll before it
        # stopped; where that cannot be told, name all.
        guilty = [rank for rank in still if not signs[rank][4]]
        if not guilty and len(still) < len(signs) and max(self._still) < 2 * self._limit:
            return None
        guilty = guilty or still
        places = "; ".join(f"rank {r} at step {signs[r][2]}, {signs[r][3]}" for r in guilty)
        return f"{_ranks(guilty)} did not move for {self._timeout:g} s: {places}"


def _gone(ranks: list[int], signs: list[list[Any]]) -> str:
    places = "; ".join(f"rank {r} at step {signs[r][2]}, {signs[r][3]}" for r in ranks)
    return f"{_ranks(ranks)} gave no more signs of life; the last: {places}"


def _ranks(numbers: list[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _open_store(ranks: Ranks, agreement: Agreement, timeout: float) -> Any:
    """Return a store served by rank 0, apart from the one that the process group uses."""
    from datetime import timedelta

    host, patience = os.environ["MASTER_ADDR"], timedelta(seconds=timeout)
    make: Callable[..., Any] = lambda port, serves: dist.TCPStore(  # noqa: E731
        host, port, None, serves, patience, wait_for_workers=False
    )
    server = make(0, True) if ranks.is_first else None
    port = agreement.from_first(lambda: server.port if server is not None else 0)
    return server if server is not None else make(port, False)


def _where(frame: FrameType | None) -> tuple[str, bool]:
    """Return where in this package a stack stands, and whether it waits for other ranks there."""
    frames = []
    while frame is not None:
        frames.append((frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno))
        frame = frame.f_back
    waits = _in_collective([name for name, _, _ in frames])
    for name, function, line in frames:
        if name.startswith(_PACKAGE):
            return f"in {function} ({Path(name).name}:{line})", waits
    return "outside of the training loop", waits


def _frames_of(trace: TracebackType | None) -> list[str]:
    names = []
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return names


def lost_contact(error: BaseException, trace: TracebackType | None) -> bool:
    """Return whether an error comes of a collective operation: another rank's failure."""
    # A handle that was waited for leaves no frame of torch.distributed, but gloo's own message.
    if isinstance(error, RuntimeError) and re.search("(?i)gloo|nccl|closed by peer", str(error)):
        return True
    return isinstance(error, dist.DistError) or _in_collective(_frames_of(trace))


def _in_collective(file_names: list[str]) -> bool:
    places = ("/torch/distributed/", "/deepspeed/comm/")
    return any(place in name.replace(os.sep, "/") for name in file_names for place in places)
