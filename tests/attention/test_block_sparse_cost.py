"""What block-sparse attention costs: memory with the kept blocks, and no compile for a layout."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spion_ds.attention import BlockLayout, block_sparse_attention, torch_backend

from .cases import (
    MIXED,
    ON_CPU,
    SMALLER,
    Case,
    assert_agree,
    evaluate,
    make,
    needs_gpu,
    needs_triton,
)


class Largest(TorchDispatchMode):
    """Watches for the largest tensor that an operator returns, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                size = leaf.untyped_storage().nbytes()
                self.bytes[str(func)] = max(size, self.bytes.get(str(func), 0))
        return result


def spion_like(n: int) -> torch.Tensor:
    """A diagonal, two hot columns, and one block more a row."""
    mask = torch.eye(n, dtype=torch.bool)
    mask[:, [1, n // 2]] = True
    mask[torch.arange(n), torch.randint(n, (n,))] = True
    return mask


def test_pytorchs_operators_make_nothing_of_the_size_of_the_attention_matrix():
    length, block = 4096, 32
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    real = torch.arange(length)[None] < 4000
    layout = BlockLayout.from_mask(spion_like(length // block).tril(), block)
    options = {"key_padding_mask": real, "causal": True, "dropout_p": 0.3}
    with Largest() as largest:
        out = block_sparse_attention(q, k, v, layout, backend="torch", **options)
        out.sum().backward()
    assert "aten.index_copy_.default" in largest.bytes  # both passes are seen
    # One byte an entry is the smallest that an (L, L) tensor could be.
    assert max(largest.bytes.values()) < length * length, largest.bytes


@pytest.mark.parametrize("limit", [1, 10_000, 100_000])
def test_results_do_not_depend_on_the_memory_of_a_piece(limit, monkeypatch):
    inputs = make(MIXED, ON_CPU, torch.device("cpu"))
    expected = evaluate(inputs, "torch")
    monkeypatch.setitem(torch_backend._PIECE_BYTES, "cpu", limit)
    # Other batches of the same products: a library may add up in another order, in float32.
    assert_agree(evaluate(inputs, "torch"), expected, 1e-6)


class Launches:
    """Stands in for a kernel: keeps what a launch would compile in, and computes nothing."""

    def __init__(self, kernel, data: list[str]) -> None:
        self.__name__ = f"recorded {kernel.__name__}"
        self.signature = inspect.signature(kernel.fn)
        self.data = data
        self.compiled_in: list[dict] = []

    def __getitem__(self, grid):
        def launch(*args, num_warps, num_stages, **kwargs):
            arguments = self.signature.bind(*args, **kwargs).arguments
            kept = {name: fixed(x) for name, x in arguments.items() if name not in self.data}
            self.compiled_in.append(kept | {"warps": num_warps, "stages": num_stages})

        return launch


def fixed(value):
    """What of an argument a compiled kernel depends on: of a tensor, its dtype."""
    if isinstance(value, tuple):
        return tuple(fixed(part) for part in value)
    return value.dtype if isinstance(value, torch.Tensor) else value


@needs_triton
@pytest.mark.parametrize("case", [Case(), MIXED], ids=str)
def test_a_new_layout_changes_nothing_that_is_compiled_in(case, device, monkeypatch):
    from spion_ds.attention.triton import backend as triton_backend
    from spion_ds.attention.triton.tokens import DATA

    kernels = {}
    for name in ("fwd", "bwd"):
        name = f"block_sparse_attention_{name}_kernel"
        kernels[name] = Launches(getattr(triton_backend, name), DATA)
        monkeypatch.setattr(triton_backend, name, kernels[name])
    inputs = make(case, SMALLER, device)
    shape = inputs.layout.to_mask().shape
    for mask in (torch.eye(*shape[-2:]).expand(shape), torch.ones(shape), torch.rand(shape) < 0.4):
        q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
        layout = BlockLayout.from_mask(mask, case.block).to(device)
        out = block_sparse_attention(q, k, v, layout, backend="triton", **inputs.options)
        out.backward(inputs.grad)
    for kernel in kernels.values():
        # The backward pass of one layout may take two launches.
        launches = len(kernel.compiled_in) // 3
        first = kernel.compiled_in[:launches]
        assert kernel.compiled_in == 3 * first


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_a_new_layout_compiles_nothing(device, monkeypatch):
    import triton

    compiled = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about)
    )
    # A head_dim of its own, so that the first layout does compile.
    q, k, v = (torch.randn(2, 2, 1000, 40, device=device, requires_grad=True) for _ in range(3))
    for index, mask in enumerate((spion_like(63), torch.eye(63), torch.ones(63, 63))):
        layout = BlockLayout.from_mask(mask, 16).to(device)
        block_sparse_attention(q, k, v, layout, backend="triton").sum().backward()
        if index == 0:
            assert len(compiled) == 3
    assert len(compiled) == 3


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_a_profilers_hook_hears_of_every_launch(device):
    import triton

    # Float32 takes a launch for the forward pass and two for the backward one.
    q, k, v = (torch.randn(1, 2, 128, 16, device=device, requires_grad=True) for _ in range(3))
    layout = BlockLayout.from_mask(torch.ones(2, 2), 64).to(device)
    heard = []

    def hear(metadata):
        heard.append(metadata.get()["name"])

    hooks = triton.knobs.runtime.launch_enter_hook
    for _ in range(2):
        block_sparse_attention(q, k, v, layout, backend="triton").sum().backward()
    hooks.add(hear)
    try:
        block_sparse_attention(q, k, v, layout, backend="triton").sum().backward()
    finally:
        hooks.remove(hear)
    block_sparse_attention(q, k, v, layout, backend="triton").sum().backward()
    attention = [name for name in heard if name.startswith("block_sparse_attention")]
    assert len(attention) == 3, heard


def peak_bytes(attend, tensors, grad) -> int:
    """Most memory that a forward and backward pass held, beyond its arguments."""
    torch.autograd.grad(attend(*tensors), tensors, grad)  # compiles, and allocates workspaces
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(attend(*tensors), tensors, grad)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_peak_memory_is_within_a_tenth_of_flash_attention(device):
    shape = (4, 8, 4096, 64)
    *tensors, grad = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(4))
    tensors = [x.requires_grad_() for x in tensors]
    layout = BlockLayout.from_mask(spion_like(64), 64).to(device)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = peak_bytes(F.scaled_dot_product_attention, tensors, grad)
    ours = peak_bytes(
        lambda q, k, v: block_sparse_attention(q, k, v, layout, backend="triton"), tensors, grad
    )
    assert ours <= 1.1 * flash
