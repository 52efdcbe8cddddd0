"""Times what ranks tell one another at a check and in a step; benchmarks/scaling.py starts it.

    torchrun --nproc_per_node 2 benchmarks/collectives.py --length 2048 --block 64 --layers 4 \
        --parameters 200000 --out collectives.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from timing import synchronize

from spion_ds.distributed.agreement import Agreement
from spion_ds.distributed.process_group import discover_ranks, end_process, join, leave

ROUNDS, WARM_UP = 10, 3
# Beside the bits of the masks the coordinator's message has a status and a digest.
_HEAD_BYTES = 33


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median over rounds of the slowest rank's seconds."""
    taken = []
    for _ in range(WARM_UP + ROUNDS):
        synchronize(device)
        dist.barrier()
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        mine = torch.tensor(time.perf_counter() - began, dtype=torch.float64, device=device)
        dist.all_reduce(mine, op=dist.ReduceOp.MAX)
        taken.append(mine.item())
    return statistics.median(taken[WARM_UP:])


def measure(length: int, block: int, layers: int, parameters: int) -> dict[str, float]:
    """Return the seconds of each collective, by name.

    The maps are float64 sums, as the coordinator reduces them, one after the other; the broadcast
    goes through the control channel (gloo); gradients are bfloat16, in one call.
    """
    device = discover_ranks().device
    agreement = Agreement()
    blocks = -(-length // block)
    token_map = torch.zeros(length, length, dtype=torch.float64, device=device)
    pooled = [torch.zeros(blocks, blocks, dtype=torch.float64, device=device)] * layers
    message = torch.zeros(_HEAD_BYTES + layers * -(-(blocks**2) // 8), dtype=torch.uint8)
    gradients = torch.zeros(parameters, dtype=torch.bfloat16, device=device)
    return {
        "reduce, one layer's token-level map": seconds(lambda: dist.reduce(token_map, 0), device),
        "reduce, all layers' pooled maps": seconds(
            lambda: [dist.reduce(each, 0) for each in pooled], device
        ),
        "broadcast of all masks": seconds(lambda: agreement.broadcast(message), device),
        "all-reduce of the gradients": seconds(lambda: dist.all_reduce(gradients), device),
    }


def main() -> int:
    """Measure and write; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("length", "block", "layers", "parameters"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    ranks = discover_ranks()
    join(ranks)
    found = measure(given.length, given.block, given.layers, given.parameters)
    if ranks.is_first:
        partial = given.out.with_name(f".{given.out.name}")
        partial.write_text(json.dumps(found, indent=1) + "\n")
        partial.replace(given.out)
    leave()
    return 0


if __name__ == "__main__":
    end_process(main())
