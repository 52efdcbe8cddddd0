"""The specification of block-sparse attention: plain PyTorch, L × M masks, any dtype.

Shape suffixes: B batch, H heads, L queries, M keys, D head_dim; b queries of a row of blocks, T
keys that it keeps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
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
    block, first, queries = layout.block, options.query_offset, q_BHLD.shape[2]
    last = first + queries
    valid_BHLM = valid_entries(q_BHLD, k_BHMD, options.key_padding_mask, options.causal, first)
    keep_BHLM = None
    if options.dropout_p > 0.0:
        assert options.dropout_key is not None
        keep_BHLM = attention_keep_mask(options.dropout_key, valid_BHLM.shape, options.dropout_p)
    out = []
    for index, kept_LM in enumerate(token_mask(layout, last, k_BHMD.shape[2])):
        heads = slice(None) if layout.heads == 1 else slice(index, index + 1)
        rows = []
        for row in range(first // block, -(-last // block)):
            own = slice(max(row * block, first) - first, min((row + 1) * block, last) - first)
            # Tokens that no query of the row keeps take part in nothing, NaN or not.
            kept_T = kept_LM[row * block].nonzero()[:, 0]
            keep = None if keep_BHLM is None else keep_BHLM[:, heads, own][..., kept_T]
            k_BHTD, v_BHTD = (x[:, heads].index_select(2, kept_T) for x in (k_BHMD, v_BHMD))
            q_BHbD, valid_BHbM = q_BHLD[:, heads, own], valid_BHLM[:, heads, own]
            rows.append(_attend(q_BHbD, k_BHTD, v_BHTD, valid_BHbM, kept_T, keep, options))
        out.append(torch.cat(rows, dim=2))
    return options.zeroed(torch.cat(out, dim=1))


def _attend(
    q_BHbD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    valid_BHbM: Tensor,
    kept_T: Tensor,
    keep_BHbT: Tensor | None,
    options: AttentionOptions,
) -> Tensor:
    """Return (B, H, b, D) of a row of query blocks, which keeps the tokens ``kept_T`` of M."""
    allowed_BHbT = valid_BHbM.index_select(3, kept_T)
    scores_BHbT = (q_BHbD @ k_BHTD.transpose(-2, -1)) * options.scale
    scores_BHbT = scores_BHbT.masked_fill(~allowed_BHbT, float("-inf"))
    # A constant shift, so it carries no gradient; 0 where a row keeps nothing.
    shift_BHb1 = F.pad(scores_BHbT.detach(), (0, 1), value=float("-inf")).amax(-1, keepdim=True)
    shift_BHb1 = shift_BHb1.masked_fill(shift_BHb1 == float("-inf"), 0.0)
    pruned_BHb1 = (valid_BHbM.sum(dim=-1) - allowed_BHbT.sum(dim=-1))[..., None]
    if options.pruned == "zero":
        # At least the logit 0 of a pruned entry, in the rows that have one.
        shift_BHb1 = torch.where(pruned_BHb1 > 0, shift_BHb1.clamp(min=0.0), shift_BHb1)
    weights_BHbT = (scores_BHbT - shift_BHb1).exp()
    total_BHb1 = weights_BHbT.sum(dim=-1, keepdim=True)
    if options.pruned == "zero":
        total_BHb1 = total_BHb1 + pruned_BHb1 * (-shift_BHb1.clamp(min=0.0)).exp()
    probs_BHbT = weights_BHbT / total_BHb1.masked_fill(total_BHb1 == 0.0, 1.0)
    if keep_BHbT is not None:
        probs_BHbT = probs_BHbT * keep_BHbT * (1.0 / (1.0 - options.dropout_p))
    return probs_BHbT @ v_BHTD


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
