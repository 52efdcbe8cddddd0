"""A map for each head: that of the head alone, by every way there is; and how such maps add up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spion_ds.attention import attention_map
from spion_ds.attention.cpu import maps as cpu_maps
from spion_ds.attention.map_dispatch import block_sums
from spion_ds.attention.map_request import MapRequest
from spion_ds.attention.streaming_maps import block_sums_torch
from spion_ds.errors import ConfigError
from tests.memory import LargestTensor
from tests.patterns import brute_force

from .cases import FLOAT64_TOLERANCE, draw_padding, needs_gpu, needs_triton, relative_error
from .test_maps import dense_map, drawn

# Scores, exponentials and sums over samples in float32: some ten roundings of 6e-8 an entry.
FLOAT32_TOLERANCE = 1e-6
FEATURES = [(False, "none"), (True, "tail"), (False, "holes"), (True, "whole_sample")]


def heads_alone(q: Tensor, k: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys of each query head, in memory of their own."""
    groups = q.shape[1] // k.shape[1]
    return [(q[:, [h]].contiguous(), k[:, [h // groups]].contiguous()) for h in range(q.shape[1])]


def request_of(length, block, filter_size, causal=False, padding="none", dtype=torch.float32):
    q, k = torch.randn(3, 4, length, 8, dtype=dtype), torch.randn(3, 2, length, 8, dtype=dtype)
    weights = torch.rand(length, dtype=torch.float64)
    real = draw_padding(padding, 3, length)
    return MapRequest(q, k, weights, real, causal, 0.4, block, filter_size, per_head=True)


def specification(request: MapRequest) -> Tensor:
    """The block sums of each head in float64."""
    wide = request._replace(q=request.q.double(), k=request.k.double())
    return torch.stack([block_sums_torch(head) for head in wide.of_heads()])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("causal", "padding"), FEATURES)
def test_token_level_maps_are_the_mean_softmax_of_each_head(causal, padding, kv_heads, device):
    q, k = (x.to(device) for x in drawn(23, kv_heads))
    real = draw_padding(padding, 3, 23)
    real = None if real is None else real.to(device)
    found = attention_map(q, k, key_padding_mask=real, causal=causal, per_head=True)
    assert found.shape == (4, 23, 23)
    assert found.dtype == torch.float64
    expected = [torch.from_numpy(dense_map(*x, real, causal, 8**-0.5)) for x in heads_alone(q, k)]
    assert relative_error(found.cpu(), torch.stack(expected)) < FLOAT64_TOLERANCE


@pytest.mark.parametrize(("causal", "padding"), FEATURES)
@pytest.mark.parametrize(("length", "block", "filter_size"), [(32, 8, 7), (45, 6, None), (9, 1, 3)])
def test_pooled_maps_are_the_pooled_mean_softmax_of_each_head(
    length, block, filter_size, causal, padding, device
):
    q, k = (x.to(device) for x in drawn(length, 2))
    real = draw_padding(padding, 3, length)
    real = None if real is None else real.to(device)
    options = {"key_padding_mask": real, "causal": causal, "per_head": True}
    found = attention_map(q, k, block=block, filter_size=filter_size, **options)
    dense = [dense_map(*x, real, causal, 8**-0.5) for x in heads_alone(q, k)]
    expected = [torch.from_numpy(brute_force.pool(a, block, filter_size)) for a in dense]
    assert found.dtype == torch.float64
    assert relative_error(found.cpu(), torch.stack(expected)) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("block", "filter_size"), [(None, None), (16, 31), (20, None)])
def test_a_heads_map_is_that_of_the_head_alone(block, filter_size, dtype, device):
    q, k = (x.to(device) for x in drawn(80, 2, dtype=dtype))
    real = draw_padding("holes", 3, 80).to(device)
    options = {"block": block, "filter_size": filter_size, "key_padding_mask": real}
    found = attention_map(q, k, per_head=True, **options)
    expected = torch.stack([attention_map(*x, **options) for x in heads_alone(q, k)])
    # The same tiles in the same precision: only float64 sums may have another order.
    assert relative_error(found, expected) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("causal", "padding"), FEATURES)
def test_the_mean_over_the_heads_maps_is_the_shared_map(causal, padding, dtype, device):
    q, k = (x.to(device) for x in drawn(70, 2, dtype=dtype))
    real = draw_padding(padding, 3, 70)
    real = None if real is None else real.to(device)
    options = {"block": 16, "filter_size": 31, "key_padding_mask": real, "causal": causal}
    mean = attention_map(q, k, per_head=True, **options).mean(dim=0)
    # The shared map adds up the heads in float32 where the maps of heads are float64.
    tolerance = FLOAT64_TOLERANCE if dtype == torch.float64 else FLOAT32_TOLERANCE
    assert relative_error(mean, attention_map(q, k, **options)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_strided_queries_and_keys_give_the_maps_of_contiguous_ones(dtype, device):
    packed = torch.randn(3, 70, 4, 32, dtype=dtype).to(device)
    q, k = packed.transpose(1, 2).chunk(2, dim=-1)  # heads behind tokens, keys behind queries
    spread = torch.randn(3, 4, 70, 16, dtype=dtype).to(device)[..., ::2]  # head_dim with stride 2
    for queries, keys in ((q, k[:, ::2]), (spread, spread[:, 1::2])):
        found = attention_map(queries, keys, block=16, filter_size=31, per_head=True)
        contiguous = (x.contiguous() for x in (queries, keys))
        expected = attention_map(*contiguous, block=16, filter_size=31, per_head=True)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("causal", "padding"), FEATURES)
def test_cpp_is_the_specification(causal, padding, dtype):
    request = request_of(150, 16, 31, causal, padding, dtype)
    missing = cpu_maps.unsupported(request)
    if missing:
        pytest.skip(missing)
    found = block_sums(request)
    assert found.shape == (4, 10, 10)
    assert relative_error(found, specification(request)) < FLOAT32_TOLERANCE


# Tiles at the corners of blocks, tiles that visit blocks, single tokens.
@needs_triton
@pytest.mark.parametrize(("causal", "padding"), FEATURES)
@pytest.mark.parametrize("shape", [(64, 32, 31), (45, 20, 7), (40, 1, 1)])
def test_triton_is_the_specification(shape, causal, padding, device, monkeypatch):
    from spion_ds.attention.triton import maps as triton_maps

    request = request_of(*shape, causal, padding)
    moved = MapRequest(*(x.to(device) if isinstance(x, Tensor) else x for x in request))
    assert triton_maps.unsupported(moved) is None
    found = triton_maps.block_sums_triton(moved).cpu()
    expected = specification(request)
    assert relative_error(found, expected) < FLOAT32_TOLERANCE
    assert torch.equal(found == 0.0, expected == 0.0)
    # As many heads at a time as there is memory for: here one.
    monkeypatch.setattr(triton_maps, "_PARTS_BYTES", 1)
    one_by_one = triton_maps.block_sums_triton(moved).cpu()
    assert relative_error(one_by_one, found) < FLOAT64_TOLERANCE


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "block", "filter_size"),
    [(1024, 64, 31), (1024, 128, 31), (997, 64, 31), (800, 16, 31), (300, 1, 1)],
)
def test_a_gpu_gives_the_maps_of_heads(length, block, filter_size, dtype):
    q, k = torch.randn(2, 6, length, 64, dtype=dtype), torch.randn(2, 3, length, 64, dtype=dtype)
    real = draw_padding("tail", 2, length)
    options = {"block": block, "filter_size": filter_size, "causal": True, "per_head": True}
    found = attention_map(q.cuda(), k.cuda(), key_padding_mask=real.cuda(), **options)
    assert found.is_cuda
    expected = attention_map(q.double(), k.double(), key_padding_mask=real, **options)
    # 64 products a score, in float32: three times the roundings of 8 products.
    assert relative_error(found.cpu(), expected) < 3 * FLOAT32_TOLERANCE


