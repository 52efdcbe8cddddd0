"""SAT's pattern against cases worked out by hand, and its loss against the definition."""

from __future__ import annotations

import pytest
import torch

from spion_ds.errors import ConfigError
from spion_ds.patterns import pattern_loss, sat_pattern


def kept(pattern: torch.Tensor) -> list[list[int]]:
    return pattern.nonzero().tolist()


# W·Wᵀ = [[9, 0, 3, 6], [0, 1, 0, 0], [3, 0, 1, 2], [6, 0, 2, 4]].
WEIGHT = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 0.0], [2.0, 0.0]])


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        (0.07, [[0, 0]]),  # int(16 · 0.07) = 1
        (0.12, [[0, 0]]),  # int(1.92) = 1: cut, not rounded
        (0.1875, [[0, 0], [0, 3], [3, 0]]),
        (0.25, [[0, 0], [0, 3], [3, 0], [3, 3]]),
        # (0, 2) and (2, 0) tie at 3: the earlier in row-major order.
        (0.3125, [[0, 0], [0, 2], [0, 3], [3, 0], [3, 3]]),
    ],
)
def test_the_largest_entries_are_kept_and_no_diagonal_is_forced(density, expected):
    assert kept(sat_pattern(WEIGHT, density)) == expected


def test_every_density_keeps_int_of_n2_density_blocks():
    weight = torch.rand(37, 32, generator=torch.Generator().manual_seed(0))
    for density in (0.021, 0.04, 0.05, 0.5, 1.0):
        assert int(sat_pattern(weight, density).sum()) == int(37 * 37 * density)
    assert not sat_pattern(weight, 0.0007).any()  # int(0.96) = 0


def test_mirrored_blocks_tie_whatever_the_products_rounding():
    weight = torch.rand(64, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    for count in range(200, 260):
        pattern = sat_pattern(weight, (count + 0.5) / 64**2)
        # An odd number off the diagonal leaves one pair split: its earlier half stays.
        lonely = kept(pattern & ~pattern.T)
        assert len(lonely) <= 1
        assert all(row < column for row, column in lonely)


@pytest.mark.parametrize("heads_and_samples", [1, 6])
def test_the_loss_has_the_gradient_of_the_published_one(heads_and_samples):
    generator = torch.Generator().manual_seed(2)
    weight = torch.rand(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    maps = torch.rand(heads_and_samples, 5, 5, generator=generator, dtype=torch.float64)
    published = (weight @ weight.T - maps).square().mean()
    [expected] = torch.autograd.grad(published, weight)
    loss = pattern_loss(weight, maps.mean(dim=0))
    [found] = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)
    variance = maps.var(dim=0, correction=0).mean()
    torch.testing.assert_close(loss + variance, published, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.rand(3), 0.5), r"weight has shape \(3,\)"),
        ((torch.ones(3, 2).long(), 0.5), r"dtype torch\.int64; allowed: \(n, head_dim\) floating"),
        ((torch.full((3, 2), float("nan")), 0.5), "weight has NaN or infinite"),
        ((torch.rand(3, 2), 0.0), "density is 0.0; allowed: above 0, up to 1"),
        ((torch.rand(3, 2), None), "density is None"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        sat_pattern(*arguments)
