"""The encoder: its sizes, and what its logits must and must not depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from spion_ds.attention import AttentionMapAccumulator
from spion_ds.errors import ConfigError
from spion_ds.models import EncoderClassifier, ModelConfig
from spion_ds.models.config import POOLINGS
from spion_ds.random_bits import sample_keys
from spion_ds.sparsity import SatAttentionConfig, SparseAttentionConfig

VOCABULARY, CLASSES, LENGTH, BLOCK = 17, 10, 48, 16
SMALL = ModelConfig(
    dim=8,
    ffn_dim=16,
    layers=2,
    heads=2,
    head_dim=4,
    classifier_dim=16,
    dropout=0.2,
    attention_dropout=0.2,
)
PHASES = ["dense", "sparse"]
# Float64 of the same sums, in batches and lengths of other sizes: some hundred roundings.
SAME = {"rtol": 1e-10, "atol": 1e-12}


def model(config: ModelConfig = SMALL, phase: str = "dense", **block) -> EncoderClassifier:
    torch.manual_seed(0)
    sparse_attention = SparseAttentionConfig(block=BLOCK, **block)
    made = EncoderClassifier(config, sparse_attention, VOCABULARY, CLASSES, LENGTH).double()
    if phase == "sparse":
        switch(made)
    return made


def switch(made: EncoderClassifier) -> None:
    for index, attention in enumerate(made.attentions):
        pattern = torch.eye(3, dtype=torch.bool)
        pattern[2 - index, 0] = True
        attention.sparsity_config.set_pattern(pattern)


def batch(samples: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (samples, LENGTH), generator=generator)
    lengths = torch.linspace(20, LENGTH, samples).long()
    return ids, torch.arange(LENGTH)[None] < lengths[:, None]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_without_padding_the_mask_is_not_needed(phase, pooling):
    config = replace(SMALL, pooling=pooling)
    with_mask = model(config, phase)
    block = SparseAttentionConfig(block=BLOCK)
    without = EncoderClassifier(config, block, VOCABULARY, CLASSES, LENGTH, padded=False).double()
    without.load_state_dict(with_mask.state_dict())
    if phase == "sparse":
        switch(without)
    ids, _ = batch()
    everything = torch.ones_like(ids, dtype=torch.bool)
    keys = sample_keys(0, 0, torch.arange(len(ids)), without.dropout_places)
    expected = with_mask(ids, everything, keys)
    torch.testing.assert_close(without(ids, everything, keys), expected, **SAME)
    masks = []
    for attention in without.attentions:
        attention.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[3]))
    without(ids, everything, keys)
    assert masks == [None, None]


def test_hidden_zeros_need_a_mask_even_without_padding():
    config = replace(SMALL, zero_is_padding=True)
    made = EncoderClassifier(
        config, SparseAttentionConfig(block=BLOCK), VOCABULARY, CLASSES, LENGTH, padded=False
    ).double()
    made.eval()
    ids, _ = batch()
    ids[:, 10:20] = 0
    everything = torch.ones_like(ids, dtype=torch.bool)
    expected = made(ids, ids != 0)
    torch.testing.assert_close(made(ids, everything), expected, **SAME)
    made.token_embedding.weight.data[0] += 1.0
    torch.testing.assert_close(made(ids, everything), expected, **SAME)


def test_published_sizes_are_the_defaults():
    config = ModelConfig()
    assert (config.dim, config.ffn_dim, config.heads, config.head_dim) == (64, 128, 2, 32)
    assert (config.classifier_dim, config.dropout) == (128, 0.1)
    made = EncoderClassifier(config, SparseAttentionConfig(), 17, 10, 2048)
    assert len(made.layers) == 4
    shapes = {name: tuple(value.shape) for name, value in made.named_parameters()}
    assert shapes["token_embedding.weight"] == (17, 64)
    assert shapes["position_embedding.weight"] == (2048, 64)
    assert shapes["classifier.0.weight"] == (128, 64)
    assert shapes["classifier.2.weight"] == (10, 128)
    layer = {name[9:]: shape for name, shape in shapes.items() if name.startswith("layers.3.")}
    assert layer == {
        "attention_norm.weight": (64,),
        "attention_norm.bias": (64,),
        "qkv.weight": (192, 64),
        "qkv.bias": (192,),
        "projection.weight": (64, 64),
        "projection.bias": (64,),
        "ffn_norm.weight": (64,),
        "ffn_norm.bias": (64,),
        "ffn_in.weight": (128, 64),
        "ffn_in.bias": (128,),
        "ffn_out.weight": (64, 128),
        "ffn_out.bias": (64,),
    }


def test_the_width_of_the_heads_is_free_of_the_models():
    made = model(replace(SMALL, heads=3, head_dim=5))
    assert made.layers[0].qkv.weight.shape == (45, 8)
    assert made.layers[0].projection.weight.shape == (8, 15)
    assert made(*batch()).shape == (4, CLASSES)


@pytest.mark.parametrize("phase", PHASES)
def test_a_layer_is_pre_layer_norm_attention_and_gelu(phase):
    made = model(phase=phase).eval()
    x, (_, real) = torch.randn(4, LENGTH, 8, dtype=torch.float64), batch()
    layer = made.layers[0]
    q, k, v = (
        part.view(4, LENGTH, 2, 4).transpose(1, 2)
        for part in layer.qkv(layer.attention_norm(x)).chunk(3, dim=-1)
    )
    attended = layer.attention(q, k, v, real)
    y = x + layer.projection(attended.transpose(1, 2).reshape(4, LENGTH, 8))
    hidden = torch.nn.functional.gelu(layer.ffn_in(layer.ffn_norm(y)))
    torch.testing.assert_close(layer(x, real, None)[0], y + layer.ffn_out(hidden), **SAME)


@pytest.mark.parametrize("pruned", ["zero", "excluded"])
@pytest.mark.parametrize("phase", PHASES)
def test_tokens_in_the_padding_do_not_influence_the_logits(phase, pruned):
    made = model(phase=phase, pruned=pruned).eval()
    ids, real = batch()
    other = torch.where(real, ids, (ids + 3) % VOCABULARY)
    assert not torch.equal(other, ids)
    torch.testing.assert_close(made(other, real), made(ids, real), **SAME)
    changed = torch.where(real, (ids + 3) % VOCABULARY, ids)
    assert not torch.allclose(made(changed, real), made(ids, real), rtol=1e-3)


@pytest.mark.parametrize("pruned", ["zero", "excluded"])
def test_the_length_of_the_padding_does_not_influence_the_logits(pruned):
    # A sample of 20 tokens alone, and padded to 48.
    made = model(pruned=pruned).eval()
    ids, real = batch()
    alone = made(ids[:1, :20], real[:1, :20])
    torch.testing.assert_close(alone, made(ids, real)[:1], **SAME)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("phase", PHASES)
def test_a_sample_without_real_tokens_gives_finite_logits_and_gradients(phase, pooling):
    made = model(replace(SMALL, pooling=pooling), phase=phase).eval()
    ids, real = batch()
    real[2] = False
    logits = made(ids, real)
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in made.parameters())


@pytest.mark.parametrize("phase", PHASES)
def test_dropout_keys_make_results_independent_of_the_micro_batch_split(phase):
    made = model(phase=phase)
    (ids, real), positions = batch(6), torch.arange(6)
    keys = sample_keys(0, 5, positions, made.dropout_places)
    whole = made(ids, real, keys)
    whole.square().sum().backward()
    expected = [parameter.grad.clone() for parameter in made.parameters()]
    made.zero_grad()
    for part in (slice(0, 1), slice(1, 3), slice(3, 6)):
        own = sample_keys(0, 5, positions[part], made.dropout_places)
        logits = made(ids[part], real[part], own)
        torch.testing.assert_close(logits, whole[part], **SAME)
        logits.square().sum().backward()
    for parameter, gradient in zip(made.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **SAME)


@pytest.mark.parametrize("phase", PHASES)
def test_dropout_keys_leave_the_random_state_alone(phase):
    made, (ids, real) = model(phase=phase), batch()
    state = torch.get_rng_state()
    made(ids, real, sample_keys(0, 0, torch.arange(4), made.dropout_places))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_place_draws_its_own_mask():
    made, (ids, real) = model(), batch()
    assert made.dropout_places == 1 + 4 * 2
    keys = sample_keys(0, 0, torch.arange(4), made.dropout_places)
    logits = made(ids, real, keys)
    for place in range(made.dropout_places):
        changed = keys.clone()
        changed[place] += 1
        assert not torch.allclose(made(ids, real, changed), logits), place


@pytest.mark.parametrize("phase", PHASES)
def test_evaluation_drops_nothing(phase):
    made, (ids, real) = model(phase=phase).eval(), batch()
    without = model(replace(SMALL, dropout=0.0, attention_dropout=0.0), phase)
    keys = sample_keys(0, 0, torch.arange(4), made.dropout_places)
    assert torch.equal(made(ids, real, keys), made(ids, real))
    torch.testing.assert_close(made(ids, real), without(ids, real), **SAME)
    assert not torch.allclose(made.train()(ids, real, keys), without(ids, real))


def pooled_and_tokens(pooling: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the classifier gets, the encoder's last output, and the real tokens."""
    made, (ids, real) = model(replace(SMALL, pooling=pooling)).eval(), batch()
    seen = []
    made.norm.register_forward_hook(lambda module, args, output: seen.append(output))
    made.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    made(ids, real)
    return seen[1], seen[0], real


