"""Some cases of the random oracle, always the same ones; ``oracle.py`` runs thousands."""

from __future__ import annotations

from .oracle import try_case

# Number 0 goes through Triton's interpreter too.
CASES = range(50)


def test_random_calls_are_the_dense_formula():
    assert [fault for number in CASES for fault in try_case(0, number)] == []
