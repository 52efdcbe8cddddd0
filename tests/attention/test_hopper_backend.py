"""The Hopper kernels against the reference, as operators, and when they are chosen.

Where there is no such GPU an emulation stands for the kernels; all around them is the same.
"""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from spion_ds import compiling
from spion_ds.attention import (
    BlockLayout,
    SparseSelfAttention,
    block_sparse_attention,
    prepare_layout,
)
from spion_ds.attention.functional import choose_backend
from spion_ds.attention.hopper import backend as hopper_backend
from spion_ds.attention.hopper import plan as hopper_plan
from spion_ds.attention.options import AttentionOptions
from spion_ds.durable_files import sha256_of
from spion_ds.errors import ConfigError
from spion_ds.sparsity import SpionSparsityConfig

from .cases import (
    ON_CPU,
    ON_GPU,
    TOLERANCES,
    Case,
    assert_agree,
    assert_is_the_reference,
    evaluate,
    make,
    with_far_padded_keys,
)
from .hopper_emulation import emulated_hopper

_IS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not _IS_HOPPER, reason="no CUDA device of capability 9.0")

LENGTH, BLOCK, BLOCKS = 300, 64, 5

CASES = [
    Case(block=block, head_dim=head_dim, dtype=dtype, **features)
    for block in (64, 128)
    for head_dim in (64, 128)
    for dtype in (torch.bfloat16, torch.float16)
    for features in (
        {"lengths": "odd", "kept": "hot_columns"},
        {"lengths": "odd", "kept": "empty_rows", "padding": "holes", "pruned": "excluded"},
        {"kept": "hot_columns", "per_head": True, "grouped": True, "padding": "tail"},
        {"kept": "empty_rows", "grouped": True, "padding": "whole_sample", "zero_padded": True},
    )
]


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=[pytest.mark.gpu, on_hopper])])
def hopper(request):
    """The device that the backend serves."""
    torch.compiler.reset()
    if request.param == "gpu":
        yield torch.device("cuda", 0)
        return
    with emulated_hopper():
        yield torch.device("cpu")


def layout_of(device: torch.device, kept: int = 9, heads: int = 1) -> BlockLayout:
    """Return a layout with a diagonal and the first blocks beside it, others for each head."""
    mask = torch.eye(BLOCKS, dtype=torch.bool).flatten().repeat(heads, 1)
    for head, of_head in enumerate(mask):
        of_head[(~of_head).nonzero()[head : head + kept - BLOCKS, 0]] = True
    mask = mask.view(heads, BLOCKS, BLOCKS)
    return BlockLayout.from_mask(mask if heads > 1 else mask[0], BLOCK).to(device)


def drawn(
    device: torch.device, batch: int = 2, dtype: torch.dtype = torch.bfloat16
) -> list[Tensor]:
    """Return q of four heads, k and v of two."""
    shapes = [(batch, heads, LENGTH, 64) for heads in (4, 2, 2)]
    return [torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes]


def padding_of(device: torch.device) -> Tensor:
    return torch.arange(LENGTH, device=device) < torch.tensor([[LENGTH], [140]], device=device)


def attend(q: Tensor, k: Tensor, v: Tensor, layout: BlockLayout, **options: Any) -> Tensor:
    return block_sparse_attention(q, k, v, layout, backend="hopper", **options)


def step(function: Any, qkv: list[Tensor], *arguments: Any, **options: Any) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    out = function(*qkv, *arguments, **options)
    return [out, *torch.autograd.grad(out.float().square().sum(), qkv)]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference(case, device):
    assert_is_the_reference(case, "hopper", ON_GPU, device)


# One block and head_dim: these only choose among kernels.
@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_what_surrounds_the_kernels_agrees_with_the_reference(case):
    with emulated_hopper():
        assert_is_the_reference(case, "hopper", ON_CPU, torch.device("cpu"))


@pytest.mark.gpu
@on_hopper
def test_runs_on_a_thread_that_has_not_used_the_gpu(device):
    qkv, layout = drawn(device), layout_of(device)
    attend(*qkv, layout)  # leaves memory, which the thread need not ask the runtime for
    expected = attend(*qkv, layout)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(attend, *qkv, layout).result()
    assert torch.equal(found, expected)


