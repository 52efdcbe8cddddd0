"""SpionSparsityConfig: dense, then the pattern that its variant finds in a pooled map."""

from __future__ import annotations

import pytest
import torch

from spion_ds.errors import ConfigError
from spion_ds.patterns import pool_map, spion_c, spion_cf, spion_f
from spion_ds.sparsity import FixedSparsityConfig, SpionSparsityConfig

LENGTH, BLOCK = 60, 6


def attention_map() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(LENGTH, LENGTH, generator=generator).mul(4).softmax(-1)


def test_defaults_are_the_published_ones_of_listops():
    config = SpionSparsityConfig(2)
    assert (config.block, config.variant, config.filter_size) == (64, "cf", 31)
    assert (config.alpha, config.density) == (0.98, 0.04)
    assert config.num_layout_heads == 1
    assert config.pattern is None


@pytest.mark.parametrize(
    ("variant", "convolution", "expected"),
    [
        ("cf", 5, lambda a: spion_cf(a, BLOCK, 0.8, 5)),
        ("c", 5, lambda a: spion_c(a, BLOCK, 0.3, 5)),
        ("f", None, lambda a: spion_f(a, BLOCK, 0.8)),
    ],
)
def test_each_variant_pools_and_finds_its_pattern(variant, convolution, expected):
    config = SpionSparsityConfig(2, BLOCK, variant=variant, alpha=0.8, density=0.3, filter_size=5)
    a = attention_map()
    assert config.convolution == convolution
    pooled = config.pool(a)
    assert torch.equal(pooled, pool_map(a, BLOCK, convolution))
    found = config.find_pattern(pooled)
    assert torch.equal(found, expected(a))
    assert config.pattern is None  # finding sets nothing


@pytest.mark.parametrize("heads", [1, 4])
def test_the_layout_is_dense_until_there_is_a_pattern_and_shared_by_all_heads(heads):
    config = SpionSparsityConfig(heads, 16)
    dense = torch.ones(heads, 3, 3, dtype=torch.int64)
    assert torch.equal(config.make_layout(48), dense)
    pattern = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    config.set_pattern(pattern)
    layout = config.make_layout(48)
    assert layout.dtype == torch.int64
    assert layout.device.type == "cpu"
    assert torch.equal(layout, pattern.long().expand(heads, 3, 3))
    layout.zero_()  # a caller's own
    assert torch.equal(config.make_layout(48), pattern.long().expand(heads, 3, 3))
    config.set_pattern(None)
    assert config.pattern is None
    assert torch.equal(config.make_layout(48), dense)


def test_masks_are_the_layouts_of_the_heads():
    config = SpionSparsityConfig(3, 16)
    assert torch.equal(config.make_mask(33), config.make_layout(48)[0].bool())
    pattern = torch.eye(3, dtype=torch.bool)
    config.set_pattern(pattern)
    assert torch.equal(config.make_mask(33), pattern)  # a last block that is partial counts
    with pytest.raises(ConfigError, match="the pattern was found at 48 tokens"):
        config.make_mask(49)
    for per_head in (False, True):
        classic = FixedSparsityConfig(
            4, 16, per_head, num_different_global_patterns=4 if per_head else 1
        )
        layout = classic.make_layout(160).bool()
        assert torch.equal(classic.make_mask(150), layout if per_head else layout[0])


def test_a_greater_length_than_the_patterns_is_an_error_that_names_both():
    config = SpionSparsityConfig(2, 16)
    config.set_pattern(torch.eye(3))
    with pytest.raises(ConfigError, match="found at 48 tokens and the input has 64"):
        config.make_layout(64)
    with pytest.raises(ConfigError, match="50 is not a multiple of the block 16"):
        config.make_layout(50)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"different_layout_per_head": 1}, "different_layout_per_head is 1; allowed: True or"),
        ({"variant": "fc"}, "unknown SPION variant 'fc'.*known: c, cf, f"),
        ({"alpha": 1.5}, "alpha is 1.5; allowed: 0 to 1"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"density": 0.0}, "density is 0.0; allowed: above 0, up to 1"),
        ({"density": 1.1}, "density is 1.1"),
        ({"filter_size": 4}, "filter_size is 4; allowed: odd whole numbers"),
        ({"filter_size": 0}, "filter_size is 0"),
        ({"filter_size": -3}, "filter_size is -3"),
        ({"filter_size": 31.0}, "filter_size is 31.0"),
        ({"block": 0}, "block is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        SpionSparsityConfig(**{"num_heads": 2, **arguments})
