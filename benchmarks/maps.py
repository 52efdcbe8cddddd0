"""Attention maps, and the switch that follows: correctness first, then time.

    python benchmarks/maps.py --out benchmarks/results/DATE-DEVICE-maps.md
    python benchmarks/maps.py --tune          # on a GPU: other launch configurations too

On the GPU if there is one. Every round times every implementation once, so that other work on the
machine hits all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cpu_attention import peak_mib
from layouts import spion_like_mask
from timing import eager_ms, machine_lines, peak_megabytes, synchronize
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spion_ds.attention import SparseSelfAttention
from spion_ds.attention.map_dispatch import block_sums
from spion_ds.attention.map_request import MapRequest
from spion_ds.attention.streaming_maps import block_sums_torch
from spion_ds.patterns import DistanceRule, pattern_from_pooled
from spion_ds.sparsity import SpionSparsityConfig
from spion_ds.switching import DenseToSparse

# Some ten roundings of float32 an entry, of which a block averages many.
TOLERANCE = 1e-6
FILTER_SIZE = 31


@dataclass(frozen=True)
class Setting:
    """A row of the table: batch, heads, tokens, head_dim; block, 1 for no pooling; dtype."""

    shape: tuple[int, int, int, int]
    block: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{','.join(map(str, self.shape))} | {self.block} | {str(self.dtype)[6:]}"


CPU_SETTINGS = [
    Setting((8, 2, 2048, 32), 64, torch.float32),
    Setting((8, 2, 2048, 32), 16, torch.float32),
    Setting((16, 2, 1024, 32), 32, torch.float32),
    Setting((2, 8, 2048, 64), 64, torch.float32),
    Setting((2, 8, 2048, 64), 64, torch.bfloat16),
    Setting((1, 2, 8192, 64), 64, torch.float32),
    Setting((16, 2, 1024, 32), 1, torch.float32),
]
GPU_SETTINGS = [
    Setting((2, 8, 16384, 64), 64, torch.bfloat16),
    Setting((1, 8, 65536, 64), 64, torch.bfloat16),
    Setting((2, 8, 16384, 128), 64, torch.bfloat16),
    Setting((2, 8, 16384, 64), 32, torch.bfloat16),
    Setting((32, 2, 4096, 32), 64, torch.bfloat16),
    Setting((256, 2, 2048, 32), 1, torch.bfloat16),
]
# Tokens, block, filter, causal, padding: what the two paths of a backend must get right.
GATE = [
    (1024, 64, FILTER_SIZE, False, False),
    (1024, 64, 1, False, True),
    (1152, 128, FILTER_SIZE, True, False),
    (997, 64, FILTER_SIZE, True, True),
    (800, 16, FILTER_SIZE, False, True),
    (997, 1, 1, False, True),
]
MAPS = (
    "| shape | block | dtype | dense ms | map ms | no filter ms | map / dense | no filter / dense"
)
MAPS += " | a map a head ms | a head / map | torch / map | MiB |"
SWITCH = "| device | layers | n | variant | ms |"
LAYERS, BLOCKS = 24, 1024


def main() -> None:
    """Check, time, print the tables, and write them as a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of a row (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tune", action="store_true", help="time other tiles of the GPU kernels")
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    for case in GATE:
        gate(device, *case)
    settings = GPU_SETTINGS if device.type == "cuda" else CPU_SETTINGS
    rows = (measure(setting, device, arguments.rounds) for setting in settings)
    maps = printed(MAPS, rows)
    tuned = printed(TUNE, tune(arguments.rounds)) if arguments.tune else []
    switch = printed(SWITCH, switches(device, arguments.rounds))
    if arguments.out is not None:
        arguments.out.write_text(page(maps, tuned, switch, arguments.rounds), encoding="utf-8")


def printed(header: str, rows: Sequence[str] | object) -> list[str]:
    """Print a table while it is made; return its lines."""
    lines = [header, "|" + " --- |" * (header.count("|") - 1)]
    print("\n".join(lines), flush=True)
    for row in rows:  # type: ignore[attr-defined]
        lines.append(row)
        print(row, flush=True)
    return lines


def page(maps: list[str], tuned: list[str], switch: list[str], rounds: int) -> str:
    """Return the page: what, where, how, tables."""
    return "\n".join(
        [
            "# Attention maps, and the switch",
            "",
            *machine_lines(),
            f"Medians of {rounds} interleaved rounds, minima in brackets; ratios are of minima. "
            f"dense: the forward pass of scaled_dot_product_attention (on a GPU its flash "
            f"backend). map: pooled with a filter of {FILTER_SIZE}; with a block of 1 the "
            "token-level map. a map a head: one for each head. torch: the specification in "
            "the inputs' precision, with which each map was compared first; the float64 "
            f"specification was, on short maps, to a relative {TOLERANCE:.0e}. MiB: peak memory "
            "of map above its inputs.",
            "",
            *maps,
            "",
            *(["Launch configurations of the two kernels, with the filter.", "", *tuned, ""])
            * bool(tuned),
            "The switch, from the pooled maps of a check to layouts that attention can use, by the "
            "driver that training uses: the distance rule, thresholds and flood fill (or top-k), "
            "packing and broadcast, index lists of rows and columns.",
            "",
            *switch,
            "",
        ]
    )


def gate(
    device: torch.device, length: int, block: int, filter_size: int, causal: bool, padded: bool
) -> None:
    """Exit unless a short map agrees with the float64 specification."""
    draw = torch.Generator().manual_seed(length)
    q, k = (torch.randn((2, 2, length, 64), generator=draw) for _ in range(2))
    real = None
    if padded:
        real = torch.arange(length) < torch.tensor([[length - 100], [length]])
    weights = torch.rand(length, generator=draw, dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        q, k = q.to(dtype), k.to(dtype)
        request = MapRequest(q, k, weights, real, causal, 0.3, block, filter_size)
        expected = block_sums_torch(request._replace(q=q.double(), k=k.double()))
        request = MapRequest(*(x.to(device) if isinstance(x, Tensor) else x for x in request))
        compare(request, block_sums(request).cpu(), expected)


def compare(request: MapRequest, found: Tensor, expected: Tensor) -> None:
    """Exit unless two maps agree."""
    error = ((found - expected).norm() / expected.norm()).item()
    if not error < TOLERANCE:
        sys.exit(
            f"{tuple(request.q.shape)} {request.q.dtype}, block {request.block}, filter "
            f"{request.filter_size}: relative error {error:.3g}; nothing was timed"
        )


def requests_of(setting: Setting, device: torch.device) -> tuple[MapRequest, Tensor]:
    """Return a map with the filter, and values for the dense forward pass."""
    draw = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(setting.shape, generator=draw, device=device).to(setting.dtype)
        for _ in range(3)
    )
    batch, heads, length, head_dim = setting.shape
    weights = torch.full((length,), 1 / (batch * heads), dtype=torch.float64, device=device)
    scale, filter_size = head_dim**-0.5, 1 if setting.block == 1 else FILTER_SIZE
    return MapRequest(q, k, weights, None, False, scale, setting.block, filter_size), v


def dense_forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return dense attention; on a GPU by the flash backend."""
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v)


def once_ms(run: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of a run; on a GPU the median of some that take 0.15 s."""
    if device.type == "cuda":
        return eager_ms(run)
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def rounds_ms(
    runs: dict[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Return the times of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(once_ms(run, device))
    return times


def shown(times: list[float]) -> str:
    """Return median and minimum."""
    digits = 0 if min(times) >= 20 else 2
    return f"{median(times):.{digits}f} ({min(times):.{digits}f})"


def measure(setting: Setting, device: torch.device, rounds: int) -> str:
    """Return the first table's line for a setting."""
    request, v = requests_of(setting, device)
    plain, heads = request._replace(filter_size=1), request._replace(per_head=True)
    with torch.no_grad():
        expected = block_sums_torch(request)
        compare(request, block_sums(request), expected)
        compare(heads, block_sums(heads).sum(dim=0), expected)
        runs: dict[str, Callable[[], object]] = {
            "dense": lambda: dense_forward(request.q, request.k, v),
            "map": lambda: block_sums(request),
            "no filter": lambda: block_sums(plain),
            "a head": lambda: block_sums(heads),
        }
        memory = (peak_megabytes if device.type == "cuda" else peak_mib)(runs["map"])
        times = rounds_ms(runs, device, rounds)
        start = time.perf_counter()
        block_sums_torch(request).cpu()
        torch_ms = (time.perf_counter() - start) * 1e3
    least = {name: min(values) for name, values in times.items()}
    cells = [
        str(setting),
        *(shown(times[name]) for name in ("dense", "map", "no filter")),
        *(f"{least[name] / least['dense']:.2f}" for name in ("map", "no filter")),
        shown(times["a head"]),
        f"{least['a head'] / least['map']:.2f}",
        f"{torch_ms / least['map']:.0f}",
        f"{memory:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


TUNE = "| shape | kernel | rows | columns | pieces | warps | stages | registers | map ms |"


def tune(rounds: int) -> list[str]:
    """Yield the times of other launch configurations, one kernel's at a time."""
    from spion_ds.attention.triton import maps as triton_maps
    from spion_ds.attention.triton.maps import MapTiles

    softmax = [(128, 64, 1, 8, 3), (128, 128, 1, 8, 3), (128, 64, 1, 4, 3), (64, 64, 1, 4, 3)]
    tile = [
        MapTiles(128, 64, 2, 8, 3),
        MapTiles(128, 64, 2, 8, 3, 128),
        MapTiles(64, 64, 2, 4, 3),
        MapTiles(64, 64, 2, 4, 3, 168),
        MapTiles(128, 64, 1, 8, 3),
        MapTiles(128, 128, 1, 8, 3),
        MapTiles(128, 64, 1, 4, 3, 168),
        MapTiles(64, 64, 1, 4, 3),
    ]
    chosen = triton_maps.choose_tiles
    rows = []
    try:
        for setting in GPU_SETTINGS[:2]:
            request, _ = requests_of(setting, torch.device("cuda"))
            expected = block_sums(request)
            first, second = chosen(request.q)
            pairs = [("softmax", MapTiles(*s), (MapTiles(*s), second)) for s in softmax]
            pairs += [("tile", t, (first, t)) for t in tile]
            for kernel, varied, tiles in pairs:
                triton_maps.choose_tiles = lambda _, tiles=tiles: tiles
                compare(request, block_sums(request), expected)
                run = {"map": lambda request=request: block_sums(request)}
                times = rounds_ms(run, request.q.device, rounds)["map"]
                cells = [",".join(map(str, setting.shape)), kernel, *map(str, varied)]
                rows.append(f"| {' | '.join(cells)} | {shown(times)} |")
                print(rows[-1], file=sys.stderr, flush=True)
    finally:
        triton_maps.choose_tiles = chosen
    return rows


def switches(device: torch.device, rounds: int) -> list[str]:
    """Return the lines of the switch, one a variant."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        return [switch(device, variant, rounds) for variant in ("cf", "c")]
    finally:
        dist.destroy_process_group()


def switch(device: torch.device, variant: str, rounds: int) -> str:
    """Return the line of a variant; exit unless its masks are those that the CPU makes."""
    block, length = 64, 64 * BLOCKS
    pooled = [attention_like_map(layer) for layer in range(LAYERS)]
    configs = [SpionSparsityConfig(8, block, variant=variant, alpha=0.98) for _ in pooled]
    attentions = [SparseSelfAttention(config) for config in configs]
    model = nn.ModuleList(attentions)
    sources = [layer.to(device) for layer in pooled]
    q = torch.randn(1, 8, length, 16, device=device)
    seconds = []
    for _ in range(rounds + 1):  # the first compiles
        for attention in attentions:
            attention.set_mask(None)
        switch = DenseToSparse(
            model, DistanceRule(), check_every=1, max_dense_steps=2, sources=lambda: sources
        )
        for number in (1, 2):  # at the second the rule has maps to compare with
            with switch.step(number) as look:
                look.by_hand()
                for layer in range(LAYERS):
                    look.add(layer, q, q)
                synchronize(device)
        assert look.event is not None
        seconds.append(look.event.seconds * 1e3)
    masks = switch.masks or []
    for config, layer, mask in zip(configs, pooled, masks, strict=True):
        if not torch.equal(
            pattern_from_pooled(layer, variant, alpha=config.alpha, density=config.density), mask
        ):
            sys.exit(f"the {variant} mask made on {device} is not the one made on the CPU")
    cells = [str(device), str(LAYERS), str(BLOCKS), variant, shown(seconds[1:])]
    return f"| {' | '.join(cells)} |"


def attention_like_map(seed: int) -> Tensor:
    """Return an (n, n) float64 map with a diagonal, hot columns and noise."""
    draw = torch.Generator().manual_seed(seed)
    kept = spion_like_mask(BLOCKS, 0.05, seed=seed).to(torch.float64)
    return torch.rand((BLOCKS, BLOCKS), generator=draw, dtype=torch.float64) * (0.1 + kept)


if __name__ == "__main__":
    main()