@pytest.mark.gpu
@needs_gpu
def test_maps_of_heads_take_the_memory_of_some_heads():
    q, k = (torch.randn(1, 32, 8192, 64, dtype=torch.bfloat16).cuda() for _ in range(2))
    attention_map(q, k, block=16, filter_size=31, per_head=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    found = attention_map(q, k, block=16, filter_size=31, per_head=True)
    taken = torch.cuda.max_memory_allocated() - before
    # Less than the token-level float32 maps of two of the 32 heads.
    assert found.numel() * 8 <= taken < 2 * 8192**2 * 4


def test_maps_of_heads_make_nothing_of_the_size_of_the_attention_matrix():
    length = 2048
    q, k = torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
    with LargestTensor() as made:
        attention_map(q, k, block=64, filter_size=31, per_head=True)
    # One byte an entry is the smallest that an (L, L) tensor could be.
    assert 0 < made.bytes < length * length


def test_many_heads_of_one_key_head_keep_their_order():
    q, k = torch.randn(1, 12, 20, 4), torch.randn(1, 3, 20, 4)
    found = attention_map(q, k, per_head=True)
    order = torch.randperm(12)
    shuffled = attention_map(q[:, order], k.repeat_interleave(4, 1)[:, order], per_head=True)
    assert torch.equal(shuffled, found[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.int64])
@pytest.mark.parametrize("per_head", [False, True])
def test_a_padding_mask_of_numbers_is_named(per_head, dtype):
    q, k = drawn(8)
    with pytest.raises(ConfigError, match=f"key_padding_mask is {dtype}; allowed: bool"):
        attention_map(q, k, key_padding_mask=torch.ones(3, 8, dtype=dtype), per_head=per_head)


def test_wrong_shapes_are_named_as_without_heads():
    with pytest.raises(ConfigError, match="kv_heads dividing heads"):
        attention_map(torch.randn(2, 3, 8, 4), torch.randn(2, 2, 8, 4), per_head=True)
    with pytest.raises(ConfigError, match="filter_size is given without block"):
        attention_map(*drawn(8), filter_size=3, per_head=True)
