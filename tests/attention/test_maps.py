"""Attention maps against a dense softmax in float64, and observers that change nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from spion_ds.attention import AttentionMapAccumulator, attention_map, streaming_maps
from spion_ds.errors import ConfigError
from tests.memory import LargestTensor
from tests.patterns import brute_force

from .cases import FLOAT64_TOLERANCE, draw_padding, relative_error

LENGTHS = [1, 13, 32, 45]
PADDINGS = ["none", "tail", "holes", "whole_sample"]
# float32 scores and probabilities: some hundred roundings.
FLOAT32_TOLERANCE = 1e-5


def dense_map(q: Tensor, k: Tensor, real: Tensor | None, causal: bool, scale: float) -> np.ndarray:
    """The mean over heads, and over the samples whose query is real, of each row's softmax."""
    q_BHLD, k_BHLD = q.double().cpu().numpy(), k.double().cpu().numpy()
    batch, heads, length, _ = q_BHLD.shape
    kept = np.ones((batch, length), bool) if real is None else real.cpu().numpy()
    total, count = np.zeros((length, length)), np.zeros(length)
    for b, h, i in itertools.product(range(batch), range(heads), range(length)):
        if not kept[b, i]:
            continue
        keys = [j for j in range(length) if kept[b, j] and (j <= i or not causal)]
        scores = scale * k_BHLD[b, h * k_BHLD.shape[1] // heads, keys] @ q_BHLD[b, h, i]
        weights = np.exp(scores - scores.max())
        total[i, keys] += weights / weights.sum()
        count[i] += 1
    return total / np.maximum(count, 1)[:, None]


def drawn(length: int, kv_heads: int = 4, batch: int = 3, dtype=torch.float64):
    q = torch.randn(batch, 4, length, 8, dtype=dtype)
    return q, torch.randn(batch, kv_heads, length, 8, dtype=dtype)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_token_level_map_is_the_mean_softmax(length, causal, padding, device):
    q, k = (x.to(device) for x in drawn(length))
    real = draw_padding(padding, 3, length)
    real = None if real is None else real.to(device)
    found = attention_map(q, k, key_padding_mask=real, causal=causal)
    assert found.shape == (length, length)
    assert found.dtype == torch.float64
    expected = torch.from_numpy(dense_map(q, k, real, causal, 8**-0.5)).to(device)
    assert relative_error(found, expected) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("padding", ["none", "holes"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("filter_size", [None, 1, 7, 31])
@pytest.mark.parametrize(("length", "block"), [(13, 4), (32, 8), (45, 6), (20, 20), (9, 1)])
def test_pooled_map_is_the_pooled_mean_softmax(length, block, filter_size, causal, padding, device):
    q, k = (x.to(device) for x in drawn(length))
    real = draw_padding(padding, 3, length)
    real = None if real is None else real.to(device)
    found = attention_map(
        q, k, block=block, filter_size=filter_size, key_padding_mask=real, causal=causal
    )
    expected = brute_force.pool(dense_map(q, k, real, causal, 8**-0.5), block, filter_size)
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    assert relative_error(found.cpu(), torch.from_numpy(expected)) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("block", [None, 8])
def test_grouped_queries_share_their_keys(block, kv_heads, device):
    q, k = (x.to(device) for x in drawn(21, kv_heads))
    expected = dense_map(q, k, None, False, 8**-0.5)
    expected = expected if block is None else brute_force.pool(expected, block, None)
    found = attention_map(q, k, block=block)
    assert relative_error(found.cpu(), torch.from_numpy(expected)) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_16_bit_inputs_are_computed_in_float32(dtype, device):
    q, k = (x.to(device) for x in drawn(33, dtype=dtype))
    expected = torch.from_numpy(dense_map(q, k, None, False, 0.5))
    found = attention_map(q, k, scale=0.5)
    assert found.dtype == torch.float64
    assert relative_error(found.cpu(), expected) < FLOAT32_TOLERANCE


def test_rows_of_real_tokens_sum_to_one_and_padded_ones_to_zero(device):
    q, k = (x.to(device) for x in drawn(30))
    real = torch.arange(30, device=device)[None] < torch.tensor([30, 22, 0], device=device)[:, None]
    real[:, 29] = False  # padding in every sample
    rows = attention_map(q, k, key_padding_mask=real).sum(dim=1)
    torch.testing.assert_close(rows[:29], torch.ones_like(rows[:29]))
    assert rows[29] == 0.0


@pytest.mark.parametrize("tile_bytes", [1, 3000, 10**9])
@pytest.mark.parametrize(("block", "filter_size"), [(None, None), (8, None), (8, 7)])
def test_maps_do_not_depend_on_the_size_of_a_tile(block, filter_size, tile_bytes, monkeypatch):
    q, k = drawn(45)
    real = draw_padding("tail", 3, 45)
    arguments = {"block": block, "filter_size": filter_size, "key_padding_mask": real}
    expected = attention_map(q, k, causal=True, **arguments)
    monkeypatch.setattr(streaming_maps, "_TILE_BYTES", tile_bytes)
    found = attention_map(q, k, causal=True, **arguments)
    assert relative_error(found, expected) < FLOAT64_TOLERANCE


def test_a_pooled_map_makes_nothing_of_the_size_of_the_attention_matrix(monkeypatch):
    length = 2048
    q, k = torch.randn(1, 1, length, 8), torch.randn(1, 1, length, 8)
    with LargestTensor() as made:
        attention_map(q, k, block=64, filter_size=31)
    # One byte an entry is the smallest that an (L, L) tensor could be.
    assert 0 < made.bytes < length * length


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", PADDINGS)
def test_micro_batches_add_up_to_the_whole_batch(padding, causal, device):
    q, k = (x.to(device) for x in drawn(27, kv_heads=2, batch=5))
    real = draw_padding(padding, 5, 27)
    real = None if real is None else real.to(device)
    whole, parts = AttentionMapAccumulator(), AttentionMapAccumulator()
    whole.add(q, k, real, causal, 0.2)
    for part in (slice(0, 1), slice(1, 4), slice(4, 5)):
        parts.add(q[part], k[part], None if real is None else real[part], causal, 0.2)
    assert torch.equal(parts.count, whole.count)
    assert relative_error(parts.total, whole.total) < FLOAT64_TOLERANCE
    mean = whole.total / whole.count.clamp(min=1.0)[:, None]
    expected = attention_map(q, k, key_padding_mask=real, causal=causal, scale=0.2)
    assert relative_error(mean, expected) < FLOAT64_TOLERANCE
    assert (
        relative_error(mean.cpu(), torch.from_numpy(dense_map(q, k, real, causal, 0.2)))
        < FLOAT64_TOLERANCE
    )


@pytest.mark.parametrize("shares", [2, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_map_is_the_same_in_whatever_shares_it_was_made(dtype, shares, device):
    # Ranks and micro-batches: masks must not depend on them, and nearly even maps are all ties.
    q, k = (1e-2 * torch.randn(32, 4, 40, 8) for _ in range(2))
    q, k = q.to(device, dtype), k.to(device, dtype)
    real = draw_padding("tail", 32, 40).to(device)
    means = []
    for count in (1, shares):
        accumulator = AttentionMapAccumulator()
        for part in zip(*(x.chunk(count) for x in (q, k, real)), strict=True):
            accumulator.add(*part)
        mean = accumulator.total / accumulator.count.clamp(min=1.0)[:, None]
        means.append(mean.float())
    assert torch.equal(*means)


def test_accumulators_start_empty_and_count_samples_and_heads():
    accumulator = AttentionMapAccumulator()
    assert accumulator.total is None
    assert accumulator.count is None
    q, k = drawn(6)
    real = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]).bool()
    accumulator.add(q, k, real)
    # 4 heads a sample.
    assert accumulator.count.tolist() == [12, 8, 8, 4, 4, 4]
    accumulator.add(q, k)
    assert accumulator.count.tolist() == [24, 20, 20, 16, 16, 16]


def test_watching_leaves_inputs_gradients_and_random_states_alone(device):
    q, k = (x.to(device).requires_grad_() for x in drawn(16))
    before = (q.detach().clone(), k.detach().clone())
    state = torch.get_rng_state()
    accumulator = AttentionMapAccumulator()
    accumulator.add(q, k)
    found = [attention_map(q, k), attention_map(q, k, block=4), accumulator.total]
    assert not any(x.requires_grad for x in found)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(q, before[0])
    assert torch.equal(k, before[1])
    assert q.grad is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"q": torch.randn(2, 8, 4)}, r"q is \(batch, heads, L, head_dim\).*got \(2, 8, 4\)"),
        ({"k": torch.randn(1, 2, 8, 4)}, r"got \(2, 4, 8, 4\) and \(1, 2, 8, 4\)"),
        ({"k": torch.randn(2, 2, 9, 4)}, r"got .* \(2, 2, 9, 4\)"),
        ({"k": torch.randn(2, 3, 8, 4)}, "kv_heads dividing heads"),
        ({"key_padding_mask": torch.ones(8, 2).bool()}, r"bool \(2, 8\); got \(8, 2\)"),
        ({"filter_size": 31}, "filter_size is given without block"),
        ({"block": 0}, "block is 0; allowed: 1 to the sequence length, 8"),
        ({"block": 9}, "block is 9"),
        ({"block": 4, "filter_size": 4}, "filter_size is 4; allowed: odd"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    fine = {"q": torch.randn(2, 4, 8, 4), "k": torch.randn(2, 2, 8, 4)}
    attention_map(**fine)
    with pytest.raises(ConfigError, match=words):
        attention_map(**fine | arguments)
