"""Block-sparse attention on CPUs: the C++ operators of ``csrc/``, with autograd and compile.

The forward pass saves the log-sum-exp of each query row, and the backward pass draws the
probabilities again from it. The same inputs give the same bits with any number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spion_ds.attention.derivatives import derivative_by, refuse_second_derivative
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.options import AttentionOptions
from spion_ds.errors import ConfigError
from spion_ds.extension import when_available

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def block_sparse_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: BlockLayout,
    options: AttentionOptions,
) -> Tensor:
    """Return (B, H, L, D) in q's dtype; arguments as in ``block_sparse_attention``.

    Scores, probabilities and sums are float32.

    Raises:
        ConfigError: the operators do not serve this dtype or device, or could not be compiled.
    """
    reason = unsupported(q, layout)
    if reason is not None:
        raise ConfigError(reason)
    out, _ = torch.ops.spion_ds.cpu_attention_fwd(
        *(q, k, v, layout.row_ptr, layout.col_idx, layout.col_ptr, layout.row_idx),
        *(options.key_padding_mask, options.dropout_key if options.dropout_p > 0.0 else None),
        *(layout.block, options.scale, options.causal),
        *(options.pruned == "zero", options.dropout_p, options.zero_padded_queries),
        options.query_offset,
    )
    return options.zeroed(out)  # its gradient too


def unsupported(q: Tensor, layout: BlockLayout) -> str | None:
    """Return why there is no kernel for tensors like ``q`` with this layout, None if there is.

    Any block, head_dim and length will do. float64 is the PyTorch backend's.
    """
    if q.device.type != "cpu":
        return f"the cpp backend runs on CPUs; the tensors are on {q.device}"
    if q.dtype not in _DTYPES:
        return f"the cpp backend takes float32, bfloat16 and float16; got {q.dtype}"
    if not _ready():
        return "the cpp backend's C++ operators are not available (a warning has said why)"
    return None


@when_available
def _ready() -> None:
    torch.library.register_fake("spion_ds::cpu_attention_fwd", _forward_fake)
    torch.library.register_fake("spion_ds::cpu_attention_bwd", _backward_fake)
    torch.library.register_autograd("spion_ds::cpu_attention_fwd", _backward, setup_context=_save)
    torch.library.register_autograd("spion_ds::cpu_attention_bwd", refuse_second_derivative)


# The operator is there once the library is loaded.
_setup_context, _backward = derivative_by(
    lambda *arguments: torch.ops.spion_ds.cpu_attention_bwd(*arguments), settings=7
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    _setup_context(ctx, inputs, output)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q), _empty_like(k), _empty_like(v)


def _empty_like(x: Tensor) -> Tensor:
    # The kernels copy tensors whose head_dim is not their innermost dimension.
    return torch.empty_like(x if x.stride(-1) == 1 else x.contiguous())
