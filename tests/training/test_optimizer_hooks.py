"""What is done around DeepSpeed's optimizer step changes no bit of it."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn

from spion_ds.distributed.process_group import import_deepspeed
from spion_ds.training.step.deepspeed_engine import clip_by_value, step_without_waiting


def trained_weights(ours: bool, gradients: list[list[Tensor | None]]) -> list[Tensor]:
    """Return the bf16 weights after a step for each list of gradients."""
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.fp16 import unfused_optimizer
    from deepspeed.runtime.fp16.loss_scaler import LossScaleConfig, LossScaleProfile

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)).bfloat16()
    # DeepSpeed keeps its buffers there.
    device = get_accelerator().current_device_name()
    model.to(device)
    scale = LossScaleConfig(
        low_precision_dtype=torch.bfloat16,
        dynamic_loss_scale=False,
        static_loss_scale=1.0,
        dynamic_loss_args=None,
        profile=LossScaleProfile.UNFUSED,
    )
    # It asks for its rank, to log; there is one process here, in no group.
    with mock.patch.object(unfused_optimizer, "dist", SimpleNamespace(get_rank=lambda: 0)):
        optimizer = unfused_optimizer.FP16_UnfusedOptimizer(
            torch.optim.AdamW(model.parameters(), lr=1e-2),
            loss_scale_config=scale,
            low_precision_dtype=torch.bfloat16,
        )
    clip_by_value(optimizer.optimizer, 0.5)
    if ours:
        engine = SimpleNamespace(optimizer=optimizer, bfloat16_enabled=lambda: True)
        step_without_waiting(engine)
        assert "step" in vars(optimizer)
    for step in gradients:
        for parameter, gradient in zip(model.parameters(), step, strict=True):
            parameter.grad = None if gradient is None else gradient.to(device, copy=True)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_the_bf16_step_without_waiting_has_deepspeeds_bits() -> None:
    torch.manual_seed(1)
    shapes = [(16, 8), (16,), (4, 16), (4,)]
    gradients: list[list[Tensor | None]] = [
        [torch.randn(shape).bfloat16() for shape in shapes] for _ in range(3)
    ]
    gradients[1][2] = None  # a parameter that a step did not use
    theirs = trained_weights(False, gradients)
    ours = trained_weights(True, gradients)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_an_engine_that_clips_by_norm_keeps_its_step() -> None:
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    optimizer = FP16_UnfusedOptimizer.__new__(FP16_UnfusedOptimizer)
    optimizer.clip_grad = 1.0
    step_without_waiting(SimpleNamespace(optimizer=optimizer, bfloat16_enabled=lambda: True))
    assert "step" not in vars(optimizer)


def test_clipping_bounds_every_element_and_keeps_nan() -> None:
    weights = [
        nn.Parameter(torch.zeros(3)),
        nn.Parameter(torch.zeros(2)),
        nn.Parameter(torch.ones(1)),
    ]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    clip_by_value(optimizer, 0.5)
    weights[0].grad = torch.tensor([2.0, -0.25, -7.0])
    weights[1].grad = torch.tensor([float("nan"), float("inf")])
    optimizer.step()
    assert weights[0].tolist() == [-0.5, 0.25, 0.5]
    assert weights[1].isnan().tolist() == [True, False]
    assert weights[1][1].item() == -0.5
    assert weights[2].tolist() == [1.0]
