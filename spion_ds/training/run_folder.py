"""A run's folder: which one it is, and the one process that may write there."""

from __future__ import annotations

import datetime
import errno
import fcntl
import os
import socket
import sys
from pathlib import Path
from typing import TextIO

from spion_ds.errors import ConfigError
from spion_ds.training.checkpoints.files import has_checkpoint

_LOCK = "writer.lock"
_JOB_IDS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID")


class RunLock:
    """A context in which this process, rank 0's, is the only one that writes to a run's folder.

    It is a POSIX record lock: the system releases it when the process dies, it works over NFS, and
    no child process inherits it. Closing any descriptor of the file would release it, so nothing
    else opens it.
    """

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def take(self, folder: Path) -> None:
        """Take a run's folder, which exists; without effect where this lock has one already.

        Raises:
            ConfigError: another process writes there; it says which.
        """
        if self._file is not None:
            return
        path = folder / _LOCK
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with file:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ConfigError(_taken(folder, file.readline().strip())) from None
            print(
                f"note: {path} cannot be locked ({error.strerror}), so nothing keeps a second "
                "process off this run",
                file=sys.stderr,
                flush=True,
            )
            return
        self._file = file
        file.truncate()
        file.write(f"{_this_process()}\n")
        file.flush()


def _taken(folder: Path, owner: str) -> str:
    return (
        f"the run {folder} is being trained by another process"
        f"{f' ({owner})' if owner else ''}; wait until that has ended, stop it, or give another "
        f"--run_name (if its host is lost, remove {folder / _LOCK})"
    )


def _this_process() -> str:
    jobs = [f"job {os.environ[name]}" for name in _JOB_IDS if name in os.environ]
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    words = [f"host {socket.gethostname()}", f"process {os.getpid()}", *jobs[:1], f"since {since}"]
    return ", ".join(words)


def continue_folder(folder: Path, lock: RunLock) -> Path:
    """Return the folder of a run that was to be started there or not yet has a checkpoint, taken.

    Raises:
        ConfigError: another process writes there, or has written a checkpoint by now.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock.take(folder)
    if has_checkpoint(folder):
        raise ConfigError(
            f"another process has trained the run {folder} while this one was starting; start "
            "again to go on from its checkpoint"
        )
    return folder


def new_folder(run_dir: Path, name: str, if_taken: str, lock: RunLock) -> Path:
    """Return a folder that no run had, made and taken.

    Args:
        run_dir: folder that holds the runs.
        name: the run's.
        if_taken: ``"suffix"`` (the next free name) or ``"error"`` when the name is taken.
        lock: gets the folder.

    Raises:
        ConfigError: the name is taken, and that is an error.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = run_dir / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            if if_taken == "error":
                raise ConfigError(
                    f"the run {folder} exists; give another --run_name, go on with --resume, or "
                    "use --if_taken suffix"
                ) from None
            number += 1
        else:
            lock.take(folder)
            return folder
