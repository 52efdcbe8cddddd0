"""Maps that are pooled while they are computed: equal to the pooled map, by every way there is."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spion_ds.attention import (
    PooledMapAccumulator,
    SparseSelfAttention,
    attention_map,
    attention_skewness,
    streaming_maps,
)
from spion_ds.attention.cpu import maps as cpu_maps
from spion_ds.attention.map_request import MapRequest, mean_row_weights, row_counts
from spion_ds.attention.streaming_maps import block_sums_torch
from spion_ds.errors import ConfigError
from spion_ds.patterns import pool_map
from spion_ds.patterns.spion import VARIANTS, pattern_from_pooled
from spion_ds.sparsity import SpionSparsityConfig

from .cases import FLOAT64_TOLERANCE, draw_padding, needs_triton, relative_error

# Scores, exponentials and sums over the heads in float32: some ten roundings of 6e-8 an entry, of
# which a block averages many.
FLOAT32_TOLERANCE = 1e-6
# Lengths, blocks (smaller than, equal to, larger than half a filter; one past and one short of a
# tile of 64; no divisor of the length) and filters.
SHAPES = [
    (1, 1, 1),
    (13, 4, 7),
    (45, 6, 31),
    (97, 97, 31),
    (64, 16, 1),
    (130, 1, 3),
    (197, 65, 31),
    (150, 16, 63),
]
FEATURES = list(itertools.product((False, True), ("none", "holes", "whole_sample")))


def request_of(length, block, filter_size, causal=False, padding="none", dtype=torch.float32):
    q = torch.randn(3, 4, length, 8, dtype=dtype)
    k = torch.randn(3, 2, length, 8, dtype=dtype)
    real = draw_padding(padding, 3, length)
    weights = torch.rand(length, dtype=torch.float64)
    return MapRequest(q, k, weights, real, causal, 0.4, block, filter_size)


def in_float64(request: MapRequest) -> MapRequest:
    return request._replace(q=request.q.double(), k=request.k.double())


def convolved_blocks(request: MapRequest) -> Tensor:
    """The block sums by the definition: the whole map, the convolution, sums of blocks."""
    a = weighted_map(request)
    length, block, half = request.length, request.block, request.filter_size // 2
    padded = torch.nn.functional.pad(a, (half,) * 4)
    shifts = range(2 * half + 1)
    s = sum(padded[f : f + length, f : f + length] for f in shifts)
    n = -(-length // block)
    blocks = torch.arange(length) // block
    chosen = (torch.arange(n)[:, None] == blocks).double()
    return chosen @ s @ chosen.T


def weighted_map(request: MapRequest) -> Tensor:
    q, real = request.q.double(), request.key_padding_mask
    k = request.k.double().repeat_interleave(q.shape[1] // request.k.shape[1], dim=1)
    scores = q @ k.transpose(-2, -1) * request.scale
    if request.causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None, :], float("-inf"))
    probs = scores.softmax(dim=-1)
    if real is not None:
        probs = probs.masked_fill(~real[:, None, :, None], 0.0)
    return probs.sum(dim=(0, 1)) * request.row_weights[:, None]


@pytest.fixture
def operators():
    if not cpu_maps._ready():
        pytest.skip("the C++ operators are not available")


@pytest.mark.parametrize(("causal", "padding"), FEATURES)
@pytest.mark.parametrize(("length", "block", "filter_size"), SHAPES)
def test_the_specification_is_the_pooled_convolved_map(
    length, block, filter_size, causal, padding, monkeypatch
):
    request = request_of(length, block, filter_size, causal, padding, torch.float64)
    expected = convolved_blocks(request)
    assert relative_error(block_sums_torch(request), expected) < FLOAT64_TOLERANCE  # one tile
    monkeypatch.setattr(streaming_maps, "_TILE_BYTES", 4 * 12 * 50**2)  # tiles of 50 × 50
    assert relative_error(block_sums_torch(request), expected) < FLOAT64_TOLERANCE


@pytest.mark.parametrize(("causal", "padding"), FEATURES)
@pytest.mark.parametrize(("length", "block", "filter_size"), SHAPES)
def test_cpp_is_the_specification(length, block, filter_size, causal, padding, operators):
    request = request_of(length, block, filter_size, causal, padding)
    found = cpu_maps.block_sums_cpu(request)
    expected = block_sums_torch(in_float64(request))
    assert found.dtype == torch.float64
    assert relative_error(found, expected) < FLOAT32_TOLERANCE
    # Blocks without attention are exactly 0: a threshold may be.
    assert torch.equal(found == 0.0, expected == 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cpp_computes_16_bit_inputs_in_float32(dtype, operators):
    request = request_of(150, 16, 31, padding="tail", dtype=dtype)
    found = cpu_maps.block_sums_cpu(request)
    assert relative_error(found, block_sums_torch(in_float64(request))) < FLOAT32_TOLERANCE


def test_cpp_takes_strided_views(operators):
    request = request_of(70, 16, 31)
    packed = torch.randn(3, 70, 4, 16)
    q, k = packed.transpose(1, 2).chunk(2, dim=-1)
    request = request._replace(q=q, k=k[:, ::2])
    expected = block_sums_torch(in_float64(request))
    assert relative_error(cpu_maps.block_sums_cpu(request), expected) < FLOAT32_TOLERANCE
    spread = torch.randn(3, 4, 70, 16)[..., ::2]  # the stride of head_dim is 2
    request = request._replace(q=spread, k=spread)
    expected = block_sums_torch(in_float64(request))
    assert relative_error(cpu_maps.block_sums_cpu(request), expected) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("way", ["torch", "cpp", pytest.param("triton", marks=needs_triton)])
def test_huge_scores_of_padded_queries_make_no_nan(way, operators, device):
    # Up to several thousand, far above the 128 at which powers of two overflow.
    request = request_of(50, 16, 7, padding="holes")._replace(scale=500.0)
    if way == "triton":
        found = triton_sums(request, device)
    else:
        found = {"torch": block_sums_torch, "cpp": cpu_maps.block_sums_cpu}[way](request)
    assert torch.isfinite(found).all()
    # A score of a thousand has an error of 1e-4 in float32, and so has its exponential.
    assert relative_error(found, block_sums_torch(in_float64(request))) < 1e-3


def test_many_heads_add_up_in_float64(operators):
    # 600 heads: more than are added in float32 at a time.
    q, k = torch.randn(2, 300, 33, 4), torch.randn(2, 300, 33, 4)
    request = MapRequest(q, k, torch.rand(33, dtype=torch.float64), None, False, 0.5, 8, 7)
    found = cpu_maps.block_sums_cpu(request)
    assert relative_error(found, block_sums_torch(in_float64(request))) < FLOAT32_TOLERANCE


def test_cpp_gives_the_same_bits_with_any_number_of_threads(operators):
    request = request_of(700, 32, 31, causal=True, padding="holes")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cpu_maps._run(request, 0.001))
    finally:
        torch.set_num_threads(before)
    for blocks, moments in results[1:]:
        assert torch.equal(blocks, results[0][0])
        assert torch.equal(moments, results[0][1])


@pytest.mark.parametrize("mean", [None, 0.01])
def test_the_operator_passes_opcheck(mean, operators):
    request = request_of(45, 6, 7, padding="tail")
    operator = torch.ops.spion_ds.attention_map_pooled.default
    arguments = (request.q, request.k, request.key_padding_mask, request.row_weights, 6, 7, 0.4)
    # It is an observer: there are no gradients to check.
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (*arguments, True, mean), test_utils=utilities)


@pytest.mark.parametrize("padding", ["none", "holes"])
@pytest.mark.parametrize("causal", [False, True])
def test_layouts_are_those_of_the_unstreamed_map(causal, padding):
    real = draw_padding(padding, 2, 300)
    for sharpness in (0.3, 1.0, 3.0):
        q, k = torch.randn(2, 4, 300, 8) * sharpness, torch.randn(2, 4, 300, 8)
        options = {"key_padding_mask": real, "causal": causal}
        whole = attention_map(q, k, **options)
        for block, variant in itertools.product((8, 16, 32), VARIANTS):
            filter_size = None if variant == "f" else 31
            streamed = attention_map(q, k, block=block, filter_size=filter_size, **options)
            expected = pool_map(whole, block, filter_size)
            assert relative_error(streamed, expected) < FLOAT32_TOLERANCE
            layouts = [
                pattern_from_pooled(pooled, variant, alpha=0.9, density=0.2)
                for pooled in (streamed, expected)
            ]
            assert torch.equal(*layouts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("filter_size", [None, 31])
def test_micro_batches_of_ranks_add_up_to_the_pooled_mean_map(filter_size, dtype):
    q, k = torch.randn(5, 4, 61, 8, dtype=dtype), torch.randn(5, 2, 61, 8, dtype=dtype)
    real = draw_padding("tail", 5, 61)
    weights = mean_row_weights(row_counts(real, 4))
    ranks = [PooledMapAccumulator(16, filter_size, weights) for _ in range(2)]
    for rank, part in ((0, slice(0, 1)), (1, slice(1, 3)), (0, slice(3, 5))):
        ranks[rank].add(q[part], k[part], real[part])
    total = ranks[0].total + ranks[1].total
    assert total.dtype == torch.float64
    expected = pool_map(attention_map(q, k, key_padding_mask=real), 16, filter_size)
    tolerance = FLOAT64_TOLERANCE if dtype == torch.float64 else FLOAT32_TOLERANCE
    assert relative_error(total, expected) < tolerance


def test_an_attention_module_reports_to_the_accumulator():
    q = torch.randn(2, 2, 64, 8)
    attention = SparseSelfAttention(SpionSparsityConfig(2, 16))
    attention.observer = seen = PooledMapAccumulator(16, 31, torch.full((64,), 1 / 4))
    attention(q, q, q)
    expected = attention_map(q, q, block=16, filter_size=31)
    assert torch.equal(seen.total, expected)


@pytest.mark.parametrize(("causal", "padding"), FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_skewness_is_that_of_the_whole_map(dtype, causal, padding):
    request = request_of(150, 1, 1, causal, padding, dtype)
    options = {"key_padding_mask": request.key_padding_mask, "causal": causal}
    found = attention_skewness(request.q, request.k, **options)
    a = attention_map(request.q.double(), request.k.double(), **options)
    distance = a - a.mean()
    expected = (distance**3).mean() / (distance**2).mean() ** 1.5
    tolerance = FLOAT64_TOLERANCE if dtype == torch.float64 else 10 * FLOAT32_TOLERANCE
    assert abs(found / expected - 1) < tolerance  # float32: cubes triple an entry's error


def test_skewness_of_equal_entries_is_0_and_of_nan_is_nan():
    q = torch.zeros(1, 1, 64, 8)
    assert attention_skewness(q, q) == 0.0
    assert attention_skewness(q.fill_(float("nan")), q).isnan()


def test_specification_makes_nothing_of_the_size_of_rows_times_keys(monkeypatch):
    monkeypatch.setattr(streaming_maps, "_TILE_BYTES", 4 * 2 * 32**2)
    length, largest = 512, 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                largest = max(largest, leaf.numel() if isinstance(leaf, Tensor) else 0)
            return result

    q, k = torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4)
    with Watch():
        block_sums_torch(MapRequest(q, k, torch.ones(length).double(), None, False, 0.5, 32, 31))
    # Less than a strip of 32 rows of the two heads: no more than a tile and its surroundings.
    assert 2 * 32**2 <= largest < 2 * 32 * length


# The interpreter takes milliseconds a tile. Filters no wider than a block, which is a power of two
# and divides the length: tiles are cut at the corners of blocks. Then others.
TRITON_CASES = [
    ((64, 32, 31), False, "none"),
    ((96, 32, 1), True, "holes"),
    ((128, 64, 31), False, "holes"),
    ((128, 64, 31), True, "whole_sample"),
    ((128, 128, 63), True, "none"),
    ((96, 16, 15), False, "whole_sample"),
    ((16, 16, 31), False, "none"),
    ((45, 20, 7), True, "holes"),
    ((70, 16, 31), False, "none"),
    ((70, 16, 31), True, "whole_sample"),
    ((33, 33, 63), True, "holes"),
    # Samples that end before some tiles begin.
    ((128, 64, 31), False, "tail"),
    ((128, 32, 1), True, "tail"),
    ((70, 16, 31), False, "tail"),
    ((100, 1, 1), False, "tail"),
    # Token-level maps.
    ((1, 1, 1), False, "none"),
    ((70, 1, 1), False, "holes"),
    ((45, 1, 1), True, "whole_sample"),
]


def triton_sums(request: MapRequest, device) -> Tensor:
    from spion_ds.attention.triton import maps as triton_maps

    moved = MapRequest(*(x.to(device) if isinstance(x, Tensor) else x for x in request))
    assert triton_maps.unsupported(moved) is None
    found = triton_maps.block_sums_triton(moved)
    assert torch.equal(triton_maps.block_sums_triton(moved), found)
    return found.cpu()


@needs_triton
@pytest.mark.parametrize(("shape", "causal", "padding"), TRITON_CASES)
def test_triton_is_the_specification(shape, causal, padding, device):
    request = request_of(*shape, causal, padding)
    expected = block_sums_torch(in_float64(request))
    found = triton_sums(request, device)
    assert relative_error(found, expected) < FLOAT32_TOLERANCE
    assert torch.equal(found == 0.0, expected == 0.0)


# Tiles of 16-bit inputs are larger: of two pieces, several corners of blocks in one, one in both.
@needs_triton
@pytest.mark.parametrize("shape", [(192, 32, 31), (256, 128, 31), (150, 50, 15), (150, 1, 1)])
def test_triton_computes_16_bit_inputs_in_float32(shape, device):
    request = request_of(*shape, True, "holes", torch.float16)
    expected = block_sums_torch(in_float64(request))
    found = triton_sums(request, device)
    assert relative_error(found, expected) < FLOAT32_TOLERANCE
    assert torch.equal(found == 0.0, expected == 0.0)


@needs_triton
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_triton_takes_scales_of_any_sign(scale, device):
    request = request_of(64, 32, 31)._replace(scale=scale)
    expected = block_sums_torch(in_float64(request))
    assert relative_error(triton_sums(request, device), expected) < FLOAT32_TOLERANCE


@needs_triton
@pytest.mark.parametrize(("causal", "padding"), [(False, "none"), (True, "holes")])
def test_triton_sums_powers(causal, padding, device):
    from spion_ds.attention.triton import maps as triton_maps

    request = request_of(70, 16, 1, causal, padding)
    expected = streaming_maps.central_sums_torch(in_float64(request), 0.01)
    moved = MapRequest(*(x.to(device) if isinstance(x, Tensor) else x for x in request))
    found = triton_maps.central_sums_triton(moved, 0.01)
    assert found.dtype == torch.float64
    # Cubes triple an entry's error.
    assert relative_error(found.cpu(), expected) < 10 * FLOAT32_TOLERANCE


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_sums_token_level_maps_beyond_float32(dtype, device):
    q, k = (1e-2 * torch.randn(8, 4, 33, 8).to(device, dtype) for _ in range(2))
    real = draw_padding("tail", 8, 33).to(device)
    ones = torch.ones(33, dtype=torch.float64, device=device)
    from spion_ds.attention.triton import maps as triton_maps

    sums = []
    for count in (1, 8):
        parts = zip(*(x.chunk(count) for x in (q, k, real)), strict=True)
        requests = (MapRequest(*part[:2], ones, part[2], False, 0.4) for part in parts)
        sums.append(sum(triton_maps.block_sums_triton(request) for request in requests))
    assert torch.equal(sums[0].float(), sums[1].float())
    # Each of 32 additions may lose 2⁻⁴⁸ of the sum: 1.1e-13 in all.
    assert relative_error(*sums) < 1e-12


@needs_triton
def test_triton_says_what_it_cannot_do():
    from spion_ds.attention.triton import maps as triton_maps

    assert "blocks from 16, and of 1 without a filter; got 8 with a filter of 31" in (
        triton_maps.unsupported(request_of(70, 8, 31))
    )
    assert "got 1 with a filter of 3" in triton_maps.unsupported(request_of(70, 1, 3))
    assert "float64" in triton_maps.unsupported(in_float64(request_of(70, 16, 31)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"block": 0}, "block is 0"),
        ({"block": 9}, "block is 9; allowed: a whole number from 1 to 8"),
        ({"filter_size": 2}, "filter_size is 2; allowed: odd"),
        ({"row_weights": torch.ones(8, 8)}, r"row_weights has shape \(8, 8\)"),
        ({"row_weights": torch.ones(8).int()}, "int32; allowed"),
    ],
)
def test_wrong_arguments_are_named(arguments, words):
    fine = {"block": 4, "filter_size": 3, "row_weights": torch.ones(8)}
    accumulator = PooledMapAccumulator(**fine)
    with pytest.raises(ConfigError, match=words):
        PooledMapAccumulator(**fine | arguments)
    with pytest.raises(ConfigError, match="q has 9 tokens; row_weights are for 8: allowed"):
        accumulator.add(torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 4))
    with pytest.raises(ConfigError, match="kv_heads dividing heads"):
        accumulator.add(torch.randn(1, 3, 8, 4), torch.randn(1, 2, 8, 4))
