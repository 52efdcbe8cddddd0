"""Inputs that a model cannot take are named, with what it can take."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spion_ds.errors import DataError
from tests.models.test_saved import LENGTH, sparse_model

ONES = torch.ones(2, LENGTH, dtype=torch.int64)
REAL = torch.ones(2, LENGTH, dtype=torch.bool)


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (ONES * 17, REAL, r"go from 17 to 17; the model has the ids 0 to 16"),
        (-ONES, REAL, r"go from -1 to -1; the model has the ids 0 to 16"),
        (torch.ones(2, 80).long(), torch.ones(2, 80).bool(), r"\(2, 80\) .* L from 1 to 70"),
        (ONES[:, :0], REAL[:, :0], r"\(2, 0\) .* L from 1 to 70"),
        (ONES[0], REAL[0], r"\(70,\) .* takes \(B, L\) int64"),
        (ONES[None], REAL[None], r"\(1, 2, 70\) .* takes \(B, L\) int64"),
        (ONES.float(), REAL, r"float32; the model takes \(B, L\) int64"),
        (ONES, REAL.float(), r"padding_mask is \(2, 70\) torch\.float32; allowed: bool"),
        (ONES, REAL[:, :9], r"padding_mask is \(2, 9\) torch\.bool; allowed: bool \(2, 70\)"),
    ],
)
def test_what_a_model_cannot_take_is_named(ids: Tensor, mask: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        sparse_model()(ids, mask)


@pytest.mark.parametrize("shape", [(2, LENGTH), (2, 3, LENGTH)])
def test_two_documents_have_a_dimension_of_two(shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"takes \(B, 2, L\) int64"):
        sparse_model(documents=2)(torch.ones(shape).long(), torch.ones(shape).bool())


def test_shorter_inputs_and_the_id_of_a_masked_token_are_taken() -> None:
    model = sparse_model(masked_token_loss=1.0)
    assert model(ONES[:, :40], REAL[:, :40]).shape == (2, 10)
    assert model(ONES * 17, REAL, guess_tokens=True).shape == (2, LENGTH, 17)
