"""Budget patterns: the blocks of most attention mass, for which heads and layers compete."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    """Return a pattern a head: of all that compete, the K blocks of most attention mass.

    Those that compete are the heads of a layer by default. The diagonal is always kept, and so are
    the floors; what is left of K goes to the largest entries of the maps, the earlier (layer, head,
    row, column) in a tie. A block that nobody needs is kept if the budget has room for it.

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
    if scope not in SCOPES:
        raise ConfigError(unknown_name("scope", scope, SCOPES))
    density = check_density(density)
    for name, value in (("row_blocks", row_blocks), ("head_blocks", head_blocks)):
        if type(value) is not int or value < 0:
            raise ConfigError(f"{name} is {value!r}; allowed: whole numbers from 0 up")
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
    competing = [[one] for one in maps] if scope != "model" else [list(maps)] if maps else []
    patterns: list[Tensor] = []
    for group in competing:
        stacked = torch.cat([one.detach().to(group[0].device, torch.float64) for one in group])
        floors = _floors(stacked, causal, row_blocks, head_blocks)
        alone = 1 if scope == "head" else len(stacked)
        parts = zip(stacked.split(alone), floors.split(alone), strict=True)
        kept = torch.cat([_largest(part, floor, density, causal) for part, floor in parts])
        patterns += kept.split([one.shape[0] for one in group])
    return [pattern.to(one.device) for pattern, one in zip(patterns, maps, strict=True)]


def _allowed(n: int, causal: bool, device: torch.device) -> Tensor:
    """Return which blocks may be kept, (n, n) bool."""
    everything = torch.ones(n, n, dtype=torch.bool, device=device)
    return everything.tril() if causal else everything


def _order(scores: Tensor) -> Tensor:
    """Return indices along the last dimension, the largest score first, the earlier in a tie."""
    # Adding 0.0 makes -0.0 equal to 0.0 for sorts that look at bits.
    return (scores + 0.0).sort(dim=-1, descending=True, stable=True).indices


def _floors(maps: Tensor, causal: bool, row_blocks: int, head_blocks: int) -> Tensor:
    """Return the blocks (heads, n, n) that are kept whatever the budget."""
    heads, n, _ = maps.shape
    allowed = _allowed(n, causal, maps.device)
    diagonal = torch.eye(n, dtype=torch.bool, device=maps.device)
    kept = diagonal.expand(heads, n, n).clone()
    scores = maps.masked_fill(~allowed, -math.inf).masked_fill(diagonal, math.inf)
    first = _order(scores)[..., :row_blocks]  # (heads, n, row_blocks)
    kept |= torch.zeros_like(kept).scatter_(-1, first, True) & allowed
    flat = scores.masked_fill(kept, math.inf).flatten(1)
    most = torch.zeros_like(flat, dtype=torch.bool)
    most.scatter_(-1, _order(flat)[:, :head_blocks], True)
    return kept | (most.view_as(kept) & allowed)


def _largest(maps: Tensor, floors: Tensor, density: float, causal: bool) -> Tensor:
    """Return the floors and the largest other blocks, (heads, n, n): ``density`` of all allowed."""
    heads, n, _ = maps.shape
    allowed = _allowed(n, causal, maps.device)
    every = heads * int(allowed.sum())
    # What rounding takes from a product like 0.29 · 100 is given back.
    count, least = math.floor(density * every + 1e-9), int(floors.sum())
    if count < least:
        raise ConfigError(
            f"density is {density}; allowed: from {math.ceil(1e4 * least / every) / 1e4:.4g} up: "
            f"the diagonal and the floors (row_blocks, head_blocks) alone are {least} of the "
            f"{every} blocks that {heads} head(s) of {n} blocks a side may keep; or take smaller "
            "blocks"
        )
    scores = maps.masked_fill(~allowed, -math.inf).masked_fill(floors, math.inf).flatten()
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[_order(scores)[:count]] = True
    return kept.view_as(maps)