def test_masked_mean_averages_the_real_tokens_and_mean_the_padding_too():
    pooled, tokens, real = pooled_and_tokens("masked_mean")
    expected = torch.stack([x[keep].mean(0) for x, keep in zip(tokens, real, strict=True)])
    torch.testing.assert_close(pooled, expected, **SAME)
    everything, tokens, _ = pooled_and_tokens("mean")
    torch.testing.assert_close(everything, tokens.mean(1), **SAME)
    # The last sample has no padding, the first has.
    torch.testing.assert_close(everything[-1], pooled[-1], **SAME)
    assert not torch.allclose(everything[0], pooled[0], rtol=1e-3)


def test_attention_pools_what_the_first_token_sees_among_the_real_ones():
    pooled, tokens, real = pooled_and_tokens("attention")
    made = model(replace(SMALL, pooling="attention")).pooling
    for sample, (x, keep) in enumerate(zip(tokens, real, strict=True)):
        q = made.query(x[0]).view(2, 1, 4)
        k, v = made.key_value(x[keep]).view(-1, 2, 2, 4).permute(1, 2, 0, 3)
        seen = (q @ k.mT / 2.0).softmax(-1) @ v  # the square root of head_dim 4
        expected = x[0] + made.projection(seen.flatten())
        torch.testing.assert_close(pooled[sample], expected, **SAME)


