"""Maps a function over items in threads: for work that waits for files."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_in_threads(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield ``work(item)`` in order, a few items ahead, on as many threads as there are cores.

    For work that waits for files, at which network file systems are slow. Opening and decoding
    small images keeps hardly more than one core busy, however many threads there are.
    """
    workers = len(os.sched_getaffinity(0))
    remaining = iter(items)
    pool = ThreadPoolExecutor(workers)
    try:
        ahead = deque(pool.submit(work, item) for item in itertools.islice(remaining, 2 * workers))
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(work, item) for item in itertools.islice(remaining, 1))
            yield result
    finally:
        # An interruption must not wait for work that nobody will look at.
        pool.shutdown(cancel_futures=True)
