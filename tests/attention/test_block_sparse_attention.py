"""Every backend against the reference in float64, and the reference against formulas.

Fresh memory is poisoned with NaN in every comparison, so an element that nobody wrote is seen.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from spion_ds.attention import BlockLayout, block_sparse_attention
from spion_ds.attention import layout as layout_module

from .cases import (
    BACKENDS,
    BLOCKS,
    CPP,
    DTYPES,
    FEATURES,
    FLOAT64_TOLERANCE,
    HEAD_DIMS,
    MIXED,
    ON_GPU,
    SMALL,
    SMALLER,
    TOLERANCES,
    TRITON,
    Case,
    Inputs,
    Results,
    assert_agree,
    assert_is_the_reference,
    covering,
    evaluate,
    make,
    needs_gpu,
    needs_triton,
    relative_error,
    with_far_padded_keys,
)
from .formula import attention_by_formula

# Any two of a block size, a head_dim, a dtype and each feature meet in some case.
FACTORS = {"block": BLOCKS, "head_dim": HEAD_DIMS, "dtype": DTYPES, **FEATURES}
CASES = [Case(**row) for row in covering(FACTORS)]
# Without padding, causality and dropout, whose code and masks a kernel then leaves out.
PLAIN_CASES = [
    Case(block, 16, torch.float16, lengths, "hot_columns", pruned=pruned)
    for block in (16, 64)
    for lengths in ("whole", "odd")
    for pruned in ("zero", "excluded")
]
# Padding at the end and in the middle, over several blocks, in each way to cut tiles.
PADDED_CASES = [
    Case(block, head_dim, torch.float16, padding=padding, zero_padded=zero_padded, pruned=pruned)
    for block, head_dim in ((16, 16), (16, 64), (64, 32))
    for padding, zero_padded, pruned in (
        ("tail", True, "zero"),
        ("tail", False, "excluded"),
        ("holes", True, "excluded"),
        ("whole_sample", True, "zero"),
    )
]
# Every block size with every head_dim and dtype, and with them every pair of features.
GPU_CASES = [
    Case(**row)
    for row in covering(
        FACTORS,
        [
            {"block": block, "head_dim": head_dim, "dtype": dtype}
            for block, head_dim, dtype in itertools.product(BLOCKS, HEAD_DIMS, DTYPES)
            for _ in range(2)
        ],
    )
]
# The specification is meant to be evaluated in float64; PyTorch's operators take it too.
PRECISIONS = [
    pytest.param("reference", torch.float64, FLOAT64_TOLERANCE, id="reference"),
    pytest.param("torch", torch.float64, FLOAT64_TOLERANCE, id="torch"),
    pytest.param(*TRITON.values, torch.float32, 1e-5, marks=TRITON.marks, id="triton"),
    pytest.param(*CPP.values, torch.float32, 1e-5, marks=CPP.marks, id="cpp"),
]
PRUNED = ("zero", "excluded")
# The interpreter warns of exponentials of masked entries, which the kernels replace afterwards.
MASKED_LATER = "ignore:(overflow|invalid value) encountered:RuntimeWarning"


@pytest.mark.parametrize("cases", [CASES, GPU_CASES], ids=["everywhere", "gpu"])
def test_the_cases_hold_every_pair_of_features(cases):
    for a, b in itertools.combinations(FACTORS, 2):
        met = {(getattr(case, a), getattr(case, b)) for case in cases}
        assert met == set(itertools.product(FACTORS[a], FACTORS[b]))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES + PLAIN_CASES + PADDED_CASES, ids=str)
def test_agrees_with_the_reference(case, backend, device):
    case = case.runnable(backend, device)
    assert_is_the_reference(case, backend, case.size(backend, device), device)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("lines", ["rows", "columns"])
def test_rows_and_columns_keep_any_number_of_blocks(lines, pruned, device):
    # A backend may treat lines of about the same number of blocks together: all numbers that
    # round up to the same one, and those that round up to everything.
    mask = torch.zeros(12, 12, dtype=torch.bool)
    for line, kept in enumerate((0, 1, 3, 5, 6, 7, 8, 9, 10, 11, 12, 12)):
        mask[line, torch.randperm(12)[:kept]] = True
    case = Case(lengths="odd", pruned=pruned, dropout_p=0.3)
    inputs = make(case, replace(SMALLER, blocks=12), device)
    layout = BlockLayout.from_mask(mask if lines == "rows" else mask.T, case.block)
    inputs = replace(inputs, layout=layout.to(device))
    expected = evaluate(inputs.to(torch.float64), "reference")
    assert_agree(evaluate(inputs, "torch"), expected, TOLERANCES[torch.float32])


@needs_triton
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    "case",
    [
        # head_dim 16 and 32 in 16 bits take rows and columns in one launch, the rest in two.
        Case(dtype=torch.float16, dropout_p=0.3),
        Case(block=32, head_dim=32, dtype=torch.float16, grouped=True, padding="holes"),
        Case(head_dim=64, dtype=torch.float16, causal=True),
        Case(lengths="fewer_keys"),
        Case(per_head=True, grouped=True, dropout_p=0.3, padding="tail"),
    ],
    ids=str,
)
def test_long_columns_are_cut_into_parts_and_summed_in_order(case, device, monkeypatch):
    monkeypatch.setattr(layout_module, "LONGEST_PART", 2 * case.block)
    size = replace(SMALLER, blocks=5) if device.type == "cpu" else ON_GPU
    inputs = make(case, size, device)
    # The diagonal and a hot column: twice the mean is 4 blocks.
    queries, keys = (-(-x.shape[2] // case.block) for x in (inputs.q, inputs.k))
    mask = torch.eye(queries, keys, dtype=torch.bool).repeat(size.heads, 1, 1)
    for head, of_head in enumerate(mask):
        of_head[:, head if case.per_head else 0] = True
    layout = BlockLayout.from_mask(mask if case.per_head else mask[0], case.block)
    assert (layout.col_parts[..., 2] >= 2).any()
    inputs = replace(inputs, layout=layout.to(device))
    results = evaluate(inputs, "triton")
    assert_agree(results, evaluate(inputs.to(torch.float64), "reference"), TOLERANCES[case.dtype])
    again = evaluate(inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_agrees_with_the_reference_at_length_1000(case, backend, device):
    assert_is_the_reference(case, backend, ON_GPU, device)


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_agrees_with_the_reference_past_2_to_the_31_elements(device):
    torch.cuda.empty_cache()
    free, needed = torch.cuda.mem_get_info()[0], 40 << 30
    if free < needed:
        pytest.skip(f"{free >> 30} GiB of GPU memory are free, {needed >> 30} are needed")
    # Eight tensors of 4 GiB. A token is 2048 elements from the next, so the last tokens of every
    # head lie past the 2^31st element. Blocks are on the diagonal, so the last two blocks of
    # tokens, alone, give the same as they do in the whole.
    block, heads, head_dim, length = 64, 16, 128, 2**20 + 16
    shape = (1, length, heads, head_dim)
    q, k, v, grad = (
        torch.randn(shape, dtype=torch.bfloat16, device=device).transpose(1, 2) for _ in range(4)
    )
    assert q.stride(2) * (length - 1) > 2**31
    diagonal = torch.eye(-(-length // block), dtype=torch.bool)
    options = {"pruned": "excluded"}
    layout = BlockLayout.from_mask(diagonal, block).to(device)
    results = evaluate(Inputs(q, k, v, grad, layout, options), "triton")
    two = BlockLayout.from_mask(torch.eye(2), block).to(device)
    for part in (slice(0, 2 * block), slice(length - block - 16, length)):
        tensors = (x[:, :, part].double() for x in (q, k, v, grad))
        expected = evaluate(Inputs(*tensors, two, options), "reference")
        found = Results(*(x[:, :, part] for x in results))
        assert_agree(found, expected, TOLERANCES[torch.bfloat16])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), PRECISIONS)
def test_is_the_published_formula(backend, dtype, tolerance, causal, pruned, device):
    case = Case(lengths="odd", kept="empty_rows", padding="holes", causal=causal, pruned=pruned)
    inputs = make(case, SMALL, device).to(dtype)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.grad)
    expected = attention_by_formula(
        *(x.double().cpu().numpy() for x in tensors),
        inputs.layout.to_mask().cpu().numpy(),
        case.block,
        inputs.options["key_padding_mask"].cpu().numpy(),
        causal,
        pruned,
    )
    expected = Results(*(torch.from_numpy(x).to(device) for x in expected))
    assert_agree(evaluate(inputs, backend), expected, tolerance)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), PRECISIONS)
def test_full_layout_excluded_is_scaled_dot_product_attention(
    backend, dtype, tolerance, causal, padded, device
):
    # A lower triangle of blocks, where causal, keeps everything that causality allows.
    case = Case(kept="full", causal=causal, padding="tail" if padded else "none", pruned="excluded")
    inputs = make(case, SMALL, device)
    exact = inputs.to(torch.float64)
    q, k, v = (x.requires_grad_() for x in (exact.q, exact.k, exact.v))
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=device)
    allowed = allowed.tril() if causal else allowed
    if padded:
        allowed = allowed & inputs.options["key_padding_mask"][:, None, None, :]
    out = F.scaled_dot_product_attention(q, k, v, allowed)
    expected = Results(out.detach(), *torch.autograd.grad(out, (q, k, v), exact.grad))
    assert_agree(evaluate(inputs.to(dtype), backend), expected, tolerance)


@pytest.mark.filterwarnings(MASKED_LATER)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("reference", torch.float64),
        ("torch", torch.float32),
        pytest.param(*TRITON.values, torch.float32, marks=TRITON.marks),
    ],
)
def test_rows_that_prune_nothing_have_a_plain_softmax(backend, dtype, device):
    # Scores near -1000, whose exponential is 0 even in float64: a shift by the logit 0 of pruned
    # entries that do not exist would lose the row.
    q, k = (torch.full((1, 1, 32, 16), 10.0) + torch.rand(1, 1, 32, 16) for _ in range(2))
    v, grad = torch.randn(1, 1, 32, 16), torch.randn(1, 1, 32, 16)
    layout = BlockLayout.from_mask(torch.ones(2, 2).tril(), 16).to(device)
    options = {"causal": True, "scale": -0.6}
    inputs = Inputs(*(x.to(device, dtype) for x in (q, k, v, grad)), layout, options)
    results = evaluate(replace(inputs, options={**options, "pruned": "zero"}), backend)
    excluded = replace(inputs.to(torch.float64), options={**options, "pruned": "excluded"})
    # Float32 scores of 1000 are off by 1000 · 2^-24 = 6e-5, and their exponentials by as much.
    tolerance = 1e-3 if dtype == torch.float32 else FLOAT64_TOLERANCE * 1000
    assert_agree(results, evaluate(excluded, "reference"), tolerance)


@pytest.mark.filterwarnings(MASKED_LATER)
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), PRECISIONS)
@pytest.mark.parametrize("factor", [-30.0, 30.0])
def test_large_scores_do_not_overflow(factor, backend, dtype, tolerance, device):
    # Scores of several hundreds of either sign, beyond the range of a float32 exponential.
    case = Case(kept="hot_columns", padding="tail", scale=factor)
    inputs = make(case, SMALL, device)
    results = evaluate(inputs.to(dtype), backend)
    assert all(result.isfinite().all() for result in results)
    expected = evaluate(inputs.to(torch.float64), "reference")
    # Scores of about 400 in float32 are off by 400 · 2^-24 ≈ 2e-5, and so is the exponential.
    # Gradients are differences of products that such factors went into.
    assert relative_error(results.out, expected.out) < max(tolerance, 1e-4)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("pruned", PRUNED)
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), PRECISIONS)
def test_rows_without_keys_give_zeros_and_zero_gradients(backend, dtype, tolerance, pruned, device):
    case = Case(padding="whole_sample", pruned=pruned, dropout_p=0.3)
    inputs = make(case, SMALL, device).to(dtype)
    mask = inputs.layout.to_mask()
    mask[1], mask[:, 2] = False, False
    inputs = replace(inputs, layout=BlockLayout.from_mask(mask, case.block))
    results = evaluate(inputs, backend)
    row, column = slice(16, 32), slice(32, None)
    for result in results:
        assert not result[-1].any()  # the sample that is all padding
    for result in (results.out, results.dq):
        assert not result[:, :, row].any()
        assert result[0, :, :16].any()
    for result in (results.dk, results.dv):
        assert not result[:, :, column].any()
        assert result[0, :, :16].any()
    nothing = BlockLayout.from_mask(torch.zeros_like(mask), case.block)
    for result in evaluate(replace(inputs, layout=nothing), backend):
        assert not result.any()
        assert not result.isnan().any()


@pytest.mark.filterwarnings(MASKED_LATER)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", ["holes", "tail"])
def test_what_padded_keys_hold_does_not_matter(padding, backend, device):
    case = Case(padding=padding)
    inputs = make(case, case.size(backend, device), device)
    far = with_far_padded_keys(inputs)
    assert_agree(evaluate(far, backend), evaluate(inputs, backend), TOLERANCES[case.dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_attends_to_itself(backend, device):
    q, k, v, grad = (torch.randn(2, 1, 1, 16, device=device) for _ in range(4))
    layout = BlockLayout.from_mask(torch.ones(1, 1), 16).to(device)
    results = evaluate(Inputs(q, k, v, grad, layout, {}), backend)
    # One probability of 1, but for the rounding of the logarithm that it comes from.
    torch.testing.assert_close(results.out, v, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(results.dv, grad, rtol=1e-6, atol=0.0)
    # dS = dP - dP, up to the rounding of two sums of 16 products.
    assert results.dq.abs().max() < 1e-5
    assert results.dk.abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_output_element_is_left_unwritten(backend, device, poisoned):
    case = Case(block=32, lengths="fewer_keys", kept="empty_rows", padding="whole_sample")
    inputs = make(case, case.size(backend, device), device)
    results = evaluate(inputs, backend)
    for result in results:
        assert not result.isnan().any()
    if backend == "triton":
        # Output, log-sum-exp, the sums that the gradients share, and three gradients.
        assert len(poisoned) >= 6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_inputs_give_the_same_bits(dtype, backend, device):
    case = replace(MIXED, dtype=dtype).runnable(backend, device)
    inputs = make(case, case.size(backend, device), device)
    first, second = evaluate(inputs, backend), evaluate(inputs, backend)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_float64_gradients_are_the_slopes_of_the_output():
    # Finite differences know nothing of either program's backward pass.
    case = Case(kept="empty_rows", padding="tail", grouped=True, dropout_p=0.3)
    inputs = make(case, SMALL, torch.device("cpu"))
    inputs = inputs.to(torch.float64)
    tensors = [x[..., :3].clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    for backend in ("reference", "torch"):

        def attend(*qkv, backend=backend):
            return block_sparse_attention(*qkv, inputs.layout, backend=backend, **inputs.options)

        assert torch.autograd.gradcheck(attend, tensors, fast_mode=True)
