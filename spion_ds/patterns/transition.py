"""When to switch from dense to sparse attention: SPION's rule, SAT's rule, and the first check.

A rule is asked at every check; how many steps lie between two checks is the caller's business.
Any object that keeps the :class:`TransitionRule` protocol is a rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from spion_ds.errors import CheckpointError, ConfigError

# Entries that are squared and added at a time, which bounds the float64 copies of large maps.
_ENTRIES_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class TransitionReport:
    """What one check found; a rule of one's own may give ``fire`` alone.

    Attributes:
        check: its number, from 1.
        distances: for each layer ‖A_before − A_now‖ (Frobenius), None where there is none yet.
        changes: for each layer the relative change of the distance, None where there is none yet.
        fire: whether all layers switch to sparse attention now.
        held: whether they would, had the caller not held the rule back.
        skewness: for each layer the skewness of its map; empty where the rule looks at none.
    """

    check: int = 0
    distances: list[float | None] = field(default_factory=list)
    changes: list[float | None] = field(default_factory=list)
    fire: bool = False
    skewness: list[float] = field(default_factory=list)
    held: bool = False


class TransitionRule(Protocol):
    """What a rule must do; only the one on rank 0 is asked.

    Two attributes ask for more than the mean maps. Without them a rule gets these alone:

    - ``per_head = True``: ``maps`` are (heads, n, n) where a layer's patterns are of each head.
    - ``needs_skewness = True``: ``update`` also gets ``skewness=``, one float a layer.
    """

    def update(self, maps: list[Tensor], *, hold: bool = False) -> TransitionReport:
        """Take the maps of one check and say whether to switch.

        Args:
            maps: one floating tensor a layer: (n, n) pooled or (L, L) token-level, the mean over
                heads, samples and ranks; of the same shapes at every check.
            hold: do not fire at this check.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's memory: plain values and tensors."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the rule that gave ``state`` stood."""
        ...


class DistanceRule:
    """Fires when the attention maps of all layers have stopped changing their pace of change.

    At each check d = ‖A_before − A_now‖_F and change = |d − d_prev| / d_prev, for each layer; the
    rule fires when int(100·change) < threshold_percent for every layer (arXiv 2309.12578).
    Check 1 stores A_before, check 2 the first distance, and from check 3 on a check that does not
    fire makes its maps the new A_before: the third check is the first that can fire.

    Args:
        threshold_percent: whole number of at least 1.
    """

    def __init__(self, threshold_percent: int = 15) -> None:
        whole = isinstance(threshold_percent, int) and not isinstance(threshold_percent, bool)
        if not whole or threshold_percent < 1:
            raise ConfigError(
                f"threshold_percent is {threshold_percent!r}; allowed: whole numbers from 1"
            )
        self.threshold_percent = threshold_percent
        self._check = 0
        self._before: list[Tensor] = []
        self._distances: list[float] = []

    def update(self, maps: list[Tensor], *, hold: bool = False) -> TransitionReport:
        """Take the maps of one check and say whether to switch.

        Args:
            maps: one floating tensor a layer, token-level (L, L) or pooled (n, n); the same
                number and shapes at every check. They are copied, in their dtype and device.
            hold: do not fire: a check that would counts as one that does not.

        Returns:
            The report of this check. Distances are float64 sums in a fixed order: the same bits
            on every device.

        Raises:
            ConfigError: no maps, a NaN or infinite map, or other layers or shapes than before;
                the rule is then as it was.
        """
        _check_maps(maps, self._before)
        check = self._check + 1
        if check == 1:
            self._check, self._before = check, [a.detach().clone() for a in maps]
            return TransitionReport(check, [None] * len(maps), [None] * len(maps), False)

        distances = [_distance(*pair) for pair in zip(self._before, maps, strict=True)]
        changes: list[float | None] = [None] * len(maps)
        if check > 2:
            changes = [_change(*pair) for pair in zip(distances, self._distances, strict=True)]
        steady = all(self._is_small(change) for change in changes)
        fire = steady and not hold
        if check > 2 and not fire:
            self._before = [a.detach().clone() for a in maps]
        self._check, self._distances = check, distances
        return TransitionReport(check, list(distances), changes, fire, held=steady and hold)

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's memory: an int, CPU tensors in the maps' dtype, and floats."""
        return {
            "check": self._check,
            "before": [a.cpu() for a in self._before],
            "distances": list(self._distances),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the rule that gave ``state`` stood, bit for bit.

        Raises:
            CheckpointError: ``state`` is of another rule.
        """
        _check_keys(state, {"check", "before", "distances"}, "distance")
        self._check = int(state["check"])
        self._before = [a.detach().clone() for a in state["before"]]
        self._distances = [float(d) for d in state["distances"]]

    def _is_small(self, change: float | None) -> bool:
        if change is None or not math.isfinite(change):
            return False
        return int(100 * change) < self.threshold_percent


