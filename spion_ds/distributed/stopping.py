"""SIGTERM, SIGUSR1 and Ctrl-C: before training they end it, during training they are a wish."""

from __future__ import annotations

import signal
import threading
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """A signal ended the run; what was trained is in its last checkpoint."""


class StopRequest:
    """A context that notes the signals which ask a run to stop.

    Attributes:
        asked: whether one came to this rank.
        patient: whether the run looks at ``asked``; until it does, a signal raises Stopped.
    """

    def __init__(self) -> None:
        self.asked = self.patient = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others cannot catch signals
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self.asked = True
        if not self.patient:
            raise Stopped("asked to stop before training started")
