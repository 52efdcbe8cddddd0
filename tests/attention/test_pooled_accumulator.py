"""PooledMapAccumulator: two ways of averaging, maps of heads, inputs of several lengths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spion_ds.attention import PooledMapAccumulator, attention_map, attention_skewness
from spion_ds.attention.map_dispatch import skewness
from spion_ds.attention.map_request import mean_row_weights, row_counts
from spion_ds.errors import ConfigError
from spion_ds.patterns import pool_map

from .cases import FLOAT64_TOLERANCE, draw_padding, relative_error

# float32 scores and probabilities: some ten roundings of 6e-8 an entry.
FLOAT32_TOLERANCE = 1e-6
BLOCK, FILTER = 16, 31


def drawn(length: int, batch: int = 3, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    shape = (batch, 4, length, 8)
    return torch.randn(shape, dtype=dtype), torch.randn(batch, 2, length, 8, dtype=dtype)


def padded(x: Tensor, length: int, value: float) -> Tensor:
    """(B, H, L, D) with tokens of ``value`` behind its own."""
    more = x.new_full((*x.shape[:2], length - x.shape[2], x.shape[3]), value)
    return torch.cat([x, more], dim=2)


@pytest.mark.parametrize("per_head", [False, True])
def test_with_row_weights_ranks_and_micro_batches_give_the_exact_mean(per_head, device):
    q, k = (x.to(device) for x in drawn(61, 5, torch.float64))
    real = draw_padding("tail", 5, 61).to(device)
    weights = mean_row_weights(row_counts(real, 1 if per_head else 4))
    ranks = [PooledMapAccumulator(BLOCK, FILTER, weights, per_head=per_head) for _ in range(2)]
    for rank, part in ((0, slice(0, 1)), (1, slice(1, 3)), (0, slice(3, 5))):
        ranks[rank].add(q[part], k[part], real[part])
    total = ranks[0].total + ranks[1].total
    tokens = attention_map(q, k, key_padding_mask=real, per_head=per_head)
    expected = [pool_map(a, BLOCK, FILTER) for a in (tokens if per_head else tokens[None])]
    expected = torch.stack(expected) if per_head else expected[0]
    assert total.shape == expected.shape
    assert total.dtype == torch.float64
    assert relative_error(total, expected) < FLOAT64_TOLERANCE
    assert [rank.added for rank in ranks] == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("per_head", [False, True])
def test_without_them_the_total_is_the_sum_of_the_maps_of_micro_batches(per_head, dtype, device):
    seen = PooledMapAccumulator(BLOCK, FILTER, per_head=per_head)
    options = {"causal": True, "scale": 0.3}
    expected = 0.0
    for batch in (3, 1, 2):
        q, k = (x.to(device) for x in drawn(61, batch, dtype))
        real = draw_padding("holes", batch, 61).to(device)
        seen.add(q, k, real, **options)
        of_batch = {"block": BLOCK, "filter_size": FILTER, "key_padding_mask": real}
        expected = expected + attention_map(q, k, per_head=per_head, **of_batch, **options)
    assert seen.added == 3
    assert torch.equal(seen.total, expected)


def test_totals_and_counts_of_ranks_give_the_mean_over_all_micro_batches(device):
    batches = [tuple(x.to(device) for x in drawn(40)) for _ in range(3)]
    ranks = [PooledMapAccumulator(BLOCK, None, per_head=True) for _ in range(2)]
    for number, batch in enumerate(batches):
        ranks[number % 2].add(*batch)
    mean = (ranks[0].total + ranks[1].total) / (ranks[0].added + ranks[1].added)
    maps = [attention_map(*batch, block=BLOCK, per_head=True) for batch in batches]
    # Three float64 additions in another order.
    assert relative_error(mean, torch.stack(maps).mean(dim=0)) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("per_head", [False, True])
def test_both_ways_agree_on_equal_micro_batches_without_padding(per_head, device):
    q, k = (x.to(device) for x in drawn(61, 4, torch.float64))
    alike = PooledMapAccumulator(BLOCK, FILTER, per_head=per_head)
    for part in zip(q.chunk(2), k.chunk(2), strict=True):
        alike.add(*part)
    options = {"block": BLOCK, "filter_size": FILTER, "per_head": per_head}
    exact = attention_map(q, k, **options)
    assert relative_error(alike.total / alike.added, exact) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_a_shorter_input_counts_as_the_same_input_padded(masked, per_head, exact, device):
    q, k = (x.to(device) for x in drawn(50))
    real = draw_padding("holes", 3, 50).to(device) if masked else None
    whole = torch.zeros(3, 70, dtype=torch.bool, device=device)
    whole[:, :50] = True if real is None else real
    weights = mean_row_weights(row_counts(whole, 1 if per_head else 4)) if exact else None
    arguments = {"row_weights": weights, "length": 70, "per_head": per_head}
    short, long = (PooledMapAccumulator(BLOCK, FILTER, **arguments) for _ in range(2))
    short.add(q, k, real)
    # What padding holds is of no consequence.
    long.add(padded(q, 70, 3.0), padded(k, 70, -2.0), whole)
    assert short.total.shape[-1] == 5
    assert torch.equal(short.total, long.total)


def test_the_first_micro_batch_fixes_the_length_where_nothing_else_does(device):
    seen = PooledMapAccumulator(BLOCK, None)
    q, k = (x.to(device) for x in drawn(64))
    seen.add(q, k)
    assert seen.length == 64
    seen.add(q[:, :, :20], k[:, :, :20])
    assert seen.total.shape == (4, 4)
    with pytest.raises(ConfigError, match="q has 65 tokens; the maps are of 64"):
        seen.add(*(x.to(device) for x in drawn(65)))


@pytest.mark.parametrize("per_head", [False, True])
def test_an_error_adds_nothing(per_head):
    seen = PooledMapAccumulator(BLOCK, FILTER, per_head=per_head)
    with pytest.raises(ConfigError, match="kv_heads dividing heads"):
        seen.add(torch.randn(1, 3, 32, 4), torch.randn(1, 2, 32, 4))
    assert (seen.added, seen.length) == (0, None)
    seen.add(*drawn(32))
    before = seen.total.clone()
    with pytest.raises(ConfigError, match="q has 33 tokens"):
        seen.add(*drawn(33))
    assert torch.equal(seen.total, before)
    assert seen.added == 1


def test_a_total_before_the_first_micro_batch_is_named():
    with pytest.raises(ConfigError, match="total: no micro-batch has been added"):
        _ = PooledMapAccumulator(BLOCK, FILTER).total
    with pytest.raises(ConfigError, match="total: no micro-batch has been added"):
        _ = PooledMapAccumulator(BLOCK, FILTER, torch.ones(32), per_head=True).total
    # A rank without a sample has its part in the sum over ranks.
    assert torch.equal(
        PooledMapAccumulator(BLOCK, FILTER, torch.ones(32)).total, torch.zeros(2, 2).double()
    )


def test_a_total_may_be_replaced_by_that_of_all_ranks():
    seen = PooledMapAccumulator(BLOCK, FILTER, per_head=True)
    seen.add(*drawn(32))
    seen.total = torch.zeros_like(seen.total)
    batch = drawn(32)
    seen.add(*batch)
    expected = attention_map(*batch, block=BLOCK, filter_size=FILTER, per_head=True)
    assert torch.equal(seen.total, expected)


@pytest.mark.parametrize("per_head", [False, True])
def test_kept_batches_give_the_skewness_of_the_map_over_all_heads(per_head):
    q, k = drawn(40, dtype=torch.float64)
    real = draw_padding("tail", 3, 40)
    weights = mean_row_weights(row_counts(real, 1 if per_head else 4))
    seen = PooledMapAccumulator(BLOCK, None, weights, per_head=per_head, keep_batches=True)
    seen.add(q, k, real)
    expected = attention_skewness(q, k, key_padding_mask=real)
    assert abs(skewness(seen.batches[0]) / expected - 1) < FLOAT64_TOLERANCE


def test_it_leaves_inputs_and_gradients_alone():
    q, k = (x.requires_grad_() for x in drawn(40))
    before = q.detach().clone()
    seen = PooledMapAccumulator(BLOCK, FILTER, length=48, per_head=True)
    seen.add(q, k)
    assert not seen.total.requires_grad
    assert torch.equal(q, before)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"length": 0}, "length is 0; allowed: a whole number from 1 up, or None"),
        ({"length": True}, "length is True"),
        ({"length": 64.0}, "length is 64.0"),
        ({"length": 8}, "block is 16; allowed: a whole number from 1 to 8"),
        ({"block": 0}, "block is 0; allowed: a whole number from 1 up"),
        ({"block": 2.0}, "block is 2.0"),
        ({"filter_size": 2}, "filter_size is 2; allowed: odd"),
        ({"row_weights": torch.ones(32), "length": 33}, "length is 33 and row_weights are for 32"),
        ({"row_weights": torch.ones(4, 32)}, r"row_weights has shape \(4, 32\)"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        PooledMapAccumulator(**{"block": BLOCK, "filter_size": FILTER} | arguments)


def test_inputs_that_do_not_fit_are_named():
    seen = PooledMapAccumulator(BLOCK, FILTER, per_head=True)
    with pytest.raises(ConfigError, match="block is 16; allowed: a whole number from 1 to 9"):
        seen.add(*drawn(9))
    seen.add(*drawn(32))
    with pytest.raises(ConfigError, match="q has 2 heads; those before had 4"):
        seen.add(torch.randn(1, 2, 32, 8), torch.randn(1, 2, 32, 8))
    with pytest.raises(ConfigError, match=r"key_padding_mask is torch\.uint8; allowed: bool"):
        seen.add(*drawn(32), torch.ones(3, 32, dtype=torch.uint8))
