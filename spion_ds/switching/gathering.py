"""Bringing the maps of all ranks together on rank 0: samples, heads and layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from spion_ds.attention import AttentionMapAccumulator, PooledMapAccumulator
from spion_ds.attention.map_dispatch import skewness
from spion_ds.attention.map_request import MapRequest
from spion_ds.distributed.agreement import Agreement
from spion_ds.errors import ConfigError
from spion_ds.sparsity import SwitchingSparsityConfig
from spion_ds.switching.observation import MapObserver


@dataclass(frozen=True)
class Part:
    """What one rank's group holds of the job's layers and heads.

    Attributes:
        leader: the group's lowest rank, where its maps are added up.
        layer_offset: which of the job's layers is the first.
        head_offset: which of a layer's heads is the first.
        configs: of each of its layers, without pattern.
    """

    leader: int
    layer_offset: int
    head_offset: int
    configs: list[SwitchingSparsityConfig]


@dataclass(frozen=True)
class JobLayer:
    """One layer of the job, and which parts hold its heads, in the heads' order.

    Attributes:
        config: with all heads of the layer.
        held: for each part its leader, which of the part's layers this is, and how many heads.
    """

    config: SwitchingSparsityConfig
    held: list[tuple[int, int, int]]


def lay_out(parts: Sequence[Part]) -> list[JobLayer]:
    """Return the layers of the whole job from what each rank says that its group holds.

    Raises:
        ConfigError: a layer or head is held by two groups, or by none, or the ranks of one group
            hold different ones.
    """
    groups: dict[int, Part] = {}
    for part in parts:
        if not _alike(groups.setdefault(part.leader, part), part):
            raise ConfigError(
                "ranks of one group= hold different layers, heads or blocks, and their maps cannot "
                "be averaged; group= is of the ranks that hold the same ones"
            )
    number = max(part.layer_offset + len(part.configs) for part in groups.values())
    layers = []
    for layer in range(number):
        holders = sorted(
            (
                part
                for part in groups.values()
                if 0 <= layer - part.layer_offset < len(part.configs)
            ),
            key=lambda part: part.head_offset,
        )
        if not holders:
            raise ConfigError(
                f"no rank holds layer {layer} of {number}; layer_offset= is the number of layers "
                "on the stages before"
            )
        heads, held = 0, []
        for part in holders:
            index = layer - part.layer_offset
            config = part.configs[index]
            if part.head_offset != heads:
                raise ConfigError(_overlap(layer, heads, part))
            held.append((part.leader, index, config.num_heads))
            heads += config.num_heads
        layers.append(JobLayer(_whole(holders[0].configs[held[0][1]], heads), held))
    return layers


def _alike(one: Part, other: Part) -> bool:
    def held(part: Part) -> list[tuple[object, ...]]:
        offsets = (part.layer_offset, part.head_offset)
        layers = [(c.num_heads, c.block, c.different_layout_per_head) for c in part.configs]
        return [offsets, *layers]

    return held(one) == held(other)


def _overlap(layer: int, heads: int, part: Part) -> str:
    what = "twice" if part.head_offset < heads else "with a gap before them"
    return (
        f"the heads of layer {layer} from {part.head_offset} on are held {what}: ranks with the "
        "same layers and heads belong into one group=; others say which they have with "
        "layer_offset= (pipeline stages) and head_offset= (tensor or sequence parallel)"
    )


def _whole(config: SwitchingSparsityConfig, heads: int) -> SwitchingSparsityConfig:
    """Return a copy of a configuration for all ``heads`` of its layer."""
    whole = copy.copy(config)
    whole.num_heads = heads
    whole.num_layout_heads = heads if config.different_layout_per_head else 1
    return whole


def gather_maps(
    observers: Sequence[MapObserver],
    job: Sequence[JobLayer],
    group: dist.ProcessGroup | None,
    leader: int,
    agreement: Agreement,
) -> list[Tensor]:
    """Return the mean map of every layer of the job, right on rank 0 only.

    (L, L) float32 at token level; else float64, (n, n) or, for patterns a head, (heads, n, n).
    """
    own = [_mean(observer, group, leader) for observer in observers]
    leaders = sorted({holder for layer in job for holder, _, _ in layer.held})
    if leaders == [leader]:
        return own
    found = _exchange([map_.cpu() for map_ in own], leaders, leader, agreement)
    if not agreement.is_first:
        return own
    return [
        _join(layer, [found[holder][index] for holder, index, _ in layer.held]) for layer in job
    ]


def _join(layer: JobLayer, maps: list[Tensor]) -> Tensor:
    """Return one layer's map from those of its heads' parts."""
    if layer.config.different_layout_per_head:
        return torch.cat(maps)
    if len(maps) == 1:
        return maps[0]
    heads = [count for _, _, count in layer.held]
    total = sum((map_.double() * count for map_, count in zip(maps, heads, strict=True)))
    assert isinstance(total, Tensor)
    return (total / sum(heads)).to(maps[0].dtype)


def _exchange(
    own: list[Tensor], leaders: list[int], leader: int, agreement: Agreement
) -> dict[int, list[Tensor]]:
    """Return the maps of each leader, on rank 0; the others get their own alone."""
    shapes = agreement.gather([(tuple(map_.shape), str(map_.dtype)) for map_ in own])
    if agreement.rank == leader and not agreement.is_first:
        for map_ in own:
            agreement.send(map_.contiguous())
    found = {leader: own}
    if agreement.is_first:
        for other in leaders:
            if other != leader:
                found[other] = [
                    agreement.receive(torch.empty(shape, dtype=_DTYPES[dtype]), other)
                    for shape, dtype in shapes[other]
                ]
    return found


_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float64)}


def _mean(observer: MapObserver, group: dist.ProcessGroup | None, leader: int) -> Tensor:
    """Return one layer's mean over the group, right on its leader only."""
    maps = observer.maps
    if isinstance(maps, AttentionMapAccumulator):
        assert maps.total is not None
        assert maps.count is not None
        _reduce(maps.total, group, leader)
        _reduce(maps.count, group, leader)
        return (maps.total / maps.count.clamp(min=1.0)[:, None]).float()
    _reduce(maps.total, group, leader)
    if maps.row_weights is not None:
        return maps.total  # the rows' weights made it a mean
    added = maps.total.new_tensor(float(maps.added))
    _reduce(added, group, leader)
    return maps.total / added


