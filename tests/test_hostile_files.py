"""Damaged, nonsensical and malicious files are refused in a sentence, by every reader.

The same readers meet any number of files with ``python -m tests.hostile_files``.
"""

from __future__ import annotations

from collections import Counter

import pytest

from tests.hostile_files import Reader, Tally, attack
from tests.hostile_readers import READERS

pytest.importorskip("safetensors")


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name.replace(" ", "-"))
def test_hostile_files_are_refused_in_a_sentence(reader: Reader) -> None:
    tally = Tally(Counter(), [])
    for sealed in (False, True)[: 1 + (reader.seal is not None)]:
        attack(reader, 3, 0, tally, sealed=sealed)
    assert tally.counts["refused"] > 0
    assert tally.wrong == []
