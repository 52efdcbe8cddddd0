"""A model and a loop of somebody's own, as small as they can be."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spion_ds.attention import SparseSelfAttention
from spion_ds.sparsity import SpionSparsityConfig

LENGTH, BLOCK, VOCABULARY, CLASSES = 64, 16, 11, 3
FILTER = 3  # side of the diagonal convolution


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int, attention: SparseSelfAttention) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.qkv = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim)
        self.attention, self.out = attention, nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return x + self.out(self.attention(q, k, v, mask).transpose(1, 2).flatten(2))


class Toy(nn.Module):
    """Two layers; the second may have other heads and another block than the first."""

    def __init__(
        self,
        *,
        heads: tuple[int, ...] = (2, 2),
        blocks: tuple[int, ...] = (BLOCK, BLOCK),
        per_head: bool = False,
        max_seq_length: int | None = None,
        length: int = LENGTH,
    ) -> None:
        super().__init__()
        dim = 16
        self.embedding, self.positions = nn.Embedding(VOCABULARY, dim), nn.Embedding(length, dim)
        self.layers = nn.ModuleList(
            Layer(
                dim,
                count,
                SparseSelfAttention(
                    SpionSparsityConfig(
                        count, block, per_head, variant="c", density=0.5, filter_size=FILTER
                    ),
                    max_seq_length=max_seq_length,
                ),
            )
            for count, block in zip(heads, blocks, strict=True)
        )
        self.head = nn.Linear(dim, CLASSES)
        # Large enough that maps differ from layer to layer and from head to head.
        with torch.no_grad():
            self.embedding.weight.mul_(3.0)
            for layer in self.layers:
                layer.qkv.weight.mul_(4.0)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = self.embedding(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.head(hidden.mean(dim=1))


def toy(seed: int = 0, **arguments: object) -> Toy:
    torch.manual_seed(seed)
    return Toy(**arguments)  # type: ignore[arg-type]


def samples(step: int, count: int, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids (B, L), a padding mask (B, L) and labels (B,), a function of the step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randint(VOCABULARY, (count, length), generator=generator)
    lengths = torch.randint(length // 2, length + 1, (count,), generator=generator)
    mask = torch.arange(length) < lengths[:, None]
    return x, mask, torch.randint(CLASSES, (count,), generator=generator)


def micro_batches(
    step: int, micro: int, rank: int = 0, ranks: int = 1, count: int = 6
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's micro-batches of a step whose ``count`` samples are always the same."""
    parts = [tensor.chunk(micro * ranks) for tensor in samples(step, count)]
    for number in range(micro):
        yield tuple(part[number * ranks + rank] for part in parts)  # type: ignore[misc]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list) -> float:
    """Take one step and return its loss."""
    total = 0.0
    for x, mask, y in batches:
        loss = F.cross_entropy(model(x, mask), y) / len(batches)
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total
