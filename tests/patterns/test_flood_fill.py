"""Flood fill: walks known by hand, C++ against Python against brute force, its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spion_ds.errors import ConfigError
from spion_ds.extension import cuda_operators_available
from spion_ds.patterns import flood_fill, pattern_from_pooled
from spion_ds.patterns.flood_fill import flood_fill_reference
from spion_ds.patterns.spion import VARIANTS

from . import brute_force

BOTH = pytest.mark.parametrize("fill", [flood_fill, flood_fill_reference])


def marked(mask: torch.Tensor) -> set[tuple[int, int]]:
    return {(int(i), int(j)) for i, j in mask.nonzero()}


@pytest.mark.usefixtures("operators")
@BOTH
def test_a_walk_follows_the_ridge(fill):
    pooled = torch.tensor(
        [
            [9.0, 0.0, 0.0, 0.0],
            [5.0, 6.0, 7.0, 0.0],
            [0.0, 0.0, 6.5, 0.0],
            [0.0, 0.0, 0.0, 1.0],
        ]
    )
    # From (0,0): diagonal 6, not down 5, to (1,1); right 7, not diagonal 6.5, to (1,2); down 6.5
    # to (2,2); diagonal 1 to (3,3); around it all is 0, a tie: out diagonally.
    # No walk steps onto (0,0), or onto (1,0), though both are above the threshold.
    assert marked(fill(pooled, 0.5)) == {(1, 1), (1, 2), (2, 2), (3, 3)}
    assert marked(fill(pooled, 6.25)) == {(1, 2), (2, 2)}


@pytest.mark.usefixtures("operators")
@BOTH
def test_marks_are_strictly_above_the_threshold(fill):
    pooled = torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert marked(fill(pooled, 3.0)) == set()
    assert marked(fill(pooled, 2.999)) == {(1, 1)}


@pytest.mark.usefixtures("operators")
@BOTH
def test_ties_go_to_the_diagonal(fill):
    # From (0,0) along the diagonal; from (0,1) to (1,2), and there the padding makes down win.
    assert marked(fill(torch.ones(3, 3), 0.5)) == {(1, 1), (1, 2), (2, 1), (2, 2)}
    # down = right > diagonal: right by the rule "down ≤ right and right > diagonal".
    pooled = torch.tensor([[0.0, 2.0], [2.0, 1.0]])
    assert (0, 1) in marked(fill(pooled, 0.5))
    assert (1, 0) not in marked(fill(pooled, 0.5))


@pytest.mark.usefixtures("operators")
@BOTH
def test_a_start_is_marked_only_if_a_walk_steps_onto_it(fill):
    assert marked(fill(torch.tensor([[5.0]]), 0.0)) == set()
    # The walk of (0,0) steps right onto (0,1), which is a start too.
    assert marked(fill(torch.tensor([[1.0, 9.0], [0.0, 0.0]]), 0.0)) == {(0, 1)}


@pytest.mark.usefixtures("operators")
@BOTH
def test_walks_leave_over_the_padding_and_mark_nothing_there(fill):
    # Below zero everywhere: the padding attracts every walk that is beside it.
    pooled = -torch.ones(3, 3)
    assert marked(fill(pooled, -2.0)) == {(1, 1), (1, 2), (2, 1), (2, 2)}


@pytest.mark.usefixtures("operators")
def test_cpp_is_the_reference_on_thousands_of_maps_with_ties():
    generator = np.random.default_rng(1)
    for trial in range(3000):
        n = int(generator.integers(1, 13))
        levels = int(generator.integers(1, 6))
        pooled = generator.integers(0, levels, (n, n)).astype(np.float64)
        if trial % 3 == 1:
            pooled -= levels // 2
        if trial % 3 == 2:
            pooled += generator.random((n, n)).round(1) / 10
        threshold = float(np.quantile(pooled, generator.random()))
        result = torch.ops.spion_ds.flood_fill(torch.from_numpy(pooled), threshold)
        assert torch.equal(result, flood_fill_reference(torch.from_numpy(pooled), threshold))
        np.testing.assert_array_equal(result.numpy(), brute_force.flood_fill(pooled, threshold))


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("n", [64, 200])
def test_cpp_walks_in_parallel_give_the_reference(n):
    # 200 blocks a side make several tasks.
    pooled = torch.rand(n, n, generator=torch.Generator().manual_seed(n)).double()
    for threshold in (0.1, 0.9):
        expected = flood_fill_reference(pooled, threshold)
        for _ in range(5):
            assert torch.equal(flood_fill(pooled, threshold), expected)


@pytest.mark.usefixtures("operators")
def test_values_are_compared_in_float64():
    pooled = torch.tensor([[0.0, 0.0], [0.0, 1.0 + 2**-40]], dtype=torch.float64)
    assert flood_fill(pooled, 1.0)[1, 1]
    assert flood_fill(torch.tensor([[0.0, 0.0], [0.0, 0.1]]), 0.1)[1, 1]  # float32 0.1 > 0.1


@pytest.mark.usefixtures("operators")
def test_views_and_half_precision_maps_are_read_right():
    pooled = torch.rand(20, 20, generator=torch.Generator().manual_seed(0))
    expected = flood_fill_reference(pooled.T.contiguous(), 0.5)
    assert torch.equal(flood_fill(pooled.T, 0.5), expected)
    wide = torch.rand(20, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(
        torch.ops.spion_ds.flood_fill(wide[:, ::2], 0.5), flood_fill_reference(wide[:, ::2], 0.5)
    )


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_operator_passes_opcheck(dtype):
    pooled = torch.rand(9, 9).to(dtype)
    torch.library.opcheck(torch.ops.spion_ds.flood_fill.default, (pooled, 0.5))
    torch.library.opcheck(torch.ops.spion_ds.flood_fill.default, (pooled.T, 0.5))


@pytest.mark.usefixtures("operators")
def test_operator_itself_refuses_what_it_cannot_walk():
    with pytest.raises(RuntimeError, match=r"square .* got \[2, 3\]"):
        torch.ops.spion_ds.flood_fill(torch.rand(2, 3), 0.5)
    with pytest.raises(RuntimeError, match="floating"):
        torch.ops.spion_ds.flood_fill(torch.ones(2, 2, dtype=torch.int64), 0.5)


@pytest.mark.usefixtures("operators")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_result_is_on_the_maps_device():
    pooled = torch.rand(30, 30)
    result = flood_fill(pooled.cuda(), 0.5)
    assert result.is_cuda
    assert torch.equal(result.cpu(), flood_fill(pooled, 0.5))


@pytest.mark.parametrize(
    ("pooled", "threshold", "words"),
    [
        (torch.rand(2, 3), 0.5, r"shape \(2, 3\)"),
        (torch.rand(4), 0.5, r"shape \(4,\)"),
        (torch.rand(0, 0), 0.5, r"shape \(0, 0\)"),
        (torch.ones(2, 2, dtype=torch.int32), 0.5, "dtype torch.int32"),
        (torch.tensor([[0.0, float("nan")], [0.0, 0.0]]), 0.5, r"\(2, 2\) has 1 entries .* NaN"),
        (torch.tensor([[0.0, float("inf")], [0.0, 0.0]]), 0.5, "infinite"),
        (torch.rand(2, 2), float("nan"), "threshold is nan"),
    ],
)
def test_wrong_arguments_are_named(pooled, threshold, words):
    with pytest.raises(ConfigError, match=words):
        flood_fill(pooled, threshold)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.usefixtures("operators")
@pytest.mark.gpu
@needs_cuda
def test_cuda_is_the_reference_with_ties_and_without():
    if not cuda_operators_available():
        pytest.skip("no nvcc")
    generator = np.random.default_rng(2)
    for trial in range(400):
        n = int(generator.integers(1, 70))
        pooled = generator.integers(0, int(generator.integers(1, 6)), (n, n)).astype(np.float64)
        if trial % 3 == 1:
            pooled -= 2
        if trial % 3 == 2:
            pooled = generator.random((n, n))
        threshold = float(np.quantile(pooled, generator.random()))
        pooled = torch.from_numpy(pooled)
        found = torch.ops.spion_ds.flood_fill(pooled.cuda(), threshold)
        assert torch.equal(found.cpu(), flood_fill_reference(pooled, threshold))


@pytest.mark.usefixtures("operators")
@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("n", [31, 1024])
@pytest.mark.parametrize("variant", VARIANTS)
def test_patterns_made_on_a_gpu_are_those_of_the_cpu(variant, n):
    generator = torch.Generator().manual_seed(n)
    smooth = torch.rand(n, n, generator=generator, dtype=torch.float64)
    signs = 1 - 2 * torch.randint(0, 2, (n, n), generator=generator)
    tied = smooth.round() * signs  # -1, -0, 0 and 1
    for pooled in (smooth, smooth.float(), smooth.T, tied):
        for share in (0.05, 0.5, 0.97):
            expected = pattern_from_pooled(pooled, variant, alpha=share, density=share)
            found = pattern_from_pooled(pooled.cuda(), variant, alpha=share, density=share)
            assert found.is_cuda
            assert torch.equal(found.cpu(), expected)
