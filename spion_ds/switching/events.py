"""What a step under DenseToSparse tells its loop, and what the loop tells it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from torch import Tensor

from spion_ds.attention.observing import Observer
from spion_ds.patterns import TransitionReport
from spion_ds.switching.observation import SAMPLES, Observation


@dataclass(frozen=True)
class Event:
    """What was decided after a step.

    Attributes:
        step: its number.
        kind: ``"check"`` (the rule was asked and attention stays dense), ``"switch"``,
            ``"refresh"`` or ``"skipped"`` (a rank reported the step as skipped: its maps are
            dropped and the next step is looked at).
        forced: whether the switch came because of ``max_dense_steps``.
        densities: share of kept blocks of each of this rank's layers; [] unless masks were set.
        digest: sha256 of the masks of the whole job, hexadecimal; "" unless masks were set.
        average: ``"samples"``: the maps are means over all samples of the step; or
            ``"micro_batches"``: the mean of every micro-batch counts alike.
        seconds: what the decision took on this rank, without the look itself.
        report: what the rule said; on rank 0 only, None at a refresh.
        maps: what the rule saw, one map a layer of the job; on rank 0 only.
        pooled: what patterns are made from, one map a layer of the job; on rank 0 only, None
            where they are made from ``sources``.
    """

    step: int
    kind: str
    forced: bool = False
    densities: list[float] = field(default_factory=list)
    digest: str = ""
    average: str = SAMPLES
    seconds: float = 0.0
    report: TransitionReport | None = None
    maps: list[Tensor] | None = None
    pooled: list[Tensor] | None = None


class Look:
    """One step under :meth:`DenseToSparse.step`.

    Attributes:
        checking: whether maps of this step's attention are made.
        event: what was decided, once the step is over; None where nothing was.
    """

    def __init__(self, observation: Observation, checking: bool) -> None:
        self._observation = observation
        self.checking = checking
        self.event: Event | None = None
        self.was_skipped = False

    def skipped(self) -> None:
        """Report that this rank's optimizer did not take the step (a NaN, loss scaling)."""
        self.was_skipped = True

    @property
    def observers(self) -> Sequence[Observer]:
        """Who is shown the passes, one a layer; () where nothing is looked at."""
        return tuple(self._observation.observers)

    def by_hand(self) -> None:
        """Say that the loop shows this step's passes itself, with :meth:`add` or to ``observers``.

        No layer shows anything of its own accord: for steps that run no Python, such as those
        that a CUDA graph replays.
        """
        self._observation.disarm()
        if not self.checking:  # nothing to prove that passes can be seen
            self._observation.observers.clear()

    def paused(self) -> AbstractContextManager[None]:
        """Return a context whose passes are not looked at, such as those of another loss."""
        return self._observation.paused() if self._observation.observers else nullcontext()

    def add(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> None:
        """Show a layer's queries and keys, after :meth:`by_hand`.

        Args:
            layer: which of :attr:`DenseToSparse.layers`.
            query, key, key_padding_mask, causal, scale: as in
                :func:`spion_ds.attention.attention_map`.
        """
        if self._observation.observers:
            self._observation.observers[layer].add(query, key, key_padding_mask, causal, scale)
