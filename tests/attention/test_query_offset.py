"""Fewer queries than keys: parts of the queries, from query_offset on, give what all give at once.

So chunks of a long input and the tokens of decoding with a cache are one causal pass.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spion_ds.attention import BlockLayout, block_sparse_attention, prepare_layout, query_rows
from spion_ds.attention.functional import choose_backend
from spion_ds.attention.hopper import backend as hopper_backend
from spion_ds.attention.options import AttentionOptions
from spion_ds.attention.query_rows import rows_of_queries
from spion_ds.errors import ConfigError
from spion_ds.extension import operators_available

from .cases import (
    BACKENDS,
    CPP,
    FLOAT64_TOLERANCE,
    TOLERANCES,
    TRITON,
    Case,
    Inputs,
    Results,
    assert_agree,
    assert_is_the_reference,
    evaluate,
    make,
    needs_gpu,
    needs_triton,
)
from .hopper_emulation import emulated_hopper

BLOCK, LENGTH = 16, 53
# Chunks of odd sizes, within a block, across several and up to a border; then token by token.
PREFILL = (0, 5, 16, 37, 46)
PARTS = list(itertools.pairwise((*PREFILL, *range(PREFILL[-1] + 1, LENGTH + 1))))
# Any two of them meet.
FEATURES = [
    {"pruned": "zero", "causal": True},
    {"pruned": "excluded", "causal": True, "per_head": True, "grouped": True},
    {"pruned": "zero", "causal": True, "per_head": True, "padding": "holes"},
    {"pruned": "excluded", "causal": True, "grouped": True, "padding": "tail"},
    {"pruned": "zero", "per_head": True, "grouped": True, "padding": "holes"},
]
CASES = [
    Case(query_offset=21, causal=True),
    Case(query_offset=32, causal=True, dtype=torch.float16, padding="holes"),
    Case(query_offset=35, causal=True, head_dim=64, dtype=torch.float16, kept="empty_rows"),
    Case(query_offset=3, block=32, causal=True, lengths="more_keys", per_head=True, grouped=True),
    # The last queries stand behind the last key.
    Case(query_offset=17, causal=True, lengths="fewer_keys", padding="tail", pruned="excluded"),
    Case(query_offset=70, block=64, causal=True, head_dim=32, dtype=torch.float16),
    Case(query_offset=150, block=128, causal=True, head_dim=32, dtype=torch.bfloat16),
    Case(query_offset=21, per_head=True, padding="whole_sample", scale=-0.3),
]


def drawn(features: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Inputs:
    """A case of LENGTH queries and keys."""
    size = replace(Case().size("triton", torch.device("cpu")), blocks=4)
    inputs = make(Case(block=BLOCK, **features), size, device).to(dtype)
    assert inputs.q.shape[2] == inputs.k.shape[2] == LENGTH
    return inputs


def evaluate_parts(inputs: Inputs, backend: str, parts: Sequence[tuple[int, int]]) -> Results:
    """What calls with a part of the queries each give together."""
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    options = {name: x for name, x in inputs.options.items() if name != "query_offset"}
    outs = [
        block_sparse_attention(
            *(q[:, :, first:last], k, v, inputs.layout),
            query_offset=first,
            backend=backend,
            **options,
        )
        for first, last in parts
    ]
    out = torch.cat(outs, dim=2)
    return Results(out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.grad))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case, backend, device):
    case = case.runnable(backend, device)
    assert_is_the_reference(case, backend, case.size(backend, device), device)


@functools.cache
def whole_pass(features: int, device: torch.device) -> Results:
    return evaluate(drawn(FEATURES[features], device, torch.float64), "reference")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("features", range(len(FEATURES)), ids=lambda i: str(Case(**FEATURES[i])))
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param("reference", torch.float64, id="reference"),
        pytest.param("torch", torch.float64, id="torch"),
        pytest.param(*TRITON.values, torch.float32, marks=TRITON.marks, id="triton"),
        pytest.param(*CPP.values, torch.float32, marks=CPP.marks, id="cpp"),
    ],
)
def test_chunks_and_then_tokens_are_the_whole_pass(backend, dtype, features, device):
    inputs = drawn(FEATURES[features], device, dtype)
    tolerance = FLOAT64_TOLERANCE if dtype == torch.float64 else TOLERANCES[dtype]
    assert_agree(evaluate_parts(inputs, backend, PARTS), whole_pass(features, device), tolerance)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("backend", ["torch", TRITON])
@pytest.mark.parametrize("features", FEATURES, ids=lambda features: str(Case(**features)))
@pytest.mark.parametrize(("block", "head_dim"), [(16, 16), (32, 64), (64, 128), (128, 32)])
def test_long_chunks_and_then_tokens_are_the_whole_pass(block, head_dim, features, backend, device):
    case = Case(block=block, head_dim=head_dim, dtype=torch.bfloat16, **features)
    inputs = make(case, case.size(backend, device), device)
    length = inputs.q.shape[2]
    tokens = range(length - 40, length)
    parts = [*itertools.pairwise((0, 101, 256, tokens[0])), *((i, i + 1) for i in tokens)]
    expected = evaluate(inputs.to(torch.float64), "reference")
    out, dq, *_ = evaluate_parts(inputs, backend, parts)
    # The gradients of keys are sums over the parts, each rounded to bf16: compared where there are
    # few.
    assert_agree(Results(out, dq, expected.dk, expected.dv), expected, TOLERANCES[torch.bfloat16])
    few = evaluate_parts(inputs, backend, [(0, 101), (101, length)])
    assert_agree(few, expected, TOLERANCES[torch.bfloat16])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cache_of_its_final_length_hides_what_is_not_there_yet(backend, device):
    inputs = drawn(FEATURES[0], device, torch.float32)
    expected = evaluate(inputs, backend).out
    for first, last in ((30, 37), (37, 38), (38, 39)):
        later = torch.arange(LENGTH, device=device)[:, None] >= last
        k, v = (x.masked_fill(later, 1e4) for x in (inputs.k, inputs.v))
        options = {**inputs.options, "query_offset": first}
        q = inputs.q[:, :, first:last]
        out = block_sparse_attention(q, k, v, inputs.layout, backend=backend, **options)
        torch.testing.assert_close(out, expected[:, :, first:last], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_blocks_above_the_diagonal_are_told_by_position(backend, device):
    mask = torch.ones(4, 4).tril()
    mask[1, 2] = 1.0
    layout = BlockLayout.from_mask(mask, BLOCK).to(device)
    q, k, v = (torch.randn(1, 1, n, 16, device=device) for n in (20, 60, 60))

    def attend(query_offset: int) -> Tensor:
        return block_sparse_attention(
            q, k, v, layout, causal=True, query_offset=query_offset, backend=backend
        )

    with pytest.raises(ConfigError, match="blocks wholly above the diagonal"):
        attend(12)  # rows 0 and 1
    attend(32)  # rows 2 and 3, full up to the diagonal


@pytest.mark.parametrize("per_head", [False, True])
def test_rows_of_queries_are_those_of_the_mask(per_head):
    mask = torch.rand(3, 5, 4) < 0.5
    mask = mask if per_head else mask[0]
    layout = BlockLayout.from_mask(mask, BLOCK)
    for queries, query_offset, rows in (
        *((80, 0, slice(0, 5)), (79, 1, slice(0, 5)), (16, 0, slice(0, 1))),
        *((1, 79, slice(4, 5)), (2, 47, slice(2, 4)), (17, 15, slice(0, 2))),
    ):
        found = rows_of_queries(layout, queries, query_offset)
        expected = BlockLayout.from_mask(mask[..., rows, :], BLOCK)
        assert torch.equal(found.to_mask(), expected.to_mask())
        for name in ("row_ptr", "col_idx", "col_ptr", "row_idx", "col_order", "col_parts"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert (found is layout) == (rows == slice(0, 5))
        # Asked again, also by another part of the same rows, it is there.
        assert rows_of_queries(layout, queries, query_offset) is found


def test_a_layout_keeps_the_latest_rows_and_those_that_were_prepared(monkeypatch):
    monkeypatch.setattr(query_rows, "_RECENT", 3)
    layout = BlockLayout.from_mask(torch.ones(8, 8), BLOCK)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 128, 16)
    prepare_layout(q, k, layout, query_offset=5)
    prepared = rows_of_queries(layout, 1, 5)
    for position in range(16, 128):
        assert rows_of_queries(layout, 1, position).num_rows == 1
    kept = [plan for plan in layout.plans if plan[0] == "recent rows"]
    assert [first for _, first, _ in kept] == [5, 6, 7]
    assert rows_of_queries(layout, 1, 5) is prepared


def test_decoding_derives_rows_once_a_block(monkeypatch, device):
    derived = []
    derive = query_rows._derive
    monkeypatch.setattr(query_rows, "_derive", lambda *args: derived.append(derive(*args)))
    inputs = drawn(FEATURES[1], device, torch.float32)
    with torch.inference_mode():
        for position in range(LENGTH):
            q = inputs.q[:, :, position : position + 1]
            options = {**inputs.options, "query_offset": position}
            block_sparse_attention(q, inputs.k, inputs.v, inputs.layout, **options)
    assert len(derived) == 4
    evaluate_parts(inputs, "torch", [(0, 40), (40, LENGTH)])  # rows that inference left serve too


@pytest.mark.parametrize("backend", [TRITON, CPP])
def test_compiles_into_one_graph_once_the_rows_are_there(backend, device):
    inputs = drawn(FEATURES[1], device, torch.float32)
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    options = {**inputs.options, "query_offset": 21}

    def attend(q, k, v, layout):
        return block_sparse_attention(q[:, :, 21:], k, v, layout, backend=backend, **options)

    torch.compiler.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"prepare_layout\(q, k, layout, query"):
        compiled(q, k, v, inputs.layout)
    prepare_layout(q[:, :, 21:], k, inputs.layout, query_offset=21, backend=backend)
    results = []
    for function in (attend, compiled):
        out = function(q, k, v, inputs.layout)
        results.append([out, *torch.autograd.grad(out, (q, k, v), inputs.grad[:, :, 21:])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_the_first_chunk_drops_what_the_whole_drops(backend, device):
    inputs = drawn({"dropout_p": 0.3}, device, torch.float32)
    expected = evaluate(inputs, backend).out
    out = block_sparse_attention(
        inputs.q[:, :, :30], inputs.k, inputs.v, inputs.layout, backend=backend, **inputs.options
    )
    torch.testing.assert_close(out, expected[:, :, :30], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_prepared_is_named():
    layout = BlockLayout.from_mask(torch.ones(4, 4), BLOCK)
    q, k = torch.randn(1, 1, 20, 16), torch.randn(1, 1, 64, 16)
    with pytest.raises(ConfigError, match="20 queries and 64 keys need 2×4"):
        prepare_layout(q, k, layout)
    with pytest.raises(ConfigError, match="query_offset is -3"):
        prepare_layout(q, k, layout, query_offset=-3)
    with pytest.raises(ConfigError, match="20 queries from position 50 on and 64 keys need 5×4"):
        prepare_layout(q, k, layout, query_offset=50)
    with pytest.raises(ConfigError, match="a mask where a layout belongs"):
        prepare_layout(q, k, torch.ones(4, 4), query_offset=0)


def test_hopper_picks_rows_and_refuses_what_it_has_no_kernel_for():
    case = Case(block=64, head_dim=64, dtype=torch.bfloat16, query_offset=70, per_head=True)
    device = torch.device("cpu")
    inputs = make(case, case.size("torch", device), device)
    with emulated_hopper():
        assert_is_the_reference(case, "hopper", case.size("torch", device), device)
        prepare_layout(inputs.q, inputs.k, inputs.layout, query_offset=70, backend="hopper")
        rows = rows_of_queries(inputs.layout, inputs.q.shape[2], 70)
        assert [plan[0] for plan in rows.plans] == ["hopper"]
        evaluate(inputs, "hopper")
        assert [plan[0] for plan in rows.plans] == ["hopper"]  # what was prepared is what is read
        causal = replace(inputs, options={**inputs.options, "causal": True})
        mask = inputs.layout.to_mask().tril()
        causal = replace(causal, layout=BlockLayout.from_mask(mask, case.block))
        with pytest.raises(ConfigError, match="the hopper backend has no causal masking"):
            evaluate(causal, "hopper")


def test_auto_leaves_offsets_to_triton(monkeypatch):
    monkeypatch.setattr(hopper_backend, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper_backend, "is_built", lambda: True)
    layout = BlockLayout.from_mask(torch.eye(16), 64)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        q = torch.empty(1, 2, 64, 128, dtype=torch.bfloat16, device="cuda")
        for query_offset, hopper in ((0, True), (64, False)):
            options = AttentionOptions(None, False, 0.1, "zero", 0.0, None, False, query_offset)
            assert (choose_backend(q, layout, options) == "hopper") is hopper


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_hopper_or_not_explicit_and_auto_agree(device):
    case = Case(block=64, head_dim=128, dtype=torch.bfloat16, query_offset=70)
    inputs = make(case, case.size("triton", device), device)
    triton, auto = evaluate(inputs, "triton"), evaluate(inputs, "auto")
    assert all(torch.equal(a, b) for a, b in zip(triton, auto, strict=True))
    if hopper_backend.is_hopper(device):
        expected = evaluate(inputs.to(torch.float64), "reference")
        assert_agree(evaluate(inputs, "hopper"), expected, TOLERANCES[torch.bfloat16])


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.skipif(not operators_available(), reason="the C++ operators do not compile here")
def test_decoding_asks_python_for_launches_once_a_block(device, monkeypatch):
    from spion_ds.attention.triton import backend as triton_backend

    launched = []
    launch = triton_backend.launch
    monkeypatch.setattr(triton_backend, "launch", lambda *args: launched.append(launch(*args)))
    case = Case(block=64, head_dim=80, dtype=torch.bfloat16, causal=True)
    inputs = make(case, case.size("triton", device), device)
    expected = evaluate(inputs, "triton").out
    launched.clear()
    for position in range(128, 320):
        q = inputs.q[:, :, position : position + 1]
        options = {**inputs.options, "query_offset": position}
        out = block_sparse_attention(
            q, inputs.k, inputs.v, inputs.layout, backend="triton", **options
        )
        torch.testing.assert_close(
            out, expected[:, :, position : position + 1], rtol=1e-2, atol=1e-2
        )
    # The first token of a block needs no zeros before it, so it has a shape of its own.
    assert len(launched) == 6


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_a_cuda_graph_keeps_its_rows(device, monkeypatch):
    monkeypatch.setattr(query_rows, "_RECENT", 2)
    case = Case(block=16, head_dim=32, dtype=torch.bfloat16, causal=True)
    inputs = make(case, case.size("triton", device), device)
    q, options = inputs.q[:, :, 100:150].clone(), {**inputs.options, "query_offset": 100}

    def attend() -> Tensor:
        return block_sparse_attention(
            q, inputs.k, inputs.v, inputs.layout, backend="triton", **options
        )

    with (
        pytest.raises(ConfigError, match=r"rows 6 to 9 of a layout, .* prepare_layout"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        attend()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        attend()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    for position in range(200, 500, 16):  # pushes other rows out
        rows_of_queries(inputs.layout, 1, position)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, attend())
