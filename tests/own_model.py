"""A model of one's own, whose layers have other blocks and heads, and masks of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spion_ds.attention import SparseSelfAttention
from spion_ds.errors import CheckpointError, ConfigError
from spion_ds.masks import load_masks
from spion_ds.sparsity import SparsityConfig, SpionSparsityConfig, SwitchingSparsityConfig
from spion_ds.switching.masks import find_attentions, get_mask

LENGTH, DIM = 64, 16


class OwnConfig(SwitchingSparsityConfig):
    """A configuration of a user's with a mask a head, which does not take ``refused``."""

    refused: Tensor | None = None

    def __init__(self, num_heads: int, block: int) -> None:
        SparsityConfig.__init__(self, num_heads, block, different_layout_per_head=True)
        self._pattern = None

    def set_pattern(self, pattern: Tensor | None) -> None:
        if self.refused is not None and pattern is not None and pattern.equal(self.refused):
            raise ConfigError("pattern is refused")
        self._pattern = None if pattern is None else pattern.clone()

    def make_mask(self, seq_len: int, longer: str = "error") -> Tensor:
        n = -(-seq_len // self.block)
        full = torch.ones(self.num_heads, n, n, dtype=torch.bool)
        return full if self._pattern is None else self._pattern


class Layer(nn.Module):
    """Attention between two linear maps, (B, L, DIM) to (B, L, DIM)."""

    def __init__(self, config: SparsityConfig) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.attend = SparseSelfAttention(config)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attend.sparsity_config.num_heads
        split = self.qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.attend(*split).transpose(1, 2).flatten(2)


class Own(nn.Module):
    """A model of one's own: layers of other blocks and heads, shared, per head and dense."""

    def __init__(self, **configs: SparsityConfig) -> None:
        super().__init__()
        torch.manual_seed(0)
        configs = {
            "shared": SpionSparsityConfig(2, 16),
            "per_head": OwnConfig(4, 32),
            "dense": SpionSparsityConfig(4, 16),
            **configs,
        }
        self.encoder = nn.ModuleDict({name: Layer(one) for name, one in configs.items()})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.encoder.values():
            x = layer(x)
        return x

    def attention(self, name: str) -> SparseSelfAttention:
        return self.encoder[name].attend


def random_mask(*shape: int, seed: int = 1) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    return mask | torch.eye(shape[-1], dtype=torch.bool)


def sparse_model(**configs: SparsityConfig) -> Own:
    model = Own(**configs)
    model.attention("shared").set_mask(random_mask(4, 4))
    model.attention("per_head").set_mask(random_mask(4, 2, 2))
    return model


def masks_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if (mask := get_mask(attention, LENGTH)) is None else mask.clone()
        for name, attention in find_attentions(model).items()
    }


def assert_same(ours: dict[str, Tensor | None], theirs: dict[str, Tensor | None]) -> None:
    assert list(ours) == list(theirs)
    for name, mask in theirs.items():
        other = ours[name]
        assert (other is None) == (mask is None), name
        assert other is None or (other.dtype == torch.bool and torch.equal(other, mask)), name


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model(torch.randn(2, LENGTH, DIM, generator=torch.Generator().manual_seed(7)))


def refuses(model: nn.Module, path: Path, message: str) -> None:
    before = masks_of(model)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_masks(model, path)
    assert "\n" not in str(caught.value)
    assert_same(masks_of(model), before)
