"""SparseSelfAttention under DeepSpeed's interface: fused or in steps, always the dense formula."""

from __future__ import annotations

import copy
import pickle
import random

import pytest
import torch
from torch import Tensor

from spion_ds.errors import ConfigError
from spion_ds.ops.sparse_attention import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparseSelfAttention,
    SparsityConfig,
    VariableSparsityConfig,
    sparse_self_attention,
)
from spion_ds.sparsity import SpionSparsityConfig
from tests.ops.dense import assert_close

BATCH, HEADS, HEAD_DIM = 2, 4, 16
LENGTH = 150  # the last block is cut short at every block size


def draw(device, dtype=torch.float32, length=LENGTH, count=3):
    shape = (BATCH, HEADS, length, HEAD_DIM)
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in range(count)]


def dense_attention(attention, q, k, v, rpe=None, kp=None, attn=None):
    """The masks as -inf and biases on dense float64 scores; rows without keys give zeros."""
    block, length = attention.sparsity_config.block, q.shape[2]
    mask = attention.get_layout(length).to(q.device).bool()
    mask = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :length, :length]
    scores = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    for bias in (rpe, None if kp is None else kp[:, None, None], attn):
        scores = scores if bias is None else scores + bias.double()
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return (scores.masked_fill(empty, 0.0).softmax(-1) * ~empty) @ v


def assert_is_dense(attention, tensors, dense_masks=(), **arguments):
    """Compare output and gradients; ``dense_masks`` are rpe, kp, attn as what is added."""
    out = attention(*tensors, **arguments)
    dtype = tensors[0].dtype
    assert out.dtype == dtype
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    wanted = dense_attention(attention, *doubles, *dense_masks)
    assert_close("output", out, wanted, dtype)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, grad)
    wanted_grads = torch.autograd.grad(wanted, doubles, grad.double())
    for name, mine, right in zip("qkv", grads, wanted_grads, strict=True):
        assert_close(f"gradient of {name}", mine, right, dtype)


def excluding(keep: Tensor) -> Tensor:
    """What is added where ``keep`` is False: -inf."""
    return torch.zeros(keep.shape, device=keep.device).masked_fill(~keep, float("-inf"))


@pytest.fixture
def fused_calls(monkeypatch):
    """The keyword arguments of every call of the fused kernels."""
    calls = []
    fused = sparse_self_attention.block_sparse_attention

    def noted(*args, **kwargs):
        calls.append(kwargs)
        return fused(*args, **kwargs)

    monkeypatch.setattr(sparse_self_attention, "block_sparse_attention", noted)
    return calls


