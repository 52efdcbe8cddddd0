"""Values inside ListOps expressions: what they are, and how an encoder learns to name them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from spion_ds.data.listops.levels import NO_VALUE, subexpression_values, take_apart
from spion_ds.data.listops.subexpressions import subexpression_loss
from spion_ds.data.listops.task import encode, evaluate
from spion_ds.data.listops.trees import CLOSE_ID, MIN_ID, UNKNOWN_ID
from spion_ds.data.storage.cache import Dataset, Split
from spion_ds.data.tasks import TASKS
from spion_ds.errors import ConfigError, DataError
from spion_ds.models import EncoderClassifier, ModelConfig
from spion_ds.sparsity import SparseAttentionConfig
from spion_ds.training.session import check_samples
from spion_ds.training.step.acceleration import AcceleratedForward
from tests.training.launching import digest, drive, losses, rows, summary
from tests.training.test_augmentation import DEPTH, trees
from tests.training.test_config import build

SIZES = ModelConfig(
    dim=16,
    ffn_dim=32,
    layers=1,
    heads=2,
    head_dim=8,
    classifier_dim=16,
    dropout=0.0,
    attention_dropout=0.0,
    positions="rotary",
    pooling="attention",
    nesting_levels=DEPTH,
    subexpression_loss=1.0,
)
BRACKETS = TASKS["listops"].brackets


def small_model(config: ModelConfig = SIZES) -> EncoderClassifier:
    torch.manual_seed(0)
    block = SparseAttentionConfig(block=16)
    return EncoderClassifier(config, block, 17, 10, 640, brackets=BRACKETS)


def some(count: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, padding mask and values of random trees."""
    ids = trees(count)
    values = torch.from_numpy(subexpression_values(ids)).long()
    return torch.from_numpy(ids).long(), torch.from_numpy(ids > 0), values


def test_the_loss_is_the_mean_over_samples_whatever_the_split() -> None:
    _, _, values = some(6)
    logits = torch.randn(*values.shape, 10, generator=torch.Generator().manual_seed(0))
    each = [
        F.cross_entropy(row[value != NO_VALUE], value[value != NO_VALUE])
        for row, value in zip(logits, values, strict=True)
    ]
    whole = subexpression_loss(logits, values)
    # Float32 sums of some ten terms.
    torch.testing.assert_close(whole, torch.stack(each).mean(), rtol=1e-5, atol=0)
    parts = [subexpression_loss(logits[i : i + 3], values[i : i + 3]) for i in (0, 3)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-5, atol=0)


def test_training_classifies_every_token_and_prediction_the_root_as_before() -> None:
    model = small_model()
    ids, real, _ = some()
    every = model.train()(ids, real)
    assert every.shape == (*ids.shape, 10)
    # The same float32 products in matrices of another size.
    torch.testing.assert_close(model.eval()(ids, real), every[:, 0], rtol=1e-4, atol=1e-5)
    # Prediction is that of a model which never heard of sub-expressions: it has the same weights.
    plain = small_model(replace(SIZES, subexpression_loss=0.0)).train()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(ids, real), model(ids, real))


def test_the_loss_reaches_every_weight_and_the_operators_tokens_alone() -> None:
    model = small_model().train()
    ids, real, values = some()
    every = model(ids, real)
    every.retain_grad()
    subexpression_loss(every, values).backward()
    assert torch.equal(every.grad.abs().sum(-1) > 0, values != NO_VALUE)
    assert all(p.grad.abs().max() > 0 for p in model.parameters())


def test_tokens_are_told_how_deep_they_are_nested() -> None:
    model = small_model(replace(SIZES, nesting_levels=3))
    ids = torch.from_numpy(encode("[MIN 1 [SM 5 [MAX 6 [MED 7 8 ] ] ] 3 ]", None)).long()
    assert model._nesting(F.pad(ids, (0, 2))[None])[0].tolist() == [
        *[0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 0],  # the deepest share the last level
        *[0, 0],
    ]
    # Those of whole trees are what the data's own reading says.
    ids = trees(4)
    levels = take_apart(ids)
    depth = np.repeat(np.arange(len(levels.bounds) - 1), np.diff(levels.bounds))
    found = small_model()._nesting(torch.from_numpy(ids).long())[torch.from_numpy(levels.real)]
    assert found[levels.place].tolist() == depth.tolist()
    assert found[levels.closes].tolist() == depth[levels.operators].tolist()
    with pytest.raises(ConfigError, match=r"nesting_levels is 10; allowed: 0 without brackets"):
        EncoderClassifier(SIZES, SparseAttentionConfig(block=16), 17, 10, 640)


