"""The gradient of the token embedding on a GPU: a one-hot product against PyTorch's own.

    python benchmarks/embedding.py --out benchmarks/results/DATE-DEVICE-embedding.md

First each must be near the float64 gradient; then it is timed, alone, replayed from a CUDA graph.
Half of the ids are one and the same, as padding and black pixels are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from timing import graph_ms, machine_lines, peak_megabytes
from torch import Tensor

from spion_ds.models.embedding import one_hot_product

# Task, batch, tokens of a sample, ids, dim.
SHAPES = (
    ("listops", 256, 2048, 17, 64),
    ("listops_open", 32, 2048, 17, 256),
    ("listops_open, nesting", 32, 2048, 10, 256),
    ("image", 256, 1024, 256, 64),
    ("text", 32, 4096, 257, 64),
    ("retrieval", 64, 4096, 257, 64),
    ("pathfinder128", 64, 16384, 256, 64),
    ("most ids", 256, 2048, 512, 64),
)
# Relative to the largest sum: bf16 rounds a sum to 2^-9 of itself, parts of it once more.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
HEADER = "| shape | B, L, ids, dim | dtype | PyTorch's | compiled | product | compiled | MiB |"


def own(gradient: Tensor, ids: Tensor, count: int) -> Tensor:
    """Return the gradient as nn.Embedding has it."""
    return torch.ops.aten.embedding_dense_backward(gradient, ids, count, -1, False)


def measure(batch: int, length: int, count: int, dim: int, dtype: torch.dtype) -> list[float]:
    """Return milliseconds of each way, and the product's memory in MiB.

    Raises:
        SystemExit: a gradient is wrong.
    """
    draw = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(count, (batch, length), device="cuda", generator=draw)
    ids[torch.rand(ids.shape, device="cuda", generator=draw) < 0.5] = 0
    gradient = torch.randn(batch, length, dim, device="cuda", generator=draw).to(dtype)
    exact = torch.zeros(count, dim, dtype=torch.float64, device="cuda")
    exact.index_add_(0, ids.flatten(), gradient.flatten(0, 1).double())
    times = []
    ways: list[Callable[[Tensor, Tensor, int], Tensor]] = [own, one_hot_product]
    for way in ways:
        for run in (way, torch.compile(way, dynamic=False)):
            error = (run(gradient, ids, count) - exact).abs().max() / exact.abs().max()
            if not error < TOLERANCE[dtype]:
                raise SystemExit(f"{way.__name__}: {ids.shape}, {count} ids: off by {error:.1e}")
            times.append(graph_ms(lambda run=run: run(gradient, ids, count)))
    memory = peak_megabytes(lambda: one_hot_product(gradient, ids, count))
    return [*times, memory]


def main() -> None:
    """Check, time, print the table, and write it as a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU; on a CPU nn.Embedding's own gradient is used")
    lines = [HEADER, "|" + " --- |" * (HEADER.count("|") - 1)]
    print(*lines, sep="\n")
    for name, batch, length, count, dim in SHAPES:
        for dtype in (torch.bfloat16, torch.float32):
            torch.compiler.reset()
            *times, memory = measure(batch, length, count, dim, dtype)
            cells = [name, f"{batch}, {length}, {count}, {dim}", str(dtype).removeprefix("torch.")]
            cells += [*(f"{time:.3f}" for time in times), f"{memory:,.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if arguments.out is not None:
        title = "# The embedding's gradient, milliseconds"
        text = "\n".join([title, "", *machine_lines(), *lines, ""])
        arguments.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
