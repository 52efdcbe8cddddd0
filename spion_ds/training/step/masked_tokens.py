"""The loss of guessing masked input tokens: self-supervision on the task's own inputs.

Shape suffixes: B batch, L tokens (of each document, where a sample has two).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from spion_ds.random_bits import combine, keep_mask

# As in BERT; every chosen token is masked.
MASKED_SHARE = 0.15


@dataclass(frozen=True)
class MaskedTokens:
    """A batch with some tokens masked.

    Attributes:
        input_ids: (B, L) or (B, 2, L) int64, masked tokens replaced by the mask's id.
        masked: bool of the same shape, which these are; none of the padding.
        original: the ids before.
    """

    input_ids: Tensor
    masked: Tensor
    original: Tensor

    def loss(self, logits: Tensor) -> Tensor:
        """Return the cross-entropy () of ``logits`` (…, vocabulary) at the masked tokens, in nats.

        The mean over samples of the mean over a sample's masked tokens, so that it does not depend
        on how a batch is split.
        """
        each = F.cross_entropy(
            logits.float().flatten(0, -2), self.original.flatten(), reduction="none"
        )
        masked = self.masked.flatten(1).to(each.dtype)  # (B, tokens of all documents)
        sums = (each.view_as(masked) * masked).sum(dim=1)
        return (sums / masked.sum(dim=1).clamp(min=1.0)).mean()


def mask_tokens(
    input_ids: Tensor, padding_mask: Tensor, keys: Tensor, mask_id: int
) -> MaskedTokens:
    """Return the batch with a share of its real tokens masked, drawn by ``keys`` (B,) int32."""
    place = torch.arange(input_ids[0].numel(), device=input_ids.device, dtype=torch.int32)
    kept = keep_mask(combine(keys, 0)[:, None], place, MASKED_SHARE).view_as(input_ids)
    masked = padding_mask & ~kept
    return MaskedTokens(torch.where(masked, mask_id, input_ids), masked, input_ids)
