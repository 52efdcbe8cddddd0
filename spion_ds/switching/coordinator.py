"""The rank-0 coordinator: gathers the maps of a check step, decides, and tells every rank."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from spion_ds.attention import AttentionMapAccumulator, PooledMapAccumulator, SparseSelfAttention
from spion_ds.attention.layout import pack_mask, unpack_mask
from spion_ds.attention.map_dispatch import skewness
from spion_ds.attention.map_request import MapRequest
from spion_ds.distributed.agreement import Agreement
from spion_ds.errors import SpionError
from spion_ds.patterns import SkewnessRule, TransitionReport, TransitionRule
from spion_ds.sparsity import SwitchingSparsityConfig

_STAY, _SWITCH, _FAILED = 0, 1, 2
_DIGEST_BYTES = 32
_MESSAGE_BYTES = 1000


class CoordinationError(SpionError, RuntimeError):
    """Rank 0 could not decide, or a rank received something else than rank 0 sent."""


class PatternError(CoordinationError):
    """Rank 0 could not make patterns of the maps: one is not finite."""


@dataclass(frozen=True)
class Decision:
    """What rank 0 decided at a check.

    Attributes:
        masks: one (n, n) bool mask a layer on the CPU, or None to stay dense.
        digest: sha256 of the packed masks, hexadecimal ("" when staying dense).
        report: distances and changes; on rank 0 only.
        maps: what the rule saw, one map a layer: (L, L) float32 mean maps, or at block resolution
            ``pooled``; on rank 0 only.
        pooled: (n, n) float64 pooled map a layer; on rank 0 only, and where patterns come from it.
    """

    masks: list[Tensor] | None
    digest: str
    report: TransitionReport | None = None
    maps: list[Tensor] | None = None
    pooled: list[Tensor] | None = None


class Coordinator:
    """Turns the attention of a check step into one decision for all ranks.

    Args:
        rule: when to switch; the same kind on every rank, and only rank 0's decides.
        sparsity_configs: one a layer; they say how a map, or SAT's W, becomes a pattern.
        blocks: n, blocks a side.
        agreement: the control channel.
    """

    def __init__(
        self,
        rule: TransitionRule,
        sparsity_configs: Sequence[SwitchingSparsityConfig],
        blocks: int,
        agreement: Agreement,
    ) -> None:
        self.rule, self.blocks, self.agreement = rule, blocks, agreement
        self.sparsity_configs = list(sparsity_configs)

    def check(
        self,
        observed: Sequence[AttentionMapAccumulator | PooledMapAccumulator],
        *,
        force: bool,
        hold: bool = False,
        weights: Sequence[Tensor] | None = None,
    ) -> Decision:
        """Return the decision; call it on every rank in the same step.

        Args:
            observed: one accumulator a layer with this rank's share of the global batch; all
                token-level, or all pooled as the layer's pattern needs it; these keep their
                batches if the rule is the skewness rule.
            force: switch even if the rule does not fire.
            hold: keep a rule that looks at maps from firing.
            weights: SAT's W of each layer, which then gives the pattern in the pooled map's place.

        Raises:
            CoordinationError: on all ranks alike.
        """
        maps = [_mean_map(layer) for layer in observed]
        update: Callable[..., TransitionReport] = self.rule.update
        if isinstance(self.rule, SkewnessRule):
            update = functools.partial(update, skewness=_token_skewness(observed))
        if hold:
            update = functools.partial(update, hold=True)
        report, masks, failure = None, None, ""
        pooled: list[Tensor] | None = None
        if dist.get_rank() == 0:
            try:
                report = update(maps)
                if weights is None:
                    pooled = [
                        attention
                        if isinstance(layer, PooledMapAccumulator)
                        else config.pool(attention)
                        for config, layer, attention in zip(
                            self.sparsity_configs, observed, maps, strict=True
                        )
                    ]
                if report.fire or force:
                    sources = weights or pooled or []
                    masks = [
                        config.find_pattern(source).cpu()
                        for config, source in zip(self.sparsity_configs, sources, strict=True)
                    ]
            except ValueError as error:
                failure = str(error)
        decided, digest = self._broadcast(masks, failure)
        first = dist.get_rank() == 0
        return Decision(decided, digest, report, maps if first else None, pooled)

    def _broadcast(
        self, masks: list[Tensor] | None, failure: str
    ) -> tuple[list[Tensor] | None, str]:
        """Send one message of fixed size: status, digest, bits (or the text of a failure)."""
        layers, n = len(self.sparsity_configs), self.blocks
        mask_bytes = -(-n * n // 8)
        body_bytes = max(layers * mask_bytes, _MESSAGE_BYTES)
        message = torch.zeros(1 + _DIGEST_BYTES + body_bytes, dtype=torch.uint8)
        if failure:
            _fill(message, _FAILED, failure.encode()[:_MESSAGE_BYTES])
        elif masks is not None:
            _fill(message, _SWITCH, b"".join(pack_mask(mask) for mask in masks))
        self.agreement.broadcast(message)
        status = int(message[0])
        digest = message[1 : 1 + _DIGEST_BYTES].numpy().tobytes()
        body = message[1 + _DIGEST_BYTES :].numpy().tobytes()
        sound = status == _STAY or hashlib.sha256(body).digest() == digest
        if self.agreement.any(not sound) or self.agreement.differing(status):
            raise CoordinationError(
                "the masks that a rank received differ from those that rank 0 sent; the network or "
                "memory is faulty, so the run stops: go on with --resume, from the last checkpoint"
            )
        if status == _STAY:
            return None, ""
        if status == _FAILED:
            text = body.rstrip(b"\0").decode(errors="replace")
            raise PatternError(f"rank 0 could not make the patterns: {text}")
        parts = [body[i * mask_bytes : (i + 1) * mask_bytes] for i in range(layers)]
        return [unpack_mask(part, (n, n)) for part in parts], digest.hex()


def layouts_digest(attentions: Sequence[SparseSelfAttention], length: int) -> str:
    """Return the sha256 of the block layouts of all layers at ``length`` tokens, hexadecimal."""
    digest = hashlib.sha256()
    for attention in attentions:
        mask = attention.sparsity_config.make_mask(length)
        digest.update(mask.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _mean_map(layer: AttentionMapAccumulator | PooledMapAccumulator) -> Tensor:
    """Return the mean over the global batch, right on rank 0 only.

    (L, L) float32, or (n, n) float64 of a pooled map, which is not rounded before the walks.
    """
    if isinstance(layer, PooledMapAccumulator):
        dist.reduce(layer.total, dst=0)
        return layer.total
    assert layer.total is not None
    assert layer.count is not None
    dist.reduce(layer.total, dst=0)
    dist.reduce(layer.count, dst=0)
    return (layer.total / layer.count.clamp(min=1.0)[:, None]).float()


def _token_skewness(
    observed: Sequence[AttentionMapAccumulator | PooledMapAccumulator],
) -> list[float] | None:
    """Return the skewness of each layer's token-level mean map, right on rank 0 only.

    None where the accumulators have those maps. The third moment of a mean is no sum over samples:
    for each layer one rank gets the queries and keys of the global batch.
    """
    pooled = [layer for layer in observed if isinstance(layer, PooledMapAccumulator)]
    if not pooled:
        return None
    ranks = dist.get_world_size()
    # All are on their way before the first is computed, so that the ranks compute side by side.
    batches = [_gather(layer.batches, number % ranks) for number, layer in enumerate(pooled)]
    found = pooled[0].total.new_zeros(len(pooled))
    for number, batch in enumerate(batches):
        if batch is not None:
            found[number] = skewness(batch)
    dist.reduce(found, dst=0)
    return found.tolist()


def _gather(batches: Sequence[MapRequest], owner: int) -> MapRequest | None:
    """Return all ranks' micro-batches as one batch on rank ``owner``, None elsewhere."""
    q, k, real = (
        _gather_samples(torch.cat(parts), owner)
        for parts in zip(*((b.q, b.k, _real(b)) for b in batches), strict=True)
    )
    if q is None or k is None:
        return None
    return batches[0]._replace(q=q, k=k, key_padding_mask=real)


def _gather_samples(tensor: Tensor, owner: int) -> Tensor | None:
    """Return the samples (dimension 0, as many on each rank) of all ranks on rank ``owner``."""
    # As bytes: not every backend knows every dtype.
    bits = tensor.contiguous().view(torch.uint8)
    if dist.get_rank() != owner:
        dist.gather(bits, dst=owner)
        return None
    ranks = dist.get_world_size()
    whole = bits.new_empty((ranks * bits.shape[0], *bits.shape[1:]))
    dist.gather(bits, list(whole.chunk(ranks)), dst=owner)
    return whole.view(tensor.dtype)


def _real(batch: MapRequest) -> Tensor:
    """Return the padding mask (B, L), all True where there is none."""
    if batch.key_padding_mask is not None:
        return batch.key_padding_mask
    return batch.q.new_ones((batch.q.shape[0], batch.length), dtype=torch.bool)


def _fill(message: Tensor, status: int, body: bytes) -> None:
    start = 1 + _DIGEST_BYTES
    message[start : start + len(body)] = torch.frombuffer(bytearray(body), dtype=torch.uint8)
    digest = hashlib.sha256(message[start:].numpy().tobytes()).digest()
    message[1:start] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
    message[0] = status
