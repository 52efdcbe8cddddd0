"""The derivative of an attention operator by another one: what all compiled backends have alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

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
