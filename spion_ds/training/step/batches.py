"""Which samples make up a step: a function of seed and step alone, for any number of ranks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spion_ds.data.storage.cache import Split
from spion_ds.data.task import Augmentation
from spion_ds.data.tasks import get_task
from spion_ds.distributed.process_group import Ranks
from spion_ds.random_bits import sample_keys
from spion_ds.training.config.run import RunConfig

# Micro-batches that are read ahead.
_AHEAD = 2


@dataclass(frozen=True)
class Batch:
    """A micro-batch on the device.

    Attributes:
        input_ids: (B, L) int64; (B, 2, L) with two documents a sample.
        padding_mask: bool of the same shape, True = real token.
        labels: (B,) int64.
        values: (B, L) int64, of sub-expressions at their operators, where they are asked for.
    """

    input_ids: Tensor
    padding_mask: Tensor
    labels: Tensor
    values: Tensor | None = None


@dataclass(frozen=True)
class DrawKeys:
    """Keys of what is drawn for a micro-batch, int32, as ``sample_keys`` makes them.

    Attributes:
        dropout: (dropout places, B), of the task's pass.
        masked_dropout: (dropout places, B), of the pass with masked tokens.
        augmentation: (B,).
        masks: (B,), which tokens are masked.
    """

    dropout: Tensor
    masked_dropout: Tensor
    augmentation: Tensor
    masks: Tensor

    @staticmethod
    def places(dropout_places: int) -> int:
        """Return how many keys a sample has, for a model of so many dropout places."""
        return 2 * dropout_places + 2

    @classmethod
    def split(cls, keys: Tensor) -> DrawKeys:
        """Return the keys (places, B) of a micro-batch by what they are for."""
        half = len(keys) // 2 - 1
        return cls(keys[:half], keys[half : 2 * half], keys[-2], keys[-1])


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
        for number in range(epoch[0], epoch[-1] + 1):
            here = epoch == number
            order[here] = self._permutation(number)[position[here] % self.num_samples]
        return order

    def _permutation(self, epoch: int) -> np.ndarray:
        # Two threads may ask; each works with what it found or made.
        found = self._epochs.get(epoch)
        if found is None:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            found = generator.permutation(self.num_samples)
            self._epochs = {k: v for k, v in self._epochs.items() if k == epoch - 1}
            self._epochs[epoch] = found
        return found


def micro_batch_positions(
    micro_step: int, micro_batch: int, rank: int, world_size: int
) -> np.ndarray:
    """Return the places in the global batch of one rank's micro-batch, (micro_batch,)."""
    first = (micro_step * world_size + rank) * micro_batch
    return np.arange(first, first + micro_batch)


def read_batch(split: Split, indices: np.ndarray, device: torch.device) -> Batch:
    """Return the samples at ``indices`` on ``device``."""
    tensors = (_ready(x, device) for x in _gather(split, indices))
    return _widen(*(x.to(device, non_blocking=True) for x in tensors))


