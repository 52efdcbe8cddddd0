"""What block_sparse_attention takes: strides, masks and errors that name what is wrong."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from spion_ds.attention import BlockLayout, block_sparse_attention
from spion_ds.errors import ConfigError

from .cases import (
    BACKENDS,
    MIXED,
    ON_CPU,
    SMALLER,
    Case,
    Inputs,
    Results,
    assert_is_the_reference,
    evaluate,
    make,
    needs_triton,
    relative_error,
)


def packed(x: torch.Tensor) -> torch.Tensor:
    """The same numbers as the middle third of a projection to (B, L, 3, H, D)."""
    wide = torch.full((*x.transpose(1, 2).shape[:2], 3, *x.shape[1::2]), 7.0)
    wide = wide.to(x.device, x.dtype)
    wide[:, :, 1] = x.transpose(1, 2)
    return wide[:, :, 1].transpose(1, 2)


STRIDED = {
    "packed": packed,
    "head_dim_first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every_other_token": lambda x: x.repeat_interleave(2, dim=2)[:, :, ::2],
    "offset": lambda x: torch.cat([x[..., :3], x], dim=-1)[..., 3:],
}


MIXED_16 = replace(MIXED, block=16)


@functools.cache
def from_contiguous_inputs(backend: str, device: torch.device) -> tuple[Inputs, Results]:
    inputs = make(MIXED_16, SMALLER, device)
    return inputs, evaluate(inputs, backend)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", STRIDED)
def test_strided_inputs_give_the_bits_of_contiguous_ones(kind, backend, device):
    inputs, expected = from_contiguous_inputs(backend, device)
    tensors = [STRIDED[kind](x) for x in (inputs.q, inputs.k, inputs.v, inputs.grad)]
    assert not any(x.is_contiguous() for x in tensors)
    results = evaluate(Inputs(*tensors, inputs.layout, inputs.options), backend)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_keys_and_gradients_are_taken(backend, device):
    inputs = make(replace(MIXED_16, grouped=False), SMALLER, device)
    # One key for all heads, and the gradient of a sum: strides of 0.
    expanded = replace(
        inputs,
        k=inputs.k[:, :1].expand_as(inputs.k),
        grad=inputs.grad[:1, :1, :1, :1].expand_as(inputs.grad),
    )
    plain = replace(expanded, k=expanded.k.contiguous(), grad=expanded.grad.contiguous())
    for a, b in zip(evaluate(expanded, backend), evaluate(plain, backend), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_left_as_they_were(backend, device):
    inputs = make(MIXED_16, SMALLER, device)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.grad, inputs.options["key_padding_mask"])
    before = [x.clone() for x in tensors]
    evaluate(inputs, backend)
    for a, b in zip(tensors, before, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_wanted_gradients_are_given(backend, device):
    inputs = make(Case(), SMALLER, device)
    q = inputs.q.requires_grad_()
    out = block_sparse_attention(q, inputs.k, inputs.v, inputs.layout, backend=backend)
    out.backward(inputs.grad)
    assert relative_error(q.grad, evaluate(inputs, backend).dq) == 0.0
    with torch.no_grad():
        again = block_sparse_attention(q, inputs.k, inputs.v, inputs.layout, backend=backend)
    assert not again.requires_grad
    assert torch.equal(again, out)


def call(**changes):
    """A call that works, except for the arguments that are given: 2 samples, 4 heads, 40 tokens."""
    arguments = {"q": torch.randn(2, 4, 40, 8), "k": torch.randn(2, 2, 40, 8)}
    arguments |= {"v": arguments["k"].clone(), "layout": BlockLayout.from_mask(torch.eye(3), 16)}
    arguments |= changes
    return block_sparse_attention(**arguments)


def test_the_call_without_changes_is_fine():
    assert call().shape == (2, 4, 40, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q": torch.randn(4, 40, 8)}, r"q is \(batch, heads, L, head_dim\).*q \(4, 40, 8\)"),
        ({"v": torch.randn(2, 2, 39, 8)}, r"k, v .*got .*v \(2, 2, 39, 8\)"),
        ({"q": torch.randn(3, 4, 40, 8)}, r"got q \(3, 4, 40, 8\)"),
        ({"q": torch.randn(2, 4, 40, 16)}, "share head_dim"),
        ({"q": torch.randn(2, 3, 40, 8)}, "k's heads divide q's"),
        ({"q": torch.randn(2, 4, 40, 8).half()}, "one floating dtype; got torch.float16"),
        ({"q": torch.randn(2, 4, 40, 8, device="meta")}, "share a device; got meta, cpu, cpu"),
        ({"key_padding_mask": torch.ones(2, 40)}, r"bool \(2, 40\).*got torch.float32"),
        (
            {"key_padding_mask": torch.ones(40, 2, dtype=torch.bool)},
            r"True = real token; got torch.bool \(40, 2\)",
        ),
        (
            {"key_padding_mask": torch.ones(2, 40, dtype=torch.bool, device="meta")},
            "key_padding_mask is on meta, q on cpu",
        ),
        (
            {
                "q": torch.randn(2, 4, 41, 8),
                "key_padding_mask": torch.ones(2, 40, dtype=torch.bool),
                "zero_padded_queries": True,
            },
            "zero_padded_queries=True is for self-attention.*41 queries and 40 keys",
        ),
        (
            {"layout": BlockLayout.from_mask(torch.eye(4), 16)},
            "4×4 blocks of 16; 40 queries and 40 keys need 3×3",
        ),
        (
            {"layout": BlockLayout.from_mask(torch.ones(2, 3, 3), 16)},
            r"2 heads; allowed: 1 \(shared\) or q's 4",
        ),
        (
            {"layout": BlockLayout.from_mask(torch.ones(3, 3), 16).to("meta")},
            "the layout is on meta, q on cpu; call layout.to",
        ),
        (
            {"layout": BlockLayout.from_mask(torch.ones(3, 3), 16), "causal": True},
            "blocks wholly above the diagonal; remove them with mask.tril",
        ),
        (
            {"layout": torch.ones(3, 3, dtype=torch.bool)},
            r"a mask where a layout belongs: BlockLayout.from_mask\(mask, block\)",
        ),
        ({"query_offset": -1}, "query_offset is -1; allowed: an int from 0 up"),
        ({"query_offset": 1.0}, "query_offset is 1.0; allowed: an int"),
        ({"query_offset": True}, "query_offset is True; allowed: an int"),
        (
            {"query_offset": 9},
            "3×3 blocks of 16; 40 queries from position 9 on and 40 keys need 4×3, or more rows",
        ),
        (
            {"query_offset": 8, "dropout_p": 0.1},
            "query_offset is 8 and dropout_p 0.1; .* What dropout drops is a function of",
        ),
        (
            {"query_offset": 8, "zero_padded_queries": True},
            "query_offset is 8 and zero_padded_queries True; allowed: one of the two",
        ),
        ({"q": torch.randn(2, 4, 0, 8)}, "0 queries and 40 keys need 0×3"),
        ({"pruned": "zeros"}, "pruned mode 'zeros'.*did you mean 'zero'.*known: excluded, zero"),
        ({"backend": "tritn"}, "backend 'tritn'.*did you mean 'triton'.*known: auto"),
        ({"dropout_p": 1.0}, "dropout_p is 1.0; allowed: 0 up to, not including, 1"),
        ({"dropout_p": -0.1}, "dropout_p is -0.1"),
        (
            {"dropout_p": 0.1, "dropout_key": torch.zeros(2, dtype=torch.int64)},
            r"int32 \(2,\), one key a sample; got torch.int64",
        ),
        (
            {"dropout_p": 0.1, "dropout_key": torch.zeros(4, dtype=torch.int32)},
            r"int32 \(2,\).*got torch.int32 \(4,\)",
        ),
        (
            {"dropout_p": 0.1, "dropout_key": torch.zeros(2, dtype=torch.int32, device="meta")},
            "dropout_key is on meta, q on cpu",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        call(**changes)


@needs_triton
@pytest.mark.parametrize(
    ("block", "head_dim", "dtype", "words"),
    [
        (8, 16, torch.float32, r"blocks of \(16, 32, 64, 128\); got 8"),
        (16, 257, torch.float32, "head_dim 1 to 256; got torch.float32 with head_dim 257"),
        (16, 16, torch.float64, "bf16, fp16 and fp32 .* got torch.float64"),
    ],
)
def test_what_the_kernels_do_not_take_is_named_and_auto_takes_it(
    block, head_dim, dtype, words, device
):
    q = torch.randn(1, 1, 20, head_dim, dtype=dtype, device=device)
    layout = BlockLayout.from_mask(torch.eye(-(-20 // block)), block).to(device)
    with pytest.raises(ConfigError, match=words):
        block_sparse_attention(q, q, q, layout, backend="triton")
    out = block_sparse_attention(q, q, q, layout, backend="auto")
    expected = block_sparse_attention(q, q, q, layout, backend="torch")
    # On a CPU "auto" may be another backend: one rounding of the output's dtype apart.
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block", "head_dim"), [(16, 1), (32, 8), (16, 24), (64, 100)])
def test_any_head_dim_is_taken(block, head_dim, backend, device):
    assert_is_the_reference(Case(block=block, head_dim=head_dim), backend, SMALLER, device)


@pytest.mark.parametrize("block", [1, 8, 24, 100])
def test_pytorchs_operators_take_any_block(block, device):
    assert_is_the_reference(Case(block=block, kept="empty_rows"), "torch", ON_CPU, device)


def test_without_a_key_dropout_follows_pytorchs_generator(device):
    q = torch.randn(2, 1, 40, 8, device=device)
    layout = BlockLayout.from_mask(torch.ones(3, 3), 16).to(device)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(block_sparse_attention(q, q, q, layout, dropout_p=0.5))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
