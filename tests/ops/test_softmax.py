"""Softmax of block-sparse tensors against dense softmax, with every mask in both modes."""

from __future__ import annotations

import pytest
import torch

from spion_ds.errors import ConfigError
from spion_ds.ops.sparse_attention.softmax import Softmax
from tests.ops.dense import assert_close, draw_layout, to_blocks, to_dense

BATCH, HEADS, ROWS, COLUMNS = 2, 3, 3, 4
SCALE = 0.4


def dense_softmax(x, layout, block, rpe, kp, kp_mode, attn, attn_mode):
    """The same from dense float64 scores; a row of -inf gives zeros."""
    scores = to_dense(x, layout, block, fill=float("-inf")) * SCALE
    for mask, mode in ((rpe, "add"), (attn, attn_mode), (kp, kp_mode)):
        if mask is None:
            continue
        mask = mask[:, None, None] if mask is kp else mask
        if mode == "mul" or mask.dtype == torch.bool:
            scores = scores.masked_fill(mask == 0, float("-inf"))
        else:
            scores = scores + mask.double()
    empty = (scores == float("-inf")).all(dim=-1, keepdim=True)
    return to_blocks(scores.masked_fill(empty, 0).softmax(-1) * ~empty, layout, block)


def draw_masks(block, dtype, device, kp_mode, attn_mode):
    """Masks of 0 and 1 for "mul", of 0 and -inf or small values for "add"."""
    rows, columns = ROWS * block, COLUMNS * block
    kp = (torch.rand(BATCH, columns, device=device) < 0.7).to(dtype)
    attn = (torch.rand(rows, columns, device=device) < 0.7).to(dtype)
    if kp_mode == "add":
        kp = torch.where(kp == 0, float("-inf"), 0.0).to(dtype)
    if attn_mode == "add":
        attn = torch.where(attn == 0, float("-inf"), torch.randn_like(attn)).to(dtype)
    return kp, attn


@pytest.mark.parametrize("modes", [("add", "add"), ("add", "mul"), ("mul", "add"), ("mul", "mul")])
@pytest.mark.parametrize(
    ("block", "dtype"),
    [
        (16, torch.float16),
        (16, torch.float32),
        (32, torch.float32),
        (64, torch.float16),
        (64, torch.float32),
    ],
)
def test_probabilities_and_gradients_are_the_dense_ones(block, dtype, modes, device):
    layout = draw_layout(HEADS, ROWS, COLUMNS)
    x = torch.randn(BATCH, int(layout.sum()), block, block, device=device, dtype=dtype)
    rpe = torch.randn(1, HEADS, ROWS * block, COLUMNS * block, device=device, dtype=dtype)
    kp, attn = draw_masks(block, dtype, device, *modes)
    leaves = x.requires_grad_(), rpe.requires_grad_()
    probs = Softmax(layout, block)(x, SCALE, rpe, kp, attn, *modes)
    assert probs.dtype == dtype
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = dense_softmax(doubles[0], layout, block, doubles[1], kp, modes[0], attn, modes[1])
    assert_close("probabilities", probs, wanted, dtype)
    grad = torch.randn_like(probs)
    grads = torch.autograd.grad(probs, leaves, grad)
    wanted_grads = torch.autograd.grad(wanted, doubles, grad.double())
    for name, mine, right in zip(("x", "rpe"), grads, wanted_grads, strict=True):
        assert_close(f"gradient of {name}", mine, right, dtype)


@pytest.mark.parametrize("which", ["none", "rpe", "kp", "attn"])
def test_each_argument_alone(which, device):
    layout = draw_layout(HEADS, ROWS, COLUMNS)
    x = torch.randn(BATCH, int(layout.sum()), 16, 16, device=device)
    rpe = torch.randn(ROWS * 16, COLUMNS * 16, device=device) if which == "rpe" else None
    kp, attn = draw_masks(16, torch.float32, device, "add", "add")
    kp, attn = (kp if which == "kp" else None), (attn if which == "attn" else None)
    probs = Softmax(layout, 16)(x, SCALE, rpe, kp, attn)
    wanted = dense_softmax(x.double(), layout, 16, rpe, kp, "add", attn, "add")
    assert_close("probabilities", probs, wanted, torch.float32)


def test_input_and_gradient_are_left_as_they_are(device):
    # The old one overwrote both.
    layout = draw_layout(1, 2, 3)
    x = torch.randn(1, int(layout.sum()), 16, 16, device=device, requires_grad=True)
    before = x.detach().clone()
    probs = Softmax(layout, 16)(x)
    grad = torch.randn_like(probs)
    kept = grad.clone()
    probs.backward(grad)
    assert torch.equal(x, before)
    assert torch.equal(grad, kept)


def test_rows_without_blocks_or_with_everything_masked_give_zeros_and_no_nan(device):
    layout = torch.tensor([[[1, 0], [0, 0]], [[0, 0], [0, 0]]])
    x = torch.randn(2, 1, 16, 16, device=device, requires_grad=True)
    kp = torch.ones(2, 32, device=device)
    kp[1, :16] = 0
    probs = Softmax(layout, 16)(x, key_padding_mask=kp, key_padding_mask_mode="mul")
    assert not probs[1].any()
    assert torch.allclose(probs[0].sum(-1), torch.ones((), device=device))
    probs.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[1].any()


def test_a_bool_mask_excludes_where_it_is_false_in_either_mode(device):
    layout = torch.ones(1, 2, 2, dtype=torch.int64)
    x = torch.randn(2, 4, 16, 16, device=device)
    kp = torch.rand(2, 32, device=device) < 0.5
    softmax = Softmax(layout, 16)
    wanted = softmax(x, key_padding_mask=kp.float(), key_padding_mask_mode="mul")
    for mode in ("add", "mul"):
        probs = softmax(x, key_padding_mask=kp, key_padding_mask_mode=mode)
        assert torch.equal(probs, wanted)


def test_rows_sum_to_one_at_scores_that_overflow_exp(device):
    layout = torch.ones(1, 1, 2, dtype=torch.int64)
    x = torch.full((1, 2, 16, 16), 1e4, device=device)
    probs = Softmax(layout, 16)(x)
    assert torch.allclose(probs, torch.full_like(probs, 1 / 32))


def test_gradients_of_gradients(device):
    layout = draw_layout(2, 2, 2)
    x = torch.randn(1, int(layout.sum()), 16, 16, device=device, dtype=torch.float64)
    softmax = Softmax(layout, 16)
    assert torch.autograd.gradgradcheck(softmax, (x.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"key_padding_mask_mode": "or"}, "unknown key_padding_mask_mode 'or'.*known: add, mul"),
        ({"attn_mask_mode": "or"}, "unknown attn_mask_mode 'or'"),
        ({"key_padding_mask": torch.ones(1, 32)}, r"key_padding_mask is \(2, 32\); got \(1, 32\)"),
        ({"attn_mask": torch.ones(16, 32)}, r"attn_mask is \(32, 32\).* got \(16, 32\)"),
        ({"rpe": torch.ones(3, 1, 32, 32)}, r"rpe is .* leading \(2 or 1, 1 or 1\)"),
    ],
)
def test_what_does_not_fit_is_named(arguments, words):
    softmax = Softmax(torch.ones(1, 2, 2), 16)
    with pytest.raises(ConfigError, match=words):
        softmax(torch.ones(2, 4, 16, 16), **arguments)
    with pytest.raises(ConfigError, match=r"x is .* the last three \(4, 16, 16\)"):
        softmax(torch.ones(2, 5, 16, 16))
