"""Budget patterns: the blocks of most attention mass, for which heads and layers compete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spion_ds.errors import ConfigError, unknown_name
from spion_ds.patterns.flood_fill import check_pooled
from spion_ds.patterns.spion import check_density

SCOPES = ("head", "layer", "model")


def budget_patterns(
    maps: Sequence[Tensor],
    density: float,
    *,
    scope: str = "layer",
    causal: bool = False,
    row_blocks: int = 1,
    head_blocks: int = 0,
) -> list[Tensor]:
    """Return a pattern a head: of all that compete, the K blocks of most attention.

    Those that compete are the heads of a layer by default. The diagonal is always kept, and so are
    the floors; what is left of K goes to the largest entries of the maps, the earlier (layer, head,
    row, column) in a tie. A block that nobody needs is kept if the budget has room for it. Pooled
    maps are means, so a last block that is not full is ranked as if it were.

    Args:
        maps: one a layer: pooled maps of its heads, (heads, n, n) floating and finite, without a
            diagonal convolution. With scope ``"model"`` n is the same in all layers.
        density: K is this share of the blocks that may be kept, rounded down, counted over all that
            compete. Above 0, up to 1.
        scope: who competes for a budget: ``"head"`` (nobody: each head has its own), ``"layer"``
            (the heads of a layer) or ``"model"`` (all heads of all layers).
        causal: only blocks on and below the diagonal may be kept, and counted.
        row_blocks: blocks that each row of each head keeps at least, the diagonal's among them, as
            far as it has so many.
        head_blocks: blocks that each head keeps at least.

    Returns:
        One bool (heads, n, n) a layer, on its map's device.

    Raises:
        ConfigError: names the argument, its value and what is allowed; also a density that is too
            small for the diagonal and the floors.
    """
    density = check_terms(density, scope, row_blocks, head_blocks)
    _check_maps(maps, scope)
    terms: dict[str, Any] = {
        "causal": causal,
        "row_blocks": row_blocks,
        "head_blocks": head_blocks,
    }
    groups = [list(maps)] if scope == "model" and maps else [[one] for one in maps]
    patterns: list[Tensor] = []
    for group in groups:
        stacked = torch.cat([one.detach().to(group[0].device, torch.float64) for one in group])
        alone = 1 if scope == "head" else len(stacked)
        check_room(stacked.shape[-1], density, heads=alone, **terms)
        parts = zip(stacked.split(alone), _floors(stacked, **terms).split(alone), strict=True)
        kept = torch.cat([_largest(part, floor, density, causal) for part, floor in parts])
        patterns += kept.split([one.shape[0] for one in group])
    return [pattern.to(one.device) for pattern, one in zip(patterns, maps, strict=True)]


def check_terms(density: float, scope: str, row_blocks: int, head_blocks: int) -> float:
    """Return the density, or raise ConfigError for a term of ``budget_patterns`` out of range."""
    if scope not in SCOPES:
        raise ConfigError(unknown_name("scope", scope, SCOPES))
    for name, value in (("row_blocks", row_blocks), ("head_blocks", head_blocks)):
        if type(value) is not int or value < 0:
            raise ConfigError(f"{name} is {value!r}; allowed: whole numbers from 0 up")
    return check_density(density)


def _check_maps(maps: Sequence[Tensor], scope: str) -> None:
    for layer, one in enumerate(maps):
        if one.dim() != 3 or one.shape[0] == 0:
            raise ConfigError(
                f"the map of layer {layer} has shape {tuple(one.shape)}; allowed: (heads, n, n)"
            )
        for head in one:
            check_pooled(head, f"the map of layer {layer}")
    sides = {one.shape[-1] for one in maps}
    if scope == "model" and len(sides) > 1:
        raise ConfigError(
            f"scope is 'model', and layers have {sorted(sides)} blocks a side; allowed: one number "
            "in all layers, so that a block costs the same everywhere; or scope 'layer'"
        )


def _allowed(n: int, causal: bool, device: torch.device) -> Tensor:
    """Return which blocks may be kept, (n, n) bool."""
    everything = torch.ones(n, n, dtype=torch.bool, device=device)
    return everything.tril() if causal else everything


def check_room(
    blocks: int, density: float, *, heads: int, causal: bool, row_blocks: int, head_blocks: int
) -> None:
    """Raise ConfigError unless ``density`` has room for the diagonal and the floors.

    Args:
        blocks: a side of the maps.
        density, causal, row_blocks, head_blocks: as in :func:`budget_patterns`.
        heads: that compete.
    """
    widths = range(1, blocks + 1) if causal else [blocks] * blocks
    floor = max(sum(max(1, min(row_blocks, width)) for width in widths), head_blocks)
    every = sum(widths)
    least = heads * min(floor, every)
    if _count(density, heads * every) < least:
        share = math.ceil(1e4 * least / (heads * every)) / 1e4
        raise ConfigError(
            f"density is {density}; allowed: from {share:.4g} up: the diagonal and the floors "
            f"(row_blocks, head_blocks) alone are {least} of the {heads * every} blocks that "
            f"{heads} head(s) of {blocks} blocks a side may keep; or take smaller blocks"
        )


def _count(density: float, every: int) -> int:
    # What rounding takes from a product like 0.29 · 100 is given back.
    return math.floor(density * every + 1e-9)


def _floors(maps: Tensor, causal: bool, row_blocks: int, head_blocks: int) -> Tensor:
    """Return the blocks (heads, n, n) that are kept whatever the budget."""
    heads, n, _ = maps.shape
    allowed = _allowed(n, causal, maps.device)
    diagonal = torch.eye(n, dtype=torch.bool, device=maps.device)
    kept = diagonal.repeat(heads, 1, 1)
    if row_blocks > 1:
        scores = maps.masked_fill(~allowed, -math.inf).masked_fill_(diagonal, math.inf)
        # Of equal ones the earlier; adding 0.0 makes -0.0 equal to 0.0 for sorts of bits.
        order = (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices
        kept.scatter_(-1, order[..., :row_blocks], True)
        kept &= allowed
    for head in range(heads if head_blocks > n else 0):
        kept[head] = _fill(maps[head], kept[head], allowed, head_blocks)
    return kept


def _largest(maps: Tensor, floors: Tensor, density: float, causal: bool) -> Tensor:
    """Return the floors and the largest other blocks, (heads, n, n): ``density`` of all allowed."""
    heads, n, _ = maps.shape
    allowed = _allowed(n, causal, maps.device)
    return _fill(maps, floors, allowed, _count(density, heads * int(allowed.sum())))


def _fill(maps: Tensor, kept: Tensor, allowed: Tensor, count: int) -> Tensor:
    """Return ``kept``, bool (…, n, n), with the largest others: ``count`` in all, if not more.

    Of equal entries the earlier. Nothing is sorted: maps of all layers are large.
    """
    missing = min(count, maps.numel() // allowed.numel() * int(allowed.sum())) - int(kept.sum())
    if missing <= 0:
        return kept
    scores = maps.masked_fill(~allowed, -math.inf).masked_fill_(kept, -math.inf).flatten()
    threshold = scores.kthvalue(scores.numel() - missing + 1).values
    more = scores > threshold
    ties = (scores == threshold).nonzero().flatten()
    more[ties[: missing - int(more.sum())]] = True
    return kept | more.view_as(kept)
