"""The classic layouts: DeepSpeed 0.19.6's bit for bit, random blocks in structure."""

from __future__ import annotations

import inspect
import itertools
import random
import subprocess
import sys

import pytest
import torch

import spion_ds.sparsity as ours
from spion_ds.errors import ConfigError

DIRECTIONS = ("bidirectional", "unidirectional")
BLOCKS = (1, 2, 3, 5, 9)  # numbers of blocks a side: short, odd, with a last window cut short

# The arguments without random blocks, and their values in all combinations.
GRIDS: dict[str, dict[str, list]] = {
    "DenseSparsityConfig": {"different_layout_per_head": [False, True]},
    "FixedSparsityConfig": {
        "different_layout_per_head": [False, True],
        "num_local_blocks": [1, 3, 4],
        "num_global_blocks": [1, 2, 4],
        "attention": DIRECTIONS,
        "horizontal_global_attention": [False, True],
        "num_different_global_patterns": [1, 3],
    },
    "VariableSparsityConfig": {
        "different_layout_per_head": [False, True],
        "local_window_blocks": [[4], [2, 3], [1, 1, 2]],
        "global_block_indices": [[0], [1, 4], [], [30], [-1]],
        "global_block_end_indices": [None, [3], [3, 7]],
        "attention": DIRECTIONS,
        "horizontal_global_attention": [False, True],
    },
    "BigBirdSparsityConfig": {
        "different_layout_per_head": [False, True],
        "num_random_blocks": [0],
        "num_sliding_window_blocks": [0, 1, 3, 4],
        "num_global_blocks": [0, 1, 2],
        "attention": DIRECTIONS,
    },
    "BSLongformerSparsityConfig": {
        "different_layout_per_head": [False, True],
        "num_sliding_window_blocks": [1, 3],
        "global_block_indices": [[0], [1, 4], [], [30], [-1]],
        "global_block_end_indices": [None, [3], [3, 7]],
        "attention": DIRECTIONS,
    },
    "LocalSlidingWindowSparsityConfig": {
        "num_sliding_window_blocks": [1, 2, 3, 5],
        "attention": DIRECTIONS,
    },
}


def layout_or_refusal(module, name: str, arguments: dict, blocks: int):
    try:
        return getattr(module, name)(3, 16, **arguments).make_layout(16 * blocks)
    except (ValueError, NotImplementedError):
        return None


@pytest.mark.parametrize("name", GRIDS)
def test_layouts_are_deepspeeds_bit_for_bit(name, deepspeeds):
    grid, compared = GRIDS[name], 0
    for values in itertools.product(*grid.values()):
        arguments = dict(zip(grid, values, strict=True))
        for blocks in BLOCKS:
            theirs = layout_or_refusal(deepspeeds, name, arguments, blocks)
            layout = layout_or_refusal(ours, name, arguments, blocks)
            if theirs is None or layout is None:
                assert theirs is layout, (arguments, blocks)
                continue
            assert layout.dtype == theirs.dtype
            assert torch.equal(layout, theirs), (arguments, blocks)
            compared += 1
    assert compared > 0


@pytest.mark.parametrize("name", [*GRIDS, "SparsityConfig"])
def test_arguments_and_defaults_are_deepspeeds(name, deepspeeds):
    theirs = inspect.signature(getattr(deepspeeds, name)).parameters
    mine = inspect.signature(getattr(ours, name)).parameters
    assert list(mine)[: len(theirs)] == list(theirs)
    assert set(mine) - set(theirs) <= {"seed"}
    for argument, parameter in theirs.items():
        default = mine[argument].default
        assert (list(default) if isinstance(default, tuple) else default) == parameter.default


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("count", [1, 2])
def test_bigbirds_random_blocks_are_those_that_deepspeed_may_draw(per_head, direction, count):
    def make(random_blocks, seed):
        config = ours.BigBirdSparsityConfig(
            3, 16, per_head, random_blocks, 1, 0, direction, seed=seed
        )
        return config.make_layout(16 * 12)

    for seed in range(5):
        drawn = make(count, seed) - make(0, seed)  # beside the diagonal
        assert drawn.unique().tolist() == [0, 1]
        assert int(drawn.sum(dim=2).max()) <= count
        if direction == "unidirectional":
            assert not drawn.triu(1).any()
        assert torch.equal(drawn[0], drawn[1]) is not per_head
    assert not torch.equal(make(count, 0), make(count, 1))


