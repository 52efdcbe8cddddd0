"""The memory that token-level attention maps take, told or refused before a run starts."""

from __future__ import annotations

import os

import torch

from spion_ds.distributed.process_group import Ranks
from spion_ds.errors import ConfigError
from spion_ds.training.config.run import RunConfig

# An entry of a layer's map on every rank: its float64 sum.
_BYTES_A_RANK = 8
# Beside it while one layer's map is added: a micro-batch's, and what it is made of.
_BYTES_ON_THE_WAY = 16
# On rank 0, in float32: the rule's map before; at its end the mean, and that map being replaced.
_BYTES_BEFORE, _BYTES_OF_THE_RULE = 4, 12
_WORTH_SAYING = 1 << 30


def token_map_bytes(config: RunConfig, ranks_on_device: int = 1) -> int:
    """Return the bytes that the maps of a check take at its peak where rank 0 is.

    Args:
        config: the run; 0 if it makes no token-level maps.
        ranks_on_device: how many ranks share that memory.
    """
    if not config.switches or config.transition.resolution != "token":
        return 0
    layers, ranks = config.model.layers, ranks_on_device
    while_added = layers * _BYTES_BEFORE + ranks * _BYTES_ON_THE_WAY
    beside = max(while_added, layers * _BYTES_OF_THE_RULE)
    return config.data.sequence_length**2 * (layers * _BYTES_A_RANK * ranks + beside)


def check_map_memory(config: RunConfig, ranks: Ranks) -> str:
    """Return a sentence for the user if the maps of a check are large, else "".

    Raises:
        ConfigError: they are larger than the memory of the device.
    """
    on_gpu = ranks.device.type == "cuda"
    needed = token_map_bytes(config, 1 if on_gpu else ranks.local_world_size)
    if needed < _WORTH_SAYING:
        return ""
    taken = (
        f"transition.resolution=token keeps maps of {config.data.sequence_length} × "
        f"{config.data.sequence_length} for {config.model.layers} layer(s): "
        f"{needed / 2**30:.1f} GiB at a check"
    )
    remedy = f"transition.resolution=block {_what_pooling_gives(config)}"
    present = _device_bytes(ranks)
    if needed > present:
        raise ConfigError(
            f"{taken}, and the {ranks.device.type} has {present / 2**30:.1f} GiB; {remedy}"
        )
    return f"{taken}; {remedy}"


def _what_pooling_gives(config: RunConfig) -> str:
    taken = "takes a few MiB"
    if config.transition.rule == "skewness":
        taken = "keeps queries and keys instead"
    if config.sparse_attention.mode == "sat":  # its patterns come from W
        return f"{taken}, though the rule may fire at another step"
    return f"{taken} and gives the same patterns of a step"


def _device_bytes(ranks: Ranks) -> int:
    if ranks.device.type == "cuda":
        # Of the first GPU: this rank's may not exist, which is another error with its own words.
        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