@pytest.mark.gpu
@on_hopper
@pytest.mark.usefixtures("poisoned")
def test_writes_every_element_the_same_way_twice(device):
    case = Case(block=64, head_dim=64, dtype=torch.bfloat16, lengths="odd", kept="empty_rows")
    inputs = make(case, ON_GPU, device)
    first, second = evaluate(inputs, "hopper"), evaluate(inputs, "hopper")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
        assert not a.isnan().any()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_what_padded_keys_hold_does_not_matter(head_dim, device):
    case = Case(block=64, head_dim=head_dim, dtype=torch.bfloat16, padding="holes")
    inputs = make(case, ON_GPU, device)
    far = evaluate(with_far_padded_keys(inputs), "hopper")
    assert_agree(far, evaluate(inputs, "hopper"), TOLERANCES[case.dtype])


def placed(x: Tensor, how: str) -> Tensor:
    """Return the same values, where the copy engine may not be able to read them."""
    if how == "of one projection":
        fresh = x.new_empty(x.shape[0], x.shape[2], 3, x.shape[1], 64)[:, :, 1].transpose(1, 2)
    elif how == "wider rows":
        fresh = x.new_empty(*x.shape[:3], 65)[..., :64]
    elif how == "transposed":
        fresh = x.new_empty(*x.shape[:2], 64, x.shape[2]).mT
    elif how == "not aligned":
        fresh = x.new_empty(x.numel() + 1)[1:].view(x.shape)
    else:
        return x[:, :1].expand(-1, x.shape[1], -1, -1)
    return fresh.copy_(x)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    "how", ["of one projection", "wider rows", "transposed", "not aligned", "expanded"]
)
def test_inputs_may_lie_anywhere(how, device):
    layout = layout_of(device)
    strange = [placed(x.detach(), how).requires_grad_() for x in drawn(device)]
    plain = [x.detach().contiguous().clone().requires_grad_() for x in strange]
    grad = placed(torch.randn_like(plain[0]), how)
    results = []
    for qkv in (strange, plain):
        out = attend(*qkv, layout)
        results.append([out, *torch.autograd.grad(out, qkv, grad)])
    assert_equal(*results)
    lists = hopper_plan.work_lists(layout, hopper_plan.Problem.of(*strange[:2]))
    arguments = (*[x.detach() for x in strange], *lists, None, False, 0.125, True, False)
    torch.library.opcheck(
        torch.ops.spion_ds.hopper_attention_fwd.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("rich", [False, True], ids=["plain", "padding and a layout a head"])
def test_operators_pass_opcheck(rich, hopper):
    hopper_backend.load()
    qkv, layout = drawn(hopper), layout_of(hopper, heads=4 if rich else 1)
    lists = hopper_plan.work_lists(layout, hopper_plan.Problem.of(*qkv[:2]))
    rest = (*lists, padding_of(hopper) if rich else None, rich, 0.125, True, rich)
    forward = torch.ops.spion_ds.hopper_attention_fwd.default
    torch.library.opcheck(forward, (*qkv, *rest))
    inputs = [x.detach() for x in qkv]
    out, lse = forward(*inputs, *rest)
    torch.library.opcheck(
        torch.ops.spion_ds.hopper_attention_bwd.default,
        (torch.randn_like(out), *inputs, out, lse, *rest),
        # Its results are gradients; nothing differentiates them again.
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("heads", [1, 4], ids=["one layout", "a layout a head"])
def test_compiles_to_one_graph_with_the_same_bits(heads, hopper):
    qkv, graphs = drawn(hopper), []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    once = torch.compile(attend, backend=count, fullgraph=True)
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    options = {"key_padding_mask": padding_of(hopper), "zero_padded_queries": True}
    for kept in (7, 9, 12):
        layout = layout_of(hopper, kept, heads)
        prepare_layout(*qkv[:2], layout, backend="hopper")
        expected = step(attend, qkv, layout, **options)
        for function in (once, compiled):
            assert_equal(step(function, qkv, layout, **options), expected)
    assert len(graphs) == 1


def test_a_graph_without_the_lists_says_what_to_do(hopper):
    qkv, layout = drawn(hopper), layout_of(hopper)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"prepare_layout\(q, k, layout\)"):
        torch.compile(attend, backend="eager", fullgraph=True)(*qkv, layout)
    # Without fullgraph it breaks there once, and works.
    compiled = torch.compile(attend, backend="eager")
    for _ in range(2):
        assert torch.equal(compiled(*qkv, layout), attend(*qkv, layout))


def test_a_prepared_module_is_one_graph_for_all_its_patterns(hopper):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    qkv = drawn(hopper)
    config = SpionSparsityConfig(4, BLOCK)
    attention = SparseSelfAttention(config, backend="hopper")
    compiled = torch.compile(attention, backend=count, fullgraph=True)
    for kept in (7, 9, 12):
        config.set_pattern(layout_of(hopper, kept).to_mask())
        attention.prepare(LENGTH, hopper, *qkv[:2])
        assert_equal(step(compiled, qkv), step(attention, qkv))
    assert len(graphs) == 1
    # A smaller last batch has lists, and a graph, of its own.
    few = drawn(hopper, batch=1)
    attention.prepare(LENGTH, hopper, *few[:2])
    for tensors in (few, qkv, few):
        assert_equal(step(compiled, tensors), step(attention, tensors))
    assert len(graphs) == 2


def test_a_module_prepared_once_has_the_lists_of_later_masks(hopper):
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    qkv = drawn(hopper)
    attention = SparseSelfAttention(SpionSparsityConfig(4, BLOCK), backend="hopper")
    attention.prepare(LENGTH, hopper, *qkv[:2])
    compiled = torch.compile(attention, backend=count, fullgraph=True)
    for kept in (7, 9, 12):
        attention.set_mask(layout_of(hopper, kept).to_mask())
        assert_equal(step(compiled, qkv), step(attention, qkv))
    assert len(graphs) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_bits(reentrant, hopper):
    qkv, layout = drawn(hopper), layout_of(hopper)
    found = []
    for run in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=reentrant)):
        for x in qkv:
            x.grad = None
        run(*qkv, layout).float().square().sum().backward()
        found.append([x.grad for x in qkv])
    assert_equal(*found)


