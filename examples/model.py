"""A model of one's own whose attention can become sparse, and data for it. No trainer."""

import torch
from torch import nn

from spion_ds.attention import SparseSelfAttention
from spion_ds.sparsity import SpionSparsityConfig

LENGTH, TOKENS, DIM, HEADS = 256, 16, 64, 4


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM)
        self.feed = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU())
        # Dense until there is a pattern, which each head gets for itself; max_seq_length keeps the
        # mask in the model's own state.
        sparsity = SpionSparsityConfig(
            HEADS, block=16, different_layout_per_head=True, variant="c", density=0.15
        )
        self.attention = SparseSelfAttention(sparsity, max_seq_length=LENGTH)

    def forward(self, x, mask):
        """Return (B, L, DIM); ``mask`` is bool (B, L), True = real token."""
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1))  # (B, L, 3, H, D)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # (B, H, L, D)
        x = x + self.out(self.attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return x + self.feed(x)


class Model(nn.Module):
    """Says whether the first token is the same as the last real one."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TOKENS, DIM), nn.Embedding(LENGTH, DIM)
        self.layers, self.head = nn.ModuleList(Layer() for _ in range(2)), nn.Linear(DIM, 2)

    def forward(self, x, mask):
        hidden = self.tokens(x) + self.positions.weight[: x.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.head(hidden[:, 0])


def make_batch(step, rank=0, ranks=1, size=8):
    """Return this rank's ids (B, L), padding masks (B, L) and labels (B,) of a step."""
    draw = torch.Generator().manual_seed(step)
    x = torch.randint(TOKENS, (size, LENGTH), generator=draw)
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (size,), generator=draw)
    y = torch.randint(2, (size,), generator=draw)
    last = x.gather(1, lengths[:, None] - 1)[:, 0]
    x[:, 0] = torch.where(y == 1, last, (last + 1) % TOKENS)
    mask = torch.arange(LENGTH) < lengths[:, None]
    return tuple(part.chunk(ranks)[rank] for part in (x, mask, y))