def test_zero_is_a_token_unless_it_is_to_be_padding():
    made, (ids, real) = model().eval(), batch()
    real = torch.ones_like(real)
    ids[:, ::3] = 0
    assert not torch.allclose(made(ids, real), made(ids, ids != 0), rtol=1e-3)
    published = model(replace(SMALL, zero_is_padding=True)).eval()
    assert torch.equal(published(ids, real), made(ids, ids != 0))


def pair_model(phase: str = "dense") -> EncoderClassifier:
    torch.manual_seed(0)
    block = SparseAttentionConfig(block=BLOCK)
    made = EncoderClassifier(SMALL, block, VOCABULARY, CLASSES, LENGTH, documents=2).double()
    if phase == "sparse":
        switch(made)
    return made


def pair_batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids, real = batch(8)
    return ids.unflatten(0, (4, 2)), real.unflatten(0, (4, 2))


@pytest.mark.parametrize("phase", PHASES)
def test_two_documents_are_encoded_alike_and_compared(phase):
    made, (ids, real) = pair_model(phase).eval(), pair_batch()
    single = model(phase=phase).eval()
    weights = {k: v for k, v in made.state_dict().items() if not k.startswith("classifier.0")}
    single.load_state_dict(weights, strict=False)
    seen = []
    single.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    single(ids[:, 0], real[:, 0])
    single(ids[:, 1], real[:, 1])
    first, second = seen
    compared = torch.cat([first, second, first * second, first - second], dim=1)
    torch.testing.assert_close(made(ids, real), made.classifier(compared), **SAME)


def test_maps_are_of_both_documents():
    made, (ids, real) = pair_model(), pair_batch()
    seen = AttentionMapAccumulator()
    made.attentions[0].observer = seen
    made(ids, real)
    apart = AttentionMapAccumulator()
    single = model()
    weights = {k: v for k, v in made.state_dict().items() if not k.startswith("classifier.0")}
    single.load_state_dict(weights, strict=False)
    for document in range(2):
        single.attentions[0].observer = apart
        single(ids[:, document], real[:, document])
    torch.testing.assert_close(seen.total, apart.total, rtol=1e-6, atol=1e-9)  # of float32 maps
    torch.testing.assert_close(seen.count, apart.count)


def test_two_documents_of_a_sample_draw_different_dropout_whatever_the_split():
    made, (ids, real) = pair_model(), pair_batch()
    keys = sample_keys(0, 5, torch.arange(4), made.dropout_places)
    whole = made(ids, real, keys)
    for row in range(4):
        own = sample_keys(0, 5, torch.tensor([row]), made.dropout_places)
        alone = made(ids[row : row + 1], real[row : row + 1], own)
        torch.testing.assert_close(alone, whole[row : row + 1], **SAME)
    twice = ids[:, :1].expand(-1, 2, -1), real[:, :1].expand(-1, 2, -1)
    seen = []
    made.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    made(*twice, keys)
    assert not torch.allclose(seen[0][:, :8], seen[0][:, 8:16], rtol=1e-3)


