"""The C++ backend against the reference in float64, for each instruction set, and its promises.

Fresh memory is NaN in every comparison, so an element that nobody wrote is seen.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spion_ds.attention import BlockLayout, block_sparse_attention
from spion_ds.attention.cpu import backend as cpu_backend
from spion_ds.errors import ConfigError
from spion_ds.extension import operators_available

ROOT = Path(__file__).resolve().parents[2]
# Sums of a few hundred rounded terms; for the 16-bit types the rounding of inputs and outputs.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Case:
    """A call; the defaults are the plain one. ``grouped`` is query heads for each key head."""

    block: int = 32
    head_dim: int = 32
    queries: int = 96
    keys: int = 96
    batch: int = 2
    kv_heads: int = 2
    grouped: int = 1
    per_head: bool = False
    causal: bool = False
    padded: bool = False
    zero_padded: bool = False
    pruned: str = "zero"
    dropout_p: float = 0.0
    strided: bool = False

    def __str__(self) -> str:
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(changed) or "plain"


CASES = [
    Case(),
    Case(block=16, head_dim=16, queries=100, keys=100, pruned="excluded", padded=True),
    Case(block=64, queries=257, keys=257, causal=True, dropout_p=0.3, strided=True),
    Case(block=128, head_dim=64, queries=300, keys=300, causal=True, padded=True, per_head=True),
    Case(block=128, head_dim=24, queries=130, keys=257, dropout_p=0.1, padded=True, grouped=2),
    Case(block=64, head_dim=40, queries=65, keys=190, per_head=True, grouped=3, strided=True),
    Case(block=32, head_dim=8, grouped=2, per_head=True, causal=True, padded=True, dropout_p=0.5),
    Case(block=16, head_dim=128, queries=33, keys=80, kv_heads=1, grouped=4, pruned="excluded"),
    Case(block=64, head_dim=256, queries=128, keys=128, batch=1, causal=True, pruned="excluded"),
    Case(block=20, head_dim=5, queries=71, keys=71, causal=True, strided=True, pruned="excluded"),
    Case(block=1, head_dim=1, queries=9, keys=7, dropout_p=0.2),
    Case(block=96, head_dim=72, queries=200, keys=100, padded=True, strided=True, batch=1),
    Case(block=32, head_dim=32, queries=50, keys=200, causal=True, padded=True),
    Case(block=128, head_dim=24, queries=450, keys=450, padded=True, zero_padded=True, grouped=2),
    Case(block=16, queries=90, keys=90, padded=True, zero_padded=True, causal=True, dropout_p=0.3),
]


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case, the same for every dtype up to rounding."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    layout: BlockLayout
    key_padding_mask: Tensor | None
    dropout_key: Tensor

    def run(self, case: Case, backend: str, dtype: torch.dtype) -> list[Tensor]:
        """Return out, dq, dk, dv; the inputs are rounded to their own dtype first."""
        qkv = [x.detach().to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        out = block_sparse_attention(
            *qkv,
            self.layout,
            key_padding_mask=self.key_padding_mask,
            causal=case.causal,
            pruned=case.pruned,
            dropout_p=case.dropout_p,
            dropout_key=self.dropout_key,
            zero_padded_queries=case.zero_padded,
            backend=backend,
        )
        return [out.detach(), *torch.autograd.grad(out, qkv, self.grad_out.to(dtype))]


def make(case: Case, dtype: torch.dtype = torch.float32) -> Inputs:
    """Draw a case: hot first key block, empty second row.

    Where it is padded: a third of the tokens, 64 neighbours, the last block, the last sample.
    """
    draw = torch.Generator().manual_seed(0)
    heads = case.kv_heads * case.grouped
    n, m = -(-case.queries // case.block), -(-case.keys // case.block)
    mask = torch.rand((heads, n, m) if case.per_head else (n, m), generator=draw) < 0.4
    mask[..., 0] = True
    mask[..., 1:2, :] = False
    layout = BlockLayout.from_mask(mask.tril() if case.causal else mask, case.block)

    def normal(count: int, tokens: int) -> Tensor:
        shape = (case.batch, tokens, count, case.head_dim)
        x = torch.randn(shape, generator=draw).to(dtype).transpose(1, 2)
        return x if case.strided else x.contiguous()

    padding = None
    if case.padded:
        padding = torch.rand((case.batch, case.keys), generator=draw) < 0.7
        padding[:, 64:128] = False  # a whole piece of a kernel's work
        padding[:, case.keys - case.block :] = False
        padding[-1] = case.batch == 1
    return Inputs(
        normal(heads, case.queries),
        normal(case.kv_heads, case.keys),
        normal(case.kv_heads, case.keys),
        normal(heads, case.queries),
        layout,
        padding,
        torch.randint(-(2**31), 2**31 - 1, (case.batch,), dtype=torch.int32, generator=draw),
    )


def assert_agrees(case: Case, dtype: torch.dtype) -> None:
    inputs = make(case, dtype)
    with poisoned():
        results = inputs.run(case, "cpp", dtype)
    for name, result, expected in zip(
        ("out", "dq", "dk", "dv"),
        results,
        inputs.run(case, "reference", torch.float64),
        strict=True,
    ):
        assert result.dtype == dtype
        error = torch.linalg.vector_norm(result.double() - expected)
        # A gradient that is 0 everywhere must be exactly that.
        limit = TOLERANCES[dtype] * torch.linalg.vector_norm(expected)
        assert error <= limit, f"{name} of {case}: {error:.3g} > {limit:.3g}"


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill fresh memory with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _operators() -> None:
    if not operators_available():
        pytest.skip("the C++ operators cannot be compiled here")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case, dtype):
    assert_agrees(case, dtype)


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_every_instruction_set_agrees_with_the_reference(capability):
    code = (
        "import torch; from tests.attention.test_cpu_backend import *\n"
        "print(torch.backends.cpu.get_cpu_capability())\n"
        "torch.set_num_threads(1)\n"
        "for case in CASES: assert_agrees(case, torch.float32)\n"
        "for case in CASES[::3]: assert_agrees(case, torch.bfloat16)\n"
        "for case in CASES[1::3]: assert_agrees(case, torch.float16)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    if capability == "avx2" and "AVX2" not in result.stdout:
        pytest.skip("a processor without AVX2")


# With one thread the backward pass hands out whole heads, with more it goes by blocks, since one
# (sample, key head) cannot keep two threads busy; three cannot keep two busy either, but nearly.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(block=64, queries=300, keys=300, batch=1, kv_heads=1, grouped=2, head_dim=24),
        Case(block=128, queries=500, keys=500, batch=1, kv_heads=1, causal=True, dropout_p=0.2),
        Case(block=16, batch=1, kv_heads=1, padded=True, grouped=2, per_head=True),
        Case(block=32, queries=300, keys=200, batch=3, kv_heads=1, padded=True),
        Case(block=64, queries=300, keys=300, batch=5, kv_heads=1, padded=True, zero_padded=True),
    ],
    ids=str,
)
def test_the_same_bits_with_any_number_of_threads(case, dtype):
    inputs = make(case, dtype)
    with threads(1):
        expected = inputs.run(case, "cpp", dtype)
    for count in (1, 2, 3):
        with threads(count):
            for result, one in zip(inputs.run(case, "cpp", dtype), expected, strict=True):
                assert torch.equal(result, one)


def test_tokens_after_the_last_real_one_are_not_computed():
    case = Case(block=128, queries=300, keys=300, zero_padded=True, dropout_p=0.2)
    real = torch.arange(300)[None] < torch.tensor([[70], [201]])
    inputs = dataclasses.replace(make(case), key_padding_mask=real)
    expected = inputs.run(case, "cpp", torch.float32)
    # Whoever computes with them meets NaN.
    q, k, v, grad = (
        x.masked_fill(~real[:, None, :, None], float("nan"))
        for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out)
    )
    inputs = dataclasses.replace(inputs, q=q, k=k, v=v, grad_out=grad)
    for result, same in zip(inputs.run(case, "cpp", torch.float32), expected, strict=True):
        assert torch.equal(result, same)
        assert not result.masked_select(~real[:, None, :, None]).any()


def test_padded_queries_have_an_infinite_log_sum_exp():
    x = make(Case(padded=True))
    layout = (x.layout.row_ptr, x.layout.col_idx, x.layout.col_ptr, x.layout.row_idx)
    for zero_padded in (False, True):
        out, lse = torch.ops.spion_ds.cpu_attention_fwd(
            *(x.q, x.k, x.v, *layout, x.key_padding_mask, None),
            *(32, 0.2, False, True, 0.0, zero_padded),
        )
        nothing = (out == 0.0).all(dim=-1)
        assert torch.equal(lse == float("inf"), nothing)
        padded = ~x.key_padding_mask[:, None].expand_as(lse)
        # The second row of blocks keeps nothing, and the second sample has no keys.
        empty = torch.zeros_like(padded)
        empty[:, :, 32:64] = empty[1] = True
        assert torch.equal(nothing, padded | empty if zero_padded else empty)


@pytest.mark.parametrize("view", ["packed", "tokens innermost", "one key for all", "every second"])
def test_any_strides(view):
    x = make(Case())
    shape, draw = tuple(x.q.shape), torch.Generator().manual_seed(1)
    if view == "packed":  # as a fused projection gives them
        packed = torch.randn((2, 96, 3, 2, 32), generator=draw)
        q, k, v = (part.transpose(1, 2) for part in packed.unbind(2))
    elif view == "tokens innermost":
        q, k, v = (torch.randn((2, 2, 32, 96), generator=draw).mT for _ in range(3))
    elif view == "one key for all":
        q, k, v = x.q, x.k[:, :1, :1].expand(shape), x.v[:1].expand(shape)
    else:
        q, k, v = (torch.randn((2, 2, 96, 64), generator=draw)[..., ::2] for _ in range(3))
    assert (q.shape, k.shape, v.shape) == (shape,) * 3
    results = []
    for backend, dtype in (("cpp", torch.float32), ("reference", torch.float64)):
        qkv = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = block_sparse_attention(*qkv, x.layout, backend=backend)
        # The gradient of a sum is one number, expanded.
        results.append([out, *torch.autograd.grad(out.sum(), qkv)])
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_rows_that_keep_nothing_are_zero_and_have_no_gradient():
    inputs = make(Case())
    with poisoned():
        out, dq, _, _ = inputs.run(Case(), "cpp", torch.float32)
    assert not out[:, :, 32:64].any()
    assert not dq[:, :, 32:64].any()
    assert out[:, :, :32].all()


@pytest.mark.parametrize("scale", [0.0, -0.5, 30.0])
def test_any_scale(scale):
    x = make(Case())
    expected, result = (
        block_sparse_attention(
            *(t.to(dtype) for t in (x.q, x.k, x.v)), x.layout, scale=scale, backend=backend
        )
        for backend, dtype in (("reference", torch.float64), ("cpp", torch.float32))
    )
    # Scores of several hundred carry the rounding error of a float32 of that size.
    torch.testing.assert_close(result.double(), expected, rtol=1e-3, atol=1e-3)


def test_nan_reaches_the_output():
    x = make(Case())
    q = x.q.clone()
    q[0, 1, 5, 3] = float("nan")
    out = block_sparse_attention(q, x.k, x.v, x.layout, backend="cpp")
    assert out[0, 1, 5].isnan().all()
    assert out.isnan().sum() == out.shape[3]


def test_operators_pass_opcheck():
    x = make(Case(padded=True))
    layout = (x.layout.row_ptr, x.layout.col_idx, x.layout.col_ptr, x.layout.row_idx)
    rest = (*layout, x.key_padding_mask, x.dropout_key, 32, 0.2, False, True, 0.1, True)
    qkv = tuple(t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    torch.library.opcheck(torch.ops.spion_ds.cpu_attention_fwd.default, (*qkv, *rest))
    out, lse = torch.ops.spion_ds.cpu_attention_fwd(x.q, x.k, x.v, *rest)
    torch.library.opcheck(
        torch.ops.spion_ds.cpu_attention_bwd.default,
        (x.grad_out, x.q, x.k, x.v, out, lse, *rest),
    )


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("backend", ["cpp", "auto"])
def test_compiles_into_one_graph(backend, strided):
    case = Case(strided=strided)
    x = make(case)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_sparse_attention(q, k, v, x.layout, backend=backend).sin()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        qkv = [t.clone().requires_grad_() for t in (x.q, x.k, x.v)]
        out = function(*qkv)
        results.append([out, *torch.autograd.grad(out, qkv, x.grad_out)])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)
        assert eager.stride() == traced.stride()


def test_auto_takes_cpp_and_leaves_float64_to_pytorch(monkeypatch):
    called = []
    original = cpu_backend.block_sparse_attention_cpu
    monkeypatch.setattr(
        cpu_backend,
        "block_sparse_attention_cpu",
        lambda q, *rest, **options: called.append(q.dtype) or original(q, *rest, **options),
    )
    inputs = make(Case())
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        inputs.run(Case(), "auto", dtype)
    assert called == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(ConfigError, match="float64"):
        inputs.run(Case(), "cpp", torch.float64)


def test_without_the_operators_cpp_says_so_and_auto_goes_on(monkeypatch):
    monkeypatch.setattr("spion_ds.extension.operators_available", lambda: False)
    inputs = make(Case())
    with pytest.raises(ConfigError, match="not available"):
        inputs.run(Case(), "cpp", torch.float32)
    result, expected = (inputs.run(Case(), name, torch.float32) for name in ("auto", "torch"))
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_there_is_no_second_derivative():
    x = make(Case())
    q = x.q.clone().requires_grad_()
    out = block_sparse_attention(q, x.k, x.v, x.layout, backend="cpp")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


def test_the_operator_refuses_what_would_reach_outside_its_memory():
    x = make(Case(), torch.float32)
    layout = [x.layout.row_ptr, x.layout.col_idx, x.layout.col_ptr, x.layout.row_idx]

    def call(
        index: list[Tensor],
        k: Tensor = x.k,
        key: Tensor | None = None,
        p: float = 0.0,
        zero_padded: bool = False,
    ):
        return torch.ops.spion_ds.cpu_attention_fwd(
            x.q, k, x.v, *index, None, key, 32, 0.2, False, True, p, zero_padded
        )

    call(layout)
    for position in (1, 3):
        outside = [t.clone() for t in layout]
        outside[position][-1] = 3
        with pytest.raises(RuntimeError, match="point outside"):
            call(outside)
    longer = [t.clone() for t in layout]
    longer[0][0, -1] += 1
    with pytest.raises(RuntimeError, match="point outside"):
        call(longer)
    with pytest.raises(RuntimeError, match="int32"):
        call([t.long() for t in layout])
    with pytest.raises(RuntimeError, match="expected"):
        call([layout[0][:, 1:].contiguous(), *layout[1:]])
    with pytest.raises(RuntimeError, match="kv_heads"):
        call(layout, k=x.k[:, :, :50])
    with pytest.raises(RuntimeError, match="dropout_key"):
        call(layout, p=0.5)
    with pytest.raises(RuntimeError, match="dropout_p"):
        call(layout, key=x.dropout_key, p=1.0)
    with pytest.raises(RuntimeError, match="zero_padded_queries"):
        call(layout, zero_padded=True)
