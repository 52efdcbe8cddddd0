"""What NaN and infinity in a token reach: nothing from padding and pruned blocks."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from spion_ds.attention import (
    AttentionMapAccumulator,
    BlockLayout,
    LearnedPattern,
    SparseSelfAttention,
    attention_map,
    attention_skewness,
    block_sparse_attention,
)
from spion_ds.ops.sparse_attention import FixedSparsityConfig
from spion_ds.ops.sparse_attention import SparseSelfAttention as DeepSpeedAttention
from spion_ds.sparsity import SpionSparsityConfig

from .cases import CPP, TRITON

BATCH, HEADS, LENGTH, BLOCK, HEAD_DIM = 2, 1, 60, 16, 8
BACKENDS = ("reference", "torch", CPP, TRITON)
NAN, INFINITY = float("nan"), float("inf")
# The second key block has padding in its middle, the last ones at the end.
REAL = torch.ones(BATCH, LENGTH, dtype=torch.bool)
REAL[0, 20:23] = False
REAL[1, 37:] = False
MASK = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1]]).bool()


def drawn(device, count: int = 4) -> list[torch.Tensor]:
    return [torch.randn(BATCH, HEADS, LENGTH, HEAD_DIM, device=device) for _ in range(count)]


def with_padding(x: torch.Tensor, value: float) -> torch.Tensor:
    return x.masked_fill(~REAL.to(x.device)[:, None, :, None], value)


def results(function, q, k, v, grad) -> list[torch.Tensor]:
    """The output and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def assert_padding_reaches_nothing(function, device, value: float, given: float = 0.0) -> None:
    """``given``: the gradient of what padded queries give."""
    q, k, v, grad = drawn(device)
    real = REAL.to(device)[:, None, :, None].expand_as(q)
    grad = with_padding(grad, 0.0)
    expected = results(function, *(with_padding(x, 0.0) for x in (q, k, v)), grad)
    inputs = [with_padding(x, value) for x in (q, k, v)]
    found = results(function, *inputs, with_padding(grad, given))
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[real], b[real])
    for gradient in found[1:]:
        assert not gradient[~real].any()


