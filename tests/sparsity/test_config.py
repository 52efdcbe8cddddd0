"""SparsityConfig under DeepSpeed's contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spion_ds.errors import ConfigError
from spion_ds.sparsity import DenseSparsityConfig, SparsityConfig


def test_attributes_and_defaults_are_deepspeeds():
    config = SparsityConfig(num_heads=4)
    assert (config.num_heads, config.block) == (4, 16)
    assert config.different_layout_per_head is False
    assert config.num_layout_heads == 1
    per_head = SparsityConfig(4, 32, True)
    assert (per_head.block, per_head.num_layout_heads) == (32, 4)


@pytest.mark.parametrize(("seq_len", "block", "n"), [(64, 16, 4), (16, 16, 1), (96, 32, 3)])
def test_setup_layout_is_all_zero_int64_on_the_cpu(seq_len, block, n):
    layout = SparsityConfig(3, block).setup_layout(seq_len)
    assert layout.shape == (3, n, n)
    assert layout.dtype == torch.int64
    assert layout.device.type == "cpu"
    assert not layout.any()


@pytest.mark.parametrize(
    ("seq_len", "advice"), [(63, "64"), (65, "80"), (1, "16"), (0, "16"), (-16, "16")]
)
def test_a_length_that_does_not_divide_is_an_error_that_says_what_does(seq_len, advice):
    # DeepSpeed raises ValueError here.
    with pytest.raises(
        ValueError, match=f"{seq_len} is not a multiple of the block 16; pad .* to {advice} tokens"
    ):
        SparsityConfig(1, 16).setup_layout(seq_len)


def test_the_first_heads_layout_goes_to_all_heads_unless_each_has_its_own():
    drawn = torch.randint(0, 2, (3, 4, 4), generator=torch.Generator().manual_seed(0))
    layout = drawn.clone()
    shared = SparsityConfig(3).check_and_propagate_first_head_layout(layout)
    assert shared is layout
    assert torch.equal(shared, drawn[:1].expand(3, 4, 4))
    layout = drawn.clone()
    own = SparsityConfig(3, different_layout_per_head=True)
    assert torch.equal(own.check_and_propagate_first_head_layout(layout), drawn)


@pytest.mark.parametrize("per_head", [False, True])
def test_dense_keeps_every_block(per_head):
    layout = DenseSparsityConfig(2, 16, per_head).make_layout(48)
    assert layout.dtype == torch.int64
    assert torch.equal(layout, torch.ones(2, 3, 3, dtype=torch.int64))
    with pytest.raises(ConfigError, match="50 is not a multiple"):
        DenseSparsityConfig(2, 16).make_layout(50)


def test_a_subclass_needs_a_make_layout_and_nothing_more():
    class Diagonal(SparsityConfig):
        def make_layout(self, seq_len: int) -> Tensor:
            layout = self.setup_layout(seq_len)
            layout[0].fill_diagonal_(1)
            return self.check_and_propagate_first_head_layout(layout)

    eye = torch.eye(3, dtype=torch.int64)
    assert torch.equal(Diagonal(2).make_layout(48), eye.expand(2, 3, 3))
    with pytest.raises(NotImplementedError, match="SparsityConfig does not define make_layout"):
        SparsityConfig(2).make_layout(48)


@pytest.mark.parametrize("value", [0, -1, 1.5, "16", None, True])
@pytest.mark.parametrize("name", ["num_heads", "block"])
def test_wrong_numbers_are_named(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value!r}; allowed: a whole number from 1"):
        SparsityConfig(**{"num_heads": 2, "block": 16, name: value})
