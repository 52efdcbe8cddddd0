"""Check the Hopper kernels against the fp64 reference, then time them against dense attention.

    python benchmarks/hopper_check.py [--no-check] [--no-time] [--shapes 0,1,2]

Needs a Hopper GPU. Times are medians of triton.testing.do_bench, which empties the L2 cache between
runs; the dense baseline is scaled_dot_product_attention's cuDNN backend in the same run.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

from spion_ds.attention import hopper_backend
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.reference import block_sparse_attention_reference

# (batch, heads, L, head_dim, block): goals in units of dense time, by density.
GOALS = {
    (2, 8, 16384, 64, 64): {0.25: 0.26, 0.10: 0.097, 0.05: 0.066},
    (2, 8, 16384, 64, 128): {0.25: 0.26, 0.10: 0.097, 0.05: 0.066},
    (2, 8, 16384, 128, 64): {0.25: 0.27, 0.10: 0.105, 0.05: 0.074},
    (2, 8, 16384, 128, 128): {0.25: 0.27, 0.10: 0.105, 0.05: 0.074},
    (8, 8, 4096, 64, 64): {0.25: 0.28, 0.10: 0.155, 0.05: 0.11},
}


KERNELS = ("fwd_kernel", "dq_kernel", "dkv_kernel", "reduce_kernel")


def spion_like_mask(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    """Return (rows, columns) bool: a band of 3, a few hot columns, and the rest at random."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.arange(rows)[:, None] - torch.arange(columns)[None]).abs() <= 1
    mask[:, torch.randperm(columns, generator=generator)[: max(1, columns // 64)]] = True
    order = torch.rand((rows, columns), generator=generator).masked_fill(mask, -1.0).argsort(dim=1)
    mask.scatter_(1, order[:, : max(1, round(density * columns))], True)
    return mask


def attend(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, **options: object) -> Tensor:
    """Return the Hopper backend's output, every option at its default but those given."""
    arguments: dict[str, object] = {
        "key_padding_mask": None,
        "causal": False,
        "scale": q.shape[3] ** -0.5,
        "pruned": "zero",
        "dropout_p": 0.0,
        "dropout_key": None,
    }
    return hopper_backend.block_sparse_attention_hopper(q, k, v, layout, **(arguments | options))


def check_case(
    name: str,
    shape: tuple[int, int, int, int, int, int],
    block: int,
    dtype: torch.dtype,
    *,
    layout_heads: int = 1,
    padding: bool = False,
    pruned: str = "zero",
    strided: bool = False,
    density: float = 0.3,
) -> bool:
    """Compare out, dQ, dK and dV with the reference in fp64, and two runs bit by bit."""
    batch, heads, kv_heads, queries, keys, head_dim = shape
    rows, columns = -(-queries // block), -(-keys // block)
    mask = torch.rand(layout_heads, rows, columns) < density
    mask[:, :, 0] = True
    mask[:, rows // 2 : rows // 2 + (rows > 1)] = False
    layout = BlockLayout.from_mask(mask if layout_heads > 1 else mask[0], block).to("cuda")

    def tensor(h: int, tokens: int) -> Tensor:
        if strided:
            x = torch.randn(batch, tokens, h, head_dim, device="cuda", dtype=dtype)
            return x.transpose(1, 2).requires_grad_()
        return torch.randn(batch, h, tokens, head_dim, device="cuda", dtype=dtype).requires_grad_()

    q, k, v = tensor(heads, queries), tensor(kv_heads, keys), tensor(kv_heads, keys)
    grad = tensor(heads, queries).detach()
    real = None
    if padding:
        real = torch.rand(batch, keys, device="cuda") < 0.7
        real[0, : keys // 2] = False
    options = {"key_padding_mask": real, "pruned": pruned, "scale": head_dim**-0.5 * 1.3}
    runs = []
    for _ in range(2):
        # The allocator gives this memory to the outputs: what a kernel leaves unwritten is NaN.
        torch.empty(64 << 20, device="cuda").fill_(float("nan"))
        out = attend(q, k, v, layout, **options)
        runs.append((out, *torch.autograd.grad(out, (q, k, v), grad)))
    double = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = block_sparse_attention_reference(
        *double, layout, causal=False, dropout_p=0.0, dropout_key=None, **options
    )
    expected = (expected, *torch.autograd.grad(expected, double, grad.double()))
    errors = [
        ((a.double() - b).norm() / b.norm()).item() for a, b in zip(runs[0], expected, strict=True)
    ]
    same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    good = same and all(error < 1e-2 for error in errors)
    shown = " ".join(f"{error:.1e}" for error in errors)
    print(f"{'ok  ' if good else 'FAIL'} {name:28} {shown} {'' if same else 'NOT DETERMINISTIC'}")
    return good


def check() -> bool:
    """Run all cases; return whether all agree."""
    bf16, fp16 = torch.bfloat16, torch.float16
    good = True
    for head_dim in (64, 128):
        for block in (64, 128):
            for dtype in (bf16, fp16):
                tag = f"D{head_dim} block {block} {str(dtype)[6:]}"
                shape = (2, 3, 3, 517, 517, head_dim)
                good &= check_case(tag, shape, block, dtype)
        base = (2, 4, 2, 700, 333, head_dim)
        good &= check_case("GQA", base, 64, bf16)
        good &= check_case("GQA block 128 excluded", base, 128, bf16, pruned="excluded")
        good &= check_case("per head GQA", base, 64, fp16, layout_heads=4)
        good &= check_case("padding", base, 64, bf16, padding=True)
        good &= check_case("padding excluded", base, 128, bf16, padding=True, pruned="excluded")
        good &= check_case("padding per head", base, 64, bf16, padding=True, layout_heads=4)
        good &= check_case("strided", base, 64, bf16, strided=True)
        good &= check_case("one token", (1, 1, 1, 1, 70, head_dim), 64, bf16)
        good &= check_case("long", (1, 2, 2, 4100, 4100, head_dim), 64, bf16, density=0.05)
        good &= check_case("many items", (4, 16, 16, 1100, 1100, head_dim), 64, bf16)
        good &= check_case("dense", (2, 3, 3, 4096, 4096, head_dim), 64, bf16, density=0.8)
    print("all agree" if good else "SOME DISAGREE")
    return good


def kernel_times(run: Callable[[], None], repeats: int = 10) -> dict[str, float]:
    """Return mean milliseconds a kernel, by the part of its name that tells it apart."""
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    times = dict.fromkeys(KERNELS, 0.0)
    for event in recorded.key_averages():
        for part in KERNELS:
            if part in event.key:
                times[part] += event.device_time_total / 1e3 / repeats
    return times


def dense_step(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> None:
    """Run dense attention forward and backward on cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = scaled_dot_product_attention(q, k, v)
    torch.autograd.grad(out, (q, k, v), grad)


def sparse_step(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, layout: BlockLayout) -> None:
    """Run block-sparse attention forward and backward."""
    torch.autograd.grad(attend(q, k, v, layout), (q, k, v), grad)


def time_shapes(indices: list[int]) -> None:
    """Print milliseconds, ratios to dense (of the whole step, and of the kernels) and rates."""
    print(
        "shape               block dens  fwd    dq     dkv    reduce total  dense  ratio  kernels "
        "goal       TFLOP/s: fwd dq dkv"
    )
    dense_times: dict[tuple[int, ...], float] = {}
    for index, ((batch, heads, tokens, head_dim, block), goals) in enumerate(GOALS.items()):
        if index not in indices:
            continue
        shape = (batch, heads, tokens, head_dim)
        q, k, v = (
            torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        grad = torch.randn_like(q)
        if shape not in dense_times:
            run = functools.partial(dense_step, q, k, v, grad)
            dense_times[shape] = do_bench(run, warmup=20, rep=120, return_mode="median")
        dense = dense_times[shape]
        for density, goal in goals.items():
            mask = spion_like_mask(tokens // block, tokens // block, density)
            layout = BlockLayout.from_mask(mask, block).to("cuda")
            run = functools.partial(sparse_step, q, k, v, grad, layout)
            total = do_bench(run, warmup=20, rep=100, return_mode="median")
            fwd, dq, dkv, reduce = kernel_times(run).values()
            product = 2 * batch * heads * tokens * tokens * head_dim * layout.density / 1e9
            verdict = "met " if total / dense <= goal else "miss"
            print(
                f"{shape!s:20} {block:4} {density:.2f} {fwd:6.3f} {dq:6.3f} {dkv:6.3f} "
                f"{reduce:6.3f} {total:6.3f} {dense:6.3f} {total / dense:6.4f} "
                f"{(fwd + dq + dkv + reduce) / dense:6.4f} {goal:5.3f} {verdict} "
                f"{2 * product / fwd:4.0f} {3 * product / dq:4.0f} {4 * product / dkv:4.0f}",
                flush=True,
            )


def main() -> None:
    """Check, then time; exit with 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--shapes", default=",".join(map(str, range(len(GOALS)))))
    options = parser.parse_args()
    torch.manual_seed(0)
    good = options.no_check or check()
    if good and not options.no_time:
        time_shapes([int(index) for index in options.shapes.split(",")])
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
