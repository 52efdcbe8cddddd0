"""Rotary positions: the formula, and what follows from it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spion_ds.errors import ConfigError
from spion_ds.models import EncoderClassifier, ModelConfig
from spion_ds.models.rotary import rotate, rotations
from spion_ds.sparsity import SparseAttentionConfig

SMALL = ModelConfig(
    dim=8, ffn_dim=16, layers=1, heads=2, head_dim=4, dropout=0.0, positions="rotary"
)


def test_pairs_are_turned_by_position_times_frequency() -> None:
    x = torch.randn(2, 3, 50, 8, dtype=torch.float64)
    turned = rotate(x, rotations(50, 8, x.device).double())
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angle = torch.arange(50.0)[:, None] * 10_000.0 ** -(torch.arange(4.0) / 4)
    expected = pairs * torch.polar(torch.ones_like(angle), angle)
    # Angles are float32: up to 49 with 24 bits.
    torch.testing.assert_close(turned[..., :4], expected.real, rtol=0, atol=2e-5)
    torch.testing.assert_close(turned[..., 4:], expected.imag, rtol=0, atol=2e-5)


def test_scores_depend_on_the_distance_alone() -> None:
    rotation = rotations(200, 16, torch.device("cpu"))
    query, key = torch.randn(2, 1, 1, 1, 16).expand(2, 1, 1, 200, 16)
    scores = rotate(query, rotation) @ rotate(key, rotation).transpose(-1, -2)
    for distance in (-60, 0, 3, 100):
        diagonal = scores[0, 0].diagonal(distance)
        # Angles of up to 199 in float32 are good to 2e-5; sums of 16 products of order 1.
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-3)


def encoder(config: ModelConfig) -> EncoderClassifier:
    torch.manual_seed(0)
    return EncoderClassifier(config, SparseAttentionConfig(block=16), 17, 10, 48).eval()


def test_the_encoder_sees_the_order_of_its_tokens_without_a_table_of_positions() -> None:
    made = encoder(SMALL)
    assert not [name for name, _ in made.named_parameters() if "position" in name]
    ids = torch.randint(1, 17, (2, 48), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids, dtype=torch.bool)
    assert not torch.allclose(made(ids.flip(1), real), made(ids, real), rtol=1e-3)
    # Without any positions the order does not matter.
    attention = made.layers[0].attention
    forward = type(attention).forward
    blind = encoder(SMALL)
    blind.layers[0].attention.forward = lambda q, k, v, *rest: forward(
        attention, *(torch.ones_like(q), torch.ones_like(k), v), *rest
    )
    torch.testing.assert_close(blind(ids.flip(1), real), blind(ids, real))


def test_the_encoder_sees_distances_alone() -> None:
    made = encoder(replace(SMALL, layers=2))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "qkv.weight" in name:
                weight *= 4.0  # attention that has to do with its scores
    ids = torch.randint(1, 17, (2, 30), generator=torch.Generator().manual_seed(0))
    placed, masks = [], []
    for first in (0, 11):
        sequence = torch.zeros(2, 48, dtype=torch.int64)
        sequence[:, first : first + 30] = ids
        placed.append(sequence)
        masks.append(sequence > 0)
    # Angles of up to 40 in float32 are good to 4e-6.
    torch.testing.assert_close(
        made(placed[1], masks[1]), made(placed[0], masks[0]), rtol=0, atol=1e-4
    )
    assert not torch.allclose(
        made(placed[0].flip(1), masks[0].flip(1)), made(placed[0], masks[0]), rtol=0, atol=1e-3
    )


def test_an_odd_head_dim_is_refused() -> None:
    replace(SMALL, head_dim=5, positions="learned").validate()
    with pytest.raises(ConfigError, match=r"model\.head_dim is 5; allowed: an even number"):
        replace(SMALL, head_dim=5).validate()
    with pytest.raises(ConfigError, match=r"model\.positions is 'sine'; allowed: learned or"):
        replace(SMALL, positions="sine").validate()
