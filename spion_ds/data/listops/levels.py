"""ListOps expressions taken apart level by level: their operands shuffled, their values found.

Every level of a batch's nodes is one run of an array, and so are an operator's operands in the
level below; so NumPy does the work in a few calls a level, and a token costs the same however
deep it stands. Shapes: B expressions, L tokens, N nodes (operators and digits), K operators.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spion_ds.data.listops.trees import CLOSE_ID, PAD_ID, apply_operators, is_operator

# The value of a token that is no operator.
NO_VALUE = -1


@dataclass(frozen=True)
class Levels:
    """The nodes of a batch, from the roots down; in a level from the first to the last token.

    Tokens are counted through the batch without padding: places are 0 to T - 1.

    Attributes:
        tokens: (T,) uint8 ids of all expressions, one after the other.
        real: (B, L) bool, where they stand in the batch.
        place: (N,) where each node stands.
        bounds: (depth + 1,) where each level starts among the nodes, and N.
        operators: (K,) which nodes are operators.
        closes: (K,) where the bracket of each of them stands.
        first: (N,) bool, whether a node is its operator's first operand, or a root.
        parent: (N,) which of the operators a node is an operand of; without meaning for a root.
    """

    tokens: np.ndarray
    real: np.ndarray
    place: np.ndarray
    bounds: np.ndarray
    operators: np.ndarray
    closes: np.ndarray
    first: np.ndarray
    parent: np.ndarray

    def slices(self) -> list[slice]:
        """Return the nodes of each level."""
        return [slice(*pair) for pair in zip(self.bounds, self.bounds[1:], strict=False)]


def first_fault(ids_BL: np.ndarray) -> tuple[int, str] | None:
    """Return the first row that is not one whole expression, and what it is; None if all are.

    An operator has at least one operand. Tokens of other vocabularies are for the caller to find.

    Args:
        ids_BL: (B, L) uint8 token ids, padded at the end.
    """
    opens, shut, real = is_operator(ids_BL), ids_BL == CLOSE_ID, ids_BL != PAD_ID
    open_now = (opens.view(np.int8) - shut.view(np.int8)).cumsum(axis=1, dtype=np.int16)
    # Operators are open after every token but the last one, and there are no gaps.
    goes_on = np.zeros_like(real)
    goes_on[:, :-1] = real[:, 1:]
    faults = {
        "an operator without operands": (opens[:, :-1] & shut[:, 1:]).any(axis=1),
        "brackets that do not close": open_now[:, -1] != 0,
        "no single expression": ((open_now > 0) != goes_on).any(axis=1) | ~real[:, 0],
    }
    found = [(int(rows.argmax()), what) for what, rows in faults.items() if rows.any()]
    return min(found, key=lambda fault: fault[0], default=None)


def take_apart(ids_BL: np.ndarray) -> Levels:
    """Return the levels of expressions in which ``first_fault`` finds none.

    Args:
        ids_BL: (B, L) uint8 token ids, padded at the end.
    """
    real = ids_BL != PAD_ID
    tokens = ids_BL[real]
    opens, shut = is_operator(tokens), tokens == CLOSE_ID
    # Operators that are open around a token, which is also what its bracket has; roots have 0.
    level = np.cumsum(opens.astype(np.int8) - shut.astype(np.int8), dtype=np.int32) - opens
    level = level.astype(np.uint16)  # NumPy sorts 16 bits by counting
    place = np.flatnonzero(~shut)
    place = place[np.argsort(level[place], kind="stable")]
    # Brackets of a level do not nest: sorted alike, its opening and its closing ones are pairs.
    closes = np.flatnonzero(shut)
    closes = closes[np.argsort(level[closes], kind="stable")]

    bounds = np.concatenate([[0], np.cumsum(np.bincount(level[place]))])
    # The first operand follows its operator's token; the operands of a level are in the order of
    # their operators.
    first = np.concatenate([[True], opens[:-1]])[place]
    first[: len(ids_BL)] = True
    parent = np.cumsum(first) - 1 - len(ids_BL)
    return Levels(tokens, real, place, bounds, np.flatnonzero(opens[place]), closes, first, parent)


def shuffle_operands(
    ids_BL: np.ndarray, draw: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return expressions with the operands of every operator in another order.

    MIN, MAX, MED and SM do not depend on it. All orders are equally likely.

    Args:
        ids_BL: (B, L) uint8 as for ``take_apart``.
        draw: ``(row, column)`` of nodes (N,) returns 31 random bits of each, (N,) int64, by which
            operands are sorted.
    """
    levels = take_apart(ids_BL)
    nodes, roots = len(levels.place), len(ids_BL)
    size = np.ones(nodes, np.int64)  # tokens of a node and all below it
    size[levels.operators] = levels.closes - levels.place[levels.operators] + 1

    row, column = (index[levels.place] for index in np.nonzero(levels.real))
    rank = draw(row, column)
    rank |= levels.parent << 31
    rank[:roots] = -1
    order = np.argsort(rank, kind="stable")  # siblings keep their run
    sizes = size[order]
    before = np.cumsum(sizes) - sizes
    start = np.flatnonzero(levels.first)
    offset = np.empty(nodes, np.int64)  # tokens of the siblings that now come before
    offset[order] = before - np.repeat(before[start], np.diff(np.append(start, nodes)))

    place = np.empty(nodes, np.int64)
    place[:roots] = levels.place[:roots]
    for level in levels.slices()[1:]:  # from the roots down: an operator's new place is known
        above = place[levels.operators[levels.parent[level]]]
        place[level] = above + 1 + offset[level]
    tokens = np.empty_like(levels.tokens)
    tokens[place] = levels.tokens[levels.place]
    tokens[place[levels.operators] + size[levels.operators] - 1] = CLOSE_ID
    shuffled = np.zeros_like(ids_BL)
    shuffled[levels.real] = tokens
    return shuffled


def subexpression_values(ids_BL: np.ndarray) -> np.ndarray:
    """Return the value of each operator's sub-expression at the operator, else ``NO_VALUE``.

    Args:
        ids_BL: (B, L) uint8 as for ``take_apart``.

    Returns:
        (B, L) int8, 0 to 9 where the token is an operator. At place 0 it is the label.
    """
    levels = take_apart(ids_BL)
    token = levels.tokens[levels.place]
    value = token.astype(np.int64) - 1  # a digit's; an operator's come below
    slices = levels.slices()
    for above, level in zip(slices[-2::-1], slices[:0:-1], strict=True):
        # From the deepest up: an operator needs its operands.
        starts = np.flatnonzero(levels.first[level])
        found = levels.operators
        operators = found[slice(*np.searchsorted(found, (above.start, above.stop)))]
        value[operators] = apply_operators(token[operators], starts, value[level])
    tokens = np.full(len(levels.tokens), NO_VALUE, np.int8)
    tokens[levels.place[levels.operators]] = value[levels.operators]
    values = np.full(ids_BL.shape, NO_VALUE, np.int8)
    values[levels.real] = tokens
    return values
