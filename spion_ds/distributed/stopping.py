"""SIGTERM, SIGUSR1 and Ctrl-C: during training a wish, while it is prepared the end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import Any

# sysexits.h's EX_TEMPFAIL, "try again later": what a Slurm job is requeued on.
STOPPED_EXIT = 75
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(Exception):
    """A signal ended the run; what was trained is in its last checkpoint."""


class StopRequest:
    """A context that notes the signals which ask a process to stop.

    A thread does, so that no library can swallow one, and the main thread need not return from a
    call that waits for other ranks. This module imports nothing slow: it is there first.

    Attributes:
        asked: whether a signal came to this rank.
        patient: whether the process looks at ``asked``; ``end_at_once`` makes it False.
    """

    def __init__(self) -> None:
        self.asked, self.patient = False, True
        self._number, self._has_checkpoint = 0, False
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup = -1

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():  # others cannot catch signals
            reading, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            threading.Thread(target=self._listen, args=(reading,), daemon=True).start()
            signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            self._before = {number: signal.signal(number, _noted) for number in _SIGNALS}
            os.register_at_fork(
                before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, self._before),
                after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before),
                after_in_child=self._forget,
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup)  # which ends the thread
            self._before = {}

    def end_at_once(self, *, has_checkpoint: bool) -> None:
        """Let a signal end the process, also one that came before; until ``patient`` is set.

        Args:
            has_checkpoint: whether the run can go on from one. The exit code is 75 then, else 128
                and the signal's number.
        """
        self.patient, self._has_checkpoint = False, has_checkpoint
        if self.asked:
            self._end()

    def _listen(self, reading: int) -> None:
        with open(reading, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in _SIGNALS:
                    self._number, self.asked = number[0], True
                    if not self.patient:
                        self._end()

    def _end(self) -> None:
        from spion_ds.distributed.process_group import discover_ranks

        if discover_ranks().is_first:
            name = signal.Signals(self._number).name
            advice = "go on with --resume" if self._has_checkpoint else "there is no checkpoint yet"
            with contextlib.suppress(OSError, ValueError):
                print(f"\nstopped by {name} before a step; {advice}", file=sys.stderr, flush=True)
        os._exit(STOPPED_EXIT if self._has_checkpoint else 128 + self._number)

    def _forget(self) -> None:
        """Let a forked child end by signals as any process; its parent must not hear of them."""
        if self._before:
            signal.set_wakeup_fd(-1)
            for number in self._before:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)
            self._before = {}


def _noted(*_: object) -> None:
    """Let Python write the signal's number to the pipe, and do nothing more."""
