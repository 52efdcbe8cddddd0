"""How exact results are where scores or their gradients are large: the bounds of the docs."""

from __future__ import annotations

import pytest
import torch

from spion_ds.attention import BlockLayout, block_sparse_attention

from .cases import CPP, TRITON, Inputs, evaluate, relative_error


@pytest.mark.parametrize("size", [10.0, 100.0])
@pytest.mark.parametrize("backend", ["torch", CPP, TRITON])
def test_errors_in_float32_grow_as_scores_are_rounded(backend, size, device):
    """Probabilities are recomputed from scores and the log-sum-exp, which are rounded to 2^-24."""
    shape = (1, 1, 64, 32)
    q, k, v, grad = (torch.randn(shape, device=device) for _ in range(4))
    layout = BlockLayout.from_mask(torch.ones(2, 2, dtype=torch.bool, device=device), 32)
    inputs = Inputs(size * q, k, v, grad, layout, {"scale": 32**-0.5})
    exact = evaluate(inputs.to(torch.float64), "reference")
    largest = size * (q @ k.transpose(2, 3)).abs().max().item() * 32**-0.5
    for found, expected in zip(evaluate(inputs, backend), exact, strict=True):
        assert relative_error(found, expected) < 1e-5 + 2**-23 * largest


@pytest.mark.parametrize("backend", ["torch", CPP, TRITON])
def test_score_gradients_that_float16_holds_overflow_nothing(backend, device):
    """dP may be beyond what float16 holds, as long as dS = P · (dP - delta) is not."""
    shape = (1, 1, 32, 16)
    q, k, v, grad = (torch.randn(shape, device=device, dtype=torch.float16) for _ in range(4))
    layout = BlockLayout.from_mask(torch.ones(1, 1, dtype=torch.bool, device=device), 32)
    k, v, grad = k / 64, 100 * v, 100 * grad
    inputs = Inputs(q, k, v, grad, layout, {"scale": 1.0})
    exact = evaluate(inputs.to(torch.float64), "reference")
    dprobs = grad.double() @ v.double().transpose(2, 3)
    assert dprobs.abs().max() > 2**16
    for found, expected in zip(evaluate(inputs, backend), exact, strict=True):
        assert relative_error(found, expected) < 1e-2


def test_the_cpp_backend_multiplies_score_gradients_in_float32():
    """No gradient of a score is rounded to the inputs' dtype there."""
    shape = (1, 1, 16, 16)
    q, k, v, grad = (torch.randn(shape, dtype=torch.float16) for _ in range(4))
    q, k, v, grad = q / 2**9, k / 2**9, 2**9 * v, 2**9 * grad
    layout = BlockLayout.from_mask(torch.ones(1, 1, dtype=torch.bool), 16)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*leaves, layout, scale=1.0, backend="cpp")
    dq, dk, _ = torch.autograd.grad(out, leaves, grad)
    assert (grad @ v.transpose(2, 3)).abs().max() == float("inf")
    assert dq.isfinite().all()
    assert dk.isfinite().all()
