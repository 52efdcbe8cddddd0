"""The sparse_attention block: taken out, read strictly, and found when its name is misspelt."""

from __future__ import annotations

import pytest

from spion_ds.errors import ConfigError
from spion_ds.sparsity import (
    AttentionConfig,
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SatSparsityConfig,
    SparseAttentionConfig,
    SpionSparsityConfig,
    VariableSparsityConfig,
    read_sparse_attention,
    take_sparse_attention_block,
)
from spion_ds.sparsity.block import MODES, merge_sparse_attention, mode_keys

LENGTH = 2048


def read(**block) -> AttentionConfig:
    return read_sparse_attention(block)


def test_the_block_is_taken_out_and_the_rest_stays():
    block = {"mode": "spion", "block": 32}
    config = {"train_batch_size": 8, "sparse_attention": block, "bf16": {"enabled": True}}
    assert take_sparse_attention_block(config) == block
    assert config == {"train_batch_size": 8, "bf16": {"enabled": True}}
    assert take_sparse_attention_block(config) is None
    assert take_sparse_attention_block({}) is None


@pytest.mark.parametrize(
    "key",
    [
        "sparse_atention",
        "sparseAttention",
        "sparse-attention",
        "sparce_attention",
        "Sparse_Attention",
        "SPARSE_ATTENTION",
        "sparse attention",
        "sparse_attentions",
        "sparse_attenton",
        "spare_attention",
        "sprase_attention",
        "sparse_attn",
        "sparseattention",
        "_sparse_attention",
        "sparse_attention_",
    ],
)
@pytest.mark.parametrize("beside", [False, True])
def test_a_misspelt_name_is_an_error_that_offers_the_right_one(key, beside):
    config = {"train_batch_size": 8, key: {"mode": "spion"}}
    config |= {"sparse_attention": {"mode": "dense"}} if beside else {}
    before = dict(config)
    with pytest.raises(ConfigError, match=f"'{key}'.*did you mean 'sparse_attention'"):
        take_sparse_attention_block(config)
    assert config == before


# Top-level keys of DeepSpeed's documentation, and the nearest that others might put beside them.
DEEPSPEED_KEYS = [
    "activation_checkpointing",
    "attention",
    "autotuning",
    "bf16",
    "checkpoint",
    "communication_data_type",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "data_types",
    "elasticity",
    "flops_profiler",
    "fp16",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "hybrid_engine",
    "monitor_config",
    "optimizer",
    "pipeline",
    "prescale_gradients",
    "scheduler",
    "sparse_gradients",
    "steps_per_print",
    "tensor_parallel",
    "tensorboard",
    "torch_autocast",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_optimization",
]


@pytest.mark.parametrize("key", DEEPSPEED_KEYS)
def test_deepspeeds_own_keys_are_let_through(key):
    config = {key: {}, "sparse_attention": {"mode": "spion"}}
    assert take_sparse_attention_block(config) == {"mode": "spion"}
    assert config == {key: {}}


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            {"blok": 64},
            "unknown key 'sparse_attention.blok'.*did you mean 'sparse_attention.block'",
        ),
        ({"num_local_blocks": 4}, "unknown key 'sparse_attention.num_local_blocks'.*known: .*mode"),
        ({"block": "64"}, "sparse_attention.block is '64'; wanted: a whole number"),
        ({"block": True}, "sparse_attention.block is True"),
        ({"block": 16.0}, "sparse_attention.block is 16.0"),
        ({"alpha": "high"}, "sparse_attention.alpha is 'high'; wanted: a finite number"),
        ({"mode": None}, "sparse_attention.mode is None; wanted: text"),
        ({"different_layout_per_head": 0}, "per_head is 0; wanted: true or false"),
        ("spion", "sparse_attention is 'spion'; a mapping is wanted"),
        ([], "a mapping is wanted"),
    ],
)
def test_unknown_keys_and_wrong_types_are_named(block, words):
    with pytest.raises(ConfigError, match=words):
        take_sparse_attention_block({"sparse_attention": block})


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (
            {"mode": "sparse"},
            "unknown sparse_attention.mode 'sparse'.*known: bigbird, .*spion",
        ),
        ({"mode": "Spion"}, "mode 'Spion'.*did you mean 'spion'"),
        ({"block": 48}, "sparse_attention.block is 48; allowed: 16, 32, 64 or 128"),
        ({"block": 0}, "sparse_attention.block is 0"),
        ({"variant": "fc"}, "unknown sparse_attention.variant 'fc'.*known: budget, c, cf, f"),
        ({"alpha": 0.0}, "sparse_attention.alpha is 0.0; allowed: between 0 and 1"),
        ({"alpha": 98.0}, "sparse_attention.alpha is 98.0"),
        ({"density": 0.0}, "sparse_attention.density is 0.0; allowed: above 0"),
        ({"density": 1.5}, "sparse_attention.density is 1.5"),
        ({"filter_size": 30}, "sparse_attention.filter_size is 30; allowed: odd"),
        ({"filter_size": -1}, "sparse_attention.filter_size is -1"),
        ({"pruned": "none"}, "unknown sparse_attention.pruned mode 'none'.*known: excluded, zero"),
        # 32 blocks a side: the diagonal alone is 1/32 = 0.03125 of them.
        (
            {"variant": "c", "density": 0.03},
            "density is 0.03; allowed: 0.0312 .the diagonal of 32×32 blocks alone. to 1",
        ),
    ],
)
def test_values_out_of_range_are_named(block, words):
    with pytest.raises(ConfigError, match=words):
        read(**block).validate(LENGTH)


