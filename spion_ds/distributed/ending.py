"""How a command ends on each of its ranks: the exit code, and one sentence on one of them."""

from __future__ import annotations

import sys
from collections.abc import Callable

from spion_ds.distributed import heartbeat
from spion_ds.distributed.heartbeat import LOST_RANK_EXIT, LostRankError
from spion_ds.distributed.machine import of_the_machine
from spion_ds.distributed.meeting import has_spoken, let_first_speak
from spion_ds.distributed.process_group import MissingRankError, discover_ranks, leave, store
from spion_ds.distributed.standard_streams import mend_streams
from spion_ds.distributed.stopping import STOPPED_EXIT, Stopped
from spion_ds.errors import ConfigError, SpionError

USER_ERROR_EXIT = 2


def run_command(command: Callable[[], object]) -> int:
    """Run a command; print a SpionError as one line, on one rank; return the exit code.

    What the machine could not give (files, memory) is said by the rank that met it.

    The codes: 0 done, 2 an error to mend, 3 another rank was lost, 75 stopped by a signal with a
    checkpoint. A signal before there is a checkpoint ends the process with 128 and its number.
    """
    mend_streams()
    try:
        command()
    except Stopped:
        return STOPPED_EXIT
    except SpionError as error:
        lost = isinstance(error, MissingRankError | LostRankError)
        speaks = _speaks(error)
        if not speaks and not lost:
            # The launcher ends all ranks when this one has left. If rank 0 has no error, this
            # rank is alone with its own.
            speaks = not let_first_speak()
        if speaks:
            line = "\n" if lost else ""  # a progress bar may stand on this one
            print(f"{line}error: {error}", file=sys.stderr, flush=True)
            has_spoken()
        return LOST_RANK_EXIT if lost else USER_ERROR_EXIT
    except (OSError, MemoryError, RuntimeError) as error:
        told = of_the_machine(error)
        if told is None:
            raise
        print(f"\nerror: {told}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT
    finally:
        leave()
    return 0


def _speaks(error: SpionError) -> bool:
    """Return whether this rank prints an error: rank 0, or each where they have not met."""
    try:
        ranks = discover_ranks()
    except ConfigError:  # this one
        return True
    if isinstance(error, LostRankError):
        return heartbeat.speaks(ranks, str(error))
    return ranks.is_first or store() is None
