"""Errors that a machine's limits explain: its disk, its memory."""

from __future__ import annotations

import errno

import torch

from spion_ds.distributed.process_group import discover_ranks


def of_the_machine(error: Exception) -> str | None:
    """Return a sentence for an error that the machine's limits explain, None for any other."""
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "; make room, and go on with --resume, from the last checkpoint" if full else ""
        return f"{where}{error.strerror or error}{advice}"
    # PyTorch has no type of its own for a CPU that is out of memory.
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if memory or "can't allocate memory" in str(error):
        return (
            f"rank {discover_ranks().rank} is out of memory "
            f"({(str(error) or 'RAM').splitlines()[0]}); set a smaller "
            "training.micro_batch_size, model.activation_checkpointing=true or offload with ZeRO"
        )
    return None
