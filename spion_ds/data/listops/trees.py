"""ListOps trees as token ids: draws them from the published distribution and evaluates them.

Shapes: T trees, N nodes of one depth, K operators among these, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from spion_ds.errors import DataError

PAD_ID = 0
DIGIT_IDS = range(1, 11)  # the digit + 1
MIN_ID, MAX_ID, MED_ID, SM_ID = 11, 12, 13, 14
OPERATOR_IDS = range(MIN_ID, SM_ID + 1)
CLOSE_ID = 15
UNKNOWN_ID = 16
VOCAB_SIZE = 17
NUM_CLASSES = 10


def is_operator(ids: Any) -> Any:
    """Return which token ids open an operator, bool; ids are a NumPy array or a tensor."""
    return (ids >= MIN_ID) & (ids <= SM_ID)


def _median(operands: list[int]) -> int:
    ordered = sorted(operands)
    middle = len(ordered) // 2
    # An even count takes the mean of the middle two, truncated.
    return (ordered[middle] + ordered[-middle - 1]) // 2


def _sum_modulo_10(operands: list[int]) -> int:
    return sum(operands) % 10


_OPERATORS: dict[int, Callable[[list[int]], int]] = {
    MIN_ID: min,
    MAX_ID: max,
    MED_ID: _median,
    SM_ID: _sum_modulo_10,
}


def evaluate(ids: Iterable[int]) -> int:
    """Return the value 0..9 of one expression; padding is skipped.

    Raises:
        DataError: the ids are not one ListOps expression.
    """
    value = _value_or_none(ids)
    if value is None:
        raise DataError("the token ids hold no digit, so the expression has no value")
    return value


def truncated_value(ids: np.ndarray, depth: int) -> int | None:
    """Return the value when all that is nested deeper than ``depth`` operators is left out.

    The root operator has depth 1: ``depth=1`` reads the root and the digits directly under it,
    ``depth=2`` also its operator children and their digits. An operator that keeps no operand is
    left out too.

    Args:
        ids: (L,) token ids, padded or not.
        depth: operators to read on the way down, the root included.

    Returns:
        0..9, or None if nothing is left.

    Raises:
        DataError: the ids are not one ListOps expression.
    """
    opens = is_operator(ids)
    closes = ids == CLOSE_ID
    # A bracket belongs to the depth that it opens or closes.
    depths = np.cumsum(opens, dtype=np.int64) - np.cumsum(closes, dtype=np.int64) + closes
    return _value_or_none(ids[depths <= depth].tolist())


def _value_or_none(ids: Iterable[int]) -> int | None:
    # One entry per open operator; the first one, which is no operator, collects the result.
    unfinished: list[tuple[int, list[int]]] = [(PAD_ID, [])]
    for token in ids:
        if token in DIGIT_IDS:
            unfinished[-1][1].append(int(token) - 1)
        elif token in OPERATOR_IDS:
            unfinished.append((int(token), []))
        elif token == CLOSE_ID and len(unfinished) > 1:
            operator, operands = unfinished.pop()
            if operands:
                unfinished[-1][1].append(_OPERATORS[operator](operands))
        elif token != PAD_ID:
            raise DataError(f"token id {token} cannot stand where it stands in the expression")
    result = unfinished[0][1]
    if len(unfinished) > 1 or len(result) > 1:
        raise DataError("the token ids are not one expression: brackets stay open, or several")
    return result[0] if result else None


@dataclass(frozen=True)
class TreeShape:
    """What a tree must be: exclusive bounds of its length, its depth, its operands.

    A digit has length 1, an operator 2 ("[MIN" and "]") plus its operands. The root has depth 1;
    a node of ``max_depth`` is a digit. An operator has 2 to ``max_operands`` operands, both
    included, as the published generator's ``randint(2, 10)`` has them.
    """

    min_length: int
    max_length: int
    max_depth: int
    max_operands: int


@dataclass(frozen=True)
class _Level:
    """All nodes of one depth, tree by tree and from left to right."""

    tree: np.ndarray  # (N,) int64, which tree the node is in
    bits: np.ndarray  # (N,) uint64, the node's random bits
    is_operator: np.ndarray  # (N,) bool
    operands: np.ndarray  # (K,) int64, how many an operator has: a run of the next level's nodes

    def starts(self) -> np.ndarray:
        """Return (K,) where each operator's operands start in the next level."""
        return np.cumsum(self.operands) - self.operands

    def operators(self) -> np.ndarray:
        """Return (K,) int64, 0..3 for MIN, MAX, MED, SM."""
        return (self.bits[self.is_operator] & np.uint64(3)).astype(np.int64)


