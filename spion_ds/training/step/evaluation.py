"""Accuracy over a split, shared out over the ranks, each sample once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from spion_ds.data.storage.cache import Split
from spion_ds.data.tasks import get_task
from spion_ds.distributed.process_group import Ranks
from spion_ds.errors import CheckpointError
from spion_ds.models import EncoderClassifier
from spion_ds.switching.masks import set_masks
from spion_ds.training.checkpoints.checkpoint import load_state, load_weights
from spion_ds.training.config.run import RunConfig
from spion_ds.training.reports.run_log import progress_bar
from spion_ds.training.step.batches import read_batch


@dataclass(frozen=True)
class Evaluation:
    """Result over a split.

    Attributes:
        accuracy: share of samples whose most likely class is the label, 0 to 1.
        loss: mean cross-entropy, nats.
        samples: how many samples were counted: the whole split.
        tokens_per_second: sequence positions, padding included, over all ranks.
        seconds: how long it took.
        predictions: most likely classes (samples of this rank,) int64 on the CPU, in its order.
    """

    accuracy: float
    loss: float
    samples: int
    tokens_per_second: float
    seconds: float
    predictions: Tensor


@torch.no_grad()
def evaluate(
    forward: Callable[[Tensor, Tensor], Tensor],
    split: Split,
    batch_size: int,
    ranks: Ranks,
    device: torch.device,
    title: str = "evaluating",
) -> Evaluation:
    """Return the accuracy of ``forward(input_ids, padding_mask) → logits`` over ``split``.

    Rank r takes samples r, r + world_size, …. All ranks make the same number of forward passes
    (ZeRO-3 needs them all in each), so a rank that has run out repeats sample 0, uncounted.
    """
    mine = np.arange(ranks.rank, len(split), ranks.world_size)
    batches = -(-len(split) // (ranks.world_size * batch_size))
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # correct, loss, samples
    predictions = []
    started = time.perf_counter()
    bar = progress_bar(iterable=range(batches), desc=title, disable=not ranks.is_first, leave=False)
    for number in bar:
        indices = mine[number * batch_size : (number + 1) * batch_size]
        counted = len(indices)
        batch = read_batch(split, indices if counted else np.zeros(1, dtype=np.int64), device)
        logits = forward(batch.input_ids, batch.padding_mask).float()[:counted]
        labels = batch.labels[:counted]
        predictions.append(logits.argmax(dim=-1))
        totals[0] += (predictions[-1] == labels).sum()
        totals[1] += F.cross_entropy(logits, labels, reduction="sum")
        totals[2] += counted
    if dist.is_initialized():
        dist.all_reduce(totals)
    correct, loss, samples = totals.tolist()
    seconds = time.perf_counter() - started
    tokens = split.input_ids.size
    return Evaluation(
        correct / samples,
        loss / samples,
        int(samples),
        tokens / seconds,
        seconds,
        torch.cat(predictions).cpu(),
    )


def build_model(config: RunConfig) -> EncoderClassifier:
    """Return the run's model with fresh weights, a function of training.seed alone."""
    task = get_task(config.task)
    torch.manual_seed(config.training.seed)
    return EncoderClassifier(
        config.model,
        config.sparse_attention,
        task.vocab_size,
        task.num_classes,
        config.data.sequence_length,
        task.documents,
        task.brackets,
        task.padded,
    )


def load_checkpoint_model(
    folder: Path, config: RunConfig, device: torch.device
) -> EncoderClassifier:
    """Return the model of a checkpoint, with its masks, in evaluation mode on ``device``.

    Raises:
        CheckpointError: the checkpoint is damaged, or of a model of another shape.
    """
    state, _ = load_state(folder)
    weights = load_weights(folder)
    model = build_model(config)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights of {folder} do not fit the model: {error}") from error
    set_masks(model, state.masks, config.data.sequence_length)
    dtype = next(iter(weights.values())).dtype
    return model.to(device=device, dtype=dtype).eval()