@pytest.mark.parametrize(
    ("zeroed", "causal", "value"),
    [(False, False, NAN), (True, False, NAN), (False, True, INFINITY), (True, True, -INFINITY)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_tokens_reach_no_real_token(backend, zeroed, causal, value, device):
    layout = BlockLayout.from_mask(MASK.to(device), BLOCK)

    def attend(q, k, v):
        return block_sparse_attention(
            *(q, k, v, layout),
            key_padding_mask=REAL.to(device),
            causal=causal,
            zero_padded_queries=zeroed,
            backend=backend,
        )

    assert_padding_reaches_nothing(attend, device, value, given=value if zeroed else 0.0)


@pytest.mark.parametrize("zeroed", [False, True])
@pytest.mark.parametrize("backend", ["reference", "torch", CPP, "dense"])
def test_padding_that_is_finite_but_overflows_reaches_no_real_token(backend, zeroed, device):
    layout = BlockLayout.from_mask(MASK.to(device), BLOCK)
    dense = SparseSelfAttention(SpionSparsityConfig(HEADS, BLOCK), zero_padded_queries=zeroed)
    named = {"key_padding_mask": REAL.to(device)}

    def attend(q, k, v):
        if backend == "dense":
            return dense(q, k, v, **named)
        named.update(zero_padded_queries=zeroed, backend=backend)
        return block_sparse_attention(q, k, v, layout, **named)

    assert_padding_reaches_nothing(attend, device, 3e38)


def test_padding_that_overflows_only_in_autocasts_dtype_reaches_no_real_token():
    q, k, v, _ = drawn("cpu")
    dense = SparseSelfAttention(SpionSparsityConfig(HEADS, BLOCK))
    with torch.autocast("cpu", torch.float16):
        found = dense(q, with_padding(k, 7e4), with_padding(v, 7e4), REAL)
        wanted = dense(q, with_padding(k, 0.0), with_padding(v, 0.0), REAL)
    real = REAL[:, None, :, None].expand_as(q)
    assert torch.equal(found[real], wanted[real])


def test_a_look_at_values_stands_in_the_way_of_no_tracing():
    q, k, v, _ = drawn("cpu")
    dense = SparseSelfAttention(SpionSparsityConfig(HEADS, BLOCK)).eval()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        assert dense(*fakes, REAL).shape == q.shape
    traced = torch.jit.trace(lambda q, k, v: dense(q, k, v, REAL), (q, k, v), check_trace=False)
    real = REAL[:, None, :, None].expand_as(q)
    found = traced(q, with_padding(k, NAN), with_padding(v, NAN))
    assert torch.equal(found[real], dense(q, k, v, REAL)[real])


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_only_pruned_blocks_hold_reach_no_query(backend, device):
    layout = BlockLayout.from_mask(MASK.to(device), BLOCK)
    q, k, v, grad = drawn(device)
    alone = slice(2 * BLOCK, 3 * BLOCK)  # of keys that the rows 0 and 1 prune
    rows = slice(0, 2 * BLOCK)
    grad[:, :, 2 * BLOCK :] = 0.0

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, layout, backend=backend)

    expected = results(attend, q, k, v, grad)
    k[:, :, alone], v[:, :, alone] = NAN, INFINITY
    found = results(attend, q, k, v, grad)
    for a, b in zip(found[:2], expected[:2], strict=True):
        assert torch.equal(a[:, :, rows], b[:, :, rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_real_token_that_is_not_finite_shows_in_the_rows_that_keep_it(backend, device):
    """And, under causal, in rows of its own tile at most: none of the blocks before it."""
    layout = BlockLayout.from_mask(MASK.to(device), BLOCK)
    q, k, v = drawn(device, 3)
    v[:, :, 2 * BLOCK + 3] = NAN
    out = block_sparse_attention(q, k, v, layout, causal=True, backend=backend)
    assert out[:, :, 2 * BLOCK + 3 :].isnan().all()
    assert out[:, :, : 2 * BLOCK].isfinite().all()
    q[:, :, 5] = NAN
    out, dq, dk, dv = results(
        lambda *x: block_sparse_attention(*x, layout, backend=backend), q, k, k, q.new_ones(q.shape)
    )
    assert out[:, :, 5].isnan().all()
    assert dq[:, :, 5].isnan().all()
    assert dk[:, :, :BLOCK].isnan().all()
    assert dv[:, :, :BLOCK].isnan().all()


def modules(device) -> dict:
    dense, sparse = (SparseSelfAttention(SpionSparsityConfig(HEADS, BLOCK)) for _ in range(2))
    sparse.set_mask(MASK)
    zeroed = SparseSelfAttention(SpionSparsityConfig(HEADS, BLOCK), zero_padded_queries=True)
    deepspeed = DeepSpeedAttention(FixedSparsityConfig(HEADS, BLOCK), max_seq_length=64)
    real = REAL.to(device)
    added = torch.where(real, 0.0, -10000.0)
    rpe = torch.randn(LENGTH, LENGTH, device=device)
    causal = torch.ones(LENGTH, LENGTH, device=device).tril()
    causal[5, 2] = 0  # not the lower triangle alone, which the kernels have built in
    return {
        "dense": lambda *x: dense(*x, key_padding_mask=real),
        "dense, zeros for padded queries": lambda *x: zeroed(*x, key_padding_mask=real),
        "sparse": lambda *x: sparse(*x, key_padding_mask=real),
        "DeepSpeed's": lambda *x: deepspeed(*x, key_padding_mask=added),
        "DeepSpeed's with positions": lambda *x: deepspeed(*x, rpe=rpe, key_padding_mask=added),
        "DeepSpeed's with a mask": lambda *x: deepspeed(
            *x, key_padding_mask=added, attn_mask=causal
        ),
    }


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("way", modules(torch.device("cpu")))
def test_so_it_is_in_modules(way, value, device):
    given = value if "zeros" in way else 0.0
    assert_padding_reaches_nothing(modules(device)[way], device, value, given)


def accumulated(q, k, real):
    accumulator = AttentionMapAccumulator()
    accumulator.add(q, k, real)
    return accumulator.total


MAPS = {
    "map": lambda q, k, real: attention_map(q, k, key_padding_mask=real),
    "float64 map": lambda q, k, real: attention_map(q.double(), k.double(), key_padding_mask=real),
    "pooled map": lambda q, k, real: attention_map(
        q, k, block=BLOCK, filter_size=3, key_padding_mask=real
    ),
    "map a head": lambda q, k, real: attention_map(
        q, k, block=BLOCK, key_padding_mask=real, per_head=True
    ),
    "skewness": lambda q, k, real: attention_skewness(q, k, key_padding_mask=real),
    "accumulator": accumulated,
    "learned pattern": lambda q, k, real: LearnedPattern(4, 4, BLOCK).to(q.device)(q, k, real),
}


@pytest.mark.parametrize("of", MAPS)
def test_padded_tokens_enter_no_map(of, device):
    q, k = drawn(device, 2)
    found = []
    for value in (0.0, NAN):
        torch.manual_seed(0)
        found.append(MAPS[of](with_padding(q, value), with_padding(k, value), REAL.to(device)))
    assert found[0].isfinite().all()
    assert torch.equal(*found)
