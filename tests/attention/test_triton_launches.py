"""The Triton backend's eager path: what Python launched once, C++ launches again."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spion_ds.attention import block_sparse_attention
from spion_ds.extension import operators_available

from .cases import MIXED, ON_GPU, SMALLER, Case, evaluate, make, needs_gpu, needs_triton
from .interpreted_driver import CASES, another_draw, by_operators

pytestmark = [
    needs_triton,
    pytest.mark.skipif(not operators_available(), reason="the C++ operators do not compile here"),
]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real CUDA driver")
def test_repeated_launches_give_the_same_bits_in_the_interpreter(tmp_path):
    # A process of its own: it has a library that is taken for the CUDA driver.
    command = [sys.executable, "-m", "tests.attention.interpreted_driver", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(CASES)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    "case",
    [
        *CASES,
        MIXED,
        Case(block=64, head_dim=32, dtype=torch.bfloat16),
        Case(block=128, head_dim=128, dtype=torch.bfloat16, padding="whole_sample"),
    ],
    ids=str,
)
def test_repeated_launches_give_the_same_bits(case, device, monkeypatch):
    from spion_ds.attention.triton import backend as triton_backend

    inputs = make(case, ON_GPU, device)
    evaluate(inputs, "triton")
    again = another_draw(inputs)
    expected = by_operators(again)

    def fail(*arguments):
        raise AssertionError("Python was asked again")

    monkeypatch.setattr(triton_backend, "launch", fail)
    for _ in range(2):
        results = evaluate(again, "triton")
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.gpu
@needs_gpu
def test_strides_streams_and_alignment_are_followed(device):
    """The same shape, lying in other ways, on another stream."""
    case = Case(block=32, head_dim=32, dtype=torch.bfloat16, lengths="whole")
    inputs = make(case, ON_GPU, device)
    results = []
    for lies in ("contiguous", "tokens first", "contiguous", "unaligned", "contiguous"):
        tensors = [inputs.q, inputs.k, inputs.v]
        if lies == "tokens first":
            tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
        if lies == "unaligned":
            tensors = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x) for x in tensors]
        tensors = [x.requires_grad_() for x in tensors]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            out = block_sparse_attention(*tensors, inputs.layout, backend="triton")
            results.append([out, *torch.autograd.grad(out, tensors, inputs.grad)])
        torch.cuda.current_stream().wait_stream(stream)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


def test_there_is_no_second_derivative(device):
    inputs = make(Case(), SMALLER, device)
    q = inputs.q.requires_grad_()
    out = block_sparse_attention(q, inputs.k, inputs.v, inputs.layout, backend="triton")
    (dq,) = torch.autograd.grad(out, q, inputs.grad, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dq.sum().backward()


def test_what_was_changed_in_between_is_an_error(device):
    inputs = make(Case(padding="tail"), SMALLER, device)
    q = inputs.q.requires_grad_()
    out = block_sparse_attention(
        q, inputs.k, inputs.v, inputs.layout, backend="triton", **inputs.options
    )
    inputs.options["key_padding_mask"].fill_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(inputs.grad)


def test_a_dispatch_mode_sees_the_operators(device):
    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func.name())
            return func(*args, **(kwargs or {}))

    inputs = make(Case(), SMALLER, device)
    q = inputs.q.requires_grad_()
    with Names() as names:
        out = block_sparse_attention(q, inputs.k, inputs.v, inputs.layout, backend="triton")
        out.backward(inputs.grad)
    assert "spion_ds::block_sparse_attention_fwd" in names.seen
    assert "spion_ds::block_sparse_attention_bwd" in names.seen
    out = block_sparse_attention(q, inputs.k, inputs.v, inputs.layout, backend="triton")
    with Names() as names:  # of the backward pass alone
        out.backward(inputs.grad)
    assert "spion_ds::block_sparse_attention_bwd" in names.seen


def test_without_a_compiler_the_operators_serve(device, monkeypatch):
    from spion_ds.attention.triton import backend as triton_backend

    inputs = make(Case(dropout_p=0.3), SMALLER, device)
    expected = evaluate(inputs, "triton")
    monkeypatch.setattr(triton_backend, "operators_available", lambda: False)
    results = evaluate(inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