def test_a_block_longer_than_the_input_is_named():
    read(block=64).validate(64)
    with pytest.raises(ConfigError, match="block is 64; allowed: at most the sequence length, 50"):
        read(block=64).validate(50)


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"mode": "dense"},
        {"block": 128, "variant": "f", "alpha": 0.99},
        {"block": 16, "variant": "c", "density": 1, "filter_size": 1},
        {"variant": "cf", "density": 0.001},  # flood fill does not use it
        {"pruned": "excluded"},
        {"different_layout_per_head": True},
    ],
)
def test_what_is_allowed_is_accepted(block):
    read(**block).validate(LENGTH)


def test_defaults_are_those_of_the_class():
    defaults, built = SparseAttentionConfig(), SpionSparsityConfig(2)
    for name in (
        "block",
        "variant",
        "alpha",
        "density",
        "filter_size",
        "different_layout_per_head",
    ):
        assert getattr(defaults, name) == getattr(built, name)


def test_every_layer_gets_a_configuration_of_its_own():
    block = read(block=32, variant="c", alpha=0.9, density=0.2, filter_size=5)
    first, second = block.build(4), block.build(4)
    assert type(first) is SpionSparsityConfig
    assert first is not second
    assert (first.num_heads, first.block, first.variant) == (4, 32, "c")
    assert (first.alpha, first.density, first.filter_size) == (0.9, 0.2, 5)
    assert first.different_layout_per_head is False
    dense = read(mode="dense", block=16).build(4)
    assert type(dense) is DenseSparsityConfig
    assert (dense.num_heads, dense.block) == (4, 16)


# Every mode's keys and defaults as DeepSpeed 0.19.6 parsed them ("local" had a class alone).
OLD_DEFAULTS = {
    "dense": {},
    "fixed": {
        "num_local_blocks": 4,
        "num_global_blocks": 1,
        "attention": "bidirectional",
        "horizontal_global_attention": False,
        "num_different_global_patterns": 1,
    },
    "variable": {
        "num_random_blocks": 0,
        "local_window_blocks": [4],
        "global_block_indices": [0],
        "global_block_end_indices": None,
        "attention": "bidirectional",
        "horizontal_global_attention": False,
    },
    "bigbird": {
        "num_random_blocks": 0,
        "num_sliding_window_blocks": 3,
        "num_global_blocks": 1,
        "attention": "bidirectional",
    },
    "bslongformer": {
        "num_sliding_window_blocks": 3,
        "global_block_indices": [0],
        "global_block_end_indices": None,
        "attention": "bidirectional",
    },
    "local": {"num_sliding_window_blocks": 3, "attention": "unidirectional"},
}
CLASSES = {
    "dense": DenseSparsityConfig,
    "fixed": FixedSparsityConfig,
    "variable": VariableSparsityConfig,
    "bigbird": BigBirdSparsityConfig,
    "bslongformer": BSLongformerSparsityConfig,
    "local": LocalSlidingWindowSparsityConfig,
}


def test_all_modes_are_known():
    assert set(MODES) == {*OLD_DEFAULTS, "spion", "sat"}


@pytest.mark.parametrize("mode", OLD_DEFAULTS)
def test_every_mode_has_the_old_keys_and_defaults_and_builds_its_class(mode):
    common = {"mode": mode, "block": 16, "different_layout_per_head": False}
    config = read(mode=mode)
    assert config.to_mapping() == {**common, **OLD_DEFAULTS[mode]}
    assert read(**config.to_mapping()) == config
    config.validate(LENGTH)
    built = config.build(4)
    assert type(built) is CLASSES[mode]
    assert (built.num_heads, built.block, config.pruned) == (4, 16, "excluded")
    for key, value in OLD_DEFAULTS[mode].items():
        assert getattr(built, key) == value


