"""LearnedPattern: the loss and gradient of its definition, from one pass, for W alone."""

from __future__ import annotations

import pytest
import torch

from spion_ds.attention import LearnedPattern
from spion_ds.errors import ConfigError

BATCH, HEADS, LENGTH, HEAD_DIM, BLOCK = 3, 2, 44, 8, 16
BLOCKS = 3  # the last one is 12 tokens


def queries_and_keys(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k = torch.randn(2, BATCH, HEADS, LENGTH, HEAD_DIM).mul(2).to(device)
    real = torch.arange(LENGTH) < torch.tensor([[LENGTH], [17], [40]])
    return q.requires_grad_(), k.requires_grad_(), real.to(device)


def published_loss(weight, q, k, real) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error between W·Wᵀ and each head's and sample's pooled map; these maps."""
    scores = q @ k.transpose(-2, -1) * HEAD_DIM**-0.5
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None, :], float("-inf"))
    attention = scores.softmax(dim=-1).detach()
    if real is not None:
        attention = attention * real[:, None, :, None]
    pooled = torch.stack(
        [
            torch.stack([a.mean(dim=(-2, -1)) for a in rows.split(BLOCK, dim=-1)], dim=-1)
            for rows in attention.split(BLOCK, dim=-2)
        ],
        dim=-2,
    )  # (B, H, n, n)
    return (weight @ weight.T - pooled).square().mean(), pooled


@pytest.mark.parametrize("padded", [False, True])
def test_loss_and_gradient_are_those_of_the_definition(padded, device):
    pattern = LearnedPattern(BLOCKS, HEAD_DIM, BLOCK).to(device)
    q, k, real = queries_and_keys(device)
    real = real if padded else None
    loss = pattern(q, k, real)
    loss.backward()
    weight = pattern.weight.detach().clone().requires_grad_()
    expected, pooled = published_loss(weight, q, k, real)
    expected.backward()
    # Float32 throughout; W·Wᵀ is about 2, the maps about 1/44.
    torch.testing.assert_close(pattern.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)
    variance = pooled.var(dim=(0, 1), correction=0).mean()
    torch.testing.assert_close(loss + variance, expected, rtol=1e-5, atol=1e-6)
    assert loss.dtype == torch.float32
    assert (q.grad, k.grad) == (None, None)


def test_micro_batches_average_to_the_whole_batch(device):
    pattern = LearnedPattern(BLOCKS, HEAD_DIM, BLOCK).to(device)
    q, k, real = queries_and_keys(device)
    gradients = []
    for parts in ([slice(0, 3)], [slice(0, 1), slice(1, 2), slice(2, 3)]):
        pattern.weight.grad = None
        for part in parts:
            (pattern(q[part], k[part], real[part]) / len(parts)).backward()
        gradients.append(pattern.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_weights_start_uniform_and_freeze_without_leaving_the_state_dict():
    pattern = LearnedPattern(64, 32, BLOCK)
    weight = pattern.weight.detach()
    assert 0.0 <= float(weight.min()) < 0.01  # 2048 draws
    assert 0.99 < float(weight.max()) <= 1.0
    assert abs(float(weight.mean()) - 0.5) < 0.03  # five standard errors
    pattern.freeze()
    assert not pattern.learning
    assert not pattern.weight.requires_grad
    assert list(pattern.state_dict()) == ["weight"]


def test_another_length_is_an_error_that_says_what_to_do():
    pattern = LearnedPattern(BLOCKS, HEAD_DIM, BLOCK)
    q = torch.randn(1, 1, 20, HEAD_DIM)
    with pytest.raises(ConfigError, match="20 tokens, and the pattern is learned for 3 blocks of"):
        pattern(q, q, None)