class BatchReader:
    """The training micro-batches of one rank, read ahead where there is a GPU.

    A thread then gathers and augments the samples and makes the keys, in pinned memory, while the
    micro-batches before them run; two of them, so that its time and that of the launches do not
    add up. The copies stay in the stream that computes: they are short, and need no other
    synchronisation there.

    Args:
        split: the training split.
        order: which samples make up a step.
        places: ``(micro_step,)`` returns the places in the global batch of this rank's micro-batch.
        accumulation: micro-batches a step.
        keys: ``(step, places)`` returns the keys on the CPU.
        device: where the batches go.
        augment: changes the ids, given the keys for it.
        values: ``(ids)`` returns ``Batch.values`` of the ids (B, L), changed or not.
    """

    def __init__(
        self,
        split: Split,
        order: BatchOrder,
        places: Callable[[int], np.ndarray],
        accumulation: int,
        keys: Callable[[int, np.ndarray], Tensor],
        device: torch.device,
        *,
        augment: Augmentation | None = None,
        values: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.split, self.order, self.places = split, order, places
        self.accumulation, self.keys, self.device = accumulation, keys, device
        self.augment, self.values = augment, values
        # On a CPU a thread would only take cores from the step.
        self._pool: ThreadPoolExecutor | None = None
        if device.type == "cuda":
            # A new thread starts on GPU 0, whichever is this rank's.
            index = torch.cuda.current_device() if device.index is None else device.index
            self._pool = ThreadPoolExecutor(1, "reader", torch.cuda.set_device, (index,))
        self._ahead: deque[tuple[tuple[int, int], Future[list[Tensor]]]] = deque()

    def read(self, step: int, micro_step: int) -> tuple[Batch, Tensor]:
        """Return a micro-batch of ``step`` (from 0) and its dropout keys, both on the device."""
        while self._ahead and self._ahead[0][0] != (step, micro_step):
            self._ahead.popleft()[1].cancel()
        ahead = self._ahead.popleft()[1] if self._ahead else None
        tensors = self._read(step, micro_step) if ahead is None else ahead.result()
        keys, *batch = (x.to(self.device, non_blocking=True) for x in tensors)
        return _widen(*batch), keys

    def read_ahead(self, step: int, micro_step: int) -> None:
        """Start to read what follows this micro-batch; call it when its work is on its way."""
        if self._pool is None:
            return
        for number in range(_AHEAD):
            last = micro_step == self.accumulation - 1
            step, micro_step = (step + 1, 0) if last else (step, micro_step + 1)
            if number == len(self._ahead):
                future = self._pool.submit(self._read, step, micro_step)
                self._ahead.append(((step, micro_step), future))

    def settle(self) -> None:
        """Wait for what is being read: memory must not be pinned while a CUDA graph is captured."""
        if self._pool is not None:
            self._pool.submit(int).result()  # the only thread: what came before is done

    def _read(self, step: int, micro_step: int) -> list[Tensor]:
        places = self.places(micro_step)
        keys = self.keys(step, places)
        indices = self.order.samples(step)[places]
        ids, lengths, labels = _gather(self.split, indices)
        if self.augment is not None:
            ids = self.augment(ids, DrawKeys.split(keys).augmentation)
        arrays = [ids, lengths, labels]
        if self.values is not None:
            arrays.append(self.values(ids))
        return [_ready(keys, self.device), *(_ready(x, self.device) for x in arrays)]


def training_reader(
    config: RunConfig, split: Split, ranks: Ranks, device: torch.device, dropout_places: int
) -> BatchReader:
    """Return what reads a run's training micro-batches on one rank, with their keys.

    Args:
        config: the run.
        split: the training split.
        ranks: this process among all.
        device: where the batches go.
        dropout_places: of the model.
    """
    seed, task = config.training.seed, get_task(config.task)
    augments, names = config.training.augment, config.model.subexpression_loss > 0.0
    return BatchReader(
        split,
        BatchOrder(len(split), config.batches.total, seed),
        lambda micro_step: micro_batch_positions(
            micro_step, config.batches.micro, ranks.rank, ranks.world_size
        ),
        config.batches.accumulation,
        lambda step, places: sample_keys(
            seed, step, torch.from_numpy(places), DrawKeys.places(dropout_places)
        ),
        device,
        augment=task.augmentation(config.data) if augments and task.augmentation else None,
        values=task.token_targets.values if names and task.token_targets else None,
    )


def _gather(split: Split, indices: np.ndarray) -> list[np.ndarray]:
    """Return ids as they are stored (a byte or two each), lengths and labels, int64."""
    ids, lengths, labels = (
        np.ascontiguousarray(array[indices])
        for array in (split.input_ids, split.lengths, split.labels)
    )
    return [ids, lengths.astype(np.int64), labels.astype(np.int64)]


def _ready(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Return a tensor that can travel to the device without waiting for it."""
    if isinstance(values, np.ndarray):
        # PyTorch does little with uint16; ids are far below 2^15.
        stored = values.view(np.int16) if values.dtype == np.uint16 else values
        values = torch.from_numpy(stored)
    return values.pin_memory() if device.type == "cuda" else values


def _widen(ids: Tensor, lengths: Tensor, labels: Tensor, values: Tensor | None = None) -> Batch:
    positions = torch.arange(ids.shape[-1], device=ids.device)
    real = positions < lengths[..., None]
    return Batch(ids.long(), real, labels, None if values is None else values.long())
