"""SatSparsityConfig: dense, then the pattern that W gives."""

from __future__ import annotations

import pytest
import torch

from spion_ds.errors import ConfigError
from spion_ds.patterns import pool_map, sat_pattern
from spion_ds.sparsity import SatSparsityConfig


def test_it_is_dense_until_it_has_the_pattern_of_its_weight():
    config = SatSparsityConfig(2, 16, density=0.3)
    weight = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(config.make_layout(64), torch.ones(2, 4, 4, dtype=torch.int64))
    pattern = config.find_pattern(weight)
    assert torch.equal(pattern, sat_pattern(weight, 0.3))
    assert config.pattern is None  # finding sets nothing
    config.set_pattern(pattern)
    assert torch.equal(config.make_layout(64), pattern.long().expand(2, 4, 4))
    config.set_pattern(None)
    assert bool(config.make_layout(64).all())


def test_its_maps_are_pooled_without_a_convolution():
    a = torch.rand(64, 64, generator=torch.Generator().manual_seed(1))
    config = SatSparsityConfig(2, 16)
    assert config.convolution is None
    assert torch.equal(config.pool(a), pool_map(a, 16))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"different_layout_per_head": True}, "different_layout_per_head is True; .* leave it"),
        ({"density": 0.0}, "density is 0.0; allowed: above 0, up to 1"),
        ({"density": float("nan")}, "density is nan"),
        ({"block": 0}, "block is 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        SatSparsityConfig(**{"num_heads": 2, **arguments})
