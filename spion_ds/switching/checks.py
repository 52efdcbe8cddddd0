"""What DenseToSparse refuses by name: arguments, and ranks that are about to differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from spion_ds.errors import ConfigError
from spion_ds.sparsity import SwitchingSparsityConfig


def check_numbers(**numbers: Any) -> None:
    """Raise ConfigError unless the numbers of steps are whole and from 1 up."""
    for name, value in numbers.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        optional = name != "check_every"
        if not (value is None and optional) and not (whole and value >= 1):
            also = ", or None" if optional else ""
            raise ConfigError(f"{name} is {value!r}; allowed: a whole number from 1 up{also}")


def check_rule(rule: Any) -> None:
    """Raise ConfigError unless ``rule`` keeps the protocol of a TransitionRule."""
    for name in ("update", "state_dict", "load_state_dict"):
        if isinstance(rule, type) or not callable(getattr(rule, name, None)):
            raise ConfigError(
                f"rule is {rule!r}, which is no rule with a method {name}; allowed: a rule of "
                "spion_ds.patterns, e.g. DistanceRule(15), or an object that keeps its "
                "TransitionRule protocol"
            )


def compare_ranks(told: Sequence[tuple[int, int | None, bool, bool, int]]) -> None:
    """Raise ConfigError unless all ranks are about to do the same.

    Args:
        told: of each rank the step, its switch step, whether it looks, whether it has padding
            masks, and their length, which may differ.
    """
    names = (
        "step numbers",
        "switch_step (of the states that they loaded)",
        "check_every, max_dense_steps or refresh_every",
        "padding_masks (some gave masks, some None)",
    )
    for place, what in enumerate(names):
        for rank, values in enumerate(told):
            if values[place] != told[0][place]:
                raise ConfigError(
                    f"the ranks differ in their {what}: {told[0][place]} on rank 0 and "
                    f"{values[place]} on rank {rank}; give the same on every rank"
                )


def compare_maps(layers: Sequence[str], told: Sequence[tuple[int, list[tuple[int, ...]]]]) -> None:
    """Raise ConfigError unless the ranks of each group made maps of the same shapes.

    Args:
        layers: their names.
        told: of each rank its group's leader, and a shape a layer.
    """
    for rank, (leader, shapes) in enumerate(told):
        for name, shape, other in zip(layers, shapes, told[leader][1], strict=False):
            if shape != other:
                raise ConfigError(
                    f"the maps of {name} are {other} on rank {leader} and {shape} on rank {rank}: "
                    "their inputs have other lengths, or the ranks other heads. Build "
                    "SparseSelfAttention with max_seq_length=, or pad the inputs to one length"
                )


def check_patterns(
    masks: Sequence[Tensor],
    configs: Sequence[SwitchingSparsityConfig],
    widths: Sequence[int],
    *,
    pooled: bool,
) -> None:
    """Raise ConfigError unless each mask is one that its layer can take.

    Args:
        masks: what was made.
        configs: of the layers, which they are tried on.
        widths: of the layers' maps, in blocks where they are ``pooled``, else in tokens.
    """
    if len(masks) != len(configs):
        raise ConfigError(f"patterns returned {len(masks)} masks for {len(configs)} layers")
    for number, (config, mask, width) in enumerate(zip(configs, masks, widths, strict=True)):
        config.set_pattern(mask)
        blocks = width if pooled else -(-width // config.block)
        if mask.shape[-1] != blocks:
            raise ConfigError(
                f"patterns returned {tuple(mask.shape)} for layer {number}, whose maps have "
                f"{blocks} × {blocks} blocks"
            )
