"""Looking at one step: an accumulator a layer, and what the layers showed it.

Shape suffixes: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spion_ds.attention import (
    AttentionMapAccumulator,
    PooledMapAccumulator,
    SparseSelfAttention,
)
from spion_ds.attention.functional import stand_in
from spion_ds.attention.map_request import mean_row_weights, query_counts, row_counts
from spion_ds.errors import ConfigError
from spion_ds.sparsity import SwitchingSparsityConfig
from spion_ds.switching.masks import find_attentions

Accumulator = AttentionMapAccumulator | PooledMapAccumulator
SAMPLES, MICRO_BATCHES = "samples", "micro_batches"


@dataclass(frozen=True)
class Layer:
    """One attention that can switch.

    Attributes:
        name: of the module in its model.
        attention: the module.
        sparsity: its configuration.
    """

    name: str
    attention: SparseSelfAttention
    sparsity: SwitchingSparsityConfig


def find_layers(model: nn.Module) -> list[Layer]:
    """Return the attentions of a model that carry a switching SparsityConfig, in order.

    Raises:
        ConfigError: there is none, or one configuration is shared by two modules.
    """
    layers = [
        Layer(name, attention, attention.sparsity_config)
        for name, attention in find_attentions(model).items()
        if isinstance(attention.sparsity_config, SwitchingSparsityConfig)
    ]
    if not layers:
        raise ConfigError(_nothing_to_switch(model))
    owners: dict[int, str] = {}
    for layer in layers:
        other = owners.setdefault(id(layer.sparsity), layer.name)
        if other != layer.name:
            raise ConfigError(
                f"{other} and {layer.name} share one {type(layer.sparsity).__name__}, and a "
                "pattern is one layer's: give each attention a configuration of its own"
            )
    return layers


def _nothing_to_switch(model: nn.Module) -> str:
    others = {
        type(module.sparsity_config).__name__
        for module in model.modules()
        if getattr(module, "sparsity_config", None) is not None
    }
    found = f"it has attentions with {', '.join(sorted(others))}" if others else "it has none"
    return (
        f"{type(model).__name__} has no attention that can switch ({found}); allowed: modules "
        "spion_ds.attention.SparseSelfAttention with a SpionSparsityConfig or SatSparsityConfig"
    )


class Probe:
    """An observer that looks at nothing: it notes that a pass came by, and how long it was."""

    def __init__(self) -> None:
        self.seen = self.length = 0

    def add(self, *seen: Any, **_: Any) -> None:
        """Count a pass, whose queries (B, H, L, D) come first."""
        self.seen += 1
        self.length = seen[0].shape[2]


class MapObserver:
    """One layer's accumulator, with what must hold of the passes that it saw.

    Args:
        maps: the accumulator.
        announced: in how many samples of this rank each token is real, (L,) float64, where the
            loop told that beforehand.
    """

    def __init__(self, maps: Accumulator, announced: Tensor | None = None) -> None:
        self.maps, self.announced = maps, announced
        self.seen = 0
        self.real: Tensor | None = None  # what the passes had in place of ``announced``
        self._like: tuple[Tensor, Tensor, bool] | None = None  # of the last pass

    def prepare(self, attention: SparseSelfAttention) -> None:
        """Derive now what the next pass like the last one needs, which a compiled one could not."""
        assert self._like is not None
        query, key, unpadded = self._like
        # With a padding mask nothing depends on the number of samples.
        like = (query, key) if unpadded else ()
        attention.prepare(query.shape[2], query.device, *like)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the map, once a pass was seen."""
        assert self.maps.total is not None
        return tuple(self.maps.total.shape)

    @property
    def length(self) -> int:
        """Tokens of the last pass."""
        return 0 if self._like is None else self._like[0].shape[2]

    @property
    def surprised(self) -> bool:
        """Whether the passes had other padding than was announced."""
        if self.announced is None:
            return False
        return self.real is None or not torch.equal(self.real, self.announced)

    def add(
        self,
        q_BHLD: Tensor,
        k_BHLD: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> None:
        """Add a pass; arguments as in :func:`spion_ds.attention.attention_map`."""
        self.maps.add(q_BHLD, k_BHLD, key_padding_mask, causal, scale)
        self.seen += 1
        self._like = (stand_in(q_BHLD), stand_in(k_BHLD), key_padding_mask is None)
        if self.announced is not None:
            counted = query_counts(q_BHLD[:, :1], key_padding_mask)  # of one head: samples
            counted = _lengthened(counted, len(self.announced))
            self.real = counted if self.real is None else self.real + counted


@dataclass
class Observation:
    """What is looked at in one step, on this rank.

    Attributes:
        layers: the attentions.
        observers: one a layer, or [] where the step is not looked at.
        average: what counts alike in the mean map: ``"samples"`` or ``"micro_batches"``.
    """

    layers: Sequence[Layer]
    observers: list[MapObserver | Probe] = field(default_factory=list)
    average: str = SAMPLES

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of each layer's map; [] where none was made."""
        return [
            observer.shape
            for observer in self.observers
            if isinstance(observer, MapObserver) and observer.seen > 0
        ]

    def arm(self) -> None:
        """Let every layer show its passes from now on."""
        for layer, observer in zip(self.layers, self.observers, strict=False):
            layer.attention.observer = observer

    def disarm(self) -> None:
        """Let no layer show anything."""
        for layer in self.layers:
            layer.attention.observer = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let no layer show anything inside the context."""
        self.disarm()
        try:
            yield
        finally:
            self.arm()

    def fault(self, step: int) -> str:
        """Return what is wrong with the passes that were seen, "" if nothing is."""
        for layer, observer in zip(self.layers, self.observers, strict=False):
            if observer.seen == 0:
                return (
                    f"{layer.name} saw no attention in step {step}: it was not called in training "
                    "mode inside 'with switch.step(...)', or a CUDA graph replayed it, in which "
                    "no Python runs. Call the model there, or say look.by_hand() and show the "
                    "queries and keys that the graph wrote with look.add(layer, query, key, "
                    "key_padding_mask)"
                )
            if isinstance(observer, MapObserver) and observer.surprised:
                return (
                    f"{layer.name} saw other padding in step {step} than the padding_masks that "
                    "the step was given; give the masks (B, L) of all of this rank's "
                    "micro-batches as attention gets them, or none"
                )
            try:
                length = layer.attention.max_seq_length or observer.length
                layer.sparsity.check_room(-(-length // layer.sparsity.block))
            except ConfigError as error:  # now, and not after a long dense phase
                return f"{layer.name} cannot get a pattern: {error}"
        return ""


def observe_maps(
    layers: Sequence[Layer],
    resolution: str,
    real: Tensor | None,
    group: dist.ProcessGroup | None,
    *,
    keep_batches: bool,
) -> Observation:
    """Return what looks at the maps of one step; all ranks of the group call it.

    Token-level maps divide at the end, so their mean is over samples. Pooling mixes rows: the mean
    over samples needs to know the padding beforehand. Without that every micro-batch's mean counts
    alike.

    Args:
        layers: the attentions.
        resolution: ``"block"`` or ``"token"``.
        real: in how many samples of this rank each token is real, (L,) float64 on the model's
            device, from :func:`count_real`; None where the loop cannot tell.
        group: ranks with the same layers and heads; None where the process is alone.
        keep_batches: whether pooled maps keep their queries and keys.
    """
    if resolution == "token":
        return Observation(layers, [MapObserver(AttentionMapAccumulator()) for _ in layers])
    if real is None:
        return Observation(
            layers,
            [MapObserver(_pooled(layer, None, keep_batches)) for layer in layers],
            MICRO_BATCHES,
        )
    whole = real.clone()
    if group is not None:
        dist.all_reduce(whole, group=group)
    observers: list[MapObserver | Probe] = []
    for layer in layers:
        length = max(layer.attention.max_seq_length or 0, len(real))
        maps = _pooled(layer, _lengthened(whole, length), keep_batches)
        observers.append(MapObserver(maps, _lengthened(real, length)))
    return Observation(layers, observers)


def _pooled(layer: Layer, real: Tensor | None, keep_batches: bool) -> PooledMapAccumulator:
    sparsity = layer.sparsity
    per_head = sparsity.different_layout_per_head
    weights, length = None, layer.attention.max_seq_length
    if real is not None:
        # One over how many (sample, head) pairs are averaged in each row of a map.
        weights = mean_row_weights(real if per_head else real * sparsity.num_heads)
        length = None
    return PooledMapAccumulator(
        sparsity.block,
        sparsity.convolution,
        weights,
        length=length,
        per_head=per_head,
        keep_batches=keep_batches,
    )


def _lengthened(real: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(real, (0, length - len(real)))


def check_padding_masks(padding_masks: Sequence[Tensor] | None) -> None:
    """Raise ConfigError unless the masks are None or one bool (B, L) a micro-batch."""
    if padding_masks is None:
        return
    if isinstance(padding_masks, Tensor) or len(padding_masks) == 0:
        raise ConfigError(
            "padding_masks is a list with one bool mask (B, L) for each micro-batch of the step, "
            "or None"
        )
    for mask in padding_masks:
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ConfigError(
                f"a padding mask is {mask.dtype} {tuple(mask.shape)}; allowed: bool (B, L), True = "
                "real token"
            )


def count_real(padding_masks: Sequence[Tensor], length: int, device: torch.device) -> Tensor:
    """Return in how many samples of the masks (B, L) each token is real, (length,) float64."""
    real = torch.zeros(length, dtype=torch.float64, device=device)
    for mask in padding_masks:
        real += _lengthened(row_counts(mask, heads=1).to(device), length)
    return real
