"""The embedding's gradient as a product: PyTorch's, deterministic, whole under a compiler."""

from __future__ import annotations

import pytest
import torch

from spion_ds.models import embedding
from spion_ds.models.embedding import Embedding, embed, embedding_gradient

COUNT, DIM = 17, 8


def case(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return gradients (5, 64, 8) and ids of which some never occur and one is half of all."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(COUNT - 2, (5, 64), generator=draw)
    ids = torch.where(torch.rand(5, 64, generator=draw) < 0.5, 0, ids)
    gradient = torch.randn(5, 64, DIM, generator=draw)
    return gradient.to(device, dtype), ids.to(device)


def exact(gradient: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return PyTorch's own gradient in float64."""
    weight = torch.zeros(COUNT, DIM, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.embedding(ids.cpu(), weight).backward(gradient.double().cpu())
    assert weight.grad is not None
    return weight.grad


# A row is a sum of up to 160 terms of about 1; float32 rounds each addition, bf16 five sums of
# samples and their total, of about 8 each, to 2^-9.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [2**25, 2 * 64 * COUNT, 1], ids=["whole", "2, 2, 1", "1 each"])
def test_the_gradient_is_that_of_the_embedding(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_CHUNK", chunk)
    gradient, ids = case(dtype)
    found = embedding_gradient(gradient, ids, COUNT)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact(gradient, ids), rtol=0, atol=TOLERANCES[dtype])
    assert not found[COUNT - 2 :].any()  # ids that never occur
    assert torch.equal(embedding_gradient(gradient, ids, COUNT), found)


def test_autograd_uses_it_and_a_compiler_takes_it_whole() -> None:
    gradient, ids = case(torch.float32)

    def through(function) -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.randn(COUNT, DIM, generator=torch.Generator().manual_seed(1))
        weight.requires_grad_()
        out = function(weight, ids)
        out.backward(gradient)
        assert weight.grad is not None
        return out.detach(), weight.grad

    out, found = through(embed)
    compiled = torch.compile(embed, backend="aot_eager", fullgraph=True, dynamic=False)
    compiled_out, compiled_found = through(compiled)
    assert torch.equal(found, embedding_gradient(gradient, ids, COUNT))
    # The same operators in the same order.
    assert torch.equal(compiled_out, out)
    assert torch.equal(compiled_found, found)


def test_a_cpu_keeps_pytorchs_own() -> None:
    _, ids = case(torch.float32)
    assert "Embedding" in type(Embedding(COUNT, DIM)(ids).grad_fn).__name__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_takes_the_product_and_repeats_its_bits(dtype: torch.dtype, compiled: bool) -> None:
    gradient, ids = case(dtype, "cuda")
    module = Embedding(COUNT, DIM, device="cuda", dtype=dtype)
    forward = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module
    found = []
    for _ in range(2):
        module.weight.grad = None
        out = forward(ids)
        assert torch.equal(out, torch.nn.functional.embedding(ids, module.weight))
        out.backward(gradient)
        assert module.weight.grad is not None
        found.append(module.weight.grad.clone())
    assert torch.equal(*found)
    torch.testing.assert_close(
        found[0].double().cpu(), exact(gradient, ids), rtol=0, atol=TOLERANCES[dtype]
    )
