"""SparseSelfAttention under torch.compile: one graph a phase, and never one that is out of date."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spion_ds.attention import SparseSelfAttention
from spion_ds.errors import CheckpointError, ConfigError
from spion_ds.sparsity import BigBirdSparsityConfig, SpionSparsityConfig

from .cases import needs_gpu

LENGTH, BLOCK, HEADS = 80, 16, 2
BLOCKS = 5
CPU = torch.device("cpu")
BUFFER = pytest.mark.parametrize("length", [None, LENGTH], ids=["no buffer", "buffer"])


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch.compiler.reset()


def module(length: int | None = None, **settings) -> SparseSelfAttention:
    config = SpionSparsityConfig(HEADS, BLOCK)
    return SparseSelfAttention(config, max_seq_length=length, **settings)


def mask(kept: int) -> Tensor:
    """The diagonal, and some blocks more."""
    found = torch.eye(BLOCKS, dtype=torch.bool)
    found.view(-1)[1 : 1 + kept] = True
    return found


def switched(kept: int, length: int | None = LENGTH) -> SparseSelfAttention:
    attention = module(length)
    attention.set_mask(mask(kept))
    return attention


def drawn(length: int = LENGTH) -> list[Tensor]:
    torch.manual_seed(length)
    return [torch.randn(2, HEADS, length, 8, requires_grad=True) for _ in range(3)]


class Graphs:
    """A backend that counts graphs, and runs them as they are."""

    def __init__(self) -> None:
        self.traced = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list) -> Callable:
        self.traced += 1
        return graph.forward

    def of(self, function: Callable, **options) -> Callable:
        return torch.compile(function, backend=self, fullgraph=True, **options)


def results(function: Callable, tensors: list[Tensor], *others) -> list[Tensor]:
    out = function(*tensors, *others)
    return [out, *torch.autograd.grad(out.square().sum(), tensors)]


def assert_same(function: Callable, expected: Callable, *others, length: int = LENGTH) -> None:
    tensors = drawn(length)
    wanted = results(expected, tensors, *others)
    for found, want in zip(results(function, tensors, *others), wanted, strict=True):
        assert torch.equal(found, want)


@BUFFER
@pytest.mark.parametrize("prepared", [False, True])
def test_a_phase_is_one_graph_whatever_the_mask(length, prepared):
    attention, graphs = module(length), Graphs()
    if prepared:
        attention.prepare(LENGTH, CPU)
    compiled = graphs.of(attention)
    assert_same(compiled, module())
    for kept in (3, 9, 5):
        attention.set_mask(mask(kept))
        assert_same(compiled, switched(kept))
    assert graphs.traced == 2
    attention.set_mask(None)
    assert_same(compiled, module())
    assert graphs.traced == 2


@BUFFER
def test_inductor_has_the_same_outputs(length):
    attention = module(length)
    compiled = torch.compile(attention, fullgraph=True)
    for kept in (3, 9):
        attention.set_mask(mask(kept))
        assert_same(compiled, switched(kept))


def test_a_pattern_set_in_the_configuration_is_seen():
    attention, graphs = module(), Graphs()
    compiled = graphs.of(attention)
    compiled(*drawn())
    for kept in (3, 9, 5):
        attention.sparsity_config.set_pattern(mask(kept))
        assert_same(compiled, switched(kept))


class Blind:
    def add(self, *_, **__) -> None:
        pass


@pytest.mark.parametrize("known", ["prepared", "observed"])
def test_layers_that_are_compiled_one_by_one_share_their_graphs(known):
    graphs, layers = Graphs(), [module() for _ in range(12)]
    # More than the eight that torch.compile makes of a function.
    compiled = [graphs.of(layer) for layer in layers]
    for kept, (layer, run) in enumerate(zip(layers, compiled, strict=True)):
        run(*drawn())
        if known == "prepared":
            layer.prepare(LENGTH, CPU)
        else:
            layer.observer = Blind()
            run(*drawn())
            layer.observer = None
        layer.set_mask(mask(kept))
        assert_same(run, switched(kept))
    assert graphs.traced == (2 if known == "prepared" else 3)


def test_a_mask_that_is_loaded_is_seen_and_not_traced_again():
    attention, graphs = module(LENGTH), Graphs()
    compiled = graphs.of(attention)
    compiled(*drawn())
    for kept in (3, 9, 5):
        attention.load_state_dict(switched(kept).state_dict(), assign=kept == 9)
        assert_same(compiled, switched(kept))
    assert graphs.traced == 2
    attention.load_state_dict(module(LENGTH).state_dict())
    assert_same(compiled, module())


@pytest.mark.parametrize("phase", ["dense", "sparse"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_mask_that_is_copied_behind_a_compiled_pass_is_an_error_until_refreshed(
    phase, backend, recomputed
):
    attention = module(LENGTH) if phase == "dense" else switched(3)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if recomputed:
            return checkpoint(attention, q, k, v, use_reentrant=False)
        return attention(q, k, v)

    compiled = torch.compile(attend, backend=backend, fullgraph=True)
    assert_same(compiled, attention)
    attention.packed_mask.copy_(attention.packed_mask.clone())
    assert_same(compiled, attention)  # the same mask, as after a broadcast of DDP's
    attention.packed_mask.copy_(switched(9).packed_mask)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"call attention.refresh\(\) before the next pass"):
            compiled(*drawn())
    attention.refresh()
    assert_same(compiled, switched(9))
    attention.packed_mask.fill_(1)
    with pytest.raises(ConfigError, match="behind a compiled pass"):
        compiled(*drawn())
    with pytest.raises(CheckpointError, match="holds no mask"):
        attention.refresh()


def test_graphs_are_of_numbers_of_blocks():
    attention, graphs = module(LENGTH), Graphs()
    attention.set_mask(mask(9))
    compiled = graphs.of(attention, dynamic=True)
    for length in (80, 75, 70, 40, 38):
        assert_same(compiled, switched(9), length=length)
    assert graphs.traced == 2


@pytest.mark.parametrize("causal", [False, True])
def test_heads_and_batches_may_be_dynamic(causal):
    attention, graphs = module(causal=causal), Graphs()
    compiled = graphs.of(attention, dynamic=True)
    for batch, key_heads in ((2, 2), (3, 2), (3, 1), (2, 1)):
        tensors = [torch.randn(batch, heads, LENGTH, 8) for heads in (HEADS, key_heads, key_heads)]
        assert torch.equal(compiled(*tensors), attention(*tensors))


def test_what_a_compiled_pass_reads_stays_whatever_other_lengths_follow():
    attention, graphs = module(longer="local"), Graphs()
    attention.set_mask(mask(9))
    compiled = graphs.of(attention)
    compiled(*drawn())
    for blocks in range(1, 30):
        attention(*drawn(blocks * BLOCK))
    compiled(*drawn())
    assert graphs.traced == 1


def test_another_mask_is_set_whatever_lengths_were_traced_before():
    attention, graphs = module(), Graphs()
    compiled = graphs.of(attention, dynamic=False)
    for length in (LENGTH, 2 * LENGTH):
        compiled(*drawn(length))
    attention.set_mask(mask(3))  # too short for one of them
    assert_same(compiled, switched(3, None))
    with pytest.raises(Exception, match="found at 80 tokens and the input has 160"):
        compiled(*drawn(2 * LENGTH))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("by_keys", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kept", [None, 9])
def test_every_pass_is_one_graph_without_preparing(padded, by_keys, causal, kept):
    settings = {"causal": causal, "dropout_p": 0.3 * by_keys}
    attention, expected = module(**settings), module(**settings)
    for one in (attention, expected):
        one.set_mask(None if kept is None else mask(kept))
    real = torch.arange(LENGTH) < torch.tensor([[LENGTH], [50]]) if padded else None
    keys = torch.arange(2, dtype=torch.int32) if by_keys else None
    graphs = Graphs()
    assert_same(graphs.of(attention), expected, real, keys)
    assert graphs.traced == 1


def test_a_static_layout_is_one_graph_without_preparing():
    config = BigBirdSparsityConfig(HEADS, BLOCK, num_sliding_window_blocks=1)
    attention, graphs = SparseSelfAttention(config), Graphs()
    assert attention.layout(LENGTH, CPU) is not None
    assert_same(graphs.of(SparseSelfAttention(config)), attention)
    assert graphs.traced == 1


@pytest.mark.parametrize("name", ["show_attention", "check_packed_mask"])
def test_the_operators_pass_opcheck(name):
    attention = switched(3)
    q, k, _ = (x.detach() for x in drawn())
    real = torch.ones(2, LENGTH, dtype=torch.bool)
    arguments = {
        "show_attention": (q, k, real, attention._ticket),
        "check_packed_mask": (attention._ticket,),
    }
    torch.library.opcheck(getattr(torch.ops.spion_ds, name).default, arguments[name])


@pytest.mark.gpu
@needs_gpu
@BUFFER
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_masks_are_set_copied_and_loaded_on_a_gpu(length, mode):
    attention, device = module(length).cuda(), torch.device("cuda", torch.cuda.current_device())
    compiled = torch.compile(attention, mode=mode, fullgraph=True)
    tensors = [x.detach().to(device) for x in drawn()]

    def agrees(kept: int) -> bool:
        wanted = switched(kept, None)(*tensors)
        # Of the third pass on TorchInductor would replay a CUDA graph.
        return all(torch.equal(compiled(*tensors), wanted) for _ in range(4))

    for _ in range(4):
        compiled(*tensors)
    for kept in (3, 9, 5):
        attention.set_mask(mask(kept))
        assert agrees(kept)
    if length is None:
        return
    attention.load_state_dict(switched(7).state_dict())
    assert agrees(7)
    attention.packed_mask.copy_(switched(2).packed_mask)
    with pytest.raises(ConfigError, match="behind a compiled pass"):
        compiled(*tensors)
    attention.refresh()
    assert agrees(2)


@pytest.mark.gpu
@needs_gpu
def test_a_captured_pass_is_prepared_or_refused_and_keeps_its_layout():
    attention, tensors = switched(9, None), [x.detach().cuda() for x in drawn()]
    attention.longer = "local"
    with (
        pytest.raises(ConfigError, match=r"call attention.prepare\(length, device\) before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        attention(*tensors)
    expected = attention(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(*tensors)
    for blocks in range(1, 30):
        attention(*(x.detach().cuda() for x in drawn(blocks * BLOCK)))
    graph.replay()
    assert torch.equal(out, expected)
