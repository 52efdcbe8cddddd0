"""Observers of SparseSelfAttention: they see each pass in training once, and change nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spion_ds.attention import (
    AttentionMapAccumulator,
    PooledMapAccumulator,
    SparseSelfAttention,
    attention_map,
)
from spion_ds.attention.observing import check_no_graph_trees
from spion_ds.errors import ConfigError
from spion_ds.random_bits import sample_keys
from spion_ds.sparsity import SpionSparsityConfig

from .cases import needs_gpu

LENGTH, BLOCK, HEADS, WIDTH = 64, 16, 2, 32
PHASES = pytest.mark.parametrize("phase", ["dense", "sparse"])


def mask() -> Tensor:
    return torch.eye(4, dtype=torch.bool) | (torch.arange(4) == 1)


def module(phase: str = "dense", **settings) -> SparseSelfAttention:
    attention = SparseSelfAttention(SpionSparsityConfig(HEADS, BLOCK), **settings)
    attention.set_mask(mask() if phase == "sparse" else None)
    return attention


def drawn() -> list[Tensor]:
    return [torch.randn(3, HEADS, LENGTH, 8, requires_grad=True) for _ in range(3)]


def real_tokens() -> Tensor:
    return torch.arange(LENGTH) < torch.tensor([[LENGTH], [50], [20]])


class Keeps:
    """Keeps all that it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple] = []

    def add(self, *tensors, **options) -> None:
        self.seen.append((*tensors, options))


@PHASES
def test_an_observer_changes_no_output_no_gradient_and_no_random_state(phase):
    attention, tensors, real = module(phase, dropout_p=0.2), drawn(), real_tokens()
    results = []
    for observer in (None, AttentionMapAccumulator()):
        torch.manual_seed(1)
        attention.observer = observer
        out = attention(*tensors, real)
        gradients = torch.autograd.grad(out.square().sum(), tensors)
        results.append([out, *gradients, torch.get_rng_state()])
    for without, observed in zip(*results, strict=True):
        assert torch.equal(without, observed)


@PHASES
def test_an_observer_makes_the_map_of_dense_attention_in_both_phases(phase):
    attention, tensors, real = module(phase, causal=True, scale=0.3), drawn(), real_tokens()
    attention.observer = observer = AttentionMapAccumulator()
    attention(*tensors, real)
    mean = observer.total / observer.count.clamp(min=1.0)[:, None]
    expected = attention_map(*tensors[:2], key_padding_mask=real, causal=True, scale=0.3)
    # A quotient or a product with the inverse: one rounding of float64.
    torch.testing.assert_close(mean, expected, rtol=1e-15, atol=0)


def test_an_observer_stays_until_it_is_taken_away_and_sees_training_alone():
    attention, tensors = module(), drawn()
    attention.observer = observer = Keeps()
    attention(*tensors)
    attention(*tensors)
    attention.eval()
    attention(*tensors)
    attention.train()
    with torch.no_grad():
        attention(*tensors)
    assert len(observer.seen) == 3
    attention.observer = None
    attention(*tensors)
    assert len(observer.seen) == 3


def test_an_observer_gets_no_gradients_and_what_the_module_was_told():
    attention, (q, k, v) = module(causal=True, scale=0.3), drawn()
    attention.observer = observer = Keeps()
    attention(q, k[:, :1], v[:, :1], real_tokens())
    ((seen_q, seen_k, options),) = observer.seen
    assert torch.equal(seen_q, q)
    assert torch.equal(seen_k, k[:, :1])
    assert not seen_q.requires_grad
    assert not seen_k.requires_grad
    assert torch.equal(options.pop("key_padding_mask"), real_tokens())
    assert options == {"causal": True, "scale": 0.3}


def test_a_sum_begun_in_inference_mode_goes_on():
    attention, tensors = module(), drawn()
    attention.observer = observer = AttentionMapAccumulator()
    with torch.inference_mode():
        attention(*tensors)
    once = observer.total.clone()
    attention(*tensors)
    assert torch.equal(observer.total, 2 * once)


def test_an_observer_may_be_a_module_and_is_no_part_of_the_model():
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.passes, self.weight = 0, nn.Parameter(torch.zeros(1))

        def add(self, *_, **__) -> None:
            self.passes += 1

    attention = module()
    attention.observer = observer = Counts()
    attention(*drawn())
    assert observer.passes == 1
    assert list(attention.parameters()) == []
    assert list(attention.children()) == []


@pytest.mark.parametrize("given", [1, "map", object()])
def test_what_cannot_observe_is_refused(given):
    with pytest.raises(ConfigError, match=r"observer is a .*; allowed: None, or an object with a"):
        module().observer = given


class Model(nn.Module):
    """Two layers, each perhaps recomputed in the backward pass."""

    def __init__(self, recompute: Callable | None = None, **settings) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inputs = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.attentions = nn.ModuleList(module(**settings) for _ in range(2))
        self.recompute = recompute

    def layer(self, index: int, x: Tensor, real: Tensor, keys: Tensor) -> Tensor:
        # (B, L, 3 · H · D) → 3 × (B, H, L, D)
        qkv = self.inputs[index](x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = self.attentions[index](*qkv, real, keys)
        return x + out.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, real: Tensor, keys: Tensor) -> Tensor:
        for index in range(2):
            layer = functools.partial(self.layer, index)
            if self.recompute is None:
                x = layer(x, real, keys)
            else:
                x = self.recompute(layer, x, real, keys)
        return x

    def observe(self) -> list[PooledMapAccumulator]:
        weights = torch.full((LENGTH,), 1 / 6, device=self.inputs[0].weight.device)
        observers = [PooledMapAccumulator(BLOCK, 3, weights) for _ in self.attentions]
        for attention, observer in zip(self.attentions, observers, strict=True):
            attention.observer = observer
        return observers