def test_sat_has_the_published_defaults_and_builds_its_class():
    config = read(mode="sat")
    assert config.to_mapping() == {
        "mode": "sat",
        "block": 64,
        "different_layout_per_head": False,
        "density": 0.04,
        "loss_weight": 0.01,
        "pruned": "zero",
    }
    config.validate(LENGTH)
    first, second = config.build(4), read(mode="sat", block=32, density=0.2).build(4, 1)
    assert type(first) is type(second) is SatSparsityConfig
    assert (first.num_heads, first.block, first.density) == (4, 64, 0.04)
    assert (second.block, second.density) == (32, 0.2)


def test_values_reach_the_class():
    built = read(
        mode="variable", block=32, different_layout_per_head=True, local_window_blocks=[1, 2]
    ).build(2)
    assert (built.block, built.local_window_blocks, built.num_layout_heads) == (32, [1, 2], 2)


def test_mode_spion_takes_a_pattern_a_head():
    config = read(mode="spion", different_layout_per_head=True)
    assert read(**config.to_mapping()) == config
    assert config.build(3).make_mask(LENGTH).shape == (3, 32, 32)


def test_random_blocks_differ_between_layers_and_not_between_ranks():
    config = read(mode="bigbird", num_random_blocks=2)
    first, again, second = (config.build(2, layer).make_layout(LENGTH) for layer in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(second)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"mode": "bigbird", "alpha": 0.9}, "'sparse_attention.alpha' in mode 'bigbird': .* spion"),
        (
            {"mode": "fixed", "num_random_blocks": 1},
            "belongs to variable, bigbird; .*known:",
        ),
        ({"mode": "spion", "num_local_blocks": 4}, "in mode 'spion': it belongs to fixed"),
        ({"mode": "dense", "pruned": "zero"}, "belongs to spion"),
        ({"mode": "fixed", "num_locl_blocks": 4}, "did you mean 'sparse_attention.num_local_blo"),
        (
            {"mode": "variable", "local_window_blocks": [1.5]},
            "window_blocks is .1.5.; wanted",
        ),
        ({"mode": "st"}, "unknown sparse_attention.mode 'st'"),
        ({"mode": "sat", "alpha": 0.9}, "in mode 'sat': it belongs to spion; .*loss_weight"),
        ({"mode": "spion", "loss_weight": 0.1}, "in mode 'spion': it belongs to sat"),
        ({"mode": "sat", "loss_weight": "much"}, "loss_weight is 'much'; wanted: a finite number"),
    ],
)
def test_keys_of_other_modes_are_unknown(block, words):
    with pytest.raises(ConfigError, match=words):
        take_sparse_attention_block({"sparse_attention": block})


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"mode": "fixed", "num_global_blocks": 3}, "sparse_attention.num_global_blocks is 3"),
        (
            {"mode": "bigbird", "num_random_blocks": 200},
            "attention.num_random_blocks is 200",
        ),
        ({"mode": "local", "attention": "both"}, "sparse_attention.attention is 'both'"),
        ({"mode": "local", "different_layout_per_head": True}, "per_head is True; allowed: false"),
        ({"mode": "fixed", "block": 48}, "sparse_attention.block is 48; allowed: 16, 32"),
        ({"mode": "sat", "block": 48}, "sparse_attention.block is 48; allowed: 16, 32"),
        ({"mode": "sat", "density": 0.0009}, r"density is 0.0009; allowed: 0.000977 \(one of 1024"),
        ({"mode": "sat", "density": 1.01}, "density is 1.01; allowed: .* to 1"),
        ({"mode": "sat", "loss_weight": 0.0}, "loss_weight is 0.0; allowed: above 0"),
        ({"mode": "sat", "pruned": "kept"}, "unknown sparse_attention.pruned mode 'kept'"),
        (
            {"mode": "sat", "different_layout_per_head": True},
            r"sparse_attention.different_layout_per_head is True; allowed: false \(SAT learns",
        ),
    ],
)
def test_other_modes_values_out_of_range_are_named(block, words):
    with pytest.raises(ConfigError, match=words):
        read(**block).validate(LENGTH)


def test_a_layer_that_changes_the_mode_leaves_the_other_modes_keys_behind():
    recipe = {"mode": "spion", "block": 64, "alpha": 0.9}
    merged = merge_sparse_attention([recipe, {"num_random_blocks": 1, "mode": "bigbird"}])
    assert merged == {"mode": "bigbird", "block": 64, "num_random_blocks": 1}
    assert merge_sparse_attention([recipe, {"block": 32}]) == {**recipe, "block": 32}
    # A layer's own keys must be of its mode.
    wrong = merge_sparse_attention([recipe, {"mode": "bigbird", "alpha": 0.8}])
    with pytest.raises(ConfigError, match="belongs to spion"):
        read_sparse_attention(wrong)
    assert "alpha" not in mode_keys("bigbird")