CONFIGS = [
    DenseSparsityConfig(HEADS),
    FixedSparsityConfig(HEADS, 16, True, num_different_global_patterns=4),
    VariableSparsityConfig(HEADS, 32, num_random_blocks=1, local_window_blocks=[1, 2]),
    BigBirdSparsityConfig(HEADS, 16, True, num_random_blocks=2),
    BSLongformerSparsityConfig(HEADS, 16),
    LocalSlidingWindowSparsityConfig(HEADS, 64),
]
BY_NAME = [pytest.param(config, id=type(config).__name__) for config in CONFIGS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("config", BY_NAME)
def test_without_masks_it_is_the_dense_formula_fused(config, dtype, device, fused_calls):
    attention = SparseSelfAttention(config)
    assert_is_dense(attention, draw(device, dtype))
    assert [call["pruned"] for call in fused_calls] == ["excluded"]


@pytest.mark.parametrize("value", [-10000.0, float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("shape", [(BATCH, LENGTH), (BATCH, 1, 1, LENGTH)])
def test_padding_masks_that_exclude_are_fused(value, shape, device, fused_calls):
    attention = SparseSelfAttention(BSLongformerSparsityConfig(HEADS))
    keep = torch.arange(LENGTH, device=device) < torch.tensor([[LENGTH], [90]], device=device)
    mask = torch.zeros(keep.shape, device=device).masked_fill(~keep, value).view(shape)
    masks = (None, excluding(keep), None)
    assert_is_dense(attention, draw(device), masks, key_padding_mask=mask)
    assert len(fused_calls) == 1
    for mode, other in (("mul", keep.float()), ("mul", keep.long()), ("add", keep)):
        attention.key_padding_mask_mode = mode
        assert_is_dense(attention, draw(device), masks, key_padding_mask=other)
    assert len(fused_calls) == 4


@pytest.mark.parametrize("mode", ["mul", "add", "bool"])
def test_a_causal_mask_is_fused_and_keeps_the_future_out(mode, device, fused_calls):
    # A "unidirectional" layout keeps its diagonal blocks whole; this is what the mask adds.
    config = FixedSparsityConfig(HEADS, 32, attention="unidirectional")
    attention = SparseSelfAttention(config, attn_mask_mode="mul" if mode == "mul" else "add")
    causal = torch.ones(LENGTH, LENGTH, device=device, dtype=torch.bool).tril()
    mask = {"mul": causal.float(), "add": excluding(causal), "bool": causal}[mode]
    tensors = draw(device)
    assert_is_dense(attention, tensors, (None, None, excluding(causal)), attn_mask=mask)
    assert [call["causal"] for call in fused_calls] == [True]
    out = attention(*tensors)
    later = [x.detach().clone() for x in tensors]
    for x in later:
        x[:, :, 17:] = 0.0
    assert torch.equal(
        attention(*later, attn_mask=mask)[:, :, :17], attention(*tensors, attn_mask=mask)[:, :, :17]
    )
    assert not torch.equal(attention(*later)[:, :, :17], out[:, :, :17])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("config", BY_NAME)
def test_rpe_and_masks_of_every_kind_at_once(config, dtype, device, fused_calls):
    attention = SparseSelfAttention(config)
    rpe = torch.randn(1, HEADS, LENGTH, LENGTH, device=device)
    attn = torch.rand(LENGTH, LENGTH, device=device) < 0.7
    kp = torch.randn(BATCH, LENGTH, device=device).masked_fill(
        torch.rand(BATCH, LENGTH, device=device) < 0.2, float("-inf")
    )
    assert_is_dense(
        attention,
        draw(device, dtype),
        (rpe, kp, excluding(attn)),
        rpe=rpe,
        key_padding_mask=kp,
        attn_mask=attn.to(dtype),
    )
    assert not fused_calls


def test_rpe_gets_the_dense_gradient(device):
    attention = SparseSelfAttention(BigBirdSparsityConfig(HEADS))
    tensors = draw(device)
    rpe = torch.randn(LENGTH, LENGTH, device=device, requires_grad=True)
    double = rpe.detach().double().requires_grad_()
    attention(*tensors, rpe=rpe).square().sum().backward()
    doubles = [x.detach().double() for x in tensors]
    dense_attention(attention, *doubles, double).square().sum().backward()
    assert_close("gradient of rpe", rpe.grad, double.grad, torch.float32)


def test_both_ways_agree_where_everything_is_masked(device):
    attention = SparseSelfAttention(LocalSlidingWindowSparsityConfig(HEADS))
    mask = torch.zeros(BATCH, LENGTH, device=device)
    mask[0] = -10000.0
    mask[1, 40:] = -10000.0
    q, k, v = draw(device)
    fused = attention(q, k, v, key_padding_mask=mask)
    in_steps = attention(
        q, k, v, key_padding_mask=mask, rpe=torch.zeros(LENGTH, LENGTH, device=device)
    )
    assert not fused[0].any()
    assert not fused[1, :, 100:].any()  # the window sees padding alone
    assert_close("output", in_steps, fused, torch.float32)
    assert not in_steps[fused == 0].any()


def test_a_mask_that_changes_in_place_is_looked_at_again(device):
    attention = SparseSelfAttention(DenseSparsityConfig(HEADS))
    q, k, v = draw(device)
    mask = torch.zeros(BATCH, LENGTH, device=device)
    attention(q, k, v, key_padding_mask=mask)
    mask[:, 5] = 3.0  # no longer yes or no
    wanted = dense_attention(attention, q.double(), k.double(), v.double(), None, mask)
    assert_close("output", attention(q, k, v, key_padding_mask=mask), wanted, torch.float32)


@pytest.mark.parametrize("fill", ["NumPy", "data"])
@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
def test_a_mask_that_is_refilled_without_a_trace_is_read_anew(name, fill):
    attention = SparseSelfAttention(DenseSparsityConfig(HEADS))
    q, k, v = draw(torch.device("cpu"))
    mask, other = torch.zeros(BATCH, LENGTH), torch.randn(BATCH, LENGTH)
    if name == "attn_mask":
        mask, other = torch.ones(LENGTH, LENGTH).tril(), torch.ones(LENGTH, LENGTH)
    attention(q, k, v, **{name: mask})
    if fill == "NumPy":
        mask.numpy()[:] = other.numpy()
    else:
        mask.data.copy_(other)
    expected = attention(q, k, v, **{name: other})
    assert torch.equal(attention(q, k, v, **{name: mask}), expected)


def test_a_module_first_used_in_inference_mode_can_be_trained(device):
    attention = SparseSelfAttention(FixedSparsityConfig(HEADS)).to(device)
    rpe = torch.zeros(LENGTH, LENGTH, device=device)
    for arguments in ({}, {"rpe": rpe}):
        with torch.inference_mode():
            attention(*draw(device), **arguments)
        tensors = draw(device)
        attention(*tensors, **arguments).sum().backward()
        assert all(x.grad is not None for x in tensors)


def test_layouts_of_sixteen_lengths_are_kept(device):
    attention = SparseSelfAttention(FixedSparsityConfig(HEADS, 16))
    made = []
    attention._make = lambda *arguments: (
        made.append(arguments) or type(attention)._make(attention, *arguments)
    )
    for length in [*range(16, 16 * 21, 16), 16 * 20 - 3]:
        attention(*draw(device, length=length))
    assert len(made) == 20  # the last length has as many blocks as the one before
    attention(*draw(device, length=16 * 10))
    assert len(made) == 20
    attention(*draw(device, length=16))
    assert len(made) == 21


def test_a_transposed_key_is_taken(device):
    attention = SparseSelfAttention(FixedSparsityConfig(HEADS))
    q, k, v = draw(device)
    assert torch.equal(attention(q, k.transpose(-2, -1), v), attention(q, k, v))


def test_inputs_longer_than_max_seq_length_work(device):
    # The old one was capped, at 2048 by default.
    attention = SparseSelfAttention(FixedSparsityConfig(HEADS), max_seq_length=64)
    assert attention.master_layout.shape == (HEADS, 4, 4)
    assert_is_dense(attention, draw(device))


def test_shorter_inputs_take_a_part_of_the_master_layout():
    config = FixedSparsityConfig(HEADS, num_local_blocks=4)
    attention = SparseSelfAttention(config, max_seq_length=256)
    assert torch.equal(attention.master_layout, config.make_layout(256))
    assert torch.equal(attention.get_layout(80), config.make_layout(256)[:, :5, :5])


def test_layers_with_different_layouts_do_not_share_them(device):
    # The old kernels were cached by sequence length alone.
    tensors = draw(device)
    for config in (LocalSlidingWindowSparsityConfig(HEADS), DenseSparsityConfig(HEADS)):
        assert_is_dense(SparseSelfAttention(config), tensors)


def test_layouts_that_keep_few_blocks_are_not_lost(device):
    # The old kernels zeroed output when every row kept fewer than four blocks.
    out = SparseSelfAttention(LocalSlidingWindowSparsityConfig(HEADS))(*draw(device))
    assert (out != 0).all()


def test_a_spion_pattern_is_followed_when_it_is_found(device):
    config = SpionSparsityConfig(HEADS, 32)
    attention = SparseSelfAttention(config)
    tensors = draw(device)
    assert_is_dense(attention, tensors)
    config.set_pattern(torch.eye(5))
    assert_is_dense(attention, tensors)
    config.set_pattern(torch.eye(5).flip(0))
    assert_is_dense(attention, tensors)


def test_a_state_dict_of_another_layout_is_followed(device):
    first = SparseSelfAttention(BigBirdSparsityConfig(HEADS, seed=1)).to(device)
    second = SparseSelfAttention(BigBirdSparsityConfig(HEADS, seed=2)).to(device)
    tensors = draw(device)
    assert not torch.equal(first(*tensors), second(*tensors))
    second.load_state_dict(first.state_dict())
    assert list(first.state_dict()) == ["master_layout"]  # as in old checkpoints
    assert torch.equal(first(*tensors), second(*tensors))


def test_a_module_can_be_copied_and_pickled(device):
    attention = SparseSelfAttention(BigBirdSparsityConfig(HEADS)).to(device)
    tensors = draw(device)
    out = attention(*tensors)
    for other in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(other(*tensors), out)


def test_random_layouts_of_a_users_class_are_the_same_on_every_rank():
    class Random(SparsityConfig):
        def make_layout(self, seq_len):
            layout = self.setup_layout(seq_len)
            layout[0] = torch.rand(layout.shape[1:]) < 0.5
            layout[0, 0, random.randrange(layout.shape[1])] = 1
            return self.check_and_propagate_first_head_layout(layout)

    random.seed(1)
    torch.manual_seed(1)
    first = SparseSelfAttention(Random(HEADS)).master_layout
    draws = random.random(), torch.rand(())
    random.seed(2)
    torch.manual_seed(2)
    assert torch.equal(SparseSelfAttention(Random(HEADS)).master_layout, first)
    random.seed(1)
    torch.manual_seed(1)
    assert (random.random(), torch.rand(())) == draws  # nobody's draws are disturbed


def test_scores_too_large_for_float16_before_scaling(device):
    attention = SparseSelfAttention(DenseSparsityConfig(1))
    q = torch.full((1, 1, 16, 256), 18.0, device=device, dtype=torch.float16)
    v = torch.randn(1, 1, 16, 256, device=device, dtype=torch.float16)
    assert torch.finfo(torch.float16).max < 256 * 18.0**2
    for arguments in ({}, {"rpe": torch.zeros(16, 16, device=device)}):
        out = attention(q, q, v, **arguments)  # all scores are equal
        assert_close("output", out, v.mean(dim=2, keepdim=True).expand_as(v), torch.float16)


def test_autocast_casts_both_ways(device):
    attention = SparseSelfAttention(BSLongformerSparsityConfig(HEADS))
    tensors = draw(device)
    rpe = torch.zeros(LENGTH, LENGTH, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert attention(*tensors).dtype == torch.bfloat16
        assert attention(*tensors, rpe=rpe).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("shapes", "arguments", "words"),
    [
        ([(1, 4, 32, 16), (1, 4, 48, 16), (1, 4, 48, 16)], {}, "share one shape"),
        ([(1, 8, 32, 16)] * 3, {}, "is for 4 heads and the query has 8; .* num_heads=8"),
        (
            [(2, 4, 32, 16)] * 3,
            {"key_padding_mask": torch.ones(2, 48)},
            r"key_padding_mask is \(2, 32\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(shapes, arguments, words):
    attention = SparseSelfAttention(FixedSparsityConfig(4))
    with pytest.raises(ConfigError, match=words):
        attention(*(torch.ones(shape) for shape in shapes), **arguments)


def test_unknown_modes_are_named():
    with pytest.raises(ConfigError, match="unknown attn_mask_mode 'or'"):
        SparseSelfAttention(FixedSparsityConfig(4), attn_mask_mode="or")
