"""Compiled and graph-replayed steps give what plain steps give, and say where they cannot."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from spion_ds.attention.dropout import sample_keys
from spion_ds.errors import ConfigError
from spion_ds.models import EncoderClassifier, ModelConfig, set_masks
from spion_ds.sparsity import AttentionConfig, SatAttentionConfig, SparseAttentionConfig
from spion_ds.training.acceleration import AcceleratedForward
from spion_ds.training.config import build_run_config
from spion_ds.training.recipe_files import read_recipe
from tests.training.launching import TINY

LENGTH = 64
_SPION = SparseAttentionConfig(block=16)


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
) -> list[float]:
    """Take three dense and three sparse steps; return the losses."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for number, (*inputs, labels) in enumerate(data):
        if number == 3:
            mask = torch.eye(4, dtype=torch.bool)
            mask[:, 1] = True
            set_masks(model, [mask, mask])
        model.prepare(len(labels), labels.device)
        with forward.step(number >= 3, tuple(inputs)):
            loss = F.cross_entropy(model(*inputs), labels)
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
    **options: Any,
) -> list[float]:
    model = tiny_model(device, sparse_attention)
    keys = set(model.state_dict())
    torch.manual_seed(1)
    data = batches(model, device)
    forward = AcceleratedForward(model, keeps_gradients=keeps_gradients, **options)
    losses = train(model, data, forward, keeps_gradients)
    assert set(model.state_dict()) == keys
    assert "forward" not in vars(model)  # check steps and evaluation use the model's own
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
def test_each_phase_is_compiled_once_and_whole(mode: AttentionConfig, change: dict) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    device = torch.device("cpu")
    model = tiny_model(device, mode, replace(_SIZES, **change))
    train(
        model,
        batches(model, device),
        AcceleratedForward(model, compile=True, cuda_graph=False, backend=backend),
    )
    assert len(graphs) == 2  # more after a break, fewer if the pass is given up at one
    for graph in graphs:
        embedded = [node for node in graph.graph.nodes if "embedding" in str(node.target)]
        assert embedded, "the graph does not begin where the pass begins"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
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


def test_what_must_rest_in_a_capture_is_told_before_each(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *_: events.append("capture"))
    device = torch.device("cpu")
    model = tiny_model(device)
    accelerated = AcceleratedForward(
        model, compile=False, cuda_graph=True, before_capture=lambda: events.append("rest")
    )
    train(model, batches(model, device), accelerated)
    assert events == ["rest", "capture"] * 2  # once a phase


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
