"""SwitchingSparsityConfig: a pattern for all heads or one a head, and the inputs it serves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spion_ds.attention import BlockLayout
from spion_ds.errors import ConfigError
from spion_ds.patterns import pattern_from_pooled, pool_map
from spion_ds.sparsity import (
    BigBirdSparsityConfig,
    SatSparsityConfig,
    SpionSparsityConfig,
    SwitchingSparsityConfig,
    find_patterns,
)

HEADS, BLOCK = 3, 16


def config(per_head: bool) -> SpionSparsityConfig:
    return SpionSparsityConfig(HEADS, BLOCK, per_head, alpha=0.8)


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def pattern(per_head: bool, n: int = 4) -> Tensor:
    return random(*((HEADS,) if per_head else ()), n, n) < 0.4


@pytest.mark.parametrize("per_head", [False, True])
def test_a_layer_is_dense_until_a_pattern_is_set_and_dense_again_without(per_head):
    layer = config(per_head)
    assert layer.pattern is None
    dense = torch.ones(HEADS, 4, 4, dtype=torch.bool)
    for _ in range(2):
        mask = layer.make_mask(61)
        assert mask.dtype == torch.bool
        assert torch.equal(mask, dense if per_head else dense[0])
        assert torch.equal(layer.make_layout(64), dense.long())
        layer.set_pattern(pattern(per_head))
        layer.set_pattern(None)


def test_each_head_has_its_own_layout():
    layer, found = config(True), pattern(True)
    layer.set_pattern(found)
    assert torch.equal(layer.pattern, found)
    assert torch.equal(layer.make_mask(64), found)
    assert torch.equal(layer.make_layout(64), found.long())
    assert layer.num_layout_heads == HEADS


def test_layouts_are_the_callers_own():
    layer, found = config(True), pattern(True)
    layer.set_pattern(found)
    layer.make_layout(64).zero_()
    assert torch.equal(layer.make_layout(64), found.long())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
@pytest.mark.parametrize("per_head", [False, True])
def test_patterns_of_0_and_1_of_any_type_are_copied_to_bool(per_head, dtype):
    layer, found = config(per_head), pattern(per_head)
    given = found.to(dtype, copy=True)
    layer.set_pattern(given)
    given.fill_(1)
    assert layer.pattern.dtype == torch.bool
    assert torch.equal(layer.pattern, found)


@pytest.mark.parametrize("per_head", [False, True])
def test_a_new_pattern_is_another_object_even_if_it_is_the_old_one(per_head):
    # What holds a layout of it sees by identity that it is out of date.
    layer = config(per_head)
    layer.set_pattern(pattern(per_head))
    first = layer.pattern
    layer.set_pattern(first)
    assert layer.pattern is not first
    assert torch.equal(layer.pattern, first)


def test_a_strided_pattern_is_read_as_it_looks():
    layer, found = config(True), pattern(True)
    layer.set_pattern(found.transpose(1, 2))
    assert torch.equal(layer.pattern, found.transpose(1, 2))
    assert layer.pattern.is_contiguous()


BAD_SHAPES = {
    False: [(4,), (4, 5), (0, 0), (1, 4, 4), (HEADS, 4, 4), (1, 1, 4, 4)],
    True: [(4,), (4, 4), (HEADS, 4, 5), (HEADS, 0, 0), (1, 4, 4), (HEADS + 1, 4, 4)],
}


@pytest.mark.parametrize(
    ("per_head", "shape"), [(per_head, s) for per_head in BAD_SHAPES for s in BAD_SHAPES[per_head]]
)
def test_other_shapes_are_never_reshaped(per_head, shape):
    layer, before = config(per_head), pattern(per_head)
    layer.set_pattern(before)
    wanted = r"\(3, n, n\), .* 3 heads" if per_head else r"a square \(n, n\) mask"
    named = rf"pattern has shape \({', '.join(map(str, shape))},?\); allowed: {wanted}"
    with pytest.raises(ConfigError, match=named):
        layer.set_pattern(torch.ones(shape))
    assert torch.equal(layer.pattern, before)


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("per_head", [False, True])
def test_values_beside_0_and_1_are_refused(per_head, value):
    layer = config(per_head)
    wrong = pattern(per_head).float()
    wrong[..., 1, 2] = value
    with pytest.raises(ConfigError, match=r"pattern \(torch.float32\) holds other values than 0"):
        layer.set_pattern(wrong)
    assert layer.pattern is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (BlockLayout.from_mask(torch.eye(4), BLOCK), r"is a BlockLayout; .* layout.to_mask\(\)"),
        ([[1, 0], [0, 1]], "pattern is a list; allowed: a tensor"),
        (True, "pattern is a bool; allowed: a tensor"),
    ],
)
def test_what_is_no_tensor_is_named(wrong, words):
    with pytest.raises(ConfigError, match=words):
        config(False).set_pattern(wrong)


@pytest.mark.parametrize("longer", ["error", "local"])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("length", "n"), [(64, 4), (50, 4), (48, 3), (33, 3), (1, 1)])
def test_shorter_inputs_get_the_upper_left_of_the_pattern(length, n, per_head, longer):
    layer, found = config(per_head), pattern(per_head)
    layer.set_pattern(found)
    assert torch.equal(layer.make_mask(length, longer), found[..., :n, :n])


def test_layouts_of_shorter_inputs_are_the_upper_left_too():
    layer, found = config(False), pattern(False)
    layer.set_pattern(found)
    assert torch.equal(layer.make_layout(32), found[:2, :2].long().expand(HEADS, 2, 2))


@pytest.mark.parametrize("per_head", [False, True])
def test_longer_inputs_are_an_error_that_names_both_lengths_and_the_way_out(per_head):
    layer = config(per_head)
    layer.set_pattern(pattern(per_head))
    words = 'found at 64 tokens and the input has 65; cut .* 64 tokens, .* longer="local"'
    with pytest.raises(ConfigError, match=words):
        layer.make_mask(65)
    with pytest.raises(ConfigError, match="found at 64 tokens and the input has 80"):
        layer.make_layout(80)


def test_longer_inputs_go_on_with_local_blocks_where_asked():
    layer, found = config(False), pattern(False)
    layer.set_pattern(found)
    expected = torch.tensor(
        [
            [*found[0].tolist(), 0, 0, 0],
            [*found[1].tolist(), 0, 0, 0],
            [*found[2].tolist(), 0, 0, 0],
            [*found[3].tolist(), 1, 0, 0],
            [1, 0, 0, 1, 1, 1, 0],
            [1, 0, 0, 0, 1, 1, 1],
            [1, 0, 0, 0, 0, 1, 1],
        ]
    ).bool()
    assert torch.equal(layer.make_mask(100, "local"), expected)
    assert torch.equal(layer.pattern, found)


def test_every_head_goes_on_with_the_same_local_blocks():
    layer, found = config(True), pattern(True)
    layer.set_pattern(found)
    one = config(False)
    for head, mask in enumerate(layer.make_mask(100, longer="local")):
        one.set_pattern(found[head])
        assert torch.equal(mask, one.make_mask(100, longer="local"))


def test_an_unknown_way_for_longer_inputs_is_named():
    with pytest.raises(ConfigError, match="unknown value of longer 'crop'; known: error, local"):
        config(False).make_mask(64, longer="crop")


@pytest.mark.parametrize("variant", ["cf", "f", "c"])
def test_the_pattern_of_a_head_is_that_of_its_own_map(variant):
    layer = SpionSparsityConfig(HEADS, BLOCK, True, variant=variant, alpha=0.8, density=0.3)
    maps = random(HEADS, 7, 7)
    found = layer.find_pattern(maps)
    alone = [pattern_from_pooled(a, variant, alpha=0.8, density=0.3) for a in maps]
    assert torch.equal(found, torch.stack(alone))
    assert layer.pattern is None  # finding sets nothing
    layer.set_pattern(found)


def test_maps_of_heads_are_pooled_one_by_one():
    layer, maps = config(True), random(HEADS, 50, 50)
    expected = torch.stack([pool_map(a, BLOCK, 31) for a in maps])
    assert torch.equal(layer.pool(maps), expected)
    with pytest.raises(ConfigError, match=r"attention_map has shape \(50, 50\); allowed: \(3, n"):
        layer.pool(maps[0])


@pytest.mark.parametrize(
    ("per_head", "source", "words"),
    [
        (True, random(5, 5), r"pooled has shape \(5, 5\); allowed: \(3, n, n\), a map a head"),
        (True, random(HEADS + 1, 5, 5), r"pooled has shape \(4, 5, 5\); allowed: \(3, n, n\)"),
        (True, random(HEADS, 5, 4), r"pooled has shape \(3, 5, 4\)"),
        (True, torch.full((HEADS, 5, 5), float("nan")), "25 entries that are NaN or infinite"),
        (False, random(HEADS, 5, 5), r"pooled has shape \(3, 5, 5\); allowed: a square \(n, n\)"),
        (False, random(5, 4), r"pooled has shape \(5, 4\)"),
    ],
)
def test_sources_that_do_not_fit_are_named(per_head, source, words):
    with pytest.raises(ConfigError, match=words):
        config(per_head).find_pattern(source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_entry_of_one_head_that_is_not_finite_is_refused(value):
    maps = random(HEADS, 5, 5)
    maps[HEADS - 1, 4, 4] = value
    with pytest.raises(ConfigError, match="has 1 entries that are NaN or infinite"):
        config(True).find_pattern(maps)


def test_the_one_function_makes_the_patterns_of_all_layers_in_their_order():
    layers = [
        config(False),
        SatSparsityConfig(2, 32, density=0.3),
        config(True),
        SpionSparsityConfig(1, 64, variant="c", density=0.5),
    ]
    sources = [random(5, 5), random(4, 8), random(HEADS, 6, 6), random(3, 3)]
    found = find_patterns(layers, sources)
    expected = [layer.find_pattern(source) for layer, source in zip(layers, sources, strict=True)]
    assert len(found) == 4
    for one, other, layer in zip(found, expected, layers, strict=True):
        assert torch.equal(one, other)
        assert layer.pattern is None


def test_the_layers_of_a_class_are_handed_over_together():
    seen = []

    class Competing(SwitchingSparsityConfig):
        @classmethod
        def find_patterns(cls, configs, sources):
            seen.append((configs, sources))
            return [torch.eye(2) * number for number, _ in enumerate(configs)]

    layers = [Competing(1), config(False), Competing(1)]
    sources = [random(2, 2), random(4, 4), random(3, 3)]
    found = find_patterns(layers, sources)
    assert seen == [([layers[0], layers[2]], [sources[0], sources[2]])]
    assert torch.equal(found[0], torch.zeros(2, 2))
    assert torch.equal(found[2], torch.eye(2))
    assert torch.equal(found[1], layers[1].find_pattern(sources[1]))


def test_what_does_not_fit_the_layers_is_named():
    class Short(SwitchingSparsityConfig):
        @classmethod
        def find_patterns(cls, configs, sources):
            return []

    with pytest.raises(ConfigError, match="sources has 1 entries for 2 layers; allowed: one a"):
        find_patterns([config(False)] * 2, [random(4, 4)])
    with pytest.raises(ConfigError, match="layer 1 has a BigBirdSparsityConfig, whose pattern is"):
        find_patterns([config(False), BigBirdSparsityConfig(2)], [random(4, 4)] * 2)
    with pytest.raises(ConfigError, match=r"Short\.find_patterns returned 0 patterns for 1 layers"):
        find_patterns([Short(1)], [random(4, 4)])


def test_a_misplaced_argument_is_not_taken_for_a_pattern_a_head():
    with pytest.raises(ConfigError, match="different_layout_per_head is 'cf'; allowed: True or"):
        SpionSparsityConfig(HEADS, BLOCK, "cf")
