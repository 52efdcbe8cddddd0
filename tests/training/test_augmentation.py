"""Augmentation keeps what the label depends on, and is a function of its keys alone."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import torch

from spion_ds.data.listops.augmentation import shuffle_operands
from spion_ds.data.listops.task import evaluate
from spion_ds.data.listops.trees import CLOSE_ID, MIN_ID, SM_ID, TreeShape, draw_trees
from spion_ds.data.pathfinder.augmentation import flip_and_turn
from spion_ds.random_bits import sample_keys

DEPTH = 10


def keys(samples: int, step: int = 3) -> torch.Tensor:
    return sample_keys(0, step, torch.arange(samples), 1)[0]


def trees(count: int) -> np.ndarray:
    shape = TreeShape(min_length=50, max_length=600, max_depth=DEPTH, max_operands=10)
    ids, _, _ = draw_trees(shape, 40 * count, np.random.PCG64(3), 640)
    return ids[:count]


def parsed(ids: np.ndarray) -> Any:
    """Return an expression as nested (operator, operands), digits as they are."""
    stack: list[tuple[int, list]] = [(0, [])]
    for token in ids.tolist():
        if MIN_ID <= token <= SM_ID:
            stack.append((token, []))
        elif token == CLOSE_ID:
            done = stack.pop()
            stack[-1][1].append(done)
        elif token:
            stack[-1][1].append(token)
    [tree] = stack[0][1]
    return tree


def unordered(tree: Any) -> str:
    """Return a text that does not depend on the order of operands."""
    if isinstance(tree, int):
        return str(tree)
    return f"{tree[0]}({' '.join(sorted(unordered(operand) for operand in tree[1]))})"


def test_shuffled_expressions_are_the_same_but_for_the_order_of_operands() -> None:
    ids = trees(30)
    shuffled = shuffle_operands(ids, keys(30))
    deepest = 0
    for before, after in zip(ids, shuffled, strict=True):
        assert unordered(parsed(after)) == unordered(parsed(before))
        assert evaluate(after.tolist()) == evaluate(before.tolist())
        assert not np.array_equal(before, after)
        assert np.array_equal(before == 0, after == 0)  # the padding stays
        steps = np.isin(before, range(MIN_ID, SM_ID + 1)).astype(int) - (before == CLOSE_ID)
        deepest = max(deepest, int(np.cumsum(steps).max()))
    assert deepest == DEPTH - 1  # operators above the deepest digits


def test_all_orders_are_equally_likely() -> None:
    expression = np.array([MIN_ID, 1, SM_ID, 5, 6, CLOSE_ID, 3, CLOSE_ID, 0], np.uint8)
    count = 3000
    shuffled = shuffle_operands(np.tile(expression, (count, 1)), keys(count))
    seen = Counter(tuple(row) for row in shuffled.tolist())
    assert len(seen) == 3 * 2 * 2
    # Five standard deviations of a binomial count.
    expected = count / 12
    assert max(abs(n - expected) for n in seen.values()) < 5 * expected**0.5


def test_draws_depend_on_the_sample_and_the_step_alone() -> None:
    ids = trees(8)
    whole = shuffle_operands(ids, keys(8))
    parts = [shuffle_operands(ids[i : i + 3], keys(8)[i : i + 3]) for i in (0, 3, 6)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(shuffle_operands(ids, keys(8, step=4)), whole)
    same = np.repeat(ids[:1], 8, axis=0)
    assert len(np.unique(shuffle_operands(same, keys(8)), axis=0)) == 8


def test_what_is_drawn_does_not_change_between_versions() -> None:
    digest = hashlib.sha256(shuffle_operands(trees(8), keys(8)).tobytes()).hexdigest()
    assert digest[:16] == "3488397b8d001568"


def test_images_take_all_eight_flips_and_turns() -> None:
    image = np.tile(np.arange(16, dtype=np.uint8), (4000, 1))
    seen = Counter(tuple(row) for row in flip_and_turn(image, keys(4000), 4).tolist())
    square = np.arange(16).reshape(4, 4)
    views = [np.rot90(view, quarter) for view in (square, square.T) for quarter in range(4)]
    assert set(seen) == {tuple(view.reshape(-1).tolist()) for view in views}
    # Five standard deviations of a binomial count.
    assert max(abs(n - 500) for n in seen.values()) < 5 * 500**0.5
