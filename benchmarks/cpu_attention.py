"""Block-sparse attention on a CPU: correctness first, then time against dense attention.

    python benchmarks/cpu_attention.py --out benchmarks/results/DATE-PROCESSOR.md

Every round times every implementation once, so that other work on the machine hits all of them.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from layouts import spion_like_mask
from timing import machine_lines
from torch import Tensor

from spion_ds.attention import BlockLayout, block_sparse_attention

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
COLUMNS = ("SDPA", "torch", "cpp")
HEADER = (
    "| shape | dtype | block | density | pass | SDPA ms | torch ms | cpp ms | SDPA / cpp | "
    "torch / cpp | MiB, SDPA | torch | cpp |"
)


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    batch: int
    heads: int
    length: int
    head_dim: int
    block: int
    density: float
    dtype: torch.dtype = torch.float32


SETTINGS = [
    Setting(8, 2, 2048, 32, 64, 0.05),
    Setting(8, 2, 2048, 32, 64, 0.10),
    Setting(8, 2, 2048, 32, 64, 0.25),
    Setting(8, 2, 2048, 32, 64, 0.05, torch.bfloat16),
    Setting(16, 2, 1024, 32, 32, 0.055),
    Setting(4, 2, 4096, 32, 64, 0.023),
    Setting(2, 8, 2048, 64, 64, 0.05),
    Setting(1, 8, 2048, 128, 128, 0.10),
    Setting(8, 2, 2048, 32, 16, 0.05),
]


def main() -> None:
    """Check, time, print the table, and write it as a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of a row (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", type=int, help="take the first N rows only")
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [HEADER, "|" + " --- |" * (HEADER.count("|") - 1)]
    print("\n".join(lines))
    for setting in SETTINGS[: arguments.only]:
        for line in measure(setting, arguments.rounds):
            lines.append(line)
            print(line, flush=True)
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(page(lines, arguments), encoding="utf-8")


def page(lines: list[str], arguments: argparse.Namespace) -> str:
    """Return the page: what, where, how, table."""
    return "\n".join(
        [
            "# Block-sparse attention on a CPU",
            "",
            *machine_lines(),
            f"Medians of {arguments.rounds} interleaved rounds, minima in brackets; ratios are "
            "of minima, which other work on the machine disturbs least. Every row first passed "
            "its check against the float64 reference. Shapes are batch, heads, tokens, head_dim. "
            "SDPA is PyTorch's dense scaled_dot_product_attention; torch and cpp are backends of "
            "block_sparse_attention. Layouts: benchmarks/layouts.py. MiB is the peak "
            "memory above the inputs, with output, gradients and workspaces.",
            "",
            *lines,
            "",
        ]
    )


def measure(setting: Setting, rounds: int) -> list[str]:
    """Return the table's lines for a setting: forward, then forward and backward."""
    blocks = -(-setting.length // setting.block)
    layout = BlockLayout.from_mask(spion_like_mask(blocks, setting.density), setting.block)
    draw = torch.Generator().manual_seed(0)
    shape = (setting.batch, setting.heads, setting.length, setting.head_dim)
    q, k, v, grad_out = (torch.randn(shape, generator=draw).to(setting.dtype) for _ in range(4))
    check(setting, layout, q, k, v, grad_out)
    for x in (q, k, v):
        x.requires_grad_()

    functions: dict[str, Callable[[], Tensor]] = {
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
        "torch": lambda: block_sparse_attention(q, k, v, layout, backend="torch"),
        "cpp": lambda: block_sparse_attention(q, k, v, layout, backend="cpp"),
    }

    def both(name: str) -> tuple[float, float]:
        start = time.perf_counter()
        out = functions[name]()
        middle = time.perf_counter()
        torch.autograd.grad(out, (q, k, v), grad_out)
        return (middle - start) * 1e3, (time.perf_counter() - start) * 1e3

    memory = {name: peak_mib(lambda name=name: both(name)) for name in COLUMNS}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in COLUMNS}
    for _ in range(rounds):
        for name in COLUMNS:
            times[name].append(both(name))
    lines = []
    for index, which in enumerate(("forward", "forward + backward")):
        usual = {name: median(pair[index] for pair in times[name]) for name in COLUMNS}
        least = {name: min(pair[index] for pair in times[name]) for name in COLUMNS}
        cells = [
            ",".join(map(str, shape)),
            str(setting.dtype).removeprefix("torch."),
            str(setting.block),
            f"{layout.density:.3f}",
            which,
            *(f"{usual[name]:.1f} ({least[name]:.1f})" for name in COLUMNS),
            f"{least['SDPA'] / least['cpp']:.1f}",
            f"{least['torch'] / least['cpp']:.1f}",
            *(f"{memory[name]:.0f}" if index else "" for name in COLUMNS),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def check(setting: Setting, layout: BlockLayout, *tensors: Tensor) -> None:
    """Exit unless one head of one sample agrees with the reference, out and gradients."""
    q, k, v, grad_out = (x[:1, :1] for x in tensors)
    results = {}
    for backend, dtype in (("cpp", setting.dtype), ("reference", torch.float64)):
        qkv = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = block_sparse_attention(*qkv, layout, backend=backend)
        results[backend] = [out, *torch.autograd.grad(out, qkv, grad_out.to(dtype))]
    for name, got, expected in zip(("out", "dq", "dk", "dv"), *results.values(), strict=True):
        error = (torch.linalg.vector_norm(got.double() - expected) / expected.norm()).item()
        if not error < TOLERANCES[setting.dtype]:
            sys.exit(f"{setting}: relative error of {name} is {error:.3g}; nothing was timed")


def peak_mib(run: Callable[[], object]) -> float:
    """Return by how much a run raises the process's resident memory, NaN where Linux is not."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not clear.exists():
        return float("nan")
    run()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    clear.write_text("5")  # the peak starts again from what is resident now

    def kib(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1])

    before = kib("VmRSS")
    run()
    return (kib("VmHWM") - before) / 1024


if __name__ == "__main__":
    main()