def test_autocast_computes_in_its_dtype(hopper):
    qkv, layout = drawn(hopper, dtype=torch.float32), layout_of(hopper)
    with torch.autocast(hopper.type, torch.bfloat16):
        out = attend(*qkv, layout)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attend(*(x.bfloat16() for x in qkv), layout))


@pytest.mark.gpu
@on_hopper
def test_inductor_gives_the_gradients_of_eager_mode(device):
    torch.compiler.reset()
    config = SpionSparsityConfig(4, BLOCK)
    config.set_pattern(layout_of(device).to_mask())
    attention = SparseSelfAttention(config, backend="hopper")
    into, out_of = (torch.nn.Linear(*s).to(device, torch.bfloat16) for s in ((64, 768), (256, 64)))
    x = torch.randn(2, LENGTH, 64, device=device, dtype=torch.bfloat16)
    attention.prepare(LENGTH, device, torch.empty(2, 4, LENGTH, 64, device=device, dtype=x.dtype))

    def model(x: Tensor) -> Tensor:
        qkv = into(x).unflatten(-1, (3, 4, 64))
        out = attention(*(part.transpose(1, 2) for part in qkv.unbind(dim=2)))
        return out_of(out.transpose(1, 2).flatten(2))

    found = []
    for function in (model, torch.compile(model, fullgraph=True)):
        for parameter in (*into.parameters(), *out_of.parameters()):
            parameter.grad = None
        function(x).float().square().sum().backward()
        found.append([p.grad for p in (*into.parameters(), *out_of.parameters())])
    for a, b in zip(*found, strict=True):
        # The same kernels on the same operands; around them a few roundings of bf16 differ.
        assert (a - b).norm() <= 1e-2 * b.norm()


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("zero", [False, True])
def test_a_captured_step_follows_its_inputs(zero, device):
    qkv, layout, real = drawn(device), layout_of(device), padding_of(device)
    options = {"key_padding_mask": real, "zero_padded_queries": zero}
    hopper_backend.load()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with pytest.raises(ConfigError, match="run the step once before"), torch.cuda.graph(graph):
        attend(*(x.detach() for x in qkv), layout, **options)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(attend, qkv, layout, **options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(attend, qkv, layout, **options)
    for _ in range(2):
        with torch.no_grad():
            for x in qkv:
                x.copy_(torch.randn_like(x))
            real[1] = torch.rand(LENGTH, device=device) < 0.5
        graph.replay()
        assert_equal(captured, step(attend, qkv, layout, **options))


def auto_of(head_dim: int = 128, length: int = 1024, block: int = 64, **options: Any) -> str:
    """Return the backend that "auto" takes for a call on a GPU."""
    given = {
        **{"key_padding_mask": None, "causal": False, "scale": 0.1, "pruned": "zero"},
        **{"dropout_p": 0.0, "dropout_key": None, "zero_padded_queries": False},
        **options,
    }
    blocks = -(-length // block)
    layout = BlockLayout.from_mask(torch.eye(blocks), block)
    with FakeTensorMode():
        q = torch.empty(1, 2, length, head_dim, dtype=torch.bfloat16, device="cuda")
        return choose_backend(q, layout, AttentionOptions(**given))


@pytest.mark.parametrize(
    ("call", "taken"),
    [
        ({}, True),
        ({"block": 128}, True),
        ({"head_dim": 64, "length": 4096}, True),
        ({"head_dim": 64, "length": 2048}, False),
        ({"head_dim": 32, "length": 4096}, False),
        ({"block": 32}, False),
        ({"causal": True}, False),
        ({"dropout_p": 0.1}, False),
        ({"key_padding_mask": torch.ones(1, 1024, dtype=torch.bool)}, False),
    ],
    ids=str,
)
def test_auto_follows_the_rule(call, taken, monkeypatch):
    monkeypatch.setattr(hopper_backend, "is_hopper", lambda device: True)
    monkeypatch.setattr(hopper_backend, "is_built", lambda: True)
    assert (auto_of(**call) == "hopper") is taken
    # Whatever the rule says: not on another GPU, and not before the kernels are built.
    monkeypatch.setattr(hopper_backend, "is_built", lambda: False)
    assert auto_of(**call) != "hopper"
    monkeypatch.setattr(hopper_backend, "is_built", lambda: True)
    monkeypatch.setattr(hopper_backend, "is_hopper", lambda device: False)
    assert auto_of(**call) != "hopper"


@pytest.mark.gpu
@on_hopper
def test_auto_takes_the_kernels_once_they_are_built_compiled_or_not(device):
    torch.compiler.reset()
    hopper_backend.load()
    layout = layout_of(device)
    q, k, v = (
        torch.randn(2, 4, LENGTH, 128, device=device, dtype=torch.bfloat16) for _ in range(3)
    )
    prepare_layout(q, k, layout)
    assert layout.plans
    expected = attend(q, k, v, layout)
    for function in (
        block_sparse_attention,
        torch.compile(block_sparse_attention, backend="aot_eager", fullgraph=True),
    ):
        assert torch.equal(function(q, k, v, layout), expected)
    padded = block_sparse_attention(q, k, v, layout, key_padding_mask=padding_of(device))
    triton = block_sparse_attention(
        q, k, v, layout, key_padding_mask=padding_of(device), backend="triton"
    )
    assert torch.equal(padded, triton)


def test_what_cannot_be_prepared_is_named_and_other_backends_need_nothing():
    qkv, layout = drawn(torch.device("cpu")), layout_of(torch.device("cpu"))
    with pytest.raises(ConfigError, match="unknown attention backend 'hoper'"):
        prepare_layout(*qkv[:2], layout, backend="hoper")
    with pytest.raises(ConfigError, match="the layout is 5×5 blocks of 64; 200 queries"):
        prepare_layout(qkv[0][:, :, :200], qkv[1], layout)
    for backend in ("auto", "cpp"):
        prepare_layout(*qkv[:2], layout, backend=backend)
    assert layout.plans == {}


def test_auto_finds_what_was_compiled_and_never_compiles(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "_PACKAGE", tmp_path)
    monkeypatch.setenv("SPION_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPION_DS_NO_COMPILE", raising=False)
    loaded: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("auto compiles")

    monkeypatch.setattr("torch.utils.cpp_extension.load", fail)
    is_built = hopper_backend._is_built.__wrapped__
    assert not is_built()
    cached = compiling.HOPPER.cached()
    assert not cached.parent.exists()
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert not is_built()  # it may be cut off
    cached.with_name("_hopper.so.sha256").write_text(sha256_of(cached))
    assert is_built()
    monkeypatch.setenv("SPION_DS_NO_COMPILE", "1")
    assert not is_built()
    shipped = tmp_path / "_hopper.so"
    shipped.touch()
    assert is_built()
    assert loaded == [cached, shipped]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": torch.float32}, "bf16 and fp16"),
        ({"head_dim": 32}, "head_dim 64 and 128"),
        ({"block": 32}, "blocks of"),
        ({"causal": True}, "no causal masking"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"scale": -1.0}, "scale above 0"),
        ({}, "capability 9.0"),
    ],
    ids=str,
)
def test_what_it_does_not_take_is_named(change, words):
    values = {"dtype": torch.bfloat16, "head_dim": 64, "block": 64, **change}
    options = {name: x for name, x in values.items() if name in ("causal", "dropout_p", "scale")}
    q = torch.randn(1, 1, 64, values["head_dim"], dtype=values["dtype"])
    layout = BlockLayout.from_mask(torch.eye(-(-64 // values["block"])), values["block"])
    with pytest.raises(ConfigError, match=words):
        block_sparse_attention(q, q, q, layout, backend="hopper", **options)


def test_a_shipped_library_is_loaded_and_nothing_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "_PACKAGE", tmp_path)
    monkeypatch.setenv("SPION_DS_NO_COMPILE", "1")
    load = hopper_backend._load.__wrapped__  # what this process has loaded is not asked
    with pytest.raises(ConfigError, match="SPION_DS_NO_COMPILE is set"):
        load()
    loaded: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    shipped = tmp_path / "_hopper.cpython-311-x86_64-linux-gnu.so"
    shipped.touch()
    load()
    assert loaded == [shipped]


def test_it_is_compiled_for_wgmma_into_the_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(compiling, "_PACKAGE", tmp_path)
    monkeypatch.setenv("SPION_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SPION_DS_NO_COMPILE", raising=False)
    asked: dict[str, Any] = {}

    def compile(**arguments: Any) -> None:
        asked.update(arguments)
        (Path(arguments["build_directory"]) / f"{arguments['name']}.so").touch()

    monkeypatch.setattr("torch.utils.cpp_extension.load", compile)
    loaded: list[Path] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    hopper_backend._load.__wrapped__()
    assert loaded == [compiling.HOPPER.cached()]
    assert loaded[0].is_file()
    names = {Path(source).name for source in asked["sources"]}
    assert {"binding.cpp", "forward.cu", "backward_dq.cu", "backward_dkv.cu"} <= names
    assert "-gencode=arch=compute_90a,code=sm_90a" in asked["extra_cuda_cflags"]


@pytest.mark.skipif(compiling.find_nvcc() is None, reason="nvcc is what is asked, and not here")
@pytest.mark.parametrize(
    "source", [x for x in compiling.HOPPER.sources() if x.suffix == ".cu"], ids=lambda x: x.stem
)
def test_the_compiler_lets_products_run_side_by_side(source, tmp_path):
    command = [compiling.find_nvcc(), "-cubin", "-std=c++17", *compiling.HOPPER_FLAGS]
    command += ["--ptxas-options=-v", "-o", tmp_path / "kernels.cubin", source]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # It says so where it waits after each wgmma, for want of registers (C7512) or other reasons.
    assert "C75" not in done.stderr, done.stderr
    assert "registers" in done.stderr
