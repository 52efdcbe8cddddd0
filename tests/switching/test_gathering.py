"""Which rank holds which layers and heads of the job."""

from __future__ import annotations

import pytest

from spion_ds.errors import ConfigError
from spion_ds.sparsity import SpionSparsityConfig
from spion_ds.switching.gathering import Part, lay_out


def part(leader: int, layers: int = 2, heads: int = 2, **offsets: int) -> Part:
    configs = [SpionSparsityConfig(heads, 16) for _ in range(layers)]
    return Part(leader, offsets.get("layer", 0), offsets.get("head", 0), configs)


def test_stages_follow_each_other_and_heads_add_up() -> None:
    parts = [part(0), part(0), part(2, head=2, heads=4), part(3, layers=1, heads=3, layer=2)]
    job = lay_out(parts)
    assert [layer.config.num_heads for layer in job] == [6, 6, 3]
    assert job[0].held == [(0, 0, 2), (2, 0, 4)]
    assert job[2].held == [(3, 0, 3)]


@pytest.mark.parametrize("other", [part(0, layers=3), part(0, heads=4), part(0, layer=2)])
def test_ranks_of_one_group_hold_the_same(other: Part) -> None:
    with pytest.raises(ConfigError, match="one group= hold different"):
        lay_out([part(0), other])
