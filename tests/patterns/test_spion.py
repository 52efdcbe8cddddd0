"""The three variants against brute force, ties in top-k, and their argument errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spion_ds.errors import ConfigError
from spion_ds.patterns import pattern_from_pooled, pool_map, spion_c, spion_cf, spion_f

from . import brute_force

SHAPES = [(8, 1), (24, 4), (25, 4), (31, 5), (40, 8), (7, 7)]


def softmax_map(generator: np.random.Generator, length: int) -> np.ndarray:
    logits = 3 * generator.standard_normal((length, length))
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def hot_columns(generator: np.random.Generator, length: int) -> np.ndarray:
    a = generator.random((length, length)) / 100
    a[:, generator.integers(0, length, 2)] += 1.0
    return a / a.sum(-1, keepdims=True)


MAPS = {
    "softmax": softmax_map,
    "integers with ties": lambda generator, length: generator.integers(
        0, 3, (length, length)
    ).astype(np.float64),
    "uniform": lambda generator, length: np.full((length, length), 1.0 / length),
    "hot columns": hot_columns,
    "diagonal": lambda generator, length: np.eye(length),
}


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize(("length", "block"), SHAPES)
def test_patterns_are_the_specification(length, block, kind, dtype):
    generator = np.random.default_rng(length * 10 + block)
    for alpha, density in ((0.0, 0.1), (0.5, 0.3), (0.9, 0.6), (0.96, 0.9), (1.0, 1.0)):
        filter_size = int(generator.choice([1, 3, 7, 31]))
        a = torch.from_numpy(MAPS[kind](generator, length)).to(dtype)
        as_numpy = a.double().numpy()
        found = {
            "cf": spion_cf(a, block, alpha, filter_size),
            "f": spion_f(a, block, alpha),
            "c": spion_c(a, block, density, filter_size),
        }
        for variant, result in found.items():
            level = density if variant == "c" else alpha
            expected = brute_force.pattern(as_numpy, variant, block, level, filter_size)
            assert result.dtype == torch.bool
            np.testing.assert_array_equal(result.numpy(), expected, err_msg=variant)


@pytest.mark.usefixtures("operators")
def test_defaults_convolve_with_31():
    a = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert torch.equal(spion_cf(a, 4, 0.9), spion_cf(a, 4, 0.9, filter_size=31))
    assert torch.equal(spion_c(a, 4, 0.2), spion_c(a, 4, 0.2, filter_size=31))
    assert not torch.equal(spion_cf(a, 4, 0.9), spion_f(a, 4, 0.9))


@pytest.mark.usefixtures("operators")
def test_a_pooled_map_gives_the_pattern_of_its_map():
    a = torch.rand(48, 48, generator=torch.Generator().manual_seed(1)).softmax(-1)
    plain, convolved = pool_map(a, 6), pool_map(a, 6, 31)
    assert torch.equal(pattern_from_pooled(plain, "f", alpha=0.8), spion_f(a, 6, 0.8))
    assert torch.equal(
        pattern_from_pooled(convolved, "cf", alpha=0.8, density=0.1), spion_cf(a, 6, 0.8)
    )
    assert torch.equal(
        pattern_from_pooled(convolved, "c", alpha=0.8, density=0.3), spion_c(a, 6, 0.3)
    )


def test_top_k_breaks_ties_in_row_major_order():
    # 16·0.5 − 4 = 4 of 16 equal blocks: the first row, then the diagonal.
    expected = torch.eye(4, dtype=torch.bool)
    expected[0] = True
    assert torch.equal(pattern_from_pooled(torch.ones(4, 4), "c", density=0.5), expected)
    # One larger block goes first, three of the equal ones follow.
    pooled = torch.ones(4, 4)
    pooled[3, 0] = 2.0
    expected[0, 3] = False
    expected[3, 0] = True
    assert torch.equal(pattern_from_pooled(pooled, "c", density=0.5), expected)


def test_top_k_keeps_the_diagonal_alone_when_k_is_not_positive():
    pooled = torch.rand(5, 5)
    eye = torch.eye(5, dtype=torch.bool)
    assert torch.equal(pattern_from_pooled(pooled, "c", density=0.01), eye)  # k = −4
    assert torch.equal(pattern_from_pooled(pooled, "c", density=0.2), eye)  # k = 0


@pytest.mark.usefixtures("operators")
def test_one_block_gives_one_block():
    for pattern in (spion_cf(torch.rand(4, 4), 4, 0.5), spion_c(torch.rand(4, 4), 4, 1.0)):
        assert torch.equal(pattern, torch.ones(1, 1, dtype=torch.bool))


@pytest.mark.usefixtures("operators")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("variant", ["cf", "f", "c"])
def test_patterns_on_a_gpu_are_those_on_the_cpu(variant):
    a = torch.rand(512, 512, generator=torch.Generator().manual_seed(2)).softmax(-1)
    filter_size = None if variant == "f" else 31
    on_cpu, on_gpu = (
        pattern_from_pooled(pool_map(b, 16, filter_size), variant, alpha=0.95, density=0.1)
        for b in (a, a.cuda())
    )
    assert on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), on_cpu)


NAN_MAP = torch.full((4, 4), 0.25)
NAN_MAP[1, 2] = float("nan")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spion_cf(torch.rand(4, 4), 2, 1.5), "alpha is 1.5; allowed: 0 to 1"),
        (lambda: spion_f(torch.rand(4, 4), 2, -0.1), "alpha is -0.1"),
        (lambda: spion_f(torch.rand(4, 4), 2, float("nan")), "alpha is nan"),
        (lambda: spion_f(torch.rand(4, 4), 2, "0.9"), "alpha is '0.9'"),
        (lambda: spion_c(torch.rand(4, 4), 2, 0.0), "density is 0.0; allowed: above 0, up to 1"),
        (lambda: spion_c(torch.rand(4, 4), 2, 1.1), "density is 1.1"),
        (lambda: spion_c(torch.rand(4, 4), 8, 0.5), "block is 8; allowed: .* 1 to 4"),
        (lambda: spion_cf(torch.rand(4, 4), -1, 0.5), "block is -1"),
        (lambda: spion_cf(torch.rand(4, 4), 2, 0.5, 4), "filter_size is 4; allowed: odd"),
        (lambda: spion_cf(torch.rand(4, 4), 2, 0.5, None), "filter_size is None"),
        (lambda: spion_c(torch.rand(4, 4), 2, 0.5, 0), "filter_size is 0"),
        (lambda: spion_f(torch.rand(4, 6), 2, 0.5), r"attention_map has shape \(4, 6\)"),
        (lambda: spion_f(torch.rand(2, 4, 4), 2, 0.5), r"attention_map has shape \(2, 4, 4\)"),
        (lambda: spion_f(torch.ones(4, 4).long(), 2, 0.5), "attention_map has dtype torch.int64"),
        (lambda: spion_f(NAN_MAP, 2, 0.5), "attention_map .* NaN or infinite"),
        (lambda: spion_c(NAN_MAP, 2, 0.5), "attention_map .* NaN or infinite"),
        (lambda: pattern_from_pooled(torch.rand(4, 4), "fc"), "unknown SPION variant 'fc'"),
        (lambda: pattern_from_pooled(torch.rand(4, 4), "f"), "alpha is None"),
        (lambda: pattern_from_pooled(torch.rand(4, 4), "c", alpha=0.5), "density is None"),
        (lambda: pattern_from_pooled(torch.rand(4, 5), "c", density=0.5), r"shape \(4, 5\)"),
        (lambda: pattern_from_pooled(NAN_MAP, "c", density=0.5), "NaN or infinite"),
    ],
)
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
