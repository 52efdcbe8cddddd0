"""Budget patterns against their definition, written as loops; what is kept, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spion_ds.errors import ConfigError
from spion_ds.patterns import budget_patterns
from tests.devices import CPU_AND_GPU


def maps(*shapes: tuple[int, int], seed: int = 0, ties: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.rand(heads, n, n, generator=generator).double() for heads, n in shapes]
    return [(8.0 * one).round() / 8.0 for one in made] if ties else made


def by_loops(
    given: list[Tensor], density: float, scope: str, causal: bool, row: int, head: int
) -> list[np.ndarray]:
    """The definition, one block after the other."""
    values = [one.numpy() for one in given]
    kept = [np.zeros(one.shape, bool) for one in values]

    def places(layer: int, h: int) -> list[tuple[int, int, int, int]]:
        n = values[layer].shape[-1]
        return [(layer, h, i, j) for i in range(n) for j in range(n) if j <= i or not causal]

    def largest(candidates: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
        return sorted(candidates, key=lambda p: (-values[p[0]][p[1:]], p))

    def keep_up_to(candidates: list[tuple[int, int, int, int]], count: int) -> None:
        missing = count - sum(bool(kept[p[0]][p[1:]]) for p in candidates)
        for p in [p for p in largest(candidates) if not kept[p[0]][p[1:]]][: max(missing, 0)]:
            kept[p[0]][p[1:]] = True

    heads = [(layer, h) for layer, one in enumerate(values) for h in range(one.shape[0])]
    for layer, h in heads:
        for p in places(layer, h):
            kept[layer][h, p[2], p[2]] = True
    for layer, h in heads:
        for i in range(values[layer].shape[-1]):
            keep_up_to([p for p in places(layer, h) if p[2] == i], row)
    for layer, h in heads:
        keep_up_to(places(layer, h), head)
    groups = {
        "head": [[pair] for pair in heads],
        "layer": [[p for p in heads if p[0] == layer] for layer in range(len(values))],
        "model": [heads],
    }[scope]
    for group in groups:
        candidates = [p for layer, h in group for p in places(layer, h)]
        keep_up_to(candidates, int(density * len(candidates) + 1e-9))
    return kept


@pytest.mark.parametrize("device", CPU_AND_GPU)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("floors", [(1, 0), (0, 0), (2, 0), (1, 12)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scope", ["head", "layer", "model"])
def test_it_is_what_its_definition_says(
    scope: str, causal: bool, floors: tuple[int, int], ties: bool, device: str
) -> None:
    given = maps((2, 6), (3, 6), ties=ties)
    row, head = floors
    found = budget_patterns(
        [one.to(device) for one in given],
        0.6,
        scope=scope,
        causal=causal,
        row_blocks=row,
        head_blocks=head,
    )
    wanted = by_loops(given, 0.6, scope, causal, row, head)
    assert [tuple(one.shape) for one in found] == [(2, 6, 6), (3, 6, 6)]
    assert {one.device.type for one in found} == {device}
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.cpu(), torch.from_numpy(theirs))


@pytest.mark.parametrize("scope", ["head", "layer", "model"])
@pytest.mark.parametrize(("density", "kept"), [(0.29, 29), (0.5, 50), (1.0, 100)])
def test_the_density_is_of_the_blocks_that_may_be_kept(
    scope: str, density: float, kept: int
) -> None:
    found = budget_patterns(maps((1, 10)), density, scope=scope)
    assert int(found[0].sum()) == kept
    half = budget_patterns(maps((4, 10)), density, scope=scope, causal=True)[0]
    assert int(half.sum()) == (4 * int(55 * density) if scope == "head" else int(220 * density))
    assert not half.triu(1).any()


def test_a_head_that_needs_far_blocks_gets_the_budget_of_one_that_does_not() -> None:
    near, far = 0.9 * torch.eye(8).double() + 1e-3, torch.full((8, 8), 0.125).double()
    shared = budget_patterns([torch.stack([near, far])], 0.5)[0]
    assert shared[0].sum() == 8
    assert shared[1].sum() == 56
    alone = budget_patterns([torch.stack([near, far])], 0.5, scope="head")[0]
    assert alone.sum(dim=(1, 2)).tolist() == [32, 32]


def test_layers_compete_only_where_the_scope_is_the_model() -> None:
    quiet, loud = maps((1, 6))[0], 10.0 * maps((1, 6), seed=1)[0]
    first, second = budget_patterns([quiet, loud], 0.5, scope="model")
    assert (int(first.sum()), int(second.sum())) == (6, 30)
    alone = budget_patterns([quiet, loud], 0.5)
    assert [int(one.sum()) for one in alone] == [18, 18]


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (maps((2, 8)), {"density": 0.1}, r"density is 0\.1; allowed: from 0\.125 up: .* 16 of"),
        (maps((2, 8)), {"density": 0.2, "row_blocks": 2}, r"allowed: from 0\.25 up"),
        (maps((2, 8)), {"density": 0.2, "causal": True}, r"from 0\.2223 up: .* 16 of the 72"),
        (maps((2, 8)), {"density": 0}, "density is 0"),
        (
            maps((2, 8)),
            {"density": 0.5, "scope": "all"},
            "unknown scope 'all'; known: head",
        ),
        (maps((2, 8)), {"density": 0.5, "row_blocks": 1.5}, r"row_blocks is 1\.5"),
        (maps((2, 8)), {"density": 0.5, "head_blocks": -1}, "head_blocks is -1"),
        (maps((1, 8), (1, 4)), {"density": 0.5, "scope": "model"}, r"layers have \[4, 8\] blocks"),
        ([torch.rand(8, 8)], {"density": 0.5}, r"layer 0 has shape \(8, 8\); allowed: \(heads"),
        ([torch.full((1, 4, 4), torch.nan)], {"density": 0.5}, "layer 0 .* NaN or infinite"),
        ([torch.ones(1, 4, 4).long()], {"density": 0.5}, "dtype torch.int64"),
    ],
)
def test_what_cannot_be_is_named(given: list[Tensor], options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        budget_patterns(given, **options)


def test_no_layers_have_no_patterns() -> None:
    assert budget_patterns([], 0.5, scope="model") == []
