"""Block-sparse attention on a GPU against dense and sparse peers: first correct, then timed.

    python benchmarks/attention.py --out benchmarks/results/DATE-DEVICE-attention.md

    python benchmarks/attention.py --flex     # FlexAttention too: a compilation for each shape
    python benchmarks/attention.py --backend triton     # these kernels, whatever "auto" takes

Forward + backward in bf16. On a Hopper GPU the Hopper kernels are compiled first, in minutes, if
they were not before. What the columns mean stands under the table.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from layouts import spion_like_mask
from timing import eager_ms, graph_ms, machine_lines, peak_megabytes
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from spion_ds.attention import BlockLayout, block_sparse_attention
from spion_ds.attention.functional import BACKENDS, choose_backend
from spion_ds.attention.hopper import backend as hopper_backend
from spion_ds.attention.options import AttentionOptions
from spion_ds.errors import ConfigError

# Relative error against the reference in float64 that a backend may have in bf16. Two backends
# that are each within a third of it, as they are, differ by less.
TOLERANCE = 1e-2
# Bytes a second of the memory floor: what a large copy moves on an H100.
MEMORY_RATE = 3.0e12


@dataclass(frozen=True)
class Shape:
    """B, H, L, D of a timing, the block, and by density what a row is to reach at most."""

    batch: int
    heads: int
    length: int
    head_dim: int
    block: int
    goals: dict[float, dict[str, float]]
    name: str = ""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, H, L, D."""
        return self.batch, self.heads, self.length, self.head_dim

    def __str__(self) -> str:
        return f"{self.name} {','.join(map(str, self.sizes))}".strip()

    def flops(self, density: float) -> float:
        """Return the operations of forward (2 products) and backward (5) over kept entries."""
        return 14.0 * self.batch * self.heads * self.length**2 * self.head_dim * density

    @property
    def floor_ms(self) -> float:
        """Time to read q, k, v, out and dO and write out, dq, dk, dv (reads twice) in bf16."""
        return 12 * 2 * self.batch * self.heads * self.length * self.head_dim / MEMORY_RATE * 1e3


# Names of the ratios that goals are set for: columns of the table.
EAGER, GRAPH = "eager / cuDNN", "graph / cuDNN"
FLOOR, BLOCK_64 = "graph / floor", "graph / block 64"


def of_three(goal: str, *most: float) -> dict[float, dict[str, float]]:
    """Return one goal for each of the three densities."""
    return {density: {goal: x} for density, x in zip((0.25, 0.10, 0.05), most, strict=True)}


SHAPES = [
    *(
        Shape(*sizes, block, goals)
        for sizes, goals in (
            ((2, 8, 16384, 64), of_three(GRAPH, 0.26, 0.097, 0.066)),
            ((2, 8, 16384, 128), of_three(GRAPH, 0.27, 0.105, 0.074)),
            ((8, 8, 4096, 64), of_three(GRAPH, 0.28, 0.155, 0.11)),
        )
        for block in (64, 128)
    ),
    Shape(2, 8, 16384, 64, 32, of_three(BLOCK_64, 1.5, 1.5, 1.5)),
    Shape(2, 8, 16384, 64, 16, of_three(BLOCK_64, 2.5, 2.5, 2.5)),
    Shape(128, 2, 1024, 32, 32, {0.055: {FLOOR: 1.7, EAGER: 0.5}}, "image"),
    Shape(64, 2, 2048, 32, 64, {0.045: {FLOOR: 1.7, EAGER: 0.2}}, "listops"),
    Shape(32, 2, 4096, 32, 64, {0.023: {FLOOR: 1.7, EAGER: 0.1}}, "retrieval"),
]


@dataclass(frozen=True)
class Times:
    """Milliseconds a step, eager and replayed from a CUDA graph, and peak MB; NaN is unknown."""

    eager: float = math.nan
    graph: float = math.nan
    memory: float = math.nan


def build_hopper_kernels(backend: str) -> None:
    """Load the Hopper kernels where they may be timed, compiling them if need be.

    Raises:
        SystemExit: the benchmark is of them, and they cannot be had.
    """
    if backend not in ("auto", "hopper") or not hopper_backend.is_hopper(torch.device("cuda")):
        return
    print("loading the Hopper kernels", file=sys.stderr, flush=True)
    try:
        hopper_backend.load()
    except ConfigError as error:
        if backend == "hopper":
            raise SystemExit(f"error: {error}") from error
        print(f'"auto" is without them: {error}', file=sys.stderr, flush=True)