def losses_of(device: str, **options: object) -> list[float]:
    model = small_model().to(device).train()
    forward = AcceleratedForward(model, **options)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, real, values = (x.to(device) for x in some())
    found = []
    for _ in range(4):
        with forward.step(False, (ids, real)):
            loss = subexpression_loss(model(ids, real), values)
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
        del loss
    return found


def test_compiled_steps_have_the_losses_of_plain_steps() -> None:
    plain = losses_of("cpu", compile=False, cuda_graph=False)
    compiled = losses_of("cpu", compile=True, cuda_graph=False, backend="aot_eager")
    assert plain[-1] < plain[0]
    # The same operators, decomposed: float32 rounding, amplified by four optimizer steps.
    assert compiled == pytest.approx(plain, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_replays_the_same_losses() -> None:
    plain = losses_of("cuda", compile=False, cuda_graph=False)
    replayed = losses_of("cuda", compile=False, cuda_graph=True)
    # The same kernels; those of matrix products may split their sums in another way.
    assert replayed == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "listops",
            (),
            r"subexpression_loss is 1\.0; allowed: 0 where model\.pooling is not attention",
        ),
        ("listops", ("model.subexpression_loss=-1",), r"model\.subexpression_loss is -1"),
        (
            "image",
            ("model.pooling=attention",),
            r"subexpression_loss is 1\.0; allowed: 0 for",
        ),
        (
            "image",
            ("model.subexpression_loss=0", "model.nesting_levels=4"),
            r"nesting_levels is 4; allowed: 0 for the task image, which has no brackets",
        ),
        (
            "listops",
            ("model.pooling=attention", "model.nesting_levels=4", "model.masked_token_loss=1"),
            r"nesting_levels is 4; allowed: 0 where model\.masked_token_loss is above 0",
        ),
        ("listops", ("model.pooling=last",), r"model\.pooling is 'last'; allowed: .* or attention"),
    ],
)
def test_what_cannot_be_is_refused(recipe: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(recipe, overrides=("model.subexpression_loss=1", *overrides))


def test_what_reads_expressions_refuses_other_data() -> None:
    ids = trees(40)
    labels = np.array([evaluate(row.tolist()) for row in ids], np.uint8)
    lengths = (ids > 0).sum(axis=1).astype(np.int32)

    def check(tokens: np.ndarray, *overrides: str) -> None:
        split = Split(tokens, lengths, labels)
        config = build("listops_small", overrides=overrides)
        check_samples(config, Dataset(split, split, split, Path("data/listops-1"), {}))

    reading = ("training.augment=true",)
    check(ids, *reading)
    other = np.where(ids > 0, 17 - ids, 0).astype(np.uint8)
    check(other)
    values = ("model.pooling=attention", "model.subexpression_loss=1")
    for overrides, message in (
        (reading, r"training\.augment is True, but data\.source .* set training\.augment to False"),
        (values, r"subexpression_loss is 1\.0, but data\.source .* set .* to 0,"),
        (("model.nesting_levels=4",), r"nesting_levels is 4, but data\.source"),
    ):
        with pytest.raises(ConfigError, match=message):
            check(other, *overrides)
    unknown, empty = ids.copy(), ids.copy()
    unknown[30, 1] = UNKNOWN_ID
    with pytest.raises(ConfigError, match=r"another vocabulary"):
        check(unknown, *reading)
    empty[30, :3] = MIN_ID, CLOSE_ID, 0
    with pytest.raises(DataError, match=r"listops-1: training sample 30 is an operator without"):
        check(empty, *reading)


@pytest.mark.ranks
def test_an_interrupted_run_goes_on_as_if_it_were_not(tmp_path: Path) -> None:
    whole = {
        "stage": 3,
        "overrides": [
            "model.pooling=attention",
            "model.nesting_levels=8",
            "model.subexpression_loss=0.5",
            "training.augment=true",
            "training.steps=9",
        ],
    }
    sessions = [
        {**whole, "run_name": "whole"},
        {**whole, "run_name": "stopped", "stop_at": 4},
        {"resume": str(tmp_path / "runs" / "stopped")},
    ]
    drive("python", 1, sessions, tmp_path)
    whole_run, stopped = tmp_path / "runs" / "whole", tmp_path / "runs" / "stopped"
    assert losses(stopped) == losses(whole_run)
    assert digest(stopped) == digest(whole_run)
    found = [row["subexpression_loss"] for row in rows(whole_run, "train")]
    assert [row["subexpression_loss"] for row in rows(stopped, "train")] == found
    # Chance is ln 10 = 2.3, give or take the random weights of ten classes.
    assert found[0] == pytest.approx(2.3, abs=0.5)
    assert summary(stopped)["phase"] == "sparse"
