"""Masked tokens: which are masked, and the loss of guessing them."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spion_ds.data.tasks import TASKS
from spion_ds.errors import ConfigError
from spion_ds.models import EncoderClassifier, ModelConfig
from spion_ds.random_bits import sample_keys
from spion_ds.sparsity import SparseAttentionConfig
from spion_ds.training.reports.metrics import Tally
from spion_ds.training.step.batches import Batch, DrawKeys
from spion_ds.training.step.losses import Losses
from spion_ds.training.step.masked_tokens import MASKED_SHARE, mask_tokens
from tests.training.test_config import build

VOCABULARY = 17


def batch(samples: int, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (samples, length), generator=generator)
    lengths = torch.linspace(length // 2, length, samples).long()
    real = torch.arange(length) < lengths[:, None]
    return ids, real, sample_keys(0, 1, torch.arange(samples), 1)[0]


def test_a_share_of_the_real_tokens_is_masked() -> None:
    ids, real, keys = batch(40, 1000)
    found = mask_tokens(ids, real, keys, VOCABULARY)
    assert torch.equal(found.input_ids == VOCABULARY, found.masked)
    assert torch.equal(torch.where(found.masked, ids, found.input_ids), ids)
    assert not found.masked[~real].any()
    # Five standard deviations of 30 000 draws.
    assert found.masked[real].float().mean() == pytest.approx(MASKED_SHARE, abs=0.0103)
    part = mask_tokens(ids[7:9], real[7:9], keys[7:9], VOCABULARY)
    assert torch.equal(part.masked, found.masked[7:9])
    pairs = mask_tokens(ids.view(20, 2, 1000), real.view(20, 2, 1000), keys[:20], VOCABULARY)
    assert not torch.equal(pairs.masked[:, 0], pairs.masked[:, 1] & real.view(20, 2, 1000)[:, 0])


def test_the_loss_is_the_mean_over_samples_whatever_the_split() -> None:
    ids, real, keys = batch(6, 50)
    found = mask_tokens(ids, real, keys, VOCABULARY)
    logits = torch.randn(6, 50, VOCABULARY, generator=torch.Generator().manual_seed(0))
    each = [
        F.cross_entropy(logits[row, masked], ids[row, masked])
        for row, masked in enumerate(found.masked)
    ]
    # Float32 sums of some ten terms.
    torch.testing.assert_close(found.loss(logits), torch.stack(each).mean(), rtol=1e-5, atol=0)
    parts = [
        mask_tokens(ids[i : i + 3], real[i : i + 3], keys[i : i + 3], VOCABULARY).loss(
            logits[i : i + 3]
        )
        for i in (0, 3)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), found.loss(logits), rtol=1e-5, atol=0)


@pytest.mark.parametrize("documents", [1, 2])
def test_the_encoder_guesses_every_token_from_the_others(documents: int) -> None:
    torch.manual_seed(0)
    sizes = ModelConfig(dim=16, ffn_dim=16, layers=1, heads=2, head_dim=8, masked_token_loss=1.0)
    model = EncoderClassifier(
        sizes, SparseAttentionConfig(block=16), VOCABULARY, 10, 32, documents
    ).eval()
    ids, real, _ = batch(4, 32)
    if documents == 2:
        ids, real = ids.view(2, 2, 32), real.view(2, 2, 32)
    masked = ids.clone()
    masked[..., 3] = VOCABULARY
    logits = model(masked, real, guess_tokens=True)
    assert logits.shape == (*ids.shape, VOCABULARY)
    assert model(ids, real).shape == (4 // documents, 10)
    other = masked.clone()
    other[..., 5] = (other[..., 5] + 1) % VOCABULARY
    changed = model(other, real, guess_tokens=True)
    assert not torch.allclose(changed[..., 3, :], logits[..., 3, :])


def test_hidden_zeros_are_not_masked() -> None:
    sizes = ModelConfig(
        dim=8, ffn_dim=8, layers=1, heads=1, head_dim=8, zero_is_padding=True, masked_token_loss=1.0
    )
    vocabulary = TASKS["image"].vocab_size
    model = EncoderClassifier(sizes, SparseAttentionConfig(block=16), vocabulary, 10, 64)
    seen: list[torch.Tensor] = []

    def forward(ids: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        seen.append(ids)
        return model(ids, *rest, **named)

    training = SimpleNamespace(pretrain_steps=1)
    config: Any = SimpleNamespace(task="image", model=sizes, training=training)
    tally = Tally(torch.device("cpu"))
    ids, real, _ = batch(8, 64)
    keys = sample_keys(0, 1, torch.arange(8), DrawKeys.places(model.dropout_places))
    given = Batch(ids, real, torch.zeros(8, dtype=torch.int64))
    logits = torch.zeros(8, 10)
    assert Losses(config, model, forward, tally).of(given, DrawKeys.split(keys), logits, 0) > 0
    assert (seen[0] == vocabulary).any()
    assert torch.equal(seen[0] == 0, ids == 0)  # as the layers see it, padding


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On a loaded machine threads wait for one another at every one of these small operators."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_an_encoder_learns_to_guess_what_can_be_guessed() -> None:
    torch.manual_seed(0)
    sizes = ModelConfig(
        dim=16,
        ffn_dim=32,
        layers=1,
        heads=2,
        head_dim=8,
        dropout=0.0,
        attention_dropout=0.0,
        positions="rotary",
        masked_token_loss=1.0,
    )
    model = EncoderClassifier(sizes, SparseAttentionConfig(block=16), VOCABULARY, 10, 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = torch.arange(16)[:, None]
    ids = (first + torch.arange(32)) % 16 + 1  # each token follows from its neighbours
    real = torch.ones_like(ids, dtype=torch.bool)
    losses = []
    for step in range(120):
        found = mask_tokens(ids, real, sample_keys(0, step, torch.arange(16), 1)[0], VOCABULARY)
        loss = found.loss(model(found.input_ids, real, guess_tokens=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # Chance is ln 16 = 2.8.
    assert losses[0] > 2.5
    assert sum(losses[-10:]) / 10 < 1.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("training.pretrain_steps=5",), r"pretrain_steps is 5; allowed: 0 where"),
        (
            ("training.pretrain_steps=30000", "model.masked_token_loss=1"),
            r"training\.pretrain_steps is 30000; allowed: 0 to 29999",
        ),
        (("model.masked_token_loss=-1",), r"model\.masked_token_loss is -1"),
    ],
)
def test_values_out_of_range_are_named(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build("listops", overrides=overrides)


def test_a_task_without_augmentation_refuses_it() -> None:
    with pytest.raises(
        ConfigError, match=r"training\.augment is True; allowed: false for the task"
    ):
        build("text", overrides=("training.augment=true",))
