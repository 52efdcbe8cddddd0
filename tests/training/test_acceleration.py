"""Compiled and graph-replayed steps give what plain steps give, and say where they cannot."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spion_ds.attention import AttentionMapAccumulator
from spion_ds.errors import ConfigError
from spion_ds.models import EncoderClassifier, ModelConfig
from spion_ds.random_bits import sample_keys
from spion_ds.sparsity import AttentionConfig, SatAttentionConfig, SparseAttentionConfig
from spion_ds.switching.masks import set_masks
from spion_ds.training.config.recipe_files import read_recipe
from spion_ds.training.config.run import build_run_config
from spion_ds.training.step.acceleration import AcceleratedForward
from tests.training.launching import TINY

LENGTH = 64
_SPION = SparseAttentionConfig(block=16)


_NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
_SIZES = ModelConfig(dim=16, ffn_dim=32, layers=2, heads=2, head_dim=16, classifier_dim=16)


def tiny_model(
    device: torch.device,
    sparse_attention: AttentionConfig = _SPION,
    config: ModelConfig = _SIZES,
) -> EncoderClassifier:
    torch.manual_seed(0)
    return EncoderClassifier(config, sparse_attention, 17, 10, LENGTH).to(device)


def batches(model: EncoderClassifier, device: torch.device) -> list[tuple]:
    """Six micro-batches: ids, padding mask, dropout keys, labels."""
    made = []
    for step in range(6):
        ids = torch.randint(1, 17, (4, LENGTH), device=device)
        lengths = torch.randint(20, LENGTH + 1, (4, 1), device=device)
        keys = sample_keys(0, step, torch.arange(4), model.dropout_places).to(device)
        labels = torch.randint(10, (4,), device=device)
        made.append((ids, torch.arange(LENGTH, device=device) < lengths, keys, labels))
    return made


def train(
    model: EncoderClassifier,
    data: list[tuple],
    forward: AcceleratedForward,
    keeps_gradients: bool = True,
    maps: list[list[torch.Tensor]] | None = None,
) -> list[float]:
    """Take three dense and three sparse steps; return the losses.

    The maps of every other dense step go to ``maps``.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for number, (*inputs, labels) in enumerate(data):
        if number == 3:
            mask = torch.eye(4, dtype=torch.bool)
            mask[:, 1] = True
            set_masks(model, [mask, mask])
        model.prepare(len(labels), labels.device)
        looks = maps is not None and number in (0, 2)
        observers = [AttentionMapAccumulator() for _ in range(2 if looks else 0)]
        with forward.step(number >= 3, tuple(inputs), observers):
            loss = F.cross_entropy(model(*inputs), labels)
        assert not any(attention.observer for attention in model.attentions)
        if maps is not None and looks:
            maps.append([layer.total.clone() for layer in observers])
        pattern_loss = model.take_pattern_loss()
        assert (pattern_loss is not None) is (bool(model.patterns) and number < 3)
        loss = loss if pattern_loss is None else loss + pattern_loss
        # Where they stay between steps, a replay must not write into what a parameter keeps.
        optimizer.zero_grad(set_to_none=not keeps_gradients)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        evaluate(model, *inputs[:2])
        # What holds the graph of an earlier step holds its stream, which a capture must not meet.
        del loss, pattern_loss
    return losses


def evaluate(model: EncoderClassifier, ids: torch.Tensor, real: torch.Tensor) -> None:
    """Run the model's own forward as evaluation does; a dense model at another length too."""
    model.eval()
    with torch.no_grad():
        model(ids, real)
        if model.attentions[0].sparsity_config.pattern is None:
            model(ids[:, :20], real[:, :20])
    model.train()


def losses_with(
    device: torch.device,
    sparse_attention: AttentionConfig = _SPION,
    keeps_gradients: bool = True,
    maps: list[list[torch.Tensor]] | None = None,
    config: ModelConfig = _SIZES,
    **options: Any,
) -> list[float]:
    model = tiny_model(device, sparse_attention, config)
    keys = set(model.state_dict())
    torch.manual_seed(1)
    data = batches(model, device)
    forward = AcceleratedForward(
        model, keeps_gradients=keeps_gradients, observes=maps is not None, **options
    )
    losses = train(model, data, forward, keeps_gradients, maps)
    assert set(model.state_dict()) == keys
    assert "forward" not in vars(model)  # evaluation uses the model's own
    assert not model.seen  # nor does anything stay of a pass
    return losses


