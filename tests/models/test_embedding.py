"""The embedding's gradient: PyTorch's in float64, the same bits twice, whole under a compiler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from spion_ds.models import embedding
from spion_ds.models.embedding import Embedding, embedding_gradient, one_hot_product

COUNT, DIM, SAMPLES, LENGTH = 17, 8, 5, 512


def case(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """Return gradients and ids of which two never occur and one is half of all."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(COUNT - 2, (SAMPLES, LENGTH), generator=draw)
    ids = torch.where(torch.rand(ids.shape, generator=draw) < 0.5, 0, ids)
    gradient = 1.0 + torch.randn(SAMPLES, LENGTH, DIM, generator=draw)
    return gradient.to(device, dtype), ids.to(device)


def assert_right(found: torch.Tensor, gradient: torch.Tensor, ids: torch.Tensor) -> None:
    """Compare with PyTorch's own gradient in float64, where each id has up to 1400 terms."""
    weight = torch.zeros(COUNT, DIM, dtype=torch.float64, requires_grad=True)
    F.embedding(ids.cpu(), weight).backward(gradient.double().cpu())
    assert weight.grad is not None
    assert found.dtype == gradient.dtype
    # Float32 sums of terms of about 1; a bf16 result is rounded to 2^-9 of itself, and so are its
    # parts. Adding in bf16 is off by more than half.
    rtol, atol = (1e-2, 0.1) if gradient.dtype == torch.bfloat16 else (1e-5, 1e-3)
    torch.testing.assert_close(found.double().cpu(), weight.grad, rtol=rtol, atol=atol)
    assert not found[COUNT - 2 :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_on_a_cpu_is_that_of_exact_sums(dtype: torch.dtype) -> None:
    gradient, ids = case(dtype)
    found = embedding_gradient(gradient, ids, COUNT)
    assert_right(found, gradient, ids)
    if dtype == torch.float32:
        weight = torch.zeros(COUNT, DIM, requires_grad=True)
        F.embedding(ids, weight).backward(gradient)
        assert torch.equal(found, weight.grad)  # runs of earlier versions go on as they were


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "chunk", [2**25, 2 * LENGTH * COUNT, 1], ids=["at once", "2, 2, 1 samples", "1 each"]
)
def test_the_product_is_that_of_exact_sums_and_repeats_its_bits(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_CHUNK", chunk)
    gradient, ids = case(dtype)
    found = one_hot_product(gradient, ids, COUNT)
    assert_right(found, gradient, ids)
    assert torch.equal(one_hot_product(gradient, ids, COUNT), found)


@pytest.mark.parametrize("product", [False, True], ids=["as on a cpu", "as on a gpu"])
def test_a_compiler_takes_it_whole(product: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if product:
        monkeypatch.setattr(embedding, "embedding_gradient", one_hot_product)
    gradient, ids = case(torch.float32)
    module = Embedding(COUNT, DIM)
    found = []
    for forward in (module, torch.compile(module, backend="aot_eager", fullgraph=True)):
        module.weight.grad = None
        out = forward(ids)
        assert torch.equal(out, F.embedding(ids, module.weight))
        out.backward(gradient)
        found.append(module.weight.grad)
    # The same sums; a compiler's decomposition adds them in another order.
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("most", [512, 0], ids=["product", "PyTorch's"])
def test_a_gpu_has_the_gradient_of_exact_sums(
    dtype: torch.dtype, compiled: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_MOST_IDS", most)
    torch.compiler.reset()
    gradient, ids = case(dtype, "cuda")
    module = Embedding(COUNT, DIM, device="cuda", dtype=dtype)
    forward = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module
    found = []
    for _ in range(2):
        module.weight.grad = None
        out = forward(ids)
        assert torch.equal(out, F.embedding(ids, module.weight))
        out.backward(gradient)
        assert module.weight.grad is not None
        found.append(module.weight.grad.clone())
    assert_right(found[0], gradient, ids)
    if most:
        assert torch.equal(*found)
