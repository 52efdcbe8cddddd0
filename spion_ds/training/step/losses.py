"""The loss of a micro-batch: the task's, and what a recipe adds to it."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from spion_ds.data.tasks import get_task
from spion_ds.models import EncoderClassifier
from spion_ds.training.config.run import RunConfig
from spion_ds.training.reports.metrics import Tally
from spion_ds.training.step.batches import Batch, DrawKeys
from spion_ds.training.step.masked_tokens import mask_tokens


class Losses:
    """Adds up the parts of a loss and counts each.

    Args:
        config: the run's.
        model: that is trained.
        forward: its forward pass, as DeepSpeed's engine makes it.
        tally: of the log's next row.
    """

    def __init__(
        self,
        config: RunConfig,
        model: EncoderClassifier,
        forward: Callable[..., Tensor],
        tally: Tally,
    ) -> None:
        self.config, self.model, self.forward, self.tally = config, model, forward, tally
        targets = get_task(config.task).token_targets
        self._token_loss = None if targets is None else targets.loss

    def of(self, batch: Batch, keys: DrawKeys, logits: Tensor, step: int) -> Tensor:
        """Return the loss () that is differentiated.

        Args:
            batch: the micro-batch.
            keys: of its random draws.
            logits: (B, classes) float32; (B, L, classes) where the batch has ``values``.
            step: optimizer steps before this one.
        """
        model, samples = self.config.model, len(batch.labels)
        named = None
        if batch.values is not None and self._token_loss is not None:
            named = self._token_loss(logits, batch.values)
            logits = logits[:, 0]  # the root's
        loss = F.cross_entropy(logits, batch.labels)
        self.tally.add(loss, logits, batch.labels)
        if named is not None:
            self.tally.add_part("subexpression_loss", named, samples)
            loss = loss + model.subexpression_loss * named
        if model.masked_token_loss > 0.0:
            # Not left out: every parameter shall have a gradient.
            loss = loss * float(step >= self.config.training.pretrain_steps)
            guessed = self._masked_tokens(batch, keys)
            self.tally.add_part("masked_token_loss", guessed, samples)
            loss = loss + model.masked_token_loss * guessed
        pattern = self.model.take_pattern_loss()
        if pattern is not None:
            self.tally.add_part("pattern_loss", pattern, samples)
            loss = loss + pattern
        return loss

    def _masked_tokens(self, batch: Batch, keys: DrawKeys) -> Tensor:
        """Return the loss () of a pass in which tokens are masked."""
        mask_id = get_task(self.config.task).vocab_size
        real = self.model.real_tokens(batch.input_ids, batch.padding_mask)
        masked = mask_tokens(batch.input_ids, real, keys.masks, mask_id)
        logits = self.forward(
            masked.input_ids, batch.padding_mask, keys.masked_dropout, guess_tokens=True
        )
        return masked.loss(logits)
