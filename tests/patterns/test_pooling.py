"""Pooling: the formula, bit-equality however it is cut, and memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spion_ds.errors import ConfigError
from spion_ds.patterns import pool_map, pooling
from spion_ds.patterns.pooling import pool_rows, quantile, rows_needed
from tests.memory import LargestTensor

from . import brute_force

SHAPES = [(1, 1), (5, 2), (16, 4), (17, 4), (33, 8), (40, 40), (31, 30)]
FILTERS = [None, 1, 3, 31]


def random_map(length: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(length, length, generator=generator).softmax(-1).to(dtype)


@pytest.mark.parametrize("filter_size", FILTERS)
@pytest.mark.parametrize(("length", "block"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_pool_map_is_the_formula_bit_for_bit(length, block, filter_size, dtype):
    a = random_map(length, seed=length, dtype=dtype)
    expected = brute_force.pool(a.double().numpy(), block, filter_size)
    pooled = pool_map(a, block, filter_size)
    assert pooled.dtype == torch.float64
    np.testing.assert_array_equal(pooled.numpy(), expected)


@pytest.mark.parametrize("filter_size", [3, 31])
def test_pool_map_is_the_weights_formula(filter_size):
    length, block = 36, 8
    n = -(-length // block)
    a = random_map(length, seed=3).double().numpy()
    sizes = [min(block, length - i * block) for i in range(n)]
    expected = np.zeros((n, n))
    for r in range(length):
        for c in range(length):
            for f in range(-(filter_size // 2), filter_size // 2 + 1):
                if 0 <= r - f < length and 0 <= c - f < length:
                    i, j = (r - f) // block, (c - f) // block
                    expected[i, j] += a[r, c] / (sizes[i] * sizes[j])
    # Other order of at most 31·64 positive terms: a relative error below 2000 roundings.
    np.testing.assert_allclose(
        pool_map(torch.from_numpy(a), block, filter_size).numpy(), expected, rtol=2000 * 2**-53
    )


def test_equal_entries_of_a_uniform_map_stay_equal():
    pooled = pool_map(torch.full((96, 96), 1 / 96), 12)
    assert pooled.unique().numel() == 1
    convolved = pool_map(torch.full((96, 96), 1 / 96), 12, 5)
    assert convolved[1:-1, 1:-1].unique().numel() == 1


@pytest.mark.parametrize("filter_size", FILTERS)
@pytest.mark.parametrize("strip", [1, 2, 3, 8])
def test_pool_rows_gives_the_same_bits_however_the_map_is_cut(filter_size, strip):
    length, block = 45, 6
    a = random_map(length, seed=4)
    parts = []
    for start in range(0, length, strip * block):
        stop = min(length, start + strip * block)
        first, last = rows_needed(start, stop, length, filter_size)
        parts.append(pool_rows(a[first:last].clone(), start, stop, block, filter_size))
    assert torch.equal(torch.cat(parts), pool_map(a, block, filter_size))


def test_pool_map_gives_the_same_bits_in_every_strip_size(monkeypatch):
    a = random_map(300, seed=5)
    expected = pool_map(a, 7, 31)
    for rows in (1, 50, 1000):
        monkeypatch.setattr(pooling, "_STRIP_ROWS", rows)
        assert torch.equal(pool_map(a, 7, 31), expected)


def test_pool_map_gives_the_same_bits_with_every_number_of_threads():
    a = random_map(700, seed=6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = pool_map(a, 32, 31)
        torch.set_num_threads(4)
        assert torch.equal(pool_map(a, 32, 31), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("filter_size", FILTERS)
def test_pool_map_gives_the_same_bits_on_a_gpu(filter_size):
    a = random_map(700, seed=7)
    assert torch.equal(pool_map(a.cuda(), 24, filter_size).cpu(), pool_map(a, 24, filter_size))


def test_pool_map_makes_no_large_tensor():
    length = 2048
    # The map is bfloat16, so its own views are smaller than the float64 copy looked for.
    a = random_map(length, seed=8, dtype=torch.bfloat16)
    with LargestTensor() as made:
        pool_map(a, 64, 31)
    assert made.bytes <= length * length * 2


def test_pool_map_does_not_touch_the_map_or_the_gradient():
    a = random_map(20, seed=9).requires_grad_()
    before = a.detach().clone()
    assert not pool_map(a, 4, 3).requires_grad
    assert torch.equal(a, before)
    b = random_map(20, seed=9, dtype=torch.float64)
    before = b.clone()
    pool_map(b, 4)
    pool_map(b, 4, 3)
    assert torch.equal(b, before)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pool_map(torch.rand(4, 5), 2), r"attention_map has shape \(4, 5\)"),
        (lambda: pool_map(torch.rand(4), 2), r"attention_map has shape \(4,\)"),
        (lambda: pool_map(torch.rand(0, 0), 1), r"attention_map has shape \(0, 0\)"),
        (lambda: pool_map(torch.ones(4, 4, dtype=torch.int64), 2), "dtype torch.int64"),
        (lambda: pool_map(torch.rand(4, 4), 0), "block is 0; allowed: .* 1 to 4"),
        (lambda: pool_map(torch.rand(4, 4), 5), "block is 5"),
        (lambda: pool_map(torch.rand(4, 4), 2.0), "block is 2.0"),
        (lambda: pool_map(torch.rand(4, 4), True), "block is True"),
        (lambda: pool_map(torch.rand(4, 4), 2, 2), "filter_size is 2; allowed: odd"),
        (lambda: pool_map(torch.rand(4, 4), 2, -1), "filter_size is -1"),
        (lambda: pool_rows(torch.rand(4, 8), 1, 5, 4), "start is 1 and stop is 5"),
        (lambda: pool_rows(torch.rand(3, 8), 4, 7, 4), "stop is 7"),
        (lambda: pool_rows(torch.rand(4, 8), 4, 12, 4), "stop is 12"),
        (lambda: pool_rows(torch.rand(4, 8), 0, 4, 4, 3), "rows has 4 rows.* 5 rows from 0 to 5"),
        (lambda: pool_rows(torch.rand(4), 0, 4, 4), r"rows has shape \(4,\)"),
        (lambda: quantile(torch.rand(0), 0.5), "values has shape"),
        (lambda: quantile(torch.rand(3), 1.5), "q is 1.5; allowed: 0 to 1"),
        (lambda: quantile(torch.rand(3), float("nan")), "q is nan"),
        (lambda: quantile(torch.tensor([1.0, float("nan")]), 0.5), "NaN"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_quantile_is_numpys_bit_for_bit():
    generator = np.random.default_rng(0)
    for size in (1, 2, 3, 10, 257, 4096):
        for values in (generator.random(size), generator.integers(0, 3, size).astype(float)):
            for q in (0.0, 0.25, 0.5, 0.96, 0.98, 0.99, 1.0, *generator.random(20)):
                assert quantile(torch.from_numpy(values), q) == np.quantile(values, q)


def test_quantile_computes_in_float64_for_float32_values():
    values = torch.rand(101, generator=torch.Generator().manual_seed(1))
    assert quantile(values, 0.123) == np.quantile(values.double().numpy(), 0.123)


def test_quantile_takes_more_entries_than_torch_quantile():
    values = torch.arange(2**24 + 10, dtype=torch.float32).view(2, -1)
    # Exact: float32 holds every even number here, and the middle two average to a half.
    assert quantile(values, 0.5) == np.quantile(values.double().numpy(), 0.5)