def micro_batches(number: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    torch.manual_seed(5)
    samples = torch.randn(3, LENGTH, WIDTH), real_tokens(), sample_keys(0, 0, torch.arange(3), 1)[0]
    return list(zip(*(x.chunk(number) for x in samples), strict=True))


def maps_of(model: Model, run: Callable, batches: int) -> list[Tensor]:
    """The maps of both layers, after forward and backward passes over micro-batches."""
    observers, device = model.observe(), model.inputs[0].weight.device
    for x, real, keys in micro_batches(batches):
        x, real, keys = x.to(device), real.to(device), keys.to(device)
        # A checkpoint that is reentrant differentiates only what an input needs.
        run(x.requires_grad_(), real, keys).square().sum().backward()
    return [observer.total for observer in observers]


def deepspeed_checkpoint(function: Callable, *inputs: Tensor) -> Tensor:
    deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    return deepspeed.checkpointing.checkpoint(function, *inputs)


KINDS = {
    "non-reentrant": functools.partial(checkpoint, use_reentrant=False),
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "deepspeed": deepspeed_checkpoint,
}


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@PHASES
def test_maps_are_the_same_bits_with_activation_checkpointing(kind, batches, phase):
    settings = {"phase": phase, "dropout_p": 0.2}
    # DeepSpeed moves what is recomputed to its accelerator.
    gpu = kind == "deepspeed" and torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    plain = Model(**settings).to(device)
    expected = maps_of(plain, plain, batches)
    model = Model(KINDS[kind], **settings).to(device)
    found = maps_of(model, model, batches)
    assert not torch.equal(*expected)  # of two layers
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # it was computed again


@pytest.mark.parametrize("recompute", [None, KINDS["non-reentrant"]], ids=["plain", "recomputed"])
@pytest.mark.parametrize(
    ("backend", "batches"), [("aot_eager", 1), ("aot_eager", 3), ("inductor", 3)]
)
def test_a_compiled_pass_is_seen_each_time_and_once(backend, recompute, batches):
    torch.compiler.reset()
    plain = Model()
    expected = maps_of(plain, plain, batches)
    model = Model(recompute)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    for _ in range(2):
        found = maps_of(model, compiled, batches)
        for a, b in zip(found, expected, strict=True):
            # TorchInductor's queries differ by roundings of float32.
            torch.testing.assert_close(a, b, rtol=1e-5 * (backend == "inductor"), atol=0)
    for attention in model.attentions:
        attention.observer = None
    compiled(*micro_batches(batches)[0])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 * (backend == "inductor"), atol=0)


def test_arming_is_traced_once_and_disarming_not_again():
    torch.compiler.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    attention, tensors = module(), drawn()
    compiled = torch.compile(attention, backend=count, fullgraph=True)
    for _ in range(3):
        for observer in (None, Keeps(), AttentionMapAccumulator()):
            attention.observer = observer
            compiled(*tensors)
    assert len(graphs) == 2


def test_what_an_observer_keeps_of_a_compiled_pass_stays_as_it_was():
    # TorchInductor's code uses the memory of queries and keys again.
    torch.compiler.reset()
    plain, model = Model(), Model()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    kept = []
    for run, owner in ((plain, plain), (compiled, model)):
        observers = [Keeps() for _ in owner.attentions]
        for attention, observer in zip(owner.attentions, observers, strict=True):
            attention.observer = observer
        with torch.no_grad():  # no backward pass needs it any more
            for x, real, keys in micro_batches(3):
                run(x, real, keys)
        kept.append([seen for observer in observers for seen in observer.seen])
    assert len(kept[0]) == len(kept[1]) == 6
    for (q, k, _), (expected_q, expected_k, _) in zip(*kept, strict=True):
        torch.testing.assert_close(q, expected_q, rtol=1e-5, atol=1e-5)  # roundings of float32
        torch.testing.assert_close(k, expected_k, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@needs_gpu
def test_a_captured_pass_with_an_observer_is_refused():
    attention, tensors = module(), [x.detach().cuda() for x in drawn()]
    attention(*tensors)
    attention.observer = Keeps()
    with (
        pytest.raises(ConfigError, match="observer is captured in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        attention(*tensors)


def test_what_reduce_overhead_compiled_is_not_looked_into(monkeypatch):
    from torch._inductor import cudagraph_trees

    managers = {0: None, 1: "a tree"}
    monkeypatch.setattr(
        cudagraph_trees, "get_manager", lambda index, create_if_none_exists: managers[index]
    )
    check_no_graph_trees(torch.device("cpu"))
    check_no_graph_trees(torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"reduce-overhead.*look\.by_hand"):
        check_no_graph_trees(torch.device("cuda", 1))


@pytest.mark.gpu
@needs_gpu
def test_a_model_that_reduce_overhead_compiled_refuses_an_observer():
    torch.compiler.reset()
    model = Model().cuda()
    model.observe()
    x, real, keys = (tensor.cuda() for tensor in micro_batches(1)[0])
    with pytest.raises(ConfigError, match="reduce-overhead"):
        torch.compile(model, mode="reduce-overhead", fullgraph=True)(x, real, keys)
    torch.compiler.reset()
