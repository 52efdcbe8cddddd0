"""Derivatives beyond backward(): right, or refused by name. None is silently zero or left out."""

from __future__ import annotations

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from spion_ds.attention import (
    BlockLayout,
    SparseSelfAttention,
    attention_map,
    attention_skewness,
    block_sparse_attention,
)
from spion_ds.ops.sparse_attention import FixedSparsityConfig
from spion_ds.ops.sparse_attention import SparseSelfAttention as DeepSpeedAttention
from spion_ds.sparsity import SpionSparsityConfig

from .cases import CPP, TRITON

BLOCK, LENGTH = 16, 32
MASK = torch.ones(2, 2, dtype=torch.bool).tril()
FAST = ("torch", CPP, TRITON)


@pytest.fixture
def qkv(device):
    return tuple(torch.randn(1, 2, LENGTH, 8, device=device) for _ in range(3))


def attend(backend: str, device):
    layout = BlockLayout.from_mask(MASK.to(device), BLOCK)
    return lambda q, k, v: block_sparse_attention(q, k, v, layout, backend=backend)


def module(device):
    attention = SparseSelfAttention(SpionSparsityConfig(2, BLOCK))
    attention.set_mask(MASK)
    return attention


def with_positions(device):
    attention = DeepSpeedAttention(FixedSparsityConfig(2, BLOCK), max_seq_length=LENGTH).to(device)
    rpe = torch.randn(LENGTH, LENGTH, device=device)
    return lambda q, k, v: attention(q, k, v, rpe=rpe)


WAYS = {
    "a module": module,
    "DeepSpeed's interface": with_positions,
    "a map": lambda device: lambda q, k, v: attention_map(q, k),
    "a float64 map": lambda device: lambda q, k, v: attention_map(q.double(), k.double()),
    "a skewness": lambda device: lambda q, k, v: attention_skewness(q, k),
}


def dual(function, inputs):
    with forward_ad.dual_level():
        function(*(forward_ad.make_dual(x, x) for x in inputs))


def gradient_of_first(function):
    return func.grad(lambda q, k, v: function(q, k, v).sum())


def compiled_jvp(function, inputs):
    compiled = torch.compile(function, backend="eager")
    func.jvp(compiled, inputs, inputs)


TRANSFORMS = {
    "jvp": lambda f, x: func.jvp(f, x, x),
    "jvp, compiled": compiled_jvp,
    "jvp of vmap": lambda f, x: func.jvp(
        func.vmap(f), *(2 * [tuple(y.expand(2, *y.shape) for y in x)])
    ),
    "dual numbers": dual,
    "jacfwd": lambda f, x: func.jacfwd(f)(*x),
    "grad": lambda f, x: gradient_of_first(f)(*x),
    "grad of vmap": lambda f, x: gradient_of_first(func.vmap(f))(*(y[None] for y in x)),
    "vjp": lambda f, x: func.vjp(f, *x),
    "jacrev": lambda f, x: func.jacrev(f)(*x),
    "hessian": lambda f, x: func.hessian(lambda *y: f(*y).sum())(*x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("backend", FAST)
def test_fast_backends_refuse_by_name_what_they_cannot_differentiate(
    backend, transform, qkv, device
):
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        TRANSFORMS[transform](attend(backend, device), qkv)


@pytest.mark.parametrize("transform", ["jvp", "dual numbers", "grad", "hessian"])
@pytest.mark.parametrize("way", WAYS)
def test_so_do_modules_and_maps(way, transform, qkv, device):
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        TRANSFORMS[transform](WAYS[way](device), qkv)


@pytest.mark.parametrize("backend", [CPP, TRITON])
def test_vmap_is_a_loop_over_calls(backend, qkv, device):
    function = attend(backend, device)
    batch = [torch.stack([x, 2 * x]).requires_grad_() for x in qkv]
    looped = torch.stack([function(*x) for x in zip(*batch, strict=True)])
    results = [
        (out, *torch.autograd.grad(out.sum(), batch))
        for out in (func.vmap(function)(*batch), looped)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("way", ["torch", "DeepSpeed's interface"])
def test_what_has_no_vmap_says_so(way, qkv, device):
    function = WAYS[way](device) if way in WAYS else attend(way, device)
    with pytest.raises(NotImplementedError, match="vmap"):
        func.vmap(function)(*(x[None] for x in qkv))


@pytest.mark.parametrize("backend", [CPP, TRITON])
def test_tensors_that_are_not_differentiated_pass_through_a_transform(backend, qkv, device):
    function = attend(backend, device)
    out, tangent = func.jvp(lambda x: x * function(*qkv), (qkv[0],), (qkv[0],))
    assert torch.equal(out, tangent)
    detached = func.grad(lambda q: (q * function(q.detach(), *qkv[1:])).sum())(qkv[0])
    assert torch.equal(detached, function(*qkv))


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("backend", FAST)
def test_a_second_derivative_is_refused_by_name(backend, unused, qkv, device):
    leaves = [x.requires_grad_() for x in qkv]
    out = attend(backend, device)(*leaves)
    grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    for grad in grads:
        with pytest.raises(NotImplementedError, match="no second derivative"):
            torch.autograd.grad(grad.sum(), leaves, allow_unused=unused, retain_graph=True)


def test_the_reference_has_all_derivatives(qkv, device):
    function = attend("reference", device)
    q, k, v = (x[..., :2].double() for x in qkv)
    leaves = tuple(x.requires_grad_() for x in (q, k, v))
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    single = func.vmap(gradient_of_first(function))(q[None], k[None], v[None])
    assert torch.allclose(single[0], torch.autograd.grad(function(q, k, v).sum(), q)[0])


def test_dense_attention_is_pytorchs(qkv):
    """What scaled_dot_product_attention has no derivative for, PyTorch refuses itself."""
    dense = SparseSelfAttention(SpionSparsityConfig(2, BLOCK))
    padding = torch.arange(LENGTH) < torch.tensor([[20]])

    def function(q, k, v):
        return dense(q, k, v, key_padding_mask=padding.to(q.device)).square()

    leaves = [x.clone().requires_grad_() for x in qkv]
    (expected,) = torch.autograd.grad(function(*leaves).sum(), leaves[:1])
    assert torch.allclose(gradient_of_first(function)(*qkv), expected, atol=1e-6)


def test_a_checkpoint_unpacks_saved_tensors_once():
    layout = BlockLayout.from_mask(torch.ones(2, 2, dtype=torch.bool), 16)
    q, k, v = (torch.randn(1, 1, 32, 8, requires_grad=True) for _ in range(3))

    def attend(*inputs):
        return block_sparse_attention(*inputs, layout, backend="torch")

    checkpoint(attend, q, k, v, use_reentrant=False).sum().backward(create_graph=True)
    assert q.grad is not None
