"""DenseToSparse: drives the switch from dense to block-sparse attention, in any loop."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spion_ds.distributed.agreement import Agreement
from spion_ds.errors import ConfigError
from spion_ds.patterns import TransitionReport, TransitionRule
from spion_ds.sparsity import SwitchingSparsityConfig, find_patterns
from spion_ds.switching.checks import (
    check_numbers,
    check_patterns,
    check_rule,
    compare_maps,
    compare_ranks,
)
from spion_ds.switching.decision import share_masks
from spion_ds.switching.events import Event, Look
from spion_ds.switching.gathering import JobLayer, Part, gather_maps, gather_skewness, lay_out
from spion_ds.switching.observation import (
    MapObserver,
    Observation,
    Probe,
    check_padding_masks,
    count_real,
    find_layers,
    observe_maps,
)
from spion_ds.switching.state import check_state, pack_masks, unpack_masks, verify_masks

Patterns = Callable[[Sequence[SwitchingSparsityConfig], Sequence[Tensor]], list[Tensor]]


class DenseToSparse:
    """Watches dense attention, decides on all ranks alike, and makes it block-sparse.

    It finds the attentions that carry a switching SparsityConfig. On check steps it averages their
    maps over micro-batches and ranks; rank 0 asks the rule and makes the patterns of all layers,
    and one broadcast tells every rank. Other steps cost nothing. Make it before or after the
    engine, on every rank; the first :meth:`step` is the first that talks to other ranks.

    Args:
        model: holds the attentions; wrapped (DDP, engine, FSDP2) or not.
        rule: when to switch; only rank 0's is asked.
        check_every: steps between two checks in the dense phase.
        max_dense_steps: step after which the switch comes whatever the rule says; None waits.
        refresh_every: steps between two looks in the sparse phase, each of which replaces the
            patterns; None keeps them. A look makes dense maps of the step's queries and keys.
        resolution: of the maps: ``"block"`` pools them while they are computed; ``"token"`` keeps
            L × L entries a layer, as published.
        group: ranks with the same layers and heads, whose maps are averaged; None is all ranks.
        layer_offset: attentions on the pipeline stages before this one.
        head_offset: heads on the tensor or sequence parallel ranks before this one.
        patterns: makes the patterns of all layers of the job from the maps of all layers; called
            on rank 0.
        sources: returns what patterns are made from in place of pooled maps, one tensor a layer,
            the same on every rank; called on every rank after a step that was looked at.
        agreement: the control channel, if there is one already.

    Attributes:
        last_step: number of the last step, 0 before the first.
        switch_step: the step after which attention became sparse, None in the dense phase.

    Raises:
        ConfigError: no attention can switch, or an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: TransitionRule,
        *,
        check_every: int = 500,
        max_dense_steps: int | None = None,
        refresh_every: int | None = None,
        resolution: str = "block",
        group: dist.ProcessGroup | None = None,
        layer_offset: int = 0,
        head_offset: int = 0,
        patterns: Patterns = find_patterns,
        sources: Callable[[], list[Tensor]] | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        self._layers = find_layers(model)
        check_numbers(
            check_every=check_every, max_dense_steps=max_dense_steps, refresh_every=refresh_every
        )
        check_rule(rule)
        per_head = [
            layer.name for layer in self._layers if layer.sparsity.different_layout_per_head
        ]
        if resolution not in ("block", "token") or (resolution == "token" and per_head):
            raise ConfigError(
                f"resolution is {resolution!r}; allowed: "
                + (f"'block', since {per_head[0]} has a pattern a head" if per_head else "")
                + ("" if per_head else "'block' or 'token'")
            )
        self.rule = rule
        self._model, self._resolution = model, resolution
        self._every, self._most, self._refresh = check_every, max_dense_steps, refresh_every
        self._group, self._offsets = group, (layer_offset, head_offset)
        self._patterns, self._sources = patterns, sources
        self._agreement = agreement
        self._job: list[JobLayer] = []
        self._leader = 0
        self._met = False  # whether this run's ranks have compared what they are about to do
        self._overdue = False  # whether a look was due at a step that was skipped
        self._loaded_digest: str | None = None
        self.last_step = 0
        self.switch_step: int | None = None

    @property
    def layers(self) -> list[str]:
        """Names of the attentions, in the model's order."""
        return [layer.name for layer in self._layers]

    @property
    def phase(self) -> str:
        """``"dense"`` or ``"sparse"``."""
        return "dense" if self.switch_step is None else "sparse"

    @property
    def masks(self) -> list[Tensor] | None:
        """This rank's masks, (n, n) or (heads, n, n) bool on the CPU a layer; None while dense."""
        patterns = [layer.sparsity.pattern for layer in self._layers]
        return None if self.switch_step is None else [p for p in patterns if p is not None]

    @property
    def densities(self) -> list[float]:
        """Share of kept blocks of each of this rank's layers."""
        masks = self.masks
        if masks is None:
            return [1.0] * len(self._layers)
        return [float(mask.double().mean()) for mask in masks]

    @contextmanager
    def step(
        self,
        number: int,
        *,
        padding_masks: Sequence[Tensor] | None = None,
        hold: bool = False,
    ) -> Iterator[Look]:
        """Watch one optimizer step with all its micro-batches, and decide at its end.

        Every rank calls it with the same number. Passes in training mode are looked at, once each:
        what activation checkpointing computes again is not, nor are passes in evaluation mode.

        Args:
            number: of the step, counted from 1 without gaps.
            padding_masks: (B, L) bool of each of this rank's micro-batches as attention will get
                them, True = real token. With them the maps are exact means over all samples;
                without, at block resolution, the mean of every micro-batch counts alike.
            hold: keep the rule from firing at this step.

        Raises:
            ConfigError: before anything is computed: the number does not follow the last one, the
                ranks differ, or the model's masks are not the driver's. Afterwards: a layer saw
                nothing, or other padding than was announced.
            CoordinationError: on all ranks alike: rank 0 could not decide, or ranks received
                different masks.
        """
        if number != self.last_step + 1:
            raise ConfigError(
                f"step {number!r} was given after step {self.last_step}; number the optimizer "
                "steps 1, 2, 3 … without gaps, and after load_state_dict go on from last_step + 1"
            )
        looks = self.looks_at(number)
        if looks or not self._met:
            observation = self._prepare_look(number, looks, padding_masks)
        else:
            observation = Observation(self._layers)
        look = Look(observation, looks)
        observation.arm()
        try:
            yield look
        finally:
            observation.disarm()
        self.last_step = number
        if observation.observers:
            look.event = self._decide(look, observation, hold)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs beside the model's own state: plain values and tensors.

        The rule's memory is rank 0's. Masks are in it for layers without a mask buffer
        (``SparseSelfAttention(max_seq_length=)``), for the others a digest alone.
        """
        sparse = self.switch_step is not None
        return {
            "format": 1,
            "last_step": self.last_step,
            "switch_step": self.switch_step,
            "overdue": self._overdue,
            # A rule that has fired is not asked again.
            "rule": {} if sparse else self.rule.state_dict(),
            **pack_masks(self._layers, sparse),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the driver that gave ``state`` stood; load the model's own state too.

        The masks of layers with a buffer come with the model's state: the next step compares.

        Raises:
            CheckpointError: the state is of another model or rule.
        """
        check_state(state, self._layers)
        if state["switch_step"] is None:
            self.rule.load_state_dict(state["rule"])
        unpack_masks(state, self._layers)
        self.last_step, self.switch_step = state["last_step"], state["switch_step"]
        self._overdue, self._met = state["overdue"], False
        self._loaded_digest = state["digest"]

    def looks_at(self, number: int) -> bool:
        """Return whether maps are made of step ``number``, the next one: whether it needs masks."""
        if self._overdue:
            return True
        if self.switch_step is None:
            return number % self._every == 0 or self._is_forced(number)
        return self._refresh is not None and (number - self.switch_step) % self._refresh == 0

    def _is_forced(self, number: int) -> bool:
        return self.switch_step is None and self._most is not None and number >= self._most

    def _prepare_look(
        self, number: int, looks: bool, padding_masks: Sequence[Tensor] | None
    ) -> Observation:
        """Compare the ranks before a step, and return what looks at it."""
        agreement = self._meet()
        masks = padding_masks if self._resolution == "block" else None

        def tell() -> tuple[int, int | None, bool, bool, int]:
            check_padding_masks(padding_masks)
            if not self._met:
                sparse = self.switch_step is not None
                verify_masks(self._layers, sparse, self._loaded_digest)
            length = 0 if masks is None else max(mask.shape[1] for mask in masks)
            return number, self.switch_step, looks, masks is not None, length

        told = agreement.gather_from(tell)
        compare_ranks(told)
        if not self._met:
            self._lay_out(agreement)
            self._met = True
        if not looks:  # the first step shows that every layer can be seen
            return Observation(self._layers, [Probe() for _ in self._layers])
        real = None
        if masks is not None:
            device = next((p.device for p in self._model.parameters()), torch.device("cpu"))
            real = count_real(masks, max(other[-1] for other in told), device)
        keeps = self._needs_skewness and self.switch_step is None
        return observe_maps(
            self._layers, self._resolution, real, self._averaging_group, keep_batches=keeps
        )

    def _meet(self) -> Agreement:
        """Return the control channel, made at the first step, when the process group is there."""
        if self._agreement is None:
            self._agreement = Agreement()
        return self._agreement

    def _lay_out(self, agreement: Agreement) -> None:
        """Learn which rank holds which layers and heads of the job."""
        group = self._averaging_group
        self._leader = 0 if group is None else min(dist.get_process_group_ranks(group))
        configs = [copy.copy(layer.sparsity) for layer in self._layers]
        for config in configs:
            config.set_pattern(None)
        self._job = lay_out(agreement.gather(Part(self._leader, *self._offsets, configs)))
        alone = all(len(layer.held) == 1 for layer in self._job)
        if len(self._job) != len(self._layers) or not alone:
            if self._sources is not None:
                raise ConfigError("sources= needs all layers and heads on every rank")
            if self._needs_skewness and not alone:
                raise ConfigError(
                    "the skewness rule needs all heads of a layer on one rank; allowed with "
                    "head_offset=: rules that look at mean maps"
                )

    @property
    def _averaging_group(self) -> dist.ProcessGroup | None:
        if not dist.is_initialized():
            return None
        return dist.group.WORLD if self._group is None else self._group

    @property
    def _needs_skewness(self) -> bool:
        return bool(getattr(self.rule, "needs_skewness", False))

    def _decide(self, look: Look, observation: Observation, hold: bool) -> Event | None:
        """Decide after a step that was looked at, on all ranks alike."""
        agreement, started = self._meet(), time.perf_counter()
        number = self.last_step
        fault = "" if look.was_skipped else observation.fault(number)
        told = agreement.gather((look.was_skipped, fault, (self._leader, observation.shapes)))
        if any(skipped for skipped, _, _ in told):
            self._overdue = look.checking
            return Event(number, "skipped") if look.checking else None
        for rank, (_, other, _) in enumerate(told):
            if other:
                raise ConfigError(f"rank {rank}: {other}" if len(told) > 1 else other)
        if not look.checking:
            return None
        compare_maps(self.layers, [shapes for _, _, shapes in told])
        self._overdue = True  # unless a decision is reached
        event = self._ask(observation, hold, agreement)
        self._overdue = False
        return dataclasses.replace(event, seconds=time.perf_counter() - started)

    def _ask(self, observation: Observation, hold: bool, agreement: Agreement) -> Event:
        """Let rank 0 decide, and obey."""
        number, forced = self.last_step, self._is_forced(self.last_step)
        observers = [o for o in observation.observers if isinstance(o, MapObserver)]
        group, leader = self._averaging_group, self._leader
        maps = gather_maps(observers, self._job, group, leader, agreement)
        skewness = None
        if self._needs_skewness and self.switch_step is None:
            skewness = gather_skewness(observers, group, leader)
        sources = None if self._sources is None else self._sources()
        report, masks, failure, pooled = None, None, "", None
        if agreement.is_first:
            try:
                if sources is None:
                    sources = pooled = self._pooled(maps)
                if self.switch_step is None:
                    report = self._report(maps, hold, skewness)
                if report is None or report.fire or forced:
                    masks = self._make_patterns(sources, maps)
            except Exception as error:  # the other ranks wait to be told
                failure = f"{error}" if isinstance(error, ValueError) else repr(error)
        decided, digest = share_masks(masks, failure, agreement)
        event = Event(
            number,
            "check",
            average=observation.average,
            report=report,
            maps=maps if agreement.is_first else None,
            pooled=pooled,
        )
        if decided is None:
            return event
        agreement.together(lambda: self._obey(decided, observers))
        kind = "refresh" if self.switch_step is not None else "switch"
        if self.switch_step is None:
            self.switch_step = number
        self._loaded_digest = None
        return dataclasses.replace(
            event, kind=kind, forced=forced, densities=self.densities, digest=digest
        )

    def _report(
        self, maps: list[Tensor], hold: bool, skewness: list[float] | None
    ) -> TransitionReport:
        """Return what the rule says of the job's maps."""
        if not getattr(self.rule, "per_head", False):
            maps = [map_.mean(dim=0) if map_.dim() == 3 else map_ for map_ in maps]
        wanted = {} if not self._needs_skewness else {"skewness": skewness}
        report = self.rule.update(maps, hold=hold, **wanted)
        if not isinstance(report, TransitionReport):
            raise ConfigError(
                f"{type(self.rule).__name__}.update returned {report!r}; allowed: a "
                "spion_ds.patterns.TransitionReport, e.g. TransitionReport(fire=True)"
            )
        return report

    def _pooled(self, maps: list[Tensor]) -> list[Tensor]:
        if self._resolution == "block":
            return maps
        return [layer.config.pool(map_) for layer, map_ in zip(self._job, maps, strict=True)]

    def _make_patterns(self, sources: Sequence[Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the masks of all layers of the job, each as its layer can take it."""
        configs = [copy.copy(layer.config) for layer in self._job]
        masks = [mask.cpu() for mask in self._patterns(configs, sources)]
        pooled = self._resolution == "block"
        check_patterns(masks, configs, [map_.shape[-1] for map_ in maps], pooled=pooled)
        return masks

    def _obey(self, masks: list[Tensor], observers: Sequence[MapObserver]) -> None:
        """Give this rank's layers their masks, and derive what the next pass needs."""
        layer_offset, head_offset = self._offsets
        for number, (layer, observer) in enumerate(zip(self._layers, observers, strict=True)):
            mask = masks[layer_offset + number]
            if mask.dim() == 3:
                mask = mask[head_offset : head_offset + layer.sparsity.num_heads]
            layer.attention.set_mask(mask)
            observer.prepare(layer.attention)
