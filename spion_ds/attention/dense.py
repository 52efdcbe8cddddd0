"""Dense self-attention by PyTorch's scaled_dot_product_attention, with what that leaves open.

Shape suffixes: B batch, H heads, L tokens, D head_dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spion_ds.attention.options import hide_padding, zero_padding


def dense_attention(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    *,
    key_padding_mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout_p: float,
    zero_padded_queries: bool,
) -> Tensor:
    """Return (B, H, L, D) attention to all keys; a sample without a real token gives zeros.

    Args:
        q_BHLD: (B, H, L, D).
        k_BHLD, v_BHLD: (B, kv_heads, L, D), kv_heads divides H.
        key_padding_mask: (B, L) bool, True = real token; None with ``causal``: together they would
            need a mask of B × L × L, which the block-sparse kernels do without.
        causal: exclude keys after the query.
        scale: factor of the scores; D ** -0.5 if None.
        dropout_p: dropout on the probabilities, from PyTorch's generators.
        zero_padded_queries: give zeros for padding.
    """
    if key_padding_mask is not None:
        device = q_BHLD.device.type
        if torch.is_autocast_enabled(device):  # what overflows there must be hidden too
            dtype = torch.get_autocast_dtype(device)
            q_BHLD, k_BHLD, v_BHLD = (x.to(dtype) for x in (q_BHLD, k_BHLD, v_BHLD))
        q_BHLD, k_BHLD, v_BHLD = hide_padding(
            *(q_BHLD, k_BHLD, v_BHLD, key_padding_mask), of_queries=True, zeroed=zero_padded_queries
        )
    grouped = False
    if q_BHLD.shape[1] != k_BHLD.shape[1]:
        # Flash attention on GPUs alone knows groups in all versions, and it takes neither masks
        # nor float32: elsewhere PyTorch would make matrices of L × L.
        flash = q_BHLD.is_cuda and q_BHLD.dtype in (torch.float16, torch.bfloat16)
        grouped = flash and key_padding_mask is None
        if not grouped:
            groups = q_BHLD.shape[1] // k_BHLD.shape[1]
            k_BHLD, v_BHLD = (x.repeat_interleave(groups, dim=1) for x in (k_BHLD, v_BHLD))
    mask = some = None
    if key_padding_mask is not None:
        mask = key_padding_mask
        if not q_BHLD.is_cpu:
            # What a row gives that sees no key is up to the backend on this device, NaN included
            # (zeros on a CPU): it sees all of them, and becomes zero.
            some = key_padding_mask.any(dim=1, keepdim=True)  # (B, 1)
            mask = mask | ~some
        mask = mask[:, None, None, :]
    out = F.scaled_dot_product_attention(
        q_BHLD,
        k_BHLD,
        v_BHLD,
        mask,
        dropout_p,
        is_causal=causal,
        scale=scale,
        enable_gqa=grouped,
    )
    if key_padding_mask is not None and zero_padded_queries:
        return zero_padding(out, key_padding_mask)
    return out if some is None else out.masked_fill(~some[..., None, None], 0.0)
