"""MatMul: every mode and transposition against dense products, forward and backward."""

from __future__ import annotations

import pytest
import torch

from spion_ds.errors import ConfigError
from spion_ds.ops.sparse_attention.matmul import MatMul
from tests.ops.dense import assert_close, draw_layout, to_blocks, to_dense

BATCH, HEADS, ROWS, COLUMNS, WIDTH = 2, 3, 4, 5, 24
CASES = [
    (16, torch.float16, True, False),
    (16, torch.float32, False, True),
    (32, torch.float16, False, False),
    (32, torch.float32, True, True),
    (64, torch.float32, False, False),
    (64, torch.float16, True, True),
    (64, torch.float16, False, True),
]


def transposed(x, yes):
    return x.transpose(-2, -1) if yes else x


def draw(shape, dtype, device):
    return torch.randn(shape, device=device, dtype=dtype).requires_grad_()


def expected_in_float64(mode, a, b, trans_a, trans_b, layout, block):
    """The product and both gradients from dense float64 tensors with the same values."""
    a, b = (x.detach().double().requires_grad_() for x in (a, b))
    left = to_dense(a, layout, block) if mode == "dsd" else a
    right = to_dense(b, layout, block) if mode == "dds" else b
    product = transposed(left, trans_a) @ transposed(right, trans_b)
    product = to_blocks(product, layout, block) if mode == "sdd" else product
    return product, a, b


@pytest.mark.parametrize("mode", ["sdd", "dsd", "dds"])
@pytest.mark.parametrize(("block", "dtype", "trans_a", "trans_b"), CASES)
def test_products_and_gradients_are_the_dense_ones(mode, block, dtype, trans_a, trans_b, device):
    layout = draw_layout(HEADS, ROWS, COLUMNS)
    sparse = (BATCH, int(layout.sum()), block, block)
    rows, columns = ROWS * block, COLUMNS * block
    if mode == "sdd":
        a, b = (rows, WIDTH), (WIDTH, columns)
    elif mode == "dsd":
        a, b = sparse, (rows if trans_a else columns, WIDTH)
    else:
        a, b = (WIDTH, columns if trans_b else rows), sparse
    operands = []
    for shape, flip in ((a, trans_a), (b, trans_b)):
        if shape is not sparse:
            shape = (BATCH, HEADS, *(reversed(shape) if flip else shape))
        operands.append(draw(shape, dtype, device))
    out = MatMul(layout, block, mode, trans_a, trans_b)(*operands)
    assert out.dtype == dtype
    wanted, *leaves = expected_in_float64(mode, *operands, trans_a, trans_b, layout, block)
    assert_close("product", out, wanted, dtype)
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, operands, grad)
    wanted_grads = torch.autograd.grad(wanted, leaves, grad.double())
    for name, mine, right in zip("ab", grads, wanted_grads, strict=True):
        assert_close(f"gradient of {name}", mine, right, dtype)


def test_rows_with_few_blocks_are_not_lost(device):
    # The old kernels zeroed tiles when every row kept fewer than four blocks.
    for kept in (1, 2, 3):
        layout = torch.eye(8, dtype=torch.int64)[None]
        layout[:, :, : kept - 1] = 1
        p = torch.randn(1, int(layout.sum()), 16, 16, device=device)
        x = torch.randn(1, 1, 128, 16, device=device)
        out = MatMul(layout, 16, "dsd")(p, x)
        assert_close("product", out, to_dense(p, layout, 16) @ x, torch.float32)
        assert (out != 0).all()


def test_a_row_or_head_without_blocks_gives_zeros(device):
    layout = torch.ones(2, 3, 3, dtype=torch.int64)
    layout[0], layout[1, 1] = 0, 0
    p = torch.randn(1, 6, 16, 16, device=device, requires_grad=True)
    x = torch.randn(1, 2, 48, 8, device=device, requires_grad=True)
    out = MatMul(layout, 16, "dsd")(p, x)
    assert not out[:, 0].any()
    assert not out[:, 1, 16:32].any()
    out.sum().backward()
    assert not x.grad[:, 0].any()


