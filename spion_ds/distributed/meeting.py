"""What the ranks tell one another before there is a process group: who cannot start, and why.

Launchers end all ranks as soon as one has left. So a rank that finds an error keeps it until all
have met, every rank raises it, and none leaves before rank 0 has printed it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
from collections.abc import Callable
from typing import TypeVar

from spion_ds.distributed import process_group
from spion_ds.distributed.machine import of_the_machine
from spion_ds.distributed.process_group import MissingRankError, Ranks, meet, missing, store
from spion_ds.errors import ConfigError, SpionError

T = TypeVar("T")

# How long a rank with an error waits for the others before it tells the error by itself.
_PATIENCE = datetime.timedelta(minutes=1)
# For rank 0 to hear of an error, and to print it.
_SAYING = datetime.timedelta(seconds=15)
_SAID = "said"


def prepare_together(ranks: Ranks, work: Callable[[], T]) -> T:
    """Run ``work`` on every rank, and let all meet; an error on any of them is raised on all.

    Raises:
        SpionError: the error of ``work``, which names its ranks unless it is rank 0's. On the rank
            of any other kind of error it is that.
        MissingRankError: the others did not come; ``work`` had no error here.
    """
    result: list[T] = []
    error: Exception | None = None
    text = ""
    try:
        result.append(work())
    except Exception as raised:
        error, text = _as_told(raised)
    if ranks.world_size > 1:
        try:
            told = _exchange(ranks, text)
        except (MissingRankError, ConfigError) as alone:
            raise error or alone from None
        if error is None or (isinstance(error, SpionError) and len(set(told)) > 1):
            error = _union(told)
    if error is not None:
        raise error
    return result[0]


def has_spoken() -> None:
    """Say on rank 0, when it has printed why it ends, that the others may leave."""
    if store() is not None:
        with contextlib.suppress(RuntimeError):
            store().set(_SAID, "")


def let_first_speak() -> bool:
    """Wait on another rank until rank 0 has printed why all end; return whether it has."""
    if store() is not None:
        with contextlib.suppress(RuntimeError):
            store().wait([_SAID], _SAYING)
            return True
    return False


def _as_told(error: Exception) -> tuple[Exception, str]:
    """Return an error as this rank raises it, and as the others do."""
    if isinstance(error, SpionError):
        return error, str(error)
    told = of_the_machine(error)
    if told is None:  # a fault of ours: its traceback belongs here
        return error, f"{type(error).__name__}: {error}".splitlines()[0]
    return SpionError(told), told


def _exchange(ranks: Ranks, error: str) -> list[str]:
    """Return the errors of all ranks, "" for none, in the order of ranks."""
    timeout = _PATIENCE if error else process_group.MEETING_TIMEOUT
    place = meet(ranks, timeout)
    keys = [f"prepared{rank}" for rank in range(ranks.world_size)]
    try:
        place.set(keys[ranks.rank], json.dumps(error))
        place.wait(keys, timeout)
        told = [json.loads(value) for value in place.multi_get(keys)]
        place.set(f"heard{ranks.rank}", "")
        if ranks.is_first:  # the store may end with this process
            place.wait([f"heard{rank}" for rank in range(ranks.world_size)], _SAYING)
        return told
    except RuntimeError as lost:
        process_group.leave()
        raise missing(ranks, timeout, str(lost).splitlines()[0]) from lost


def _union(told: list[str]) -> SpionError | None:
    """Return the errors of all ranks as one that names the ranks other than 0, None for none."""
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(told):
        if text:
            by_text.setdefault(text, []).append(rank)
    if not by_text:
        return None
    return ConfigError(
        "; ".join(
            text if 0 in ranks else f"on rank {', '.join(map(str, ranks))}: {text}"
            for text, ranks in by_text.items()
        )
    )
