"""Pooled attention maps on a CPU: correctness first, then time against a dense forward pass.

    python benchmarks/cpu_maps.py --out benchmarks/results/DATE-PROCESSOR-maps.md

Every round times every implementation once, so that other work on the machine hits all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from cpu_attention import peak_mib
from timing import machine_lines

from spion_ds.attention.cpu_maps import block_sums_cpu, unsupported
from spion_ds.attention.streaming_maps import MapRequest, block_sums_torch

# Some ten roundings of float32 an entry, of which a block averages many.
TOLERANCE = 1e-6
FILTER_SIZE = 31
# Batch, heads, tokens, head_dim; block; dtype.
SETTINGS = [
    ((8, 2, 2048, 32), 64, torch.float32),
    ((8, 2, 2048, 32), 16, torch.float32),
    ((16, 2, 1024, 32), 32, torch.float32),
    ((2, 8, 2048, 64), 64, torch.float32),
    ((2, 8, 2048, 64), 64, torch.bfloat16),
    ((1, 2, 8192, 64), 64, torch.float32),
]
HEADER = "| shape | block | dtype | SDPA ms | torch ms | cpp ms | SDPA / cpp | torch / cpp | MiB |"


def main() -> None:
    """Check, time, print the table, and write it as a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of a row (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = [HEADER, "|" + " --- |" * (HEADER.count("|") - 1)]
    print("\n".join(lines))
    for shape, block, dtype in SETTINGS:
        lines.append(measure(shape, block, dtype, arguments.rounds))
        print(lines[-1], flush=True)
    if arguments.out is not None:
        arguments.out.write_text(page(lines, arguments.rounds), encoding="utf-8")


def page(lines: list[str], rounds: int) -> str:
    """Return the page: what, where, how, table."""
    return "\n".join(
        [
            "# Pooled attention maps on a CPU",
            "",
            *machine_lines(),
            f"Medians of {rounds} interleaved rounds, minima in brackets; ratios are of minima. "
            f"Maps are pooled with a filter of {FILTER_SIZE}, and each first passed its check "
            "against the float64 specification. SDPA is the forward pass of PyTorch's dense "
            "scaled_dot_product_attention; torch is the specification in the inputs' precision. "
            "MiB is the peak memory of cpp above its inputs.",
            "",
            *lines,
            "",
        ]
    )


def measure(shape: tuple[int, ...], block: int, dtype: torch.dtype, rounds: int) -> str:
    """Return the table's line for a setting."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=draw).to(dtype) for _ in range(3))
    batch, heads, length, head_dim = shape
    weights = torch.full((length,), 1 / (batch * heads), dtype=torch.float64)
    request = MapRequest(q, k, weights, None, False, head_dim**-0.5, block, FILTER_SIZE)
    check(request)
    functions: dict[str, Callable[[], object]] = {
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
        "torch": lambda: block_sums_torch(request),
        "cpp": lambda: block_sums_cpu(request),
    }
    memory = peak_mib(functions["cpp"])
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e3)
    least = {name: min(values) for name, values in times.items()}
    cells = [
        ",".join(map(str, shape)),
        str(block),
        str(dtype).removeprefix("torch."),
        *(f"{median(values):.0f} ({least[name]:.0f})" for name, values in times.items()),
        f"{least['SDPA'] / least['cpp']:.2f}",
        f"{least['torch'] / least['cpp']:.1f}",
        f"{memory:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def check(request: MapRequest) -> None:
    """Exit unless the operator agrees with the float64 specification on one head."""
    reason = unsupported(request)
    if reason is not None:
        sys.exit(reason)
    one = request._replace(q=request.q[:1, :1], k=request.k[:1, :1])
    expected = block_sums_torch(one._replace(q=one.q.double(), k=one.k.double()))
    error = ((block_sums_cpu(one) - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE:
        sys.exit(f"{tuple(request.q.shape)}: relative error {error:.3g}; nothing was timed")


if __name__ == "__main__":
    main()
