"""SparseSelfAttention: dense until it has a pattern, swapped in place, watched without a trace."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spion_ds.attention import (
    AttentionMapAccumulator,
    BlockLayout,
    SparseSelfAttention,
    attention_map,
    block_sparse_attention,
)
from spion_ds.errors import ConfigError
from spion_ds.random_bits import sample_keys
from spion_ds.sparsity import DenseSparsityConfig, SparsityConfig, SpionSparsityConfig

from .cases import needs_gpu, relative_error

LENGTH, BLOCK, HEADS = 72, 16, 2
BLOCKS_A_SIDE = 5  # the last one has 8 tokens
# Dense attention is another program than the block-sparse one: some roundings of float32.
FLOAT32_TOLERANCE = 1e-5


def module(**settings) -> SparseSelfAttention:
    return SparseSelfAttention(SpionSparsityConfig(HEADS, BLOCK), **settings)


def drawn(length: int = LENGTH) -> list[Tensor]:
    return [torch.randn(3, HEADS, length, 8, requires_grad=True) for _ in range(3)]


def real_tokens() -> Tensor:
    return torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [50], [0]])


def pattern(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(BLOCKS_A_SIDE, BLOCKS_A_SIDE, generator=generator) < 0.3
    return mask | torch.eye(BLOCKS_A_SIDE, dtype=torch.bool)


def sparse(tensors: list[Tensor], mask: Tensor, **options) -> Tensor:
    return block_sparse_attention(*tensors, BlockLayout.from_mask(mask, BLOCK), **options)


@pytest.mark.parametrize("padded", [False, True])
def test_is_dense_attention_until_there_is_a_pattern(padded):
    attention, (q, k, v) = module(), drawn()
    real = real_tokens() if padded else None
    mask = None if real is None else real[:, None, None, :]
    assert attention.layout(LENGTH, torch.device("cpu")) is None
    out = attention(q, k, v, real)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, mask))
    # A sample without a real token has nothing to attend to, in both phases.
    assert not out.isnan().any()
    assert not padded or not out[2].any()


def test_a_prepared_layout_stays_in_memory_whatever_lengths_follow():
    # A captured CUDA graph reads it at its address.
    attention, cpu = module(dropout_p=0.1), torch.device("cpu")
    attention.prepare(LENGTH, cpu)
    prepared = attention._full_layout(LENGTH, cpu)
    key = torch.arange(3, dtype=torch.int32)
    for length in (20, 40, 20):
        attention(*drawn(length), None, key)
    assert attention._full_layout(LENGTH, cpu) is prepared


@pytest.mark.parametrize("dropout_key", [None, torch.arange(3, dtype=torch.int32)])
@pytest.mark.parametrize("sparse_phase", [False, True])
def test_padded_queries_give_zeros_where_that_is_asked_for(sparse_phase, dropout_key):
    tensors, real = drawn(), real_tokens()
    found = []
    for zero in (False, True):
        attention = module(dropout_p=0.1 * (dropout_key is not None), zero_padded_queries=zero)
        attention.sparsity_config.set_pattern(pattern() if sparse_phase else None)
        found.append(attention(*tensors, real, dropout_key))
    plain, zeroed = found
    assert plain[1, :, 50:].any()
    assert not zeroed[1, :, 50:].any()
    read = real[:, None].expand(-1, HEADS, -1)
    assert torch.equal(zeroed[read], plain[read])


@pytest.mark.gpu
@needs_gpu
def test_dense_attention_with_padding_is_the_same_on_a_gpu():
    attention, tensors, real = module(), drawn(), real_tokens()
    found = attention(*(x.cuda() for x in tensors), real.cuda())
    assert relative_error(found.cpu(), attention(*tensors, real)) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("pruned", ["zero", "excluded"])
def test_is_block_sparse_attention_with_a_pattern(pruned):
    attention, tensors = module(pruned=pruned), drawn()
    attention.sparsity_config.set_pattern(pattern())
    real = real_tokens()
    expected = sparse(tensors, pattern(), pruned=pruned, key_padding_mask=real)
    assert torch.equal(attention(*tensors, real), expected)


def test_a_switch_swaps_the_layout_and_back():
    attention, tensors = module(), drawn()
    config = attention.sparsity_config
    dense = attention(*tensors)
    for seed in (0, 1, 0):
        config.set_pattern(pattern(seed))
        assert torch.equal(attention(*tensors), sparse(tensors, pattern(seed)))
        layout = attention.layout(LENGTH, torch.device("cpu"))
        assert torch.equal(layout.to_mask(), pattern(seed))
        # Made once for a pattern.
        assert attention.layout(LENGTH, torch.device("cpu")) is layout
    config.set_pattern(None)
    assert torch.equal(attention(*tensors), dense)


def test_a_pattern_that_keeps_everything_is_dense_attention():
    attention, tensors = module(), drawn()
    dense = attention(*tensors)
    attention.sparsity_config.set_pattern(torch.ones(5, 5, dtype=torch.bool))
    assert attention.layout(LENGTH, torch.device("cpu")) is None
    assert torch.equal(attention(*tensors), dense)


def test_an_input_longer_than_the_pattern_is_an_error_that_names_both():
    attention = module()
    attention.sparsity_config.set_pattern(pattern())
    with pytest.raises(ConfigError, match="found at 80 tokens and the input has 96"):
        attention(*drawn(96))


@pytest.mark.gpu
@needs_gpu
def test_the_layout_follows_the_input_to_a_gpu():
    attention, tensors = module(), drawn()
    attention.sparsity_config.set_pattern(pattern())
    expected = attention(*tensors)
    found = attention(*(x.cuda() for x in tensors))
    assert found.is_cuda
    assert relative_error(found.cpu(), expected) < FLOAT32_TOLERANCE


class OwnLayouts(SparsityConfig):
    """One layout a head."""

    def make_layout(self, seq_len: int) -> Tensor:
        layout = self.setup_layout(seq_len)
        for head in range(self.num_heads):
            layout[head, :, head] = 1
        return layout


def test_each_head_may_have_its_own_layout():
    tensors = drawn()
    config = OwnLayouts(HEADS, BLOCK, different_layout_per_head=True)
    expected = sparse(tensors, config.make_layout(80), pruned="excluded")
    found = SparseSelfAttention(config, pruned="excluded")(*tensors)
    assert torch.equal(found, expected)
    shared = SparseSelfAttention(OwnLayouts(HEADS, BLOCK), pruned="excluded")(*tensors)
    assert torch.equal(shared, sparse(tensors, config.make_layout(80)[0], pruned="excluded"))


@pytest.mark.parametrize("config", [SpionSparsityConfig(2), DenseSparsityConfig(2)])
def test_there_is_nothing_in_the_state_dict(config):
    attention = SparseSelfAttention(config, dropout_p=0.1)
    tensors = drawn(64)
    attention(*tensors, dropout_key=sample_keys(0, 0, torch.arange(3), 1)[0])
    assert list(attention.parameters()) == []
    assert list(attention.buffers()) == []
    assert attention.state_dict() == {}


@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_an_observer_sees_one_pass_and_changes_nothing(phase):
    attention, tensors = module(dropout_p=0.2), drawn()
    if phase == "sparse":
        attention.sparsity_config.set_pattern(pattern())
    real = real_tokens()
    results = []
    for observer in (None, AttentionMapAccumulator()):
        torch.manual_seed(1)
        attention.observer = observer
        out = attention(*tensors, real)
        gradients = torch.autograd.grad(out.square().sum(), tensors)
        results.append([out, *gradients, torch.get_rng_state()])
        assert attention.observer is None
    for without, observed in zip(*results, strict=True):
        assert torch.equal(without, observed)
    # The map of dense attention, in both phases.
    expected = attention_map(*tensors[:2], key_padding_mask=real)
    mean = observer.total / observer.count.clamp(min=1.0)[:, None]
    assert torch.equal(mean, expected)
    before = observer.total.clone()
    attention(*tensors, real)
    assert torch.equal(observer.total, before)


@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_a_recomputed_pass_is_the_same_and_is_not_seen_twice(phase):
    attention, tensors = module(dropout_p=0.3), drawn()
    if phase == "sparse":
        attention.sparsity_config.set_pattern(pattern())
    keys = sample_keys(0, 0, torch.arange(3), 1)[0]
    expected = torch.autograd.grad(attention(*tensors, None, keys).square().sum(), tensors)
    attention.observer = observer = AttentionMapAccumulator()
    out = checkpoint(attention, *tensors, None, keys, use_reentrant=False)
    found = torch.autograd.grad(out.square().sum(), tensors)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert observer.count.unique().tolist() == [3 * HEADS]


@pytest.mark.parametrize("phase", ["dense", "sparse"])
@pytest.mark.parametrize("keys", [None, sample_keys(0, 0, torch.arange(3), 1)[0]])
def test_there_is_dropout_in_training_and_none_in_evaluation(keys, phase):
    attention, tensors = module(dropout_p=0.3), drawn()
    plain = module()
    for one in (attention, plain):
        one.sparsity_config.set_pattern(pattern() if phase == "sparse" else None)
    expected = plain(*tensors)
    assert not torch.allclose(attention(*tensors, None, keys), expected, atol=0.01)
    attention.eval()
    assert torch.equal(attention(*tensors, None, keys), expected)


def test_dropout_with_keys_is_the_same_function_in_both_phases():
    # The dense phase draws from the same counters, by way of a layout that keeps everything.
    attention, tensors = module(dropout_p=0.3), drawn()
    keys, real = sample_keys(0, 0, torch.arange(3), 1)[0], real_tokens()
    everything = torch.ones(5, 5, dtype=torch.bool)
    options = {"key_padding_mask": real, "dropout_p": 0.3, "dropout_key": keys}
    dense = attention(*tensors, real, keys)
    assert torch.equal(dense, sparse(tensors, everything, **options, pruned="excluded"))
    assert torch.equal(attention(*tensors, real, keys), dense)
    attention.sparsity_config.set_pattern(pattern())
    assert torch.equal(attention(*tensors, real, keys), sparse(tensors, pattern(), **options))


def test_the_backend_is_the_one_asked_for():
    tensors = drawn()
    for backend in ("reference", "torch"):
        attention = module(backend=backend)
        attention.sparsity_config.set_pattern(pattern())
        assert torch.equal(attention(*tensors), sparse(tensors, pattern(), backend=backend))
    attention = module(backend="fastest")
    attention.sparsity_config.set_pattern(pattern())
    with pytest.raises(ConfigError, match="unknown attention backend 'fastest'"):
        attention(*tensors)
