"""The Triton kernels as PyTorch operators: opcheck, torch.compile, checkpointing, autocast."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from spion_ds.attention import BlockLayout, SparseSelfAttention, block_sparse_attention
from spion_ds.sparsity import SpionSparsityConfig

from .cases import needs_triton

pytestmark = needs_triton

LENGTH, BLOCK, HEAD_DIM = 60, 16, 16


@pytest.fixture
def qkv(device):
    return [
        torch.randn(2, 2, LENGTH, HEAD_DIM, device=device, requires_grad=True) for _ in range(3)
    ]


def layout_of(device, kept: int = 7) -> BlockLayout:
    mask = torch.eye(4, dtype=torch.bool).flatten()
    mask[(~mask).nonzero()[: kept - 4, 0]] = True
    return BlockLayout.from_mask(mask.view(4, 4), BLOCK).to(device)


def options_of(device) -> dict:
    real = torch.arange(LENGTH, device=device) < torch.tensor([[LENGTH], [40]], device=device)
    key = torch.tensor([5, -6], dtype=torch.int32, device=device)
    return {"key_padding_mask": real, "dropout_p": 0.2, "dropout_key": key}


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "padding and dropout"])
def test_operators_pass_opcheck(rich, qkv, device):
    import spion_ds.attention.triton.backend  # noqa: F401

    layout = layout_of(device)
    index = (layout.row_ptr, layout.col_idx, layout.col_ptr, layout.row_idx)
    index += (layout.col_order, layout.col_parts)
    options = options_of(device)
    rest = (
        options["key_padding_mask"] if rich else None,
        options["dropout_key"] if rich else None,
        *(BLOCK, 0.25, False, True, rich, 0.2 if rich else 0.0),
    )
    forward = torch.ops.spion_ds.block_sparse_attention_fwd.default
    torch.library.opcheck(forward, (*qkv, *index, *rest))
    inputs = [x.detach() for x in qkv]
    out, lse = forward(*inputs, *index, *rest)
    backward = torch.ops.spion_ds.block_sparse_attention_bwd.default
    torch.library.opcheck(
        backward,
        (torch.randn_like(out), *inputs, out, lse, *index, *rest),
        # Its results are gradients; nothing differentiates them again.
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_to_one_graph_with_the_same_bits(qkv, device):
    layout, options = layout_of(device), options_of(device)

    def attend(q, k, v, layout):
        return block_sparse_attention(q, k, v, layout, backend="triton", **options)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    grad = torch.randn(2, 2, LENGTH, HEAD_DIM, device=device)
    for kept in (5, 9, 12):
        layout = layout_of(device, kept)
        results = []
        for function in (attend, compiled):
            out = function(*qkv, layout)
            results.append([out, *torch.autograd.grad(out, qkv, grad)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_another_layout_is_not_traced_again(qkv, device):
    traced = []

    def count(graph, inputs):
        traced.append(graph)
        return graph.forward

    config = SpionSparsityConfig(2, BLOCK)
    attention = SparseSelfAttention(config, backend="triton")
    compiled = torch.compile(attention, backend=count, fullgraph=True)
    attention.layout(LENGTH, qkv[0].device)
    compiled(*qkv)  # dense
    for kept in (5, 9, 12):
        config.set_pattern(layout_of(device, kept).to_mask())
        attention.layout(LENGTH, qkv[0].device)
        compiled(*qkv)
    assert len(traced) == 2  # one of the dense phase, one of the sparse


def test_compiled_attention_reads_and_writes_where_eager_attention_does(device, monkeypatch):
    """Inductor puts no copies around the operators."""
    from spion_ds.attention.triton import backend as triton_backend

    layout, options, seen = layout_of(device), options_of(device), []

    def spy(name: str) -> None:
        original = getattr(triton_backend, name)

        def run(*args):
            tensors = [x for x in args if isinstance(x, torch.Tensor) and x.dim() == 4]
            given = [x.untyped_storage().data_ptr() for x in tensors]
            results = original(*args)
            strides = [x.stride() for x in (*tensors, *results)]
            shared = [given.index(pointer) for pointer in given]
            seen.append((name, strides, shared))
            return results

        monkeypatch.setattr(triton_backend, name, run)

    spy("_forward")
    spy("_backward")
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, 32, device=device, requires_grad=True)
    into, out_of = (torch.nn.Linear(32, width).to(device) for width in (96, 32))

    def attend(x):
        qkv = into(x).unflatten(-1, (3, 2, HEAD_DIM))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(dim=2))
        out = block_sparse_attention(q, k, v, layout, backend="triton", **options)
        return out_of(out.transpose(1, 2).flatten(2))

    for function in (attend, torch.compile(attend, fullgraph=True)):
        function(x).sum().backward()
    (*eager,), (*compiled,) = seen[:2], seen[2:]
    assert compiled == eager
    # q, k and v are views of one projection, in the backward pass too.
    assert [shared[:4] for _, _, shared in eager] == [[0, 0, 0], [0, 1, 1, 1]]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(reentrant, qkv, device):
    layout = layout_of(device)

    def attend(q, k, v):  # no dropout key: the draw must be repeated in the recomputation
        return block_sparse_attention(q, k, v, layout, dropout_p=0.3, backend="triton")

    grads = []
    for run in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        out = run(*qkv)
        grads.append(torch.autograd.grad(out.sum(), qkv) if not reentrant else backward(out, qkv))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def backward(out: torch.Tensor, leaves) -> list[torch.Tensor]:
    """Return the gradients of leaves; re-entrant checkpointing knows backward() only."""
    for leaf in leaves:
        leaf.grad = None
    out.sum().backward()
    return [leaf.grad for leaf in leaves]


def test_autocast_computes_in_its_dtype(device):
    q, k, v = (torch.randn(1, 2, LENGTH, HEAD_DIM, device=device) for _ in range(3))
    layout = layout_of(device)
    with torch.autocast(device.type, torch.bfloat16):
        out = block_sparse_attention(q, k, v, layout, backend="torch")
    assert out.dtype == torch.bfloat16
    low = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, block_sparse_attention(*low, layout, backend="torch"))
