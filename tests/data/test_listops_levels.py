"""ListOps expressions taken apart: values, shuffled operands, and what is no expression."""

from __future__ import annotations

import numpy as np
import pytest

from spion_ds.data.listops.levels import (
    NO_VALUE,
    first_fault,
    shuffle_operands,
    subexpression_values,
    take_apart,
)
from spion_ds.data.listops.task import encode, evaluate
from spion_ds.data.listops.trees import CLOSE_ID, MIN_ID, SM_ID, TreeShape, draw_trees


def drawn(count: int) -> np.ndarray:
    shape = TreeShape(min_length=50, max_length=600, max_depth=10, max_operands=10)
    ids, _, _ = draw_trees(shape, 40 * count, np.random.PCG64(3), 640)
    return ids[:count]


def by_hash(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    return (row * 7919 + column * 104729) % 1009


def by_evaluator(ids: np.ndarray) -> list[int]:
    """Return the values of one expression's operators, each evaluated on its own."""
    values, opened = [NO_VALUE] * len(ids), []
    for place, token in enumerate(ids.tolist()):
        if MIN_ID <= token <= SM_ID:
            opened.append(place)
        elif token == CLOSE_ID:
            first = opened.pop()
            values[first] = evaluate(ids[first : place + 1].tolist())
    return values


def test_values_are_those_of_the_evaluator_also_of_shuffled_operands() -> None:
    ids = drawn(30)
    shuffled = shuffle_operands(ids, by_hash)
    assert not np.array_equal(shuffled, ids)
    for expressions in (ids, shuffled):
        found = subexpression_values(expressions)
        assert found.tolist() == [by_evaluator(row) for row in expressions]
    assert set(np.unique(found)) == set(range(NO_VALUE, 10))


@pytest.mark.parametrize(
    ("expression", "values"),
    [
        ("[MED 9 0 8 3 ]", [5]),  # the mean of 3 and 8, truncated
        ("[MED 7 7 1 ]", [7]),
        ("[SM 9 9 [MIN 4 3 ] ]", [1, 3]),
        ("[MAX 0 [SM 5 5 ] 0 ]", [0, 0]),
        ("7", []),
    ],
)
def test_values_of_known_expressions(expression: str, values: list[int]) -> None:
    found = subexpression_values(np.pad(encode(expression, None), (0, 2))[None])
    assert found[found != NO_VALUE].tolist() == values


def test_levels_of_a_known_batch() -> None:
    texts = ("[MIN 1 [SM 5 6 ] 3 ]", "7", "[MAX 2 [MED 0 ] ]")
    ids = np.zeros((3, 9), np.uint8)
    for row, text in zip(ids, texts, strict=True):
        tokens = encode(text, None)
        row[: len(tokens)] = tokens
    levels = take_apart(ids)
    assert levels.bounds.tolist() == [0, 3, 8, 11]
    assert levels.place.tolist() == [0, 8, 9, 1, 2, 6, 10, 11, 3, 4, 12]
    assert levels.operators.tolist() == [0, 2, 4, 7]
    assert levels.closes.tolist() == [7, 14, 5, 13]
    assert levels.parent[3:].tolist() == [0, 0, 0, 1, 1, 2, 2, 3]


def test_a_deep_tree_is_shuffled_whole() -> None:
    depth = 300  # more than a byte counts
    ids = encode("[SM 1 " * depth + "2 " + "3 ] " * depth, None)[None]
    assert len(take_apart(ids).bounds) == depth + 2
    shuffled = shuffle_operands(ids, by_hash)
    assert first_fault(shuffled) is None
    assert not np.array_equal(shuffled, ids)
    assert np.array_equal(np.sort(shuffled), np.sort(ids))
    values = subexpression_values(shuffled)
    assert values[0, 0] == evaluate(ids[0].tolist())
    assert values[0].tolist() == by_evaluator(shuffled[0])


@pytest.mark.parametrize(
    ("tokens", "fault"),
    [
        ([11, 3, 15], None),
        ([3], None),
        ([11, 15], "an operator without operands"),
        ([11, 3, 12, 15, 15], "an operator without operands"),
        ([11, 3], "brackets that do not close"),
        ([11, 3, 15, 15], "brackets that do not close"),
        ([3, 15, 11, 4], "no single expression"),
        ([3, 4], "no single expression"),
        ([11, 3, 15, 4], "no single expression"),
        ([11, 0, 3, 15], "no single expression"),
        ([0, 3], "no single expression"),
        ([], "no single expression"),
    ],
)
def test_what_is_no_expression_is_found(tokens: list[int], fault: str | None) -> None:
    for width in (max(1, len(tokens)), 8):
        ids = np.zeros((3, width), np.uint8)
        ids[:, 0] = 3
        ids[1] = 0
        ids[1, : len(tokens)] = tokens
        assert first_fault(ids) == (None if fault is None else (1, fault))
