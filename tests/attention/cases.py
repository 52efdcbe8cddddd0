"""Cases of block-sparse attention: their tensors, how they are evaluated, and covering sets.

Shape suffixes: B batch, H heads, L queries, M keys, D head_dim, n and m blocks of rows and columns.
"""

from __future__ import annotations

import itertools
import os
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from spion_ds.attention import BlockLayout, block_sparse_attention
from spion_ds.attention.available import HAS_TRITON

BLOCKS = (16, 32, 64, 128)
HEAD_DIMS = (16, 32, 48, 64, 80, 128, 256)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# The relative errors that the contract allows against the reference in float64: about a hundred
# roundings of float32, and a few of the 16-bit formats, in which inputs, probabilities and results
# are held.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
# Two programs of the same float64 formula: some hundred roundings of 1e-16.
FLOAT64_TOLERANCE = 1e-12

# What a case may ask for besides block, head_dim and dtype.
FEATURES: dict[str, Sequence[Any]] = {
    "lengths": ("whole", "odd", "more_keys", "fewer_keys", "one_block"),
    "kept": ("hot_columns", "empty_rows", "full"),
    "per_head": (False, True),
    "padding": ("none", "tail", "holes", "whole_sample"),
    "zero_padded": (False, True),
    "causal": (False, True),
    "grouped": (False, True),
    "dropout_p": (0.0, 0.3),
    "pruned": ("zero", "excluded"),
    "scale": (None, 0.3),
}


def why_no_triton() -> str | None:
    """What is missing for the triton backend, None if nothing is."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device, and TRITON_INTERPRET is set to something else than 1"
    return None


needs_triton = pytest.mark.skipif(why_no_triton() is not None, reason=str(why_no_triton()))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TRITON = pytest.param("triton", marks=needs_triton, id="triton")
CPP = pytest.param(
    "cpp",
    marks=pytest.mark.skipif(
        torch.cuda.is_available(), reason="the device under test is a GPU, and cpp is for CPUs"
    ),
    id="cpp",
)
BACKENDS = ("torch", TRITON, CPP)


@dataclass(frozen=True)
class Size:
    """How large a case is made: about ``length`` tokens, at least ``blocks`` blocks a side."""

    batch: int
    heads: int
    length: int
    blocks: int


# The interpreter takes milliseconds a tile, and large blocks have many.
SMALL = Size(batch=2, heads=2, length=48, blocks=2)
SMALLER = replace(SMALL, batch=1)
ON_CPU = Size(batch=2, heads=4, length=100, blocks=4)
ON_GPU = Size(batch=2, heads=4, length=1000, blocks=8)


@dataclass(frozen=True)
class Case:
    """One combination of what the contract allows."""

    block: int = 16
    head_dim: int = 16
    dtype: torch.dtype = torch.float32
    lengths: str = "odd"
    kept: str = "hot_columns"
    per_head: bool = False
    padding: str = "none"
    zero_padded: bool = False  # where queries are the keys' tokens
    causal: bool = False
    grouped: bool = False
    dropout_p: float = 0.0
    pruned: str = "zero"
    scale: float | None = None
    query_offset: int = 0  # the queries before it are left out

    def __str__(self) -> str:
        words = [f"block{self.block}", f"dim{self.head_dim}", str(self.dtype)[6:], self.lengths]
        words += [self.kept, f"{self.padding}-padding", self.pruned]
        words += [
            name for name in ("zero_padded", "per_head", "causal", "grouped") if getattr(self, name)
        ]
        words += ["dropout"] if self.dropout_p else []
        words += [f"from{self.query_offset}"] if self.query_offset else []
        return "-".join([*words, *([] if self.scale is None else ["scale"])])

    def runnable(self, backend: str, device: torch.device) -> Case:
        """The case, or its fp16 version: Triton's interpreter multiplies bf16 wrongly."""
        if backend == "triton" and device.type == "cpu" and self.dtype == torch.bfloat16:
            return replace(self, dtype=torch.float16)
        return self

    def size(self, backend: str, device: torch.device) -> Size:
        """As large as there is time for."""
        if device.type == "cuda":
            return ON_GPU
        if backend != "triton":
            return ON_CPU
        one_sample = self.block == 128 and self.padding != "whole_sample"
        return SMALLER if one_sample else SMALL


# Most of what there is, at once.
MIXED = Case(
    block=32, kept="hot_columns", per_head=True, padding="holes", grouped=True, dropout_p=0.3
)


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and the gradient of its output."""

    q: Tensor  # (B, H, L, D)
    k: Tensor  # (B, kv heads, M, D)
    v: Tensor
    grad: Tensor
    layout: BlockLayout
    options: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Inputs:
        q, k, v, grad = (x.to(dtype) for x in (self.q, self.k, self.v, self.grad))
        return Inputs(q, k, v, grad, self.layout, self.options)


class Results(NamedTuple):
    """What is promised to be the reference's."""

    out: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def make(case: Case, size: Size, device: torch.device) -> Inputs:
    """Draw the case's tensors; the same ones on every machine."""
    torch.manual_seed(zlib.crc32(str(case).encode()))
    end, keys = token_counts(case, size)
    queries = end - case.query_offset
    kv_heads = size.heads // 2 if case.grouped else size.heads
    q, grad = (torch.randn(size.batch, size.heads, queries, case.head_dim) for _ in range(2))
    k, v = (torch.randn(size.batch, kv_heads, keys, case.head_dim) for _ in range(2))
    layout = BlockLayout.from_mask(draw_mask(case, end, keys, size.heads), case.block)
    padding = draw_padding(case.padding, size.batch, keys)
    dropout_key = torch.randint(-(2**31), 2**31 - 1, (size.batch,), dtype=torch.int32)
    options = {
        "key_padding_mask": None if padding is None else padding.to(device),
        "causal": case.causal,
        "scale": case.scale,
        "pruned": case.pruned,
        "dropout_p": case.dropout_p,
        "dropout_key": dropout_key.to(device) if case.dropout_p else None,
        "zero_padded_queries": case.zero_padded and queries == keys,
        "query_offset": case.query_offset,
    }
    tensors = (x.to(device, case.dtype) for x in (q, k, v, grad))
    return Inputs(*tensors, layout.to(device), options)


