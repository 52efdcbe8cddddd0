"""The specification of block-sparse attention: plain PyTorch, L×L matrices, any dtype.

Shape suffixes: B batch, H heads, L queries, M keys, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.options import AttentionOptions
from spion_ds.random_bits import combine, keep_mask


def block_sparse_attention_reference(
    q_BHLD: Tensor,
    k_BHMD: Tensor,
    v_BHMD: Tensor,
    layout: BlockLayout,
    options: AttentionOptions,
) -> Tensor:
    """Return (B, H, L, D) attention over the kept blocks; arguments as in the public function.

    Query i stands at position ``options.query_offset + i``, in the layout and under ``causal``.
    With ``pruned="zero"`` a pruned entry counts as logit 0 in the softmax's denominator and adds
    nothing to the output (SPION); with ``"excluded"`` it is absent (DeepSpeed).
    """
    groups = q_BHLD.shape[1] // k_BHMD.shape[1]
    k_BHMD = k_BHMD.repeat_interleave(groups, dim=1)
    v_BHMD = v_BHMD.repeat_interleave(groups, dim=1)

    first, last = options.query_offset, options.query_offset + q_BHLD.shape[2]
    valid_BHLM = valid_entries(q_BHLD, k_BHMD, options.key_padding_mask, options.causal, first)
    kept_BHLM = valid_BHLM & token_mask(layout, last, k_BHMD.shape[2])[:, first:]

    scores_BHLM = (q_BHLD @ k_BHMD.transpose(-2, -1)) * options.scale
    scores_BHLM = scores_BHLM.masked_fill(~kept_BHLM, float("-inf"))
    # A constant shift, so it carries no gradient; 0 where a row keeps nothing.
    shift_BHL1 = scores_BHLM.detach().amax(dim=-1, keepdim=True)
    shift_BHL1 = shift_BHL1.masked_fill(shift_BHL1 == float("-inf"), 0.0)
    pruned_BHL1 = (valid_BHLM & ~kept_BHLM).sum(dim=-1, keepdim=True)
    if options.pruned == "zero":
        # At least the logit 0 of a pruned entry, in the rows that have one.
        shift_BHL1 = torch.where(pruned_BHL1 > 0, shift_BHL1.clamp(min=0.0), shift_BHL1)
    weights_BHLM = (scores_BHLM - shift_BHL1).exp()
    total_BHL1 = weights_BHLM.sum(dim=-1, keepdim=True)
    if options.pruned == "zero":
        total_BHL1 = total_BHL1 + pruned_BHL1 * (-shift_BHL1.clamp(min=0.0)).exp()
    probs_BHLM = weights_BHLM / total_BHL1.masked_fill(total_BHL1 == 0.0, 1.0)

    if options.dropout_p > 0.0:
        assert options.dropout_key is not None
        keep = attention_keep_mask(options.dropout_key, probs_BHLM.shape, options.dropout_p)
        probs_BHLM = probs_BHLM * keep * (1.0 / (1.0 - options.dropout_p))
    return options.zeroed(probs_BHLM @ v_BHMD)


def token_mask(layout: BlockLayout, queries: int, keys: int) -> Tensor:
    """Return the layout as a token mask, bool (1 or heads, L, M)."""
    mask = layout.to_mask()
    mask = mask[None] if mask.dim() == 2 else mask
    mask = mask.repeat_interleave(layout.block, dim=1).repeat_interleave(layout.block, dim=2)
    return mask[:, :queries, :keys]


def valid_entries(
    q_BHLD: Tensor,
    k_BHMD: Tensor,
    key_padding_mask: Tensor | None,
    causal: bool,
    query_offset: int = 0,
) -> Tensor:
    """Return the entries that neither padding nor causality excludes, bool (B, H, L, M)."""
    batch, heads, queries, _ = q_BHLD.shape
    keys = k_BHMD.shape[2]
    valid = torch.ones((batch, heads, queries, keys), dtype=torch.bool, device=q_BHLD.device)
    if key_padding_mask is not None:
        valid &= key_padding_mask[:, None, None, :]
    return valid.tril(query_offset) if causal else valid


def attention_keep_mask(dropout_key: Tensor, shape: torch.Size, p: float) -> Tensor:
    """Return which probabilities dropout keeps, bool (B, H, L, M).

    The key of row (b, h, i) is combine(combine(dropout_key[b], h), i), its columns are j.
    """
    _, heads, queries, keys = shape
    device = dropout_key.device
    head = torch.arange(heads, dtype=torch.int32, device=device)
    row = torch.arange(queries, dtype=torch.int32, device=device)
    column = torch.arange(keys, dtype=torch.int32, device=device)
    row_keys = combine(combine(dropout_key[:, None], head)[:, :, None], row)
    return keep_mask(row_keys[..., None], column, p)