class SkewnessRule:
    """Fires when the attention of all layers is skewed, and its pace of change is steady.

    SAT's rule (IEEE Access 12, 2024). At each check d = ‖A_before − A_now‖_F and
    change = |d − d_prev| / d_prev, for each layer; the rule fires when for every layer the
    skewness of A_now is at least ``min_skewness`` and 100·change < ``max_change_percent``.
    A_before is always the map of the check before, so the third check is the first that can
    fire; it does not fire from a distance of 0.

    Args:
        min_skewness: of the third standardised moment over all entries, population's deviation.
        max_change_percent: above 0.
    """

    needs_skewness: ClassVar[bool] = True

    def __init__(self, min_skewness: float = 1.7, max_change_percent: float = 1.3) -> None:
        for name, value in (
            ("min_skewness", min_skewness),
            ("max_change_percent", max_change_percent),
        ):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value):
                raise ConfigError(f"{name} is {value!r}; allowed: a number")
        if max_change_percent <= 0:
            raise ConfigError(f"max_change_percent is {max_change_percent!r}; allowed: above 0")
        self.min_skewness, self.max_change_percent = min_skewness, max_change_percent
        self._check = 0
        self._before: list[Tensor] = []
        self._distances: list[float] = []

    def update(
        self, maps: list[Tensor], skewness: Sequence[float] | None = None, *, hold: bool = False
    ) -> TransitionReport:
        """Take the maps of one check and say whether to switch; see :class:`DistanceRule`.

        Args:
            maps: one a layer, whose distances are taken.
            skewness: of each layer's token-level map, where ``maps`` are pooled; None computes it
                from ``maps``.
            hold: do not fire.
        """
        _check_maps(maps, self._before)
        check = self._check + 1
        nothing: list[float | None] = [None] * len(maps)
        skewness = [_skewness(a) for a in maps] if skewness is None else list(skewness)
        # None to compare with at check 1, and no distance before at check 2.
        distances = [_distance(*pair) for pair in zip(self._before, maps, strict=False)]
        changes = [
            abs(now - before) / before if before > 0.0 else math.inf
            for now, before in zip(distances, self._distances, strict=False)
        ]
        steady = check > 2 and all(
            100.0 * change < self.max_change_percent and skew >= self.min_skewness
            for change, skew in zip(changes, skewness, strict=True)
        )
        self._check, self._distances = check, distances
        self._before = [a.detach().clone() for a in maps]
        return TransitionReport(
            check,
            [*distances] or nothing,
            [*changes] or [*nothing],
            steady and not hold,
            skewness,
            held=steady and hold,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's memory: an int, CPU tensors in the maps' dtype, and floats."""
        return {
            "check": self._check,
            "before": [a.cpu() for a in self._before],
            "last_distances": list(self._distances),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the rule that gave ``state`` stood, bit for bit.

        Raises:
            CheckpointError: ``state`` is of another rule.
        """
        _check_keys(state, {"check", "before", "last_distances"}, "skewness")
        self._check = int(state["check"])
        self._before = [a.detach().clone() for a in state["before"]]
        self._distances = [float(d) for d in state["last_distances"]]


class FixedStepRule:
    """Fires at its first check that is not held: the caller checks at the step that it wants."""

    def __init__(self) -> None:
        self._check = 0

    def update(self, maps: list[Tensor], *, hold: bool = False) -> TransitionReport:
        """Return a report that fires unless held; looks at nothing but the number of layers."""
        self._check += 1
        nothing: list[float | None] = [None] * len(maps)
        return TransitionReport(self._check, nothing, list(nothing), not hold, held=hold)

    def state_dict(self) -> dict[str, Any]:
        """Return the rule's memory, one int."""
        return {"check": self._check}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the rule that gave ``state`` stood.

        Raises:
            CheckpointError: ``state`` is of another rule.
        """
        _check_keys(state, {"check"}, "fixed-step")
        self._check = int(state["check"])


def _check_maps(maps: list[Tensor], before: list[Tensor]) -> None:
    """Raise ConfigError unless the maps are finite, and of the layers and shapes of ``before``."""
    if not maps or (before and len(maps) != len(before)):
        wanted = f"{len(before)} as before" if before else "at least one"
        raise ConfigError(f"maps has {len(maps)} layers; allowed: {wanted}")
    for layer, a in enumerate(maps):
        if not a.is_floating_point():
            raise ConfigError(f"the map of layer {layer} is {a.dtype}; allowed: floating")
        if before and a.shape != before[layer].shape:
            raise ConfigError(
                f"the map of layer {layer} has shape {tuple(a.shape)}; allowed: "
                f"{tuple(before[layer].shape)} as at the first check"
            )
        if not torch.isfinite(a).all():
            raise ConfigError(
                f"the map of layer {layer} has NaN or infinite entries: the attention of that "
                f"layer has overflowed; allowed: finite values"
            )


def _distance(before: Tensor, now: Tensor) -> float:
    """Return ‖before − now‖_F in float64, the same bits on every device."""
    before = before.to(now.device).flatten()
    total = 0.0
    for a, b in zip(
        before.split(_ENTRIES_AT_A_TIME),
        now.detach().flatten().split(_ENTRIES_AT_A_TIME),
        strict=True,
    ):
        difference = a.to(torch.float64) - b.to(torch.float64)
        total += _sum(difference * difference)
    return math.sqrt(total)


def _skewness(a: Tensor) -> float:
    """Return the third standardised moment in float64, the same bits on every device.

    0 where all entries are equal.
    """
    parts = a.detach().flatten().split(_ENTRIES_AT_A_TIME)
    mean = sum(_sum(part.to(torch.float64, copy=True)) for part in parts) / a.numel()
    square, cube = 0.0, 0.0
    for part in parts:
        difference = part.to(torch.float64) - mean
        squares = difference * difference
        cube += _sum(squares * difference)
        square += _sum(squares)
    deviation = math.sqrt(square / a.numel())
    # A mean of equal entries may be off by its rounding.
    if deviation <= 1e-12 * abs(mean):
        return 0.0
    return cube / a.numel() / deviation**3


def _sum(values: Tensor) -> float:
    """Add up a 1-D float64 tensor, which it overwrites: elementwise adds in a fixed order."""
    while values.numel() > 1:
        half = (values.numel() + 1) // 2
        values[: values.numel() - half] += values[half:]
        values = values[:half]
    return float(values)


def _change(distance: float, previous: float) -> float:
    """Return |d − d_prev| / d_prev; from 0 it is 0 when nothing moved again, else infinite."""
    if previous == 0.0:
        return 0.0 if distance == 0.0 else math.inf
    return abs(distance - previous) / previous


def _check_keys(state: dict[str, Any], keys: set[str], rule: str) -> None:
    if set(state) != keys:
        raise CheckpointError(
            f"the saved transition state has {sorted(state)}, and the {rule} rule saves "
            f"{sorted(keys)}: it was saved by another rule; resume with the rule of the saved run"
        )