def test_every_row_of_a_random_layout_keeps_exactly_as_many_blocks():
    config = ours.VariableSparsityConfig(2, 16, True, 3, [1], [], attention="unidirectional")
    layout = config.make_layout(16 * 10)
    layout[:, range(10), range(10)] = 0  # the windows of one block
    assert set(layout.sum(dim=2).flatten().tolist()) <= {2, 3}
    assert layout.triu(1).any()  # as in DeepSpeed, "unidirectional" does not bind them here
    with pytest.raises(ConfigError, match="num_random_blocks is 3, and a row has 2 blocks"):
        config.make_layout(32)


def test_the_first_rows_of_a_causal_random_layout_keep_what_there_is():
    # DeepSpeed's sampling fails in row 0 for more than one block.
    config = ours.BigBirdSparsityConfig(1, 16, False, 3, 1, 0, "unidirectional")
    layout = config.make_layout(16 * 6)
    assert layout[0, :3].equal(torch.ones(3, 6, dtype=torch.int64).tril())


def test_random_blocks_come_from_the_seed_alone():
    classes = ("BigBirdSparsityConfig", "VariableSparsityConfig")
    before = random.getstate(), torch.get_rng_state()
    here = [
        getattr(ours, name)(2, 16, True, num_random_blocks=2).make_layout(160).flatten().tolist()
        for name in classes
    ]
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    # Another process, as another rank is, with other generator states.
    script = f"""
import random, torch, spion_ds.sparsity as s
random.seed(7), torch.manual_seed(7)
for name in {classes}:
    print(getattr(s, name)(2, 16, True, num_random_blocks=2).make_layout(160).flatten().tolist())
"""
    words = [sys.executable, "-c", script]
    there = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert there.splitlines() == [str(layout) for layout in here]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("Fixed", {"num_local_blocks": 0}, "num_local_blocks is 0; allowed: .* from 1 up"),
        ("Fixed", {"num_global_blocks": 3}, "num_global_blocks is 3; allowed: a divisor of .* 4"),
        ("Fixed", {"attention": "causal"}, "attention is 'causal'; allowed: bidirectional or"),
        (
            "Fixed",
            {"attention": "unidirectional", "horizontal_global_attention": True},
            "horizontal_global_attention is True .* allowed with 'bidirectional' only",
        ),
        (
            "Fixed",
            {"num_different_global_patterns": 2},
            "num_different_global_patterns is 2 .* set different_layout_per_head to True",
        ),
        (
            "Fixed",
            {"num_different_global_patterns": 5, "different_layout_per_head": True},
            "num_different_global_patterns is 5; allowed: at most .* 4",
        ),
        ("Variable", {"local_window_blocks": []}, "local_window_blocks is .*; allowed: one or"),
        ("Variable", {"local_window_blocks": [2, 0]}, "local_window_blocks is .2, 0.; allowed"),
        ("Variable", {"global_block_indices": [0.5]}, "global_block_indices is .0.5.; allowed"),
        ("Variable", {"global_block_end_indices": [1, 2]}, "has 2 entries and .* 1; give one end"),
        ("BSLongformer", {"global_block_end_indices": [0]}, "0 for the start 0; allowed: .* 1 up"),
        ("BSLongformer", {"attention": None}, "attention is None"),
        ("BigBird", {"num_random_blocks": -1}, "num_random_blocks is -1"),
        ("BigBird", {"seed": -1}, "seed is -1"),
        ("LocalSlidingWindow", {"num_sliding_window_blocks": "3"}, "sliding_window_blocks is '3'"),
    ],
)
def test_wrong_arguments_are_named(name, arguments, words):
    with pytest.raises(ConfigError, match=words):
        getattr(ours, f"{name}SparsityConfig")(2, **arguments)


@pytest.mark.parametrize("name", ["BigBird", "BSLongformer", "LocalSlidingWindow"])
def test_an_input_shorter_than_the_window_is_named(name):
    config = getattr(ours, f"{name}SparsityConfig")(2)
    with pytest.raises(ConfigError, match="num_sliding_window_blocks is 3, and a row has 2"):
        config.make_layout(32)


def test_configurations_do_not_share_their_lists():
    first, second = ours.VariableSparsityConfig(2), ours.VariableSparsityConfig(2)
    first.global_block_indices.append(3)
    first.local_window_blocks[0] = 1
    assert second.global_block_indices == [0]
    assert second.local_window_blocks == [4]
