"""Time every launch configuration of the Triton kernels, and print the fastest as a table.

    python benchmarks/tune_tiles.py

The table goes into spion_ds/attention/triton/tiles.py by hand, after a look at the margins: a
configuration that wins by less than two runs differ is no reason to change. Compiles on all cores.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import sys
from dataclasses import dataclass
from typing import Any

import torch
from layouts import spion_like_mask
from timing import graph_ms, machine_lines

from spion_ds.attention import BlockLayout, block_sparse_attention
from spion_ds.attention.triton import backend as triton_backend
from spion_ds.attention.triton.tiles import TABLE, Tiles

# Forward; backward by rows, by columns, and by both in one launch.
KERNELS = ("fwd", "dq", "dkv", "both")
# Batch, heads and tokens that fill a GPU, and a density, by head_dim.
SIZES = {32: (64, 2, 2048, 0.045), 64: (2, 8, 16384, 0.10), 128: (2, 8, 8192, 0.10)}
SIZES[256] = (1, 8, 4096, 0.10)


@dataclass(frozen=True)
class Job:
    """One configuration for all kernels."""

    head_dim: int
    block: int
    tiles: Tiles


def candidates(head_dim: int, block: int) -> list[Tiles]:
    """Return configurations whose accumulators and tiles can fit a multiprocessor."""
    found = []
    for own, tile, warps, stages in itertools.product(
        (16, 32, 64, 128), (16, 32, 64, 128), (1, 2, 4, 8), (1, 2, 3)
    ):
        registers = own * (head_dim * 2 + tile * 2) // (warps * 32)
        shared = (own * 2 + tile * 2 * stages) * head_dim * 2
        useful = own <= block and 8 * warps <= own and tile <= max(2 * block, 32)
        if useful and registers <= 256 and shared <= 200_000:
            found.append(Tiles(own, tile, warps, stages))
    return found


def inputs_of(job: Job, small: bool) -> tuple[list[torch.Tensor], torch.Tensor, BlockLayout]:
    """Return q, k, v, an output gradient and a layout, on the GPU in bf16."""
    batch, heads, tokens, density = (1, 1, 512, 0.5) if small else SIZES[job.head_dim]
    shape = (batch, heads, tokens, job.head_dim)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    qkv = [x.requires_grad_() for x in tensors[:3]]
    mask = spion_like_mask(tokens // job.block, density)
    return qkv, tensors[3], BlockLayout.from_mask(mask, job.block).to("cuda")


def launches_of(job: Job, small: bool = False) -> list[tuple[Any, ...]]:
    """Run forward and backward in both ways; return the launches' arguments, as in KERNELS."""
    made: list[tuple[Any, ...]] = []
    names = ("launch", "choose_tiles", "find_tiles", "operators_available")
    originals = [getattr(triton_backend, name) for name in names]

    def record(*arguments: Any) -> None:
        made.append(arguments)
        originals[0](*arguments)

    triton_backend.launch = record
    triton_backend.choose_tiles = lambda *_: job.tiles
    # Launches that are repeated in C++ would not come by here.
    triton_backend.operators_available = lambda: False
    try:
        qkv, grad, layout = inputs_of(job, small)
        for both in (None, job.tiles):
            triton_backend.find_tiles = lambda *_, both=both: both
            out = block_sparse_attention(*qkv, layout, backend="triton")
            torch.autograd.grad(out, qkv, grad)
        torch.cuda.synchronize()
    finally:
        for name, original in zip(names, originals, strict=True):
            setattr(triton_backend, name, original)
    return [*made[:3], made[4]]


def compile_job(job: Job) -> str | None:
    """Compile into Triton's cache on disk; return what went wrong, None if nothing did."""
    try:
        launches_of(job, small=True)
    except Exception as error:  # a configuration that does not fit is one to leave out
        return f"{job}: {str(error).splitlines()[0][:80]}"
    return None


def main() -> int:
    """Compile, time, print; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head_dim", type=int, nargs="*", default=list(TABLE["fwd"]))
    parser.add_argument("--block", type=int, nargs="*", default=[16, 32, 64, 128])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: tuning needs a CUDA device", file=sys.stderr)
        return 2
    print("\n".join(machine_lines()))
    pairs = list(itertools.product(options.head_dim, options.block))
    jobs = [Job(*pair, tiles) for pair in pairs for tiles in candidates(*pair)]
    with concurrent.futures.ProcessPoolExecutor(
        mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        failed = [text for text in pool.map(compile_job, jobs) if text is not None]
    print(f"{len(jobs)} configurations, {len(failed)} do not compile")
    for head_dim, block in pairs:
        times: dict[str, list[tuple[float, Tiles]]] = {name: [] for name in KERNELS}
        for job in jobs:
            if (job.head_dim, job.block) != (head_dim, block):
                continue
            try:
                launches = launches_of(job)
            except Exception as error:
                print(f"{job}: {str(error).splitlines()[0][:80]}")
                continue
            for name, arguments in zip(KERNELS, launches, strict=True):
                ms = graph_ms(lambda arguments=arguments: triton_backend.launch(*arguments))
                times[name].append((ms, job.tiles))
        for name in KERNELS:
            best = sorted(times[name])[:3]
            shown = "  ".join(f"{ms:.4f} {tuple(tiles)}" for ms, tiles in best)
            print(f"head_dim {head_dim} block {block} {name:4} {shown}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
