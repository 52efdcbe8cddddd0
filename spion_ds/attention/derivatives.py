"""The first derivative of an attention operator, by another one; all others are refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

SetupContext = Callable[[Any, tuple[Any, ...], tuple[Tensor, Tensor]], None]
Backward = Callable[..., tuple[Tensor | None, ...]]


def derivative_by(backward: Callable[..., Any], settings: int) -> tuple[SetupContext, Backward]:
    """Return ``setup_context`` and ``backward`` for ``torch.library.register_autograd``.

    They are for an operator ``(q, k, v, *tensors, *settings)`` that returns out and lse, of which
    nobody differentiates lse.

    Args:
        backward: ``(grad, q, k, v, out, lse, *tensors, *settings)`` returns dq, dk and dv.
        settings: how many of the arguments, at the end, are no tensors.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tensors, ctx.settings = inputs[:-settings], inputs[-settings:]
        ctx.save_for_backward(*tensors, *output)

    def differentiate(ctx: Any, grad: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
        q, k, v, *rest, out, lse = ctx.saved_tensors
        grads = backward(grad, q, k, v, out, lse, *rest, *ctx.settings)
        return (*grads, *[None] * (len(rest) + settings))

    return setup_context, differentiate


def refuse_second_derivative(ctx: Any, *_: Tensor) -> None:
    """Be the ``backward`` of an operator that is itself a backward pass."""
    raise NotImplementedError(
        "block-sparse attention has no second derivative: its gradients cannot be differentiated "
        'again; backend="reference" has all derivatives, with matrices of L × L'
    )


class _DifferentiatedOnce(torch.autograd.Function):
    """Gradients and what they depend on; returns the gradients, which have no derivative."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:count])

    backward = staticmethod(refuse_second_derivative)


def once_differentiable(backward: Backward) -> Backward:
    """Decorate ``backward(ctx, saved_tensors, *grads)`` of a Function, once differentiable.

    Unlike PyTorch's decorator it connects them to the saved tensors. Without that,
    ``torch.autograd.grad`` calls a second derivative unused, or gives None for it.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpoint may be unpacked no second time
        with torch.no_grad():
            results = backward(ctx, saved, *grads)
        if not torch.is_grad_enabled():  # no create_graph=True
            return results
        found = [x for x in results if x is not None]
        given = _DifferentiatedOnce.apply(len(found), *found, *saved, *grads)
        connected = iter(given)
        return tuple(None if x is None else next(connected) for x in results)

    return run


_REVERSE = "backward() and torch.autograd.grad"


def refuse_transforms(what: str, *tensors: Tensor, allowed: str = _REVERSE) -> None:
    """Raise NotImplementedError where a derivative is asked for that autograd would leave out.

    The operators have a reverse-mode derivative for ``backward`` and ``torch.autograd.grad``.
    Forward mode would pass by them, as if they were constants.

    Args:
        what: begins the sentence.
        tensors: what is differentiated.
        allowed: what works instead.
    """
    if any(_is_followed(x) for x in tensors):
        raise NotImplementedError(
            f"{what} has no forward-mode derivative and none for torch.func (jvp, jacfwd, grad, "
            f"vjp, jacrev); allowed: {allowed}"
        )


def refuse_every_transform(what: str, *tensors: Tensor) -> None:
    """Be :func:`refuse_transforms` where ``torch.func.vmap`` cannot serve either."""
    refuse_transforms(what, *tensors)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{what} takes no part in a transform of torch.func, vmap included; allowed: batches "
            f"as the first dimension, {_REVERSE}"
        )


def _is_followed(x: Tensor) -> bool:
    """Return whether forward mode, or a reverse-mode transform of torch.func, follows x."""
    if torch.compiler.is_compiling():
        # All that can be traced; a compiled torch.func.grad fails by itself.
        return forward_ad._current_level >= 0
    while _functorch.is_functorch_wrapped_tensor(x):
        if _functorch.is_gradtrackingtensor(x):
            # Only transforms of the innermost level can tell that x is detached.
            inner = _functorch.maybe_get_level(x) == _functorch.maybe_current_level()
            if not inner or x.requires_grad or _has_tangent(x):
                return True
        x = _functorch.get_unwrapped(x)
    return _has_tangent(x)


def _has_tangent(x: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
