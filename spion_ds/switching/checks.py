"""What DenseToSparse refuses by name: arguments, and ranks that are about to differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spion_ds.errors import ConfigError


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