def test_fewer_dimensions_come_back_as_they_went_in(device):
    layout = torch.ones(1, 2, 2, dtype=torch.int64)
    a, b = torch.randn(32, 8, device=device), torch.randn(8, 32, device=device)
    p = MatMul(layout[0], 16, "sdd")(a, b)
    assert p.shape == (4, 16, 16)
    assert_close("product", to_dense(p[None], layout, 16)[0, 0], a @ b, torch.float32)
    assert MatMul(layout, 16, "dsd")(p, torch.randn(1, 32, 8, device=device)).shape == (1, 32, 8)
    batched = MatMul(layout, 16, "dsd")(p, torch.randn(5, 1, 32, 8, device=device))
    assert batched.shape == (5, 1, 32, 8)


def test_gradients_of_gradients(device):
    layout = draw_layout(2, 2, 3)
    a = draw((1, 2, 32, 3), torch.float64, device)
    b = draw((1, 2, 3, 48), torch.float64, device)
    p = draw((1, int(layout.sum()), 16, 16), torch.float64, device)
    x = draw((1, 2, 48, 2), torch.float64, device)
    assert torch.autograd.gradgradcheck(MatMul(layout, 16, "sdd"), (a, b), fast_mode=True)
    assert torch.autograd.gradgradcheck(MatMul(layout, 16, "dsd"), (p, x), fast_mode=True)


def test_two_layouts_of_one_shape_do_not_share_anything(device):
    a, b = torch.randn(1, 1, 32, 4, device=device), torch.randn(1, 1, 4, 32, device=device)
    for layout in (torch.eye(2).long()[None], torch.eye(2).long().flip(1)[None]):
        p = MatMul(layout, 16, "sdd")(a, b)
        assert_close("product", p, to_blocks(a @ b, layout, 16), torch.float32)


def test_the_same_inputs_give_the_same_bits(device):
    layout = draw_layout(HEADS, ROWS, COLUMNS)
    p = draw((BATCH, int(layout.sum()), 16, 16), torch.float32, device)
    x = draw((BATCH, HEADS, COLUMNS * 16, 8), torch.float32, device)

    def run():
        out = MatMul(layout, 16, "dsd")(p, x)
        return (out, *torch.autograd.grad(out.square().sum(), (p, x)))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize(
    ("mode", "a", "b", "words"),
    [
        ("sss", None, None, "unknown MatMul mode 'sss'.*known: dds, dsd, sdd"),
        ("sdd", (1, 1, 30, 4), (1, 1, 4, 32), r"A .* is \(batch, 1, 32, any\).*\(1, 1, 30, 4\)"),
        ("sdd", (1, 1, 32, 4), (1, 1, 5, 32), "A has 4 inner columns and B 5 inner rows"),
        ("sdd", (1, 2, 32, 4), (1, 2, 4, 32), r"expand\(heads, -1, -1\)"),
        ("dsd", (1, 3, 16, 16), (1, 1, 32, 4), r"A is sparse.*\(4, 16, 16\); got \(1, 3, 16, 16\)"),
        ("dsd", (2, 4, 16, 16), (3, 1, 32, 4), "A has a batch of 2 and B of 3"),
        ("dds", (1, 1, 4, 31), (1, 4, 16, 16), r"A .* \(batch, 1, any, 32\)"),
    ],
)
def test_what_does_not_fit_is_named(mode, a, b, words):
    with pytest.raises(ConfigError, match=words):
        MatMul(torch.ones(1, 2, 2), 16, mode)(torch.ones(a), torch.ones(b))


def test_dtypes_must_agree_unless_autocast_makes_them(device):
    product = MatMul(torch.ones(1, 2, 2), 16, "sdd")
    a = torch.randn(1, 1, 32, 4, device=device)
    b = torch.randn(1, 1, 4, 32, device=device, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"A is torch.float32 and B is torch.bfloat16"):
        product(a, b)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert product(a, b).dtype == torch.bfloat16
