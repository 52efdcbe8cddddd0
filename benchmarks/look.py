"""What a look at attention costs: a step with a check or a refresh against the same step without.

    python benchmarks/look.py --out benchmarks/results/DATE-DEVICE-look.md
    python benchmarks/look.py --small      # seconds on a CPU

A model of attention layers alone under AdamW. First the masks of a look must be those that
``attention_map`` gives. Then dense and sparse steps are timed, with and without a look; what a look
costs is the difference. The decision is rank 0's: rule, patterns, broadcast and new layouts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from timing import machine_lines, synchronize
from torch import Tensor, nn

from spion_ds import DenseToSparse
from spion_ds.attention import SparseSelfAttention, attention_map
from spion_ds.patterns import DistanceRule
from spion_ds.sparsity import SpionSparsityConfig

HEADER = (
    "| B,H,L,D | block | patterns | phase | step ms | with a look ms | look × step | decide ms |"
)


class Layers(nn.Module):
    """Attention layers with their projections, each added to the residual stream."""

    def __init__(self, heads: int, head_dim: int, layers: int, block: int, per_head: bool) -> None:
        super().__init__()
        dim = heads * head_dim
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.attention = nn.ModuleList(
            SparseSelfAttention(SpionSparsityConfig(heads, block, per_head, "c", density=0.06))
            for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, L, E)."""
        for qkv, attention, out in zip(self.qkv, self.attention, self.out, strict=True):
            q, k, v = qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
            attended = attention(*(t.transpose(1, 2) for t in (q, k, v)))
            x = x + out(attended.transpose(1, 2).flatten(2))
        return x


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not given.small else "cpu")
    shapes = [(4, 8, 8192, 64), (1, 8, 32768, 64)] if device.type == "cuda" else [(1, 2, 512, 32)]
    lines = [HEADER, "| --- " * HEADER.count(" | ") + "| --- |"]
    for shape in shapes:
        for per_head in (False, True):
            lines += measure(shape, 64, per_head, device)
            print("\n".join(lines[-2:]), flush=True)
    page = ["# What a look at attention costs", "", *machine_lines()]
    page += [(__doc__ or "").split("\n\n")[2].strip(), ""]
    text = "\n".join([*page, *lines]) + "\n"
    if given.out is not None:
        given.out.write_text(text)


def measure(
    shape: tuple[int, int, int, int], block: int, per_head: bool, device: torch.device
) -> list[str]:
    """Return the lines of a shape, one a phase."""
    batch, heads, length, head_dim = shape
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Layers(heads, head_dim, 4, block, per_head).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    x = torch.randn(batch, length, heads * head_dim, device=device, dtype=dtype)
    switch = DenseToSparse(
        model, DistanceRule(1), check_every=3, max_dense_steps=24, refresh_every=3
    )
    times: dict[tuple[str, bool], list[float]] = {}
    decided: dict[str, list[float]] = {"dense": [], "sparse": []}
    real = torch.ones(batch, length, dtype=torch.bool, device=device)
    for number in range(1, 49):
        phase, looks = switch.phase, switch.looks_at(number)
        synchronize(device)
        start = time.perf_counter()
        with switch.step(number, padding_masks=[real] if looks else None) as look:
            model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize(device)
        times.setdefault((phase, looks), []).append((time.perf_counter() - start) * 1e3)
        if look.event is not None:
            decided[phase].append(look.event.seconds * 1e3)
    gate(model, x, switch)
    lines = []
    for phase in ("dense", "sparse"):
        plain, looked = (statistics.median(times[phase, looks][2:]) for looks in (False, True))
        decide = statistics.median(decided[phase][2:])
        cells = [",".join(map(str, shape)), str(block), "a head" if per_head else "a layer", phase]
        cells += [f"{plain:.2f}", f"{looked:.2f}", f"{looked / plain:.2f}", f"{decide:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@torch.no_grad()
def gate(model: Layers, x: Tensor, switch: DenseToSparse) -> None:
    """Exit unless the first layer's mask of one more look is that of ``attention_map``."""
    number = switch.last_step + 1
    while not switch.looks_at(number):
        with switch.step(number):
            model(x)
        number += 1
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    with switch.step(number, padding_masks=[real]):
        model(x)
    q, k, _ = model.qkv[0](x).unflatten(-1, (3, model.heads, -1)).unbind(2)
    config = model.attention[0].sparsity_config
    pooled = attention_map(
        q.transpose(1, 2),
        k.transpose(1, 2),
        block=config.block,
        filter_size=config.convolution,
        per_head=config.different_layout_per_head,
    )
    if not torch.equal(config.find_pattern(pooled).cpu(), config.pattern):
        sys.exit("the mask of a look is not that of attention_map")


if __name__ == "__main__":
    main()
