"""What a backend of block-sparse attention is asked for besides tensors and layout."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The root of what float32 holds, about.
_LARGEST = 2.0**63


class AttentionOptions(NamedTuple):
    """Arguments of ``block_sparse_attention``, checked, none left to a default.

    Attributes:
        key_padding_mask: (batch, M) bool, True = real token, or None.
        causal: whether entries above the diagonal are masked.
        scale: factor of the scores.
        pruned: ``"zero"`` or ``"excluded"``.
        dropout_p: probability of dropping a kept probability.
        dropout_key: (batch,) int32; None only without dropout.
        zero_padded_queries: whether queries that the mask calls padding give zeros.
        query_offset: the position of the first query. The specification gets the whole layout; the
            other backends get the block rows from the one of this position to that of the last
            query (query_rows.py), so that the first one may begin before the first query.
    """

    key_padding_mask: Tensor | None
    causal: bool
    scale: float
    pruned: str
    dropout_p: float
    dropout_key: Tensor | None
    zero_padded_queries: bool
    query_offset: int = 0

    def zeroed(self, out: Tensor) -> Tensor:
        """Return (batch, heads, L, head_dim) with zeros for padded queries where that is asked."""
        if not self.zero_padded_queries or self.key_padding_mask is None:
            return out
        return zero_padding(out, self.key_padding_mask)


def zero_padding(x: Tensor, padding_mask: Tensor) -> Tensor:
    """Return (batch, heads, L, head_dim) with zeros where (batch, L) ``padding_mask`` is False."""
    return x.masked_fill(~padding_mask[:, None, :, None], 0.0)


def hide_padding(
    q: Tensor, k: Tensor, v: Tensor, padding_mask: Tensor, of_queries: bool, zeroed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v in which padded tokens harm nobody: a probability of 0 times NaN is NaN.

    Padded keys and values become 0. Padded queries do where they are not finite or so large that a
    score could overflow, or all of them if what they give is zeroed: the gradients of all keys go
    through them.

    Args:
        q: (batch, heads, L, head_dim).
        k, v: (batch, kv_heads, M, head_dim).
        padding_mask: (batch, M) bool, True = real token.
        of_queries: whether it is the queries' mask too.
        zeroed: whether padded queries give zeros.
    """
    # Reading once is much cheaper than copying, where a look at values costs no waiting.
    if q.is_cpu and _can_be_read(q) and all(map(_is_harmless, (q, k, v))):
        return q, k, v
    padded = ~padding_mask[:, None, :, None]
    if of_queries:
        q = q.masked_fill(padded if zeroed else padded & ~(q.abs() < _LARGEST), 0.0)
    return q, k.masked_fill(padded, 0.0), v.masked_fill(padded, 0.0)


def _is_harmless(x: Tensor) -> bool:
    """Return whether no product with another such tensor overflows (Cauchy-Schwarz)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return bool(torch.linalg.vector_norm(x.detach(), dtype=wide) < _LARGEST)


def _can_be_read(x: Tensor) -> bool:
    """Return whether Python sees the values: nothing traces, fakes or transforms them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    return type(x) in (Tensor, torch.nn.Parameter)
