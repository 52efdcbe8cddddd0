"""Random calls of block_sparse_attention against a dense float64 formula in NumPy.

    python -m tests.attention.oracle --cases 5000 --seed 0 [--only 17]

A case draws shapes, strides, layout, padding, what is not finite in excluded tokens, and all
options. Every backend that runs here computes it; Triton's interpreter takes few and small ones.
The last line is ``tried N, wrong M``; a wrong case prints what ``--only`` takes to repeat it.

Shape suffixes: B batch, H heads, L queries, M keys, D head_dim.
"""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from spion_ds.attention import BlockLayout, block_sparse_attention
from spion_ds.attention.options import AttentionOptions

NAMES = ("out", "dq", "dk", "dv")
# Of the sums of absolute values that a result is made of: a hundred roundings of float32 or
# float64, and a few of the 16-bit formats, in which probabilities and results are held.
TOLERANCES = {
    torch.float64: 1e-13,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.5e-2,
}
POISON = (float("nan"), float("inf"), float("-inf"))
# The interpreter takes about a second a case.
TRITON_EVERY = 100


@dataclass
class Call:
    """One call: tensors with their strides, options, and what is compared.

    Attributes:
        read: (B, L) which queries' outputs are defined.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    layout: BlockLayout
    options: dict[str, Any]
    read: np.ndarray
    words: str


def draw_call(seed: int, number: int, *, small: bool = False) -> Call:
    """Return case ``number``, the same on every machine; ``small`` is for the interpreter."""
    draw = random.Random(f"{seed} {number}")
    torch.manual_seed(draw.getrandbits(63))
    dtypes = (torch.float32, torch.float16) if small else tuple(TOLERANCES)
    dtype = draw.choice(dtypes)
    block = draw.choice((16, 32) if small else (1, 3, 8, 16, 16, 20, 32, 64))
    longest = 40 if small else min(100, 12 * block)
    batch, kv_heads, group = (draw.choice(x) for x in ((1, 1, 2, 3), (1, 1, 2), (1, 1, 2, 3)))
    heads, head_dim = kv_heads * group, draw.choice((1, 3, 8, 16, 24, 33, 64))
    queries = draw.randint(1, longest)
    keys = queries if draw.random() < 0.6 else draw.randint(1, longest)
    offset = draw.randint(1, longest) if draw.random() < 0.2 else 0
    causal = draw.random() < 0.4
    padding = draw_padding(draw, batch, keys) if draw.random() < 0.6 else None
    itself = queries == keys and offset == 0
    dropout_p = draw.choice((0.1, 0.5, 0.9)) if not offset and draw.random() < 0.3 else 0.0
    zeroed = itself and padding is not None and draw.random() < 0.5
    rows = -(-(offset + queries) // block) + (draw.randint(1, 3) if offset else 0)
    mask = draw_mask(draw, draw.choice((1, heads)), rows, -(-keys // block))
    mask = mask.tril() if causal else mask
    key = torch.randint(-(2**31), 2**31, (batch,)).to(torch.int32)
    options = {
        "key_padding_mask": padding,
        "causal": causal,
        "scale": draw.choice((None, None, 0.02, 1.0, -0.3, 0.0)),
        "pruned": draw.choice(("zero", "excluded")),
        "dropout_p": dropout_p,
        "dropout_key": key if dropout_p else None,
        "zero_padded_queries": zeroed,
        "query_offset": offset,
    }
    q, grad = (torch.randn(batch, heads, queries, head_dim).to(dtype) for _ in range(2))
    k, v = (torch.randn(batch, kv_heads, keys, head_dim).to(dtype) for _ in range(2))
    read = np.ones((batch, queries), dtype=bool)
    if draw.random() < 0.5:
        poison_keys(draw, k, v, mask, padding, offset, queries, block)
        if itself and padding is not None:
            padded = ~padding[:, None, :, None]
            q = q.masked_fill(padded, draw.choice(POISON))
            grad = grad.masked_fill(padded, draw.choice(POISON) if zeroed else 0.0)
            read = padding.numpy() | zeroed
    q, k, v, grad = (strided(draw, x) for x in (q, k, v, grad))
    words = f"{dtype} {tuple(q.shape)} {tuple(k.shape)} block {block} layouts {mask.shape[0]}"
    words += "".join(f" {name}={value}" for name, value in options.items() if "key" not in name)
    layout = BlockLayout.from_mask(mask if mask.shape[0] > 1 else mask[0], block)
    return Call(q, k, v, grad, layout, options, read, words)


def draw_padding(draw: random.Random, batch: int, keys: int) -> Tensor:
    """Return (B, M) bool: holes, ends, whole samples, all or none."""
    ends = torch.tensor([draw.choice((0, keys, draw.randint(0, keys))) for _ in range(batch)])
    real = torch.arange(keys) < ends[:, None]
    if draw.random() < 0.4:
        real = real & (torch.rand(batch, keys) < 0.7)
    if draw.random() < 0.2:
        real = real[:1].expand(batch, -1)
    return real.T.contiguous().T if draw.random() < 0.3 else real


def draw_mask(draw: random.Random, heads: int, rows: int, columns: int) -> Tensor:
    """Return kept blocks, (heads, n, m) bool, with full and empty lines."""
    mask = torch.rand(heads, rows, columns) < draw.choice((0.0, 0.15, 0.4, 0.9, 1.0))
    if draw.random() < 0.3:
        mask[:, :, draw.randrange(columns)] = True
    if draw.random() < 0.3:
        mask[:, draw.randrange(rows)] = draw.random() < 0.5
    return mask


def poison_keys(
    draw: random.Random,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    padding: Tensor | None,
    offset: int,
    queries: int,
    block: int,
) -> None:
    """Write what is not finite into padded keys and into those that no query's block keeps."""
    rows = mask[:, offset // block : -(-(offset + queries) // block)]
    kept = rows.any(dim=1).repeat_interleave(block, 1)[:, : k.shape[2]]  # (heads or 1, M)
    kept = kept.unflatten(0, (-1, max(1, len(kept) // k.shape[1]))).any(dim=1)  # of kv heads
    out_of_reach = ~kept[None, :, :, None]
    if padding is not None:
        out_of_reach = out_of_reach | ~padding[:, None, :, None]
    for x in (k, v):
        x.masked_fill_(out_of_reach, draw.choice(POISON))


def strided(draw: random.Random, x: Tensor) -> Tensor:
    """Return the values of x with other strides; expanded where it is the same anyway."""
    kind = draw.randrange(6)
    if kind == 0:  # (B, L, H, D) as projections make it
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 1:  # head_dim is not the innermost dimension
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if kind == 2:  # every second token of a buffer, from its second on
        wide = x.new_full((*x.shape[:2], 2 * x.shape[2] + 1, x.shape[3]), float("nan"))
        wide[:, :, 1::2] = x
        return wide[:, :, 1::2]
    if kind == 3:  # a part of the columns of a buffer
        wide = x.new_full((*x.shape[:3], x.shape[3] + 5), float("nan"))
        wide[..., 2:-3] = x
        return wide[..., 2:-3]
    if kind == 4 and (x.shape[0] == 1 or torch.equal(x, x[:1].expand_as(x))):
        return x[:1].expand_as(x)
    return x


def keep(call: Call, shape: tuple[int, ...]) -> np.ndarray:
    """Return what dropout keeps times 1 / (1 - p), (B, H, L, M), from the documented hash."""
    p = call.options["dropout_p"]
    if p == 0.0:
        return np.ones(shape)

    def combined(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
        x = key + (counter.astype(np.uint32) + np.uint32(1)) * np.uint32(0x9E3779B9)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    sample = call.options["dropout_key"].numpy().view(np.uint32)
    head, row, column = (np.arange(count) for count in shape[1:])
    keys = combined(combined(sample[:, None], head)[:, :, None], row)[..., None]
    word = (column.astype(np.uint32) + np.uint32(1)) * np.uint32(0x9E3779B9)
    word = (word ^ (word >> np.uint32(16))) * np.uint32(0x7FEB352D)
    bits = (keys ^ word) * (keys * np.uint32(0x846CA68B) | np.uint32(1))
    return (bits.view(np.int32) >= round(p * 2**32) - 2**31) / (1.0 - p)


def expected(call: Call) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return each result in float64, and the sum of absolute values that it is made of."""
    o, group = call.options, call.q.shape[1] // call.k.shape[1]
    q, k, v, grad = (x.double().numpy() for x in (call.q, call.k, call.v, call.grad))
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    (batch, heads, queries, head_dim), keys = q.shape, k.shape[2]
    positions = o["query_offset"] + np.arange(queries)
    padding = o["key_padding_mask"]
    real = np.ones((batch, keys), bool) if padding is None else padding.numpy()
    future = np.arange(keys) > positions[:, None] if o["causal"] else np.zeros((1, keys), bool)
    valid = np.broadcast_to(real[:, None, None] & ~future, (batch, heads, queries, keys))
    mask = call.layout.to_mask().numpy().reshape(-1, call.layout.num_rows, call.layout.num_cols)
    block = call.layout.block
    kept = valid & mask[:, positions // block][:, :, np.arange(keys) // block]
    # Nothing that is excluded is in the formula, so its value does not matter.
    in_use = kept.any(axis=2)[..., None]
    k, v = np.where(in_use, k, 0.0), np.where(in_use, v, 0.0)
    q = np.where(np.isfinite(q), q, 0.0)
    if o["zero_padded_queries"]:
        kept = kept & real[:, None, :, None]
        grad = np.where(real[:, None, :, None], grad, 0.0)
    scale = head_dim**-0.5 if o["scale"] is None else o["scale"]
    scores = np.where(kept, q @ k.swapaxes(2, 3) * scale, -np.inf)
    pruned = (valid.sum(-1) - kept.sum(-1))[..., None] if o["pruned"] == "zero" else 0
    top = scores.max(axis=-1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    top = np.where(pruned > 0, np.maximum(top, 0.0), top)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True) + pruned * np.exp(-np.maximum(top, 0.0))
    probs = weights / np.where(total == 0.0, 1.0, total)
    factor = keep(call, probs.shape)
    dropped = probs * factor
    dprobs = (grad @ v.swapaxes(2, 3)) * factor
    delta = (probs * dprobs).sum(-1, keepdims=True)
    dscores = probs * (dprobs - delta) * scale
    size = (np.abs(grad) @ np.abs(v).swapaxes(2, 3)) * factor
    size = probs * (size + (probs * size).sum(-1, keepdims=True)) * abs(scale)

    def of_keys(x: np.ndarray) -> np.ndarray:
        return x.reshape(batch, -1, group, keys, head_dim).sum(axis=2)

    return {
        "out": (dropped @ v, dropped @ np.abs(v)),
        "dq": (dscores @ k, size @ np.abs(k)),
        "dk": (of_keys(dscores.swapaxes(2, 3) @ q), of_keys(size.swapaxes(2, 3) @ np.abs(q))),
        "dv": (
            of_keys(dropped.swapaxes(2, 3) @ grad),
            of_keys(dropped.swapaxes(2, 3) @ np.abs(grad)),
        ),
    }


def faults(call: Call, backend: str, wanted: dict[str, tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """Return what is wrong with a backend's results, nothing if they are right."""
    device = "cuda" if torch.cuda.is_available() and backend != "cpp" else "cpu"
    tensors = [x.detach().to(device).requires_grad_() for x in (call.q, call.k, call.v)]
    options = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in call.options.items()
    }
    layout = call.layout.to(device)
    try:
        out = block_sparse_attention(*tensors, layout, backend=backend, **options)
        grads = torch.autograd.grad(out, tensors, call.grad.to(device))
    except Exception as error:
        return [f"{backend}: {type(error).__name__}: {error}"]
    tolerance, found = TOLERANCES[call.q.dtype], []
    for name, x in zip(NAMES, (out, *grads), strict=True):
        exact, size = wanted[name]
        error = np.abs(x.detach().double().cpu().numpy() - exact)
        if name == "out":
            error = error[np.broadcast_to(call.read[:, None, :, None], error.shape)]
            size = size[np.broadcast_to(call.read[:, None, :, None], size.shape)]
        # 16-bit results are rounded to what their format can hold, at least.
        limit = tolerance * np.linalg.norm(size) + torch.finfo(call.q.dtype).tiny * error.size
        if not np.linalg.norm(error) <= limit:  # NaN is a fault
            found.append(f"{backend} {name}: {np.linalg.norm(error):.1e}, allowed {limit:.1e}")
    return found


def backends_for(call: Call, number: int) -> list[str]:
    """Return the backends that compute a case here."""
    if torch.cuda.is_available():
        from spion_ds.attention.hopper import backend as hopper
        from spion_ds.attention.triton import backend as triton

        o = AttentionOptions(*list(call.options.values()))
        o = o._replace(scale=o.scale or call.q.shape[3] ** -0.5)
        serving = ["triton"] if triton.unsupported(call.q.cuda(), call.layout.block) is None else []
        serving += ["hopper"] if hopper.unsupported(call.q.cuda(), call.layout, o) is None else []
        return ["reference", "torch", *serving]
    cpp = ["cpp"] if call.q.dtype != torch.float64 else []
    return ["reference", "torch", *cpp]


def try_case(seed: int, number: int) -> list[str]:
    """Return the faults of a case in all backends; few go through Triton's interpreter as well."""
    call = draw_call(seed, number)
    calls = [(call, backend) for backend in backends_for(call, number)]
    if number % TRITON_EVERY == 0 and not torch.cuda.is_available():
        calls.append((draw_call(seed, number, small=True), "triton"))
    found = []
    with np.errstate(all="ignore"):
        wanted = expected(call)
        for given, backend in calls:
            found += faults(given, backend, wanted if given is call else expected(given))
    words = {id(given): given.words for given, _ in calls}.values()
    return [f"{fault} ({'; '.join(words)})" for fault in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case")
    given = parser.parse_args()
    torch.set_num_threads(1)  # small tensors
    numbers = range(given.cases) if given.only is None else [given.only]
    wrong = 0
    for number in numbers:
        found = try_case(given.seed, number)
        wrong += bool(found)
        for fault in found:
            print(f"--seed {given.seed} --only {number}: {fault}", flush=True)
    print(f"tried {len(numbers)}, wrong {wrong}")


if __name__ == "__main__":
    main()