def _reduce(tensor: Tensor, group: dist.ProcessGroup | None, leader: int) -> None:
    if group is not None:
        dist.reduce(tensor, dst=leader, group=group)


def gather_skewness(
    observers: Sequence[MapObserver], group: dist.ProcessGroup | None, leader: int
) -> list[float] | None:
    """Return the skewness of each layer's token-level mean map, right on the leader only.

    None where the accumulators have those maps. The third moment of a mean is no sum over samples:
    for each layer one rank gets the queries and keys of the whole group.
    """
    pooled = [o.maps for o in observers if isinstance(o.maps, PooledMapAccumulator)]
    if not pooled:
        return None
    ranks = [0] if group is None else dist.get_process_group_ranks(group)
    # All are on their way before the first is computed, so that the ranks compute side by side.
    batches = [
        _gather_batches(layer.batches, group, ranks[number % len(ranks)])
        for number, layer in enumerate(pooled)
    ]
    found = pooled[0].total.new_zeros(len(pooled))
    for number, batch in enumerate(batches):
        if batch is not None:
            found[number] = skewness(batch)
    _reduce(found, group, leader)
    return found.tolist()


def _gather_batches(
    batches: Sequence[MapRequest], group: dist.ProcessGroup | None, owner: int
) -> MapRequest | None:
    """Return all ranks' micro-batches as one batch on rank ``owner``, None elsewhere."""
    q, k, real = (
        _gather_samples(torch.cat(parts), group, owner)
        for parts in zip(*((b.q, b.k, _real(b)) for b in batches), strict=True)
    )
    if q is None or k is None:
        return None
    return batches[0]._replace(q=q, k=k, key_padding_mask=real)


def _gather_samples(tensor: Tensor, group: dist.ProcessGroup | None, owner: int) -> Tensor | None:
    """Return the samples (dimension 0, as many on each rank) of all ranks on rank ``owner``."""
    if group is None:
        return tensor
    # As bytes: not every backend knows every dtype.
    bits = tensor.contiguous().view(torch.uint8)
    if dist.get_rank() != owner:
        dist.gather(bits, dst=owner, group=group)
        return None
    ranks = dist.get_world_size(group)
    whole = bits.new_empty((ranks * bits.shape[0], *bits.shape[1:]))
    dist.gather(bits, list(whole.chunk(ranks)), dst=owner, group=group)
    return whole.view(tensor.dtype)


def _real(batch: MapRequest) -> Tensor:
    """Return the padding mask (B, L), all True where there is none."""
    if batch.key_padding_mask is not None:
        return batch.key_padding_mask
    return batch.q.new_ones((batch.q.shape[0], batch.length), dtype=torch.bool)
