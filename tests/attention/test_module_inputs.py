"""What SparseSelfAttention takes in both phases: causal, scale, key heads, padding; what not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spion_ds.attention import BlockLayout, SparseSelfAttention, block_sparse_attention
from spion_ds.errors import ConfigError
from spion_ds.sparsity import SpionSparsityConfig

from .cases import needs_gpu, relative_error

LENGTH, BLOCK, HEADS = 72, 16, 4
BLOCKS = 5  # the last one has 8 tokens
# Two programs of the same float64 formula: some hundred roundings of 1e-16.
FLOAT64_TOLERANCE = 1e-12
PHASES = ["dense", "sparse"]


def pattern() -> Tensor:
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(BLOCKS, BLOCKS, generator=generator) < 0.4
    return mask | torch.eye(BLOCKS, dtype=torch.bool)


def module(phase: str, **settings) -> SparseSelfAttention:
    attention = SparseSelfAttention(SpionSparsityConfig(HEADS, BLOCK), **settings)
    attention.set_mask(pattern() if phase == "sparse" else None)
    return attention


def drawn(key_heads: int = HEADS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(3, heads, LENGTH, 8) for heads in (HEADS, key_heads, key_heads)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def real_tokens(kind: str) -> Tensor | None:
    """None, tails of padding, or padding at the start, which leaves causal rows without a key."""
    ends = torch.tensor([[LENGTH], [50], [0]])
    place = torch.arange(LENGTH)[None]
    return {"none": None, "tail": place < ends, "head": place >= LENGTH - ends}[kind]


def reference(phase: str, tensors: list[Tensor], causal: bool, **options) -> Tensor:
    mask = pattern() if phase == "sparse" else torch.ones(BLOCKS, BLOCKS, dtype=torch.bool)
    layout = BlockLayout.from_mask(mask.tril() if causal else mask, BLOCK)
    return block_sparse_attention(*tensors, layout, causal=causal, backend="reference", **options)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("padding", ["none", "tail", "head"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_both_phases_are_the_reference_formula(phase, padding, causal, key_heads, scale):
    attention, tensors = module(phase, causal=causal, scale=scale), drawn(key_heads)
    options = {"key_padding_mask": real_tokens(padding), "scale": scale, "pruned": "excluded"}
    expected = reference(phase, tensors, causal, **options)
    found = attention(*tensors, options["key_padding_mask"])
    grad = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad(expected, tensors, grad)]
    results = [found, *torch.autograd.grad(found, tensors, grad)]
    for result, want in zip(results, wanted, strict=True):
        # Written so that NaN fails.
        assert relative_error(result, want) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_that_sees_no_key_gives_zeros_and_no_gradients(phase, dtype):
    for causal, real in ((False, real_tokens("tail")), (True, real_tokens("head"))):
        attention, tensors = module(phase, causal=causal), drawn(dtype=dtype)
        out = attention(*tensors, real)
        lonely = ~real.cumsum(1).bool() if causal else ~real.any(1, keepdim=True).expand_as(real)
        assert lonely.any()
        assert not out.transpose(1, 2)[lonely].any()
        for grad in torch.autograd.grad(out.float().sum(), tensors):
            assert grad.isfinite().all()
            assert not grad[2].any()  # the sample without a real token


def test_a_causal_module_cuts_what_a_pattern_keeps_above_the_diagonal():
    attention, tensors = module("sparse", causal=True), drawn()
    assert pattern().triu(1).any()
    layout = attention.layout(LENGTH, torch.device("cpu"))
    assert torch.equal(layout.to_mask(), pattern().tril())
    # The pattern itself stays as it was given.
    assert torch.equal(attention.sparsity_config.pattern, pattern())
    before = attention(*tensors)[:, :, :40]
    changed = [x.detach().clone() for x in tensors]
    for x in changed:
        x[:, :, 40:] = 7.0
    assert torch.equal(attention(*changed)[:, :, :40], before)


def test_a_pattern_that_keeps_the_whole_lower_triangle_is_dense_for_a_causal_module():
    attention = module("dense", causal=True)
    attention.set_mask(torch.ones(BLOCKS, BLOCKS, dtype=torch.bool).tril())
    assert attention.layout(LENGTH, torch.device("cpu")) is None


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.ones(3, LENGTH), "key_padding_mask is bool .* got torch.float32"),
        (torch.ones(3, LENGTH, dtype=torch.int64), "got torch.int64 .* by mask.bool()"),
        (torch.zeros(3, LENGTH).masked_fill(torch.ones(3, LENGTH) > 0, -1e4), "by mask == 0"),
        (torch.ones(3, 1, 1, LENGTH, dtype=torch.bool), r"got torch.bool \(3, 1, 1, 72\)"),
        (torch.ones(LENGTH, dtype=torch.bool), r"got torch.bool \(72,\)"),
        (torch.ones(1, LENGTH, dtype=torch.bool), r"bool \(3, 72\)"),
    ],
    ids=["float", "int", "additive", "four dimensions", "one dimension", "another batch"],
)
def test_a_padding_mask_of_another_kind_is_refused(phase, mask, expected):
    with pytest.raises(ConfigError, match=expected):
        module(phase)(*drawn(), mask)


@pytest.mark.parametrize("phase", PHASES)
def test_heads_that_are_not_the_configurations_are_refused(phase):
    q, k, v = (x.repeat(1, 2, 1, 1) for x in drawn())
    with pytest.raises(ConfigError, match="query has 8 heads; allowed: 4, the num_heads"):
        module(phase)(q, k, v)
    with pytest.raises(ConfigError, match="k's heads divide q's"):
        module(phase)(*drawn(key_heads=3))


@pytest.mark.parametrize("phase", PHASES)
def test_keys_of_other_tokens_than_the_queries_are_refused(phase):
    q, k, v = drawn()
    with pytest.raises(ConfigError, match="query has 72 tokens and key 40"):
        module(phase)(q, k[:, :, :40], v[:, :, :40])


@pytest.mark.parametrize("phase", PHASES)
def test_autocast_takes_tensors_of_several_dtypes(phase):
    q, k, v = drawn(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(phase)(q, k, v.bfloat16())
        assert torch.equal(out, module(phase)(q, k, v))
    assert out.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="share one floating dtype"):
        module(phase)(q, k, v.bfloat16())


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("causal", [False, True])
def test_padded_queries_give_zeros_where_that_is_asked_for(phase, causal):
    tensors, real = drawn(key_heads=2), real_tokens("tail")
    plain, zeroed = (
        module(phase, causal=causal, zero_padded_queries=zero)(*tensors, real)
        for zero in (False, True)
    )
    read = real[:, None].expand(-1, HEADS, -1)
    assert not zeroed[~read].any()
    assert torch.equal(zeroed[read], plain[read])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("padding", ["none", "tail", "head"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("key_heads", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_phases_are_the_reference_formula_on_a_gpu(phase, padding, causal, key_heads, dtype):
    attention, tensors = module(phase, causal=causal), drawn(key_heads, dtype)
    real = real_tokens(padding)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    expected = reference(phase, exact, causal, key_padding_mask=real, pruned="excluded")
    on_gpu = [x.detach().cuda().requires_grad_() for x in tensors]
    found = attention(*on_gpu, None if real is None else real.cuda())
    grad = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad(expected, exact, grad)]
    results = [found, *torch.autograd.grad(found, on_gpu, grad.to(found))]
    # As block_sparse_attention promises: about a hundred roundings of float32, a few of bfloat16.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for result, want in zip(results, wanted, strict=True):
        assert relative_error(result.cpu(), want) < tolerance


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_without_an_index_may_be_prepared():
    attention = module("sparse")
    attention.prepare(LENGTH, torch.device("cuda"))
    device = torch.device("cuda", torch.cuda.current_device())
    prepared = attention.layout(LENGTH, device)
    attention.prepare(LENGTH, device)
    assert attention.layout(LENGTH, device) is prepared
