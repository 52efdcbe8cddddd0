"""Which samples make up a step: a function of seed and step alone, for any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spion_ds.data import Split


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device.

    Attributes:
        input_ids: (B, L) int64; (B, 2, L) with two documents a sample.
        padding_mask: bool of the same shape, True = real token.
        labels: (B,) int64.
    """

    input_ids: Tensor
    padding_mask: Tensor
    labels: Tensor


class BatchOrder:
    """Endless shuffled order of a split: every epoch a new permutation, cut into global batches.

    Args:
        num_samples: samples of the split.
        batch_size: global batch size.
        seed: the run's seed.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self._epochs: dict[int, np.ndarray] = {}

    def samples(self, step: int) -> np.ndarray:
        """Return the sample indices of the global batch of ``step`` (from 0), (batch_size,)."""
        position = step * self.batch_size + np.arange(self.batch_size)
        epoch = position // self.num_samples
        order = np.empty(self.batch_size, dtype=np.int64)
        for number in np.unique(epoch):
            here = epoch == number
            order[here] = self._permutation(int(number))[position[here] % self.num_samples]
        return order

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs = {k: v for k, v in self._epochs.items() if k == epoch - 1}
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self._epochs[epoch] = generator.permutation(self.num_samples)
        return self._epochs[epoch]


def micro_batch_positions(
    micro_step: int, micro_batch: int, rank: int, world_size: int
) -> np.ndarray:
    """Return the places in the global batch of one rank's micro-batch, (micro_batch,)."""
    first = (micro_step * world_size + rank) * micro_batch
    return np.arange(first, first + micro_batch)


def read_batch(split: Split, indices: np.ndarray, device: torch.device) -> Batch:
    """Return the samples at ``indices`` on ``device``."""
    stored = np.ascontiguousarray(split.input_ids[indices])
    # PyTorch does little with uint16; ids are far below 2^15.
    ids = torch.from_numpy(stored.view(np.int16) if stored.dtype == np.uint16 else stored)
    lengths = torch.from_numpy(np.ascontiguousarray(split.lengths[indices]).astype(np.int64))
    labels = torch.from_numpy(np.ascontiguousarray(split.labels[indices]).astype(np.int64))
    if device.type == "cuda":
        ids, lengths, labels = ids.pin_memory(), lengths.pin_memory(), labels.pin_memory()
    # The ids travel as they are stored (one or two bytes each) and widen on the device.
    ids, lengths, labels = (x.to(device, non_blocking=True) for x in (ids, lengths, labels))
    positions = torch.arange(ids.shape[-1], device=device)
    return Batch(ids.long(), positions < lengths[..., None], labels)