def test_switching_the_masks_keeps_parameters_and_state_dict_keys():
    made, (ids, real) = model().eval(), batch()
    parameters = {name: id(parameter) for name, parameter in made.named_parameters()}
    before = {name: value.clone() for name, value in made.state_dict().items()}
    dense = made(ids, real)
    switch(made)
    assert not torch.allclose(made(ids, real), dense, rtol=1e-3)
    assert {name: id(parameter) for name, parameter in made.named_parameters()} == parameters
    assert list(made.state_dict()) == list(before)
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name])
    # A dense model's weights load strictly into a sparse one, and the other way round.
    made.load_state_dict(before)
    model().load_state_dict(made.state_dict())
    for attention in made.attentions:
        attention.sparsity_config.set_pattern(None)
    assert torch.equal(made(ids, real), dense)


def test_each_layer_has_a_pattern_of_its_own():
    made, (ids, real) = model().eval(), batch()
    dense = made(ids, real)
    first, second = made.attentions
    first.sparsity_config.set_pattern(torch.eye(3))
    assert second.sparsity_config.pattern is None
    one = made(ids, real)
    first.sparsity_config.set_pattern(None)
    second.sparsity_config.set_pattern(torch.eye(3))
    other = made(ids, real)
    assert not torch.allclose(one, dense)
    assert not torch.allclose(other, dense)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 0}, "model.dim is 0; allowed: a whole number from 1 up"),
        ({"ffn_dim": -1}, "model.ffn_dim is -1"),
        ({"layers": 0}, "model.layers is 0"),
        ({"heads": 0}, "model.heads is 0"),
        ({"head_dim": 0}, "model.head_dim is 0"),
        ({"classifier_dim": 0}, "model.classifier_dim is 0"),
        ({"dropout": 1.0}, "model.dropout is 1.0; allowed: 0 up to, not including, 1"),
        ({"attention_dropout": -0.1}, "model.attention_dropout is -0.1"),
        ({"pooling": "max"}, "model.pooling is 'max'; allowed: masked_mean or mean or attention"),
    ],
)
def test_values_out_of_range_are_named(change, words):
    ModelConfig().validate()
    with pytest.raises(ConfigError, match=words):
        replace(ModelConfig(), **change).validate()


def sat_model(config: ModelConfig = SMALL) -> EncoderClassifier:
    torch.manual_seed(0)
    sat = SatAttentionConfig(block=BLOCK, loss_weight=0.5)
    return EncoderClassifier(config, sat, VOCABULARY, CLASSES, LENGTH).double()


def test_learned_patterns_leave_every_other_weight_and_the_logits_alone():
    plain, made, (ids, real) = model(), sat_model(), batch()
    assert plain.patterns == []
    weights = made.state_dict()
    shapes = [tuple(weights.pop(f"layers.{i}.pattern.weight").shape) for i in range(2)]
    assert shapes == [(3, 4), (3, 4)]
    assert weights.keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(weights[name], value), name
    keys = sample_keys(0, 0, torch.arange(4), made.dropout_places)
    for modes in (made.train(), made.eval()):
        assert torch.equal(modes(ids, real, keys), plain.train(modes.training)(ids, real, keys))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_pass_has_one_pattern_loss_with_a_gradient_for_w_alone(checkpointing):
    made, (ids, real) = sat_model(replace(SMALL, activation_checkpointing=checkpointing)), batch()
    logits = made(ids, real)
    loss = made.take_pattern_loss()
    assert made.take_pattern_loss() is None
    (0.0 * logits.sum() + loss).backward()
    for name, parameter in made.named_parameters():
        assert bool(parameter.grad.any()) is name.endswith("pattern.weight"), name
    # The layers' losses, times weight and a quarter of the layers: the map is 1/16 to 0 a block.
    products = [p.weight.detach() @ p.weight.detach().T for p in made.patterns]
    size = sum(float(product.square().mean()) for product in products)
    assert float(loss.detach()) == pytest.approx(0.5 * 2 / 4 * size, rel=0.2)


def test_neither_evaluation_nor_frozen_patterns_have_a_pattern_loss():
    made, (ids, real) = sat_model(), batch()
    made.eval()(ids, real)
    assert made.take_pattern_loss() is None
    for pattern in made.patterns:
        pattern.freeze()
    made.train()(ids, real)
    assert made.take_pattern_loss() is None


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("phase", PHASES)
def test_checkpointed_layers_are_computed_twice_and_have_the_same_gradients(phase, positions):
    ids, real = batch()
    found = []
    for checkpointing in (False, True):
        sizes = replace(SMALL, positions=positions, activation_checkpointing=checkpointing)
        made = model(sizes, phase=phase)
        passes, seen = [], AttentionMapAccumulator()
        made.layers[1].ffn_in.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        made.attentions[0].observer = seen
        made(ids, real, sample_keys(0, 5, torch.arange(4), made.dropout_places)).sum().backward()
        assert len(passes) == 1 + checkpointing
        found.append([seen.total, *(parameter.grad for parameter in made.parameters())])
    for plain, again in zip(*found, strict=True):
        assert torch.equal(plain, again)
