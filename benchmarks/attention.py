"""Block-sparse attention on a GPU against dense and sparse peers: first correct, then timed.

    python benchmarks/attention.py --out benchmarks/results/DATE-DEVICE-attention.md

Forward + backward in bf16. "limit" is density times the fastest dense time of the same shape.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from layouts import spion_like_mask
from timing import eager_ms, graph_ms, machine_lines, peak_megabytes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from spion_ds.attention import BlockLayout, block_sparse_attention

# Relative error against the reference in float64 that a backend may have in bf16.
TOLERANCE = 1e-2
# Bytes a second of the memory floor: what a large copy moves on an H100.
MEMORY_RATE = 3.0e12


@dataclass(frozen=True)
class Shape:
    """B, H, L, D of a timing, the block, and the densities."""

    batch: int
    heads: int
    length: int
    head_dim: int
    block: int
    densities: tuple[float, ...]
    name: str = ""

    def __str__(self) -> str:
        sizes = f"{self.batch},{self.heads},{self.length},{self.head_dim}"
        return f"{self.name} {sizes}".strip()

    def flops(self, density: float) -> float:
        """Return the operations of forward (2 products) and backward (5) over kept entries."""
        return 14.0 * self.batch * self.heads * self.length**2 * self.head_dim * density

    @property
    def floor_ms(self) -> float:
        """Time to read q, k, v, out and dO and write out, dq, dk, dv (reads twice) in bf16."""
        return 12 * 2 * self.batch * self.heads * self.length * self.head_dim / MEMORY_RATE * 1e3


THREE = (0.25, 0.10, 0.05)
SHAPES = [
    *(
        Shape(*sizes, block, THREE)
        for sizes in ((2, 8, 16384, 64), (2, 8, 16384, 128), (8, 8, 4096, 64))
        for block in (64, 128)
    ),
    Shape(2, 8, 16384, 64, 32, THREE),
    Shape(2, 8, 16384, 64, 16, THREE),
    Shape(128, 2, 1024, 32, 32, (0.055,), "image"),
    Shape(64, 2, 2048, 32, 64, (0.045,), "listops"),
    Shape(32, 2, 4096, 32, 64, (0.023,), "retrieval"),
]


def draw(shape: Shape) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v that need gradients, and an output gradient, all random bf16."""
    sizes = (shape.batch, shape.heads, shape.length, shape.head_dim)
    inputs = [
        torch.randn(sizes, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    return inputs, torch.randn(sizes, device="cuda", dtype=torch.bfloat16)


def step(attend: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    out = attend(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def gate(shape: Shape, density: float, backend: str) -> float:
    """Return the largest relative error of out, dQ, dK, dV on a short sequence of odd length.

    Raises:
        SystemExit: it is above the tolerance, so timing it would mean nothing.
    """
    blocks = 1024 // shape.block
    length = blocks * shape.block - 3
    small = Shape(1, 2, length, shape.head_dim, shape.block, (density,))
    layout = BlockLayout.from_mask(spion_like_mask(blocks, density), shape.block).to("cuda")
    inputs, grad = draw(small)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours = step(
        lambda q, k, v: block_sparse_attention(q, k, v, layout, backend=backend), inputs, grad
    )
    theirs = step(
        lambda q, k, v: block_sparse_attention(q, k, v, layout, backend="reference"),
        exact,
        grad.double(),
    )
    error = max(
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, theirs, strict=True)
    )
    if not error < TOLERANCE:
        raise SystemExit(f"{shape}, block {shape.block}, density {density}: error {error:.1e}")
    return error


def time_dense(shape: Shape) -> dict[str, tuple[float, float, float]]:
    """Return (eager ms, graph ms, peak MB) of each dense peer that runs here."""
    inputs, grad = draw(shape)
    results = {}
    for name, backend in (
        ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("SDPA flash", SDPBackend.FLASH_ATTENTION),
    ):

        def run(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                step(F.scaled_dot_product_attention, inputs, grad)

        results[name] = (eager_ms(run), graph_ms(run), peak_megabytes(run))
    attend = flash_attention_4()
    if attend is not None:

        def run_4() -> None:
            step(attend, inputs, grad)

        results["FlashAttention-4"] = (eager_ms(run_4), float("nan"), peak_megabytes(run_4))
    return results


def flash_attention_4() -> Callable[..., Tensor] | None:
    """Return dense FlashAttention-4 on (B, H, L, D), None where its package is missing."""
    try:
        from flash_attn.cute import flash_attn_func
    except ImportError:
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return attend


def time_flex(shape: Shape, mask: Tensor) -> float | str:
    """Return FlexAttention's eager ms, or why there is none."""
    if shape.block < 128:
        return "no backward"
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    counts = mask.sum(dim=1, dtype=torch.int32)
    order = mask.int().argsort(dim=1, descending=True, stable=True).to(torch.int32)
    block_mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts)[None, None].cuda(),
        torch.zeros_like(order)[None, None].cuda(),
        counts[None, None].cuda(),
        order[None, None].cuda(),
        BLOCK_SIZE=shape.block,
        seq_lengths=(shape.length, shape.length),
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    inputs, grad = draw(shape)

    def run() -> None:
        step(lambda q, k, v: compiled(q, k, v, block_mask=block_mask), inputs, grad)

    try:
        return eager_ms(run)
    except Exception as error:  # a peer that fails is reported, not fatal
        return f"failed: {str(error).splitlines()[0][:40]}"


def time_ours(shape: Shape, mask: Tensor, backend: str) -> tuple[float, float, float]:
    """Return (eager ms, graph ms, peak MB)."""
    layout = BlockLayout.from_mask(mask, shape.block).to("cuda")
    inputs, grad = draw(shape)

    def run() -> None:
        step(lambda q, k, v: block_sparse_attention(q, k, v, layout, backend=backend), inputs, grad)

    return eager_ms(run), graph_ms(run), peak_megabytes(run)


def rows_of(
    shape: Shape, dense: dict[str, tuple[float, float, float]], backend: str, flex: bool
) -> list[str]:
    """Return the table rows of one shape and block."""
    fastest = min(eager for eager, _, _ in dense.values())
    cudnn, flash_mb = dense["SDPA cuDNN"][0], dense["SDPA flash"][2]
    rows = []
    for density in shape.densities:
        error = gate(shape, density, backend)
        mask = spion_like_mask(shape.length // shape.block, density)
        kept = mask.double().mean().item()
        eager, graph, memory = time_ours(shape, mask, backend)
        peer = time_flex(shape, mask) if flex else "not run"
        peer = f"{peer:.3f}" if isinstance(peer, float) else peer
        cells = [
            f"{shape}",
            f"{shape.block}",
            f"{kept:.3f}",
            f"{cudnn:.3f}",
            f"{dense['SDPA flash'][0]:.3f}",
            peer,
            f"{eager:.3f}",
            f"{graph:.3f}",
            f"{eager / cudnn:.3f}",
            f"{graph / cudnn:.3f}",
            f"{graph / (kept * fastest):.2f}",
            f"{graph / shape.floor_ms:.2f}",
            f"{shape.flops(kept) / graph / 1e9:.0f}",
            f"{memory / flash_mb:.2f}",
            f"{error:.0e}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
        print(rows[-1], flush=True)
    return rows


HEADER = [
    "| B,H,L,D | block | density | cuDNN ms | flash ms | Flex ms | ours eager ms | ours graph ms "
    "| eager / cuDNN | graph / cuDNN | graph / limit | graph / floor | TFLOP/s | memory / flash "
    "| error |",
    "| --- " * 15 + "|",
]


def main() -> int:
    """Run the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    parser.add_argument("--only", default="", help="only shapes whose text contains this")
    parser.add_argument("--backend", default="triton", help="of block_sparse_attention")
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too (compiles)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    lines = ["# Block-sparse attention, forward + backward, bf16", "", *machine_lines(), *HEADER]
    print("\n".join(lines))
    dense: dict[tuple[int, ...], dict[str, tuple[float, float, float]]] = {}
    for shape in SHAPES:
        if options.only not in f"{shape} block {shape.block}":
            continue
        key = (shape.batch, shape.heads, shape.length, shape.head_dim)
        if key not in dense:
            dense[key] = time_dense(shape)
        lines += rows_of(shape, dense[key], options.backend, options.flex)
        gc.collect()
        torch.cuda.empty_cache()
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