def test_compiled_steps_have_the_losses_of_plain_steps() -> None:
    device = torch.device("cpu")
    plain = losses_with(device, compile=False, cuda_graph=False)
    compiled = losses_with(device, compile=True, cuda_graph=False, backend="aot_eager")
    # The same operators, decomposed: float32 rounding, amplified by six optimizer steps.
    assert compiled == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        (_SPION, {}),
        (_SPION, {"attention_dropout": 0.0}),
        (_SPION, {"activation_checkpointing": True, "positions": "rotary"}),
        (SatAttentionConfig(block=16), {}),
        (SatAttentionConfig(block=16), {"activation_checkpointing": True}),
    ],
    ids=["spion", "no attention dropout", "checkpointing", "sat", "sat, checkpointing"],
)
@pytest.mark.parametrize("replayed", [False, True])
def test_each_phase_is_compiled_once_and_whole(
    mode: AttentionConfig, change: dict, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", replay_without_gpu)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    device = torch.device("cpu")
    model = tiny_model(device, mode, replace(_SIZES, **change))
    train(
        model,
        batches(model, device),
        AcceleratedForward(
            model, compile=True, cuda_graph=replayed, observes=replayed, backend=backend
        ),
        maps=[] if replayed else None,
    )
    assert len(graphs) == 2  # more after a break, fewer if the pass is given up at one
    for graph in graphs:
        embedded = [node for node in graph.graph.nodes if "embedding" in str(node.target)]
        assert embedded, "the graph does not begin where the pass begins"


@pytest.mark.gpu
@_NEEDS_GPU
@pytest.mark.parametrize("keeps_gradients", [True, False])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("sparse_attention", [_SPION, SatAttentionConfig(block=16)])
def test_replayed_steps_have_the_losses_of_plain_steps(
    compile: bool, sparse_attention: AttentionConfig, keeps_gradients: bool
) -> None:
    device = torch.device("cuda")
    plain = losses_with(device, sparse_attention, compile=False, cuda_graph=False)
    replayed = losses_with(
        device, sparse_attention, keeps_gradients, compile=compile, cuda_graph=True
    )
    # Without compiling, the same kernels in the same order; fused ones round differently.
    assert replayed == (pytest.approx(plain, rel=1e-3) if compile else plain)


def replay_without_gpu(module: torch.nn.Module, inputs: tuple, allow_unused_input: bool) -> None:
    """Stand in for make_graphed_callables: later calls run no Python of the model's that is seen.

    They write what the first call left in ``seen`` to the same memory, and leave the rest alone.
    """
    model, own, static = module.model, module.forward, [x.clone() for x in inputs]
    assert allow_unused_input is model.learns_patterns
    keeps = model.keeps_seen
    own(*static)
    first = model.seen

    def replay(*given: torch.Tensor) -> torch.Tensor:
        for place, value in zip(static, given, strict=True):
            place.copy_(value)
        before, model.keeps_seen = model.seen, keeps
        out = own(*static)
        for layer, now in zip(first, model.seen, strict=True):
            for place, value in zip(layer, now, strict=True):
                if place is not value:  # the mask may be an input
                    place.copy_(value)
        model.seen, model.keeps_seen = before, False
        return out

    module.forward = replay


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        (_SPION, {}),
        (_SPION, {"zero_is_padding": True, "activation_checkpointing": True}),
        (SatAttentionConfig(block=16), {}),
    ],
    ids=["spion", "zero is padding, checkpointing", "sat"],
)
@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, _NEEDS_GPU])]
)
def test_observers_and_patterns_see_the_attention_of_a_replay(
    device: str, mode: AttentionConfig, change: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", replay_without_gpu)
    config = replace(_SIZES, **change)
    plain_maps, maps = [], []
    losses = [
        losses_with(
            torch.device(device), mode, maps=seen, config=config, compile=False, cuda_graph=graph
        )
        for seen, graph in ((plain_maps, False), (maps, True))
    ]
    assert losses[1] == losses[0]
    assert len(maps) == len(plain_maps) == 2
    for step, plain in zip(maps, plain_maps, strict=True):
        assert not torch.equal(*plain)  # of two layers
        for found, expected in zip(step, plain, strict=True):
            assert torch.equal(found, expected)


def test_what_must_rest_in_a_capture_is_told_before_each(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(
        torch.cuda, "make_graphed_callables", lambda *_, **__: events.append("capture")
    )
    device = torch.device("cpu")
    model = tiny_model(device)
    accelerated = AcceleratedForward(
        model, compile=False, cuda_graph=True, before_capture=lambda: events.append("rest")
    )
    train(model, batches(model, device), accelerated)
    assert events == ["rest", "capture"] * 2  # once a phase


def test_other_patterns_are_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    # A graph reads the memory of its layouts, which is freed with the pattern.
    captured: list[int] = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_, **__: captured.append(1))
    model = tiny_model(torch.device("cpu"))
    accelerated = AcceleratedForward(model, compile=False, cuda_graph=True)
    *inputs, _ = batches(model, torch.device("cpu"))[0]
    counts = []
    for mask in (torch.eye(4), torch.eye(4).flip(0), None):
        for layer, attention in enumerate(model.attentions):
            if layer == 0 or mask is None:
                attention.set_mask(mask)
        for _ in range(2):
            with accelerated.step(mask is not None, tuple(inputs)):
                pass
        counts.append(len(captured))
    assert counts == [1, 2, 3]


def test_evaluation_is_not_accelerated() -> None:
    model = tiny_model(torch.device("cpu"))
    compiled = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    accelerated = AcceleratedForward(model, compile=True, cuda_graph=False, backend=backend)
    *inputs, _ = batches(model, torch.device("cpu"))[0]
    before = copy.deepcopy(model).eval()(*inputs)
    assert not compiled
    with accelerated.step(False, tuple(inputs)):
        model(*inputs)
    graphs = len(compiled)
    assert graphs > 0
    assert torch.equal(model.eval()(*inputs), before)
    assert len(compiled) == graphs


@pytest.mark.parametrize(
    ("overrides", "stage", "device_type", "expected"),
    [
        (["training.cuda_graph=true"], 0, "cpu", "training.cuda_graph is true on a CPU"),
        (["training.cuda_graph=true"], 3, "cuda", "training.cuda_graph is true at ZeRO stage 3"),
        (["training.compile=true"], 3, "cuda", "training.compile is true at ZeRO stage 3"),
        (
            ["training.cuda_graph=true", "training.micro_batch_size=4"],
            0,
            "cuda",
            "with 2 accumulation steps",
        ),
    ],
)
def test_what_cannot_be_accelerated_is_refused(
    overrides: list[str], stage: int, device_type: str, expected: str
) -> None:
    deepspeed = {"zero_optimization": {"stage": stage}}
    with pytest.raises(ConfigError, match=expected):
        build_run_config(
            read_recipe(str(TINY)), deepspeed, overrides, world_size=1, device_type=device_type
        )
