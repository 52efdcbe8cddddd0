"""How the benchmarks time and describe: medians, graph replays, peak memory, the machine."""

from __future__ import annotations

import platform
import shlex
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch


def machine_lines() -> list[str]:
    """Return the lines that a results page opens with: date, device, versions, command."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = f"Python {platform.python_version()}, PyTorch {torch.__version__}"
    if torch.version.cuda:
        versions += f", CUDA {torch.version.cuda}"
    try:
        import triton

        versions += f", Triton {triton.__version__}"
    except ImportError:
        pass
    command = shlex.join(["python", *sys.argv])
    return [f"{date.today()} · {device} · {versions}", "", f"    {command}", ""]


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def eager_ms(run: Callable[[], object], seconds: float = 0.15) -> float:
    """Return the median milliseconds of ``run`` on the GPU, as a program that calls it sees them.

    The level-2 cache is overwritten before each call; launches that come too late count.
    """
    from triton.testing import do_bench

    return do_bench(run, warmup=25, rep=int(1000 * seconds), return_mode="median")


def graph_ms(run: Callable[[], object], calls: int = 10) -> float:
    """Return the median milliseconds of one of ``calls`` runs replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times[2:])


def peak_megabytes(run: Callable[[], object]) -> float:
    """Return how much more GPU memory than before ``run`` holds at its peak."""
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _processor() -> str:
    """Return the processor's name, its threads in use and its instruction set."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = names[0].split(":", 1)[1].strip() if names else name
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