def kernels_of(shape: Shape, mask: Tensor, backend: str) -> str:
    """Return the backend that a timing uses: ``backend``, or what "auto" takes."""
    if backend != "auto":
        return backend
    q = torch.empty(shape.sizes, device="cuda", dtype=torch.bfloat16)
    options = AttentionOptions(None, False, shape.head_dim**-0.5, "zero", 0.0, None, False)
    return choose_backend(q, BlockLayout.from_mask(mask, shape.block).to("cuda"), options)


def draw(shape: Shape) -> tuple[list[Tensor], Tensor]:
    """Return q, k, v that need gradients, and an output gradient, all random bf16."""
    inputs = [
        torch.randn(shape.sizes, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]
    return inputs, torch.randn(shape.sizes, device="cuda", dtype=torch.bfloat16)


def step(attend: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    out = attend(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def largest_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest relative error of out, dQ, dK, dV; NaN if one has a NaN."""
    errors = [
        (a.double() - b.double()).norm() / b.double().norm()
        for a, b in zip(found, expected, strict=True)
    ]
    return torch.stack(errors).max().item()


def gate(shape: Shape, density: float, backend: str) -> float:
    """Return the largest relative error of out, dQ, dK, dV on a short sequence of odd length.

    Raises:
        SystemExit: it is above the tolerance, so timing it would mean nothing.
    """
    blocks = 1024 // shape.block
    length = blocks * shape.block - 3
    small = Shape(1, 2, length, shape.head_dim, shape.block, {})
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
    error = largest_error(ours, theirs)
    if not error < TOLERANCE:
        raise SystemExit(f"{shape}, block {shape.block}, density {density}: error {error:.1e}")
    return error


def failed(name: str, error: Exception) -> str:
    """Say which peer failed, and return it for the table: a peer's failure is not fatal."""
    said = (str(error) or type(error).__name__).splitlines()[0]
    print(f"{name} failed: {said}", file=sys.stderr, flush=True)
    return "failed"


def time_dense(shape: Shape) -> dict[str, Times]:
    """Return eager time and memory of the dense peers; NaN for SDPA's that do not run here."""
    inputs, grad = draw(shape)
    results = {}
    for name, backend in (
        ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("SDPA flash", SDPBackend.FLASH_ATTENTION),
    ):

        def run(backend: SDPBackend = backend) -> None:
            with sdpa_kernel(backend):
                step(F.scaled_dot_product_attention, inputs, grad)

        try:
            results[name] = Times(eager_ms(run), memory=peak_megabytes(run))
        except Exception as error:
            failed(f"{shape}: {name}", error)
            results[name] = Times()
    attend = flash_attention_4()
    if attend is not None:
        try:
            results["FlashAttention-4"] = Times(eager_ms(lambda: step(attend, inputs, grad)))
        except Exception as error:
            failed(f"{shape}: FlashAttention-4", error)
    return results


def host_ms() -> float:
    """Return the milliseconds of a step that leaves the GPU idle: what PyTorch costs the host."""
    inputs, grad = draw(Shape(1, 1, 64, 32, 64, {}))

    def run() -> None:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            step(F.scaled_dot_product_attention, inputs, grad)

    return eager_ms(run)


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


class Flex:
    """FlexAttention for the layouts of one shape and block, compiled once for all of them."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        # Beyond a few shapes of a function PyTorch stops compiling it, and runs it unfused.
        torch.compiler.reset()
        self._attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def cells(self, mask: Tensor, backend: str) -> tuple[str, str]:
        """Return its eager and graph milliseconds for a layout, or why there are none.

        It is timed only if it agrees with ``backend`` on this layout.
        """
        name = f"{self.shape}, block {self.shape.block}: FlexAttention"
        try:
            run, error = self._checked(mask, backend)
            if not error < TOLERANCE:
                print(f"{name}: relative difference {error:.1e}", file=sys.stderr, flush=True)
                return f"differs by {error:.0e}", "–"
            eager = f"{eager_ms(run):.3f}"
        except Exception as error:
            return failed(name, error), "–"
        try:
            return eager, f"{graph_ms(run):.3f}"
        except Exception as error:
            return eager, failed(f"{name}'s CUDA graph", error)

    def _checked(self, mask: Tensor, backend: str) -> tuple[Callable[[], object], float]:
        """Return a step of it, and how far its results are from ours."""
        inputs, grad = draw(self.shape)
        kept = self._block_mask(mask)
        layout = BlockLayout.from_mask(mask, self.shape.block).to("cuda")

        def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attend(q, k, v, block_mask=kept)

        def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Its softmax runs over the kept keys alone.
            return block_sparse_attention(q, k, v, layout, pruned="excluded", backend=backend)

        error = largest_error(step(theirs, inputs, grad), step(ours, inputs, grad))
        return lambda: step(theirs, inputs, grad), error

    def _block_mask(self, mask: Tensor) -> BlockMask:
        """Return a layout of whole blocks; its tensors' sizes do not depend on the density."""
        mask = mask.cuda()
        counts = mask.sum(dim=1, dtype=torch.int32)[None, None]
        order = mask.int().argsort(dim=1, descending=True, stable=True).to(torch.int32)[None, None]
        # It also makes the transposed lists, which the backward pass needs.
        return BlockMask.from_kv_blocks(
            torch.zeros_like(counts),
            torch.zeros_like(order),
            counts,
            order,
            BLOCK_SIZE=self.shape.block,
            seq_lengths=(self.shape.length, self.shape.length),
        )


def time_ours(shape: Shape, mask: Tensor, backend: str) -> Times:
    """Return the times of ``block_sparse_attention``."""
    layout = BlockLayout.from_mask(mask, shape.block).to("cuda")
    inputs, grad = draw(shape)

    def run() -> None:
        step(lambda q, k, v: block_sparse_attention(q, k, v, layout, backend=backend), inputs, grad)

    return Times(eager_ms(run), graph_ms(run), peak_megabytes(run))


@dataclass
class Table:
    """The rows, and what they are compared with.

    Attributes:
        backend: of ``block_sparse_attention``; "auto" is resolved for each row.
        with_flex: whether FlexAttention is timed.
        dense: times of the dense peers, by B, H, L, D.
        block_64: graph milliseconds at blocks of 64, by B, H, L, D and density.
    """

    backend: str
    with_flex: bool
    dense: dict[tuple[int, ...], dict[str, Times]] = field(default_factory=dict)
    block_64: dict[tuple[tuple[int, ...], float], float] = field(default_factory=dict)

    def rows(self, shape: Shape) -> list[str]:
        """Measure and print the rows of one shape and block; return them."""
        if shape.sizes not in self.dense:
            self.dense[shape.sizes] = time_dense(shape)
        flex = Flex(shape) if self.with_flex and shape.block >= 128 else None
        rows = []
        for density, goals in shape.goals.items():
            rows.append(self._row(shape, density, goals, flex))
            print(rows[-1], flush=True)
        return rows

    def _row(self, shape: Shape, density: float, goals: dict[str, float], flex: Flex | None) -> str:
        mask = spion_like_mask(shape.length // shape.block, density)
        kept = mask.double().mean().item()
        backend = kernels_of(shape, mask, self.backend)
        # By name: on the short sequence "auto" may take others.
        error = gate(shape, density, backend)
        ours = time_ours(shape, mask, backend)
        if shape.block == 64:
            self.block_64[shape.sizes, density] = ours.graph
        if flex is not None:
            flex_cells = flex.cells(mask, backend)
        else:
            flex_cells = ("no backward" if self.with_flex else "not run", "–")
        dense = self.dense[shape.sizes]
        cudnn, flash = dense["SDPA cuDNN"], dense["SDPA flash"]
        eagers = [times.eager for times in dense.values() if not math.isnan(times.eager)]
        ratios = {
            EAGER: ours.eager / cudnn.eager,
            GRAPH: ours.graph / cudnn.eager,
            "graph / limit": ours.graph / (kept * min(eagers, default=math.nan)),
            FLOOR: ours.graph / shape.floor_ms,
            BLOCK_64: ours.graph / self.block_64.get((shape.sizes, density), math.nan),
        }
        cells = [
            *(f"{shape}", f"{shape.block}", f"{kept:.3f}"),
            *(shown(x, 3) for x in (cudnn.eager, flash.eager)),
            *flex_cells,
            backend,
            *(shown(x, 3) for x in (ours.eager, ours.graph, ratios[EAGER], ratios[GRAPH])),
            *(shown(ratios[name], 2) for name in ("graph / limit", FLOOR, BLOCK_64)),
            goals_cell(goals, ratios),
            shown(shape.flops(kept) / ours.graph / 1e9, 0),
            shown(ours.memory / flash.memory, 2),
            f"{error:.0e}",
        ]
        return "| " + " | ".join(cells) + " |"


def shown(value: float, digits: int) -> str:
    """Return a number, or a dash where it is unknown."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def goals_cell(goals: dict[str, float], ratios: dict[str, float]) -> str:
    """Return what each goal is of, the most it allows, and whether it is met."""
    verdicts = []
    for name, most in goals.items():
        met = "unknown" if math.isnan(ratios[name]) else "met" if ratios[name] <= most else "missed"
        verdicts.append(f"{name} {most:g} {met}")
    return ", ".join(verdicts)


COLUMNS = [
    *("B,H,L,D", "block", "density", "cuDNN ms", "flash ms", "Flex ms", "Flex graph ms"),
    *("kernels", "ours eager ms", "ours graph ms", EAGER, GRAPH, "graph / limit", FLOOR, BLOCK_64),
    *("goal", "TFLOP/s", "memory / flash", "error"),
]
HEADER = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
LEGEND = [
    "Milliseconds of forward + backward in bf16, medians. eager: as a program that calls it sees "
    "it, with a cold level-2 cache; where the GPU needs less than the host, this is the host's "
    "time. graph: the same step replayed from a CUDA graph. cuDNN and flash: dense "
    "scaled_dot_product_attention with that backend, eager. Flex: FlexAttention with the same "
    "layout, timed only where output and gradients agree with ours to a relative "
    f"{TOLERANCE:.0e}; its backward pass does not compile for blocks under 128 (PyTorch 2.11). "
    'kernels: the backend that is timed as ours; unless --backend names one, what backend="auto" '
    "takes.",
    "",
    "Layouts: a diagonal, a few hot columns, random rest, shared by all heads; density is the "
    "share of blocks that are kept. limit: density times the fastest dense eager time of the shape "
    "(cuDNN, flash, and FlashAttention-4 where it is installed). floor: the time to read q, k and "
    "v twice, to write out and read it, to read dO and to write dq, dk and dv, at "
    f"{MEMORY_RATE / 1e12:g} TB/s, a large copy's speed on an H100. block 64: our graph time with "
    "blocks of 64 at the same shape and density. goal: the most that the ratio is to be. TFLOP/s: "
    "of the kept blocks' 2 + 5 products, in the graph time. memory: peak beyond inputs and output "
    "gradient, against flash's. error: the largest relative error of output and gradients against "
    "the float64 reference, on a short sequence of odd length with the same block, head_dim and "
    f"density; from {TOLERANCE:.0e} up nothing is timed.",
]


def main() -> int:
    """Run the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    parser.add_argument("--only", default="", help="only shapes whose text contains this")
    parser.add_argument(
        "--backend", default="auto", choices=BACKENDS, help="of block_sparse_attention"
    )
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too (compiles)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    build_hopper_kernels(options.backend)
    lines = ["# Block-sparse attention, forward + backward, bf16", "", *machine_lines(), *HEADER]
    print("\n".join(lines))
    table = Table(options.backend, options.flex)
    for shape in SHAPES:
        if options.only not in f"{shape} block {shape.block}":
            continue
        try:
            lines += table.rows(shape)
        except ConfigError as error:
            print(f"{shape}, block {shape.block}: left out: {error}", file=sys.stderr, flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    host = (
        f"host: an eager step of SDPA flash at 1,1,64,32, where the GPU has nothing to do, takes "
        f"{host_ms():.3f} ms; no eager time of an autograd function is below about that."
    )
    closing = ["", *LEGEND, "", host]
    lines += closing
    print("\n".join(closing))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