def draw_trees(
    shape: TreeShape, draws: int, random: np.random.BitGenerator, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw ``draws`` trees and keep those whose length fits, about 8 % at the published shape.

    A tree is a branching process, so all are drawn at once, depth by depth: a node above
    ``max_depth`` is an operator with probability 1/4, else a uniform digit. One random word makes
    a node, taken raw from the bit generator, whose stream NumPy promises never to change.

    Args:
        shape: what is accepted.
        draws: trees drawn.
        random: where the random words come from.
        width: columns of the result, at least ``shape.max_length - 1``.

    Returns:
        (T, width) uint8 token ids padded with 0, (T,) int32 lengths, (T,) uint8 values 0..9.
    """
    levels, lengths = _draw_levels(shape, draws, random)
    accepted = (lengths > shape.min_length) & (lengths < shape.max_length)
    levels = _select(levels, accepted)
    sizes, values = _sizes_and_values(levels)
    ids = np.zeros((int(accepted.sum()), width), np.uint8)
    _place_tokens(ids, levels, sizes, values)
    return ids, lengths[accepted].astype(np.int32), values[0].astype(np.uint8)


def _draw_levels(
    shape: TreeShape, draws: int, random: np.random.BitGenerator
) -> tuple[list[_Level], np.ndarray]:
    """Return the levels and the (draws,) lengths; a tree too long is cut short, at max_length."""
    levels: list[_Level] = []
    tree = np.arange(draws)
    lengths = np.zeros(draws, np.int64)
    while len(tree):
        bits = np.asarray(random.random_raw(len(tree)), dtype=np.uint64)
        # The top two bits decide operator or digit; the rest of the word decides which one.
        is_operator = (bits >> np.uint64(62)) == 0
        if len(levels) + 1 == shape.max_depth:
            is_operator[:] = False
        kinds = np.uint64(shape.max_operands - 1)
        operands = ((bits[is_operator] >> np.uint64(2)) % kinds).astype(np.int64) + 2
        levels.append(_Level(tree, bits, is_operator, operands))

        parents = tree[is_operator]
        lengths += np.bincount(tree, minlength=draws) + np.bincount(parents, minlength=draws)
        # Every node to come adds at least 1: a tree that cannot fit any more is drawn no further.
        to_come = np.bincount(parents, weights=operands, minlength=draws)
        hopeless = lengths + to_come >= shape.max_length
        lengths[hopeless] = shape.max_length
        tree = np.repeat(parents, operands)
        tree = tree[~hopeless[tree]]
    return levels, lengths


def _select(levels: list[_Level], accepted: np.ndarray) -> list[_Level]:
    """Return the levels with the accepted trees alone, renumbered."""
    number = np.cumsum(accepted) - 1
    selected = []
    for level in levels:
        keep = accepted[level.tree]
        selected.append(
            _Level(
                number[level.tree[keep]],
                level.bits[keep],
                level.is_operator[keep],
                level.operands[keep[level.is_operator]],
            )
        )
    return selected


def _sizes_and_values(levels: list[_Level]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return for each level (N,) tokens of the node's subtree and (N,) its value, int64."""
    sizes: list[np.ndarray] = []
    values: list[np.ndarray] = []
    # From the deepest level up: an operator needs its operands.
    for level in reversed(levels):
        size = np.ones(len(level.tree), np.int64)
        value = (level.bits % np.uint64(10)).astype(np.int64)
        if len(level.operands):
            size[level.is_operator] = 2 + np.add.reduceat(sizes[-1], level.starts())
            tokens = level.operators() + MIN_ID
            value[level.is_operator] = apply_operators(tokens, level.starts(), values[-1])
        sizes.append(size)
        values.append(value)
    return sizes[::-1], values[::-1]


def apply_operators(tokens: np.ndarray, starts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the (K,) int64 values 0..9 of operators.

    Args:
        tokens: (K,) ids of the operators.
        starts: (K,) where each one's operands start, which go on to the next one's; one at least.
        values: (N,) int64 values 0..9 of all operands.
    """
    ends = np.append(starts[1:], len(values))
    operands = ends - starts
    # Sort the operands within each operator: its number above their 4 bits. A sort that merges runs
    # takes a quarter of the time here, where nothing is far from its place.
    group = np.repeat(np.arange(len(starts)) << 4, operands)
    ordered = np.sort(group | values, kind="stable") & 15
    lower, upper = ordered[starts + (operands - 1) // 2], ordered[starts + operands // 2]
    by_operator = (
        ordered[starts],
        ordered[ends - 1],
        (lower + upper) // 2,
        np.add.reduceat(values, starts) % 10,
    )
    return np.choose(tokens - MIN_ID, by_operator)


def _place_tokens(
    ids: np.ndarray, levels: list[_Level], sizes: list[np.ndarray], values: list[np.ndarray]
) -> None:
    """Write every node's tokens into the (T, L) ``ids``, which are zero."""
    position = np.zeros(len(ids), np.int64)
    for depth, level in enumerate(levels):
        is_operator = level.is_operator
        token = values[depth] + DIGIT_IDS[0]
        token[is_operator] = level.operators() + MIN_ID
        ids[level.tree, position] = token
        ends = (position + sizes[depth] - 1)[is_operator]
        ids[level.tree[is_operator], ends] = CLOSE_ID
        if depth + 1 < len(levels):
            # Operands follow their operator's token, each after all tokens of those before it.
            before = np.cumsum(sizes[depth + 1]) - sizes[depth + 1]
            first = position[is_operator] + 1 - before[level.starts()]
            position = np.repeat(first, level.operands) + before