def token_counts(case: Case, size: Size) -> tuple[int, int]:
    """Numbers of queries and keys; all odd except for "whole"."""
    block = case.block
    if case.lengths == "one_block":
        return block - 5, block - 3
    whole = max(size.length // block, size.blocks) * block
    short = whole - block // 2 - 3
    return {
        "whole": (whole, whole),
        "odd": (short, short),
        "more_keys": (short, whole + 5),
        "fewer_keys": (short, whole - block - 1),
    }[case.lengths]


def draw_mask(case: Case, queries: int, keys: int, heads: int) -> Tensor:
    """Kept blocks, (n, m) or (heads, n, m) bool."""
    shape = (heads if case.per_head else 1, -(-queries // case.block), -(-keys // case.block))
    if case.kept == "full":
        mask = torch.ones(shape, dtype=torch.bool)
    else:
        mask = torch.rand(shape) < 0.3
        mask |= torch.eye(*shape[1:], dtype=torch.bool)
    for head, of_head in enumerate(mask):
        if case.kept == "hot_columns":
            of_head[:, head % shape[2]] = True
        elif case.kept == "empty_rows":
            of_head[(head + 1) % shape[1] :: 3] = False
            of_head[:, (head + 1) % shape[2] :: 4] = False
    mask = mask.tril() if case.causal else mask
    return mask if case.per_head else mask[0]


def draw_padding(kind: str, batch: int, keys: int) -> Tensor | None:
    """(batch, keys) bool, True = real token."""
    if kind == "none":
        return None
    if kind == "holes":
        return torch.rand(batch, keys) < 0.7
    real = torch.arange(keys)[None] < torch.linspace(0.4 * keys, keys, batch)[:, None]
    if kind == "whole_sample":
        real[-1] = False
    return real


def with_far_padded_keys(inputs: Inputs) -> Inputs:
    """The same but for padded keys: their scores would overflow any probability."""
    real = inputs.options["key_padding_mask"][:, None, :, None]
    return replace(inputs, k=torch.where(real, inputs.k, 1e4 * inputs.k))


def evaluate(inputs: Inputs, backend: str) -> Results:
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = block_sparse_attention(q, k, v, inputs.layout, backend=backend, **inputs.options)
    return Results(out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.grad))


def relative_error(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b|| in float64; where b is zero, zero only for a = 0."""
    difference, norm = (a.double() - b.double()).norm().item(), b.double().norm().item()
    return difference / norm if norm > 0.0 else difference * float("inf") if difference else 0.0


def assert_agree(results: Results, expected: Results, tolerance: float) -> None:
    for name, a, b in zip(Results._fields, results, expected, strict=True):
        assert a.shape == b.shape, name
        error = relative_error(a, b)
        # Written so that NaN fails.
        assert error < tolerance, f"{name}: relative error {error:.1e}, allowed {tolerance:.0e}"


def assert_is_the_reference(case: Case, backend: str, size: Size, device: torch.device) -> None:
    inputs = make(case, size, device)
    results = evaluate(inputs, backend)
    assert all(result.dtype == case.dtype for result in results)
    # The reference sees the same rounded inputs.
    expected = evaluate(inputs.to(torch.float64), "reference")
    assert_agree(results, expected, TOLERANCES[case.dtype])


def covering(factors: dict[str, Sequence[Any]], given: Sequence[dict[str, Any]] = ()) -> list[dict]:
    """Rows that hold every pair of values of two factors, found greedily; always the same rows.

    Args:
        factors: the values of each factor.
        given: parts of rows that are to be completed, each once, before rows are added.
    """
    draw = random.Random(0)
    pairs = itertools.combinations(factors, 2)
    missing = {((a, x), (b, y)) for a, b in pairs for x in factors[a] for y in factors[b]}
    rows: list[dict] = []
    for start in itertools.chain(given, itertools.repeat(None)):
        if start is None and not missing:
            return rows
        fixed = dict(min(missing, key=str)) if start is None else start
        candidates = []
        for _ in range(30):
            row = {
                name: fixed.get(name, draw.choice(list(values))) for name, values in factors.items()
            }
            candidates.append((len(missing & _pairs(row)), row))
        rows.append(max(candidates, key=lambda candidate: candidate[0])[1])
        missing -= _pairs(rows[-1])
    raise AssertionError("unreachable")


def _pairs(row: dict[str, Any]) -> set:
    return set(itertools.combinations(row.items(), 2))
