"""Which samples make up a step."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from spion_ds.data.storage.cache import Split
from spion_ds.training.step.batches import (
    BatchOrder,
    BatchReader,
    micro_batch_positions,
    read_batch,
)
from tests.devices import CPU_AND_GPU


def test_every_epoch_takes_each_sample_once_in_a_new_order() -> None:
    order = BatchOrder(num_samples=12, batch_size=4, seed=0)
    epochs = [np.concatenate([order.samples(3 * e + s) for s in range(3)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(12))
    assert not np.array_equal(epochs[0], epochs[1])


def test_batches_run_on_across_the_end_of_an_epoch() -> None:
    order = BatchOrder(num_samples=10, batch_size=4, seed=0)
    stream = np.concatenate([order.samples(step) for step in range(5)])
    assert sorted(stream[:10]) == list(range(10))
    assert sorted(stream[10:]) == list(range(10))


def test_order_is_a_function_of_seed_and_step_alone() -> None:
    forwards = BatchOrder(50, 8, seed=3)
    expected = [forwards.samples(step) for step in range(20)]
    backwards = BatchOrder(50, 8, seed=3)
    for step in reversed(range(20)):
        assert np.array_equal(backwards.samples(step), expected[step])
    assert not np.array_equal(BatchOrder(50, 8, seed=4).samples(0), expected[0])


def test_micro_batches_of_all_ranks_make_up_the_global_batch() -> None:
    for world, micro, accumulation in ((1, 12, 1), (2, 3, 2), (4, 1, 3), (3, 4, 1)):
        positions = [
            micro_batch_positions(step, micro, rank, world)
            for step in range(accumulation)
            for rank in range(world)
        ]
        assert np.array_equal(np.concatenate(positions), np.arange(12))


def test_read_batch_masks_padding() -> None:
    ids = np.array([[3, 4, 0, 0], [5, 6, 7, 8]], dtype=np.uint8)
    split = Split(ids, np.array([2, 4], dtype=np.int32), np.array([1, 9], dtype=np.uint8))
    batch = read_batch(split, np.array([1, 0]), torch.device("cpu"))
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [3, 4, 0, 0]]
    assert batch.padding_mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert batch.labels.tolist() == [9, 1]
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64


def test_read_batch_keeps_two_documents_apart_and_every_byte() -> None:
    ids = np.array([[[256, 4, 0], [1, 0, 0]], [[5, 6, 7], [8, 256, 0]]], dtype=np.uint16)
    lengths = np.array([[2, 1], [3, 2]], dtype=np.int32)
    split = Split(ids, lengths, np.array([1, 0], dtype=np.uint8))
    batch = read_batch(split, np.array([1, 0]), torch.device("cpu"))
    assert batch.input_ids.tolist() == ids[::-1].tolist()
    assert batch.padding_mask.tolist() == (ids[::-1] != 0).tolist()
    assert batch.input_ids.dtype == torch.int64


@pytest.mark.parametrize("device", ["cpu, by a thread", *CPU_AND_GPU])
@pytest.mark.parametrize("changed", [False, True])
def test_reading_ahead_gives_the_batches_of_reading_when_needed(device: str, changed: bool) -> None:
    def augment(ids: np.ndarray, keys: torch.Tensor) -> np.ndarray:
        return ids + keys.numpy().astype(np.uint8)[:, None]

    draw = np.random.default_rng(0)
    split = Split(
        draw.integers(0, 9, (10, 6), dtype=np.uint8),
        draw.integers(1, 7, 10, dtype=np.int32),
        draw.integers(0, 3, 10).astype(np.uint8),
    )
    order = BatchOrder(10, 4, seed=0)
    device, _, thread = device.partition(", ")
    asked: list[int] = []

    def keys_of(step: int, places: np.ndarray) -> torch.Tensor:
        asked.append(step)
        # The last but one is the augmentation's.
        return torch.from_numpy(100 * step + places).repeat(4, 1)

    reader = BatchReader(
        split,
        order,
        places=lambda micro_step: micro_batch_positions(micro_step, 2, 0, 1),
        accumulation=2,
        keys=keys_of,
        device=torch.device(device),
        augment=augment if changed else None,
        values=(lambda ids: ids.astype(np.int8) * 2) if changed else None,
    )
    if thread:
        reader._pool = ThreadPoolExecutor(1)
    # The fourth is out of order, as after a resumption.
    for step, micro_step in ((0, 0), (0, 1), (1, 0), (5, 1), (6, 0), (6, 1)):
        batch, keys = reader.read(step, micro_step)
        reader.read_ahead(step, micro_step)
        places = micro_batch_positions(micro_step, 2, 0, 1)
        wanted = read_batch(split, order.samples(step)[places], torch.device(device))
        key = 100 * step + places
        ids = wanted.input_ids + torch.from_numpy(changed * key).to(device)[:, None] % 256
        assert torch.equal(batch.input_ids, ids)
        assert (batch.values is None) is not changed
        if batch.values is not None:
            # Of the ids as they are after the change.
            assert torch.equal(batch.values, (2 * ids).to(torch.int8).long())
        assert torch.equal(batch.padding_mask, wanted.padding_mask)
        assert torch.equal(batch.labels, wanted.labels)
        assert keys.tolist() == [key.tolist()] * 4
    reader.settle()
    if reader._pool is None:
        assert asked == [0, 0, 1, 5, 6, 6]
    else:
        reader._pool.shutdown()
        assert asked[-2:] == [7, 7]  # two are ready
        assert len(asked) <= 6 + 4  # each was read once; besides these, two were read for nothing
