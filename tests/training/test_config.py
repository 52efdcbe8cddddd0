"""One validated configuration from recipe, DeepSpeed JSON and overrides."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from spion_ds.errors import ConfigError
from spion_ds.sparsity.block import MODES
from spion_ds.training.config.deepspeed import zero_stage
from spion_ds.training.config.recipe_files import (
    attention_names,
    read_attention,
    read_recipe,
    recipe_names,
)
from spion_ds.training.config.run import RunConfig, build_run_config
from tests.training.launching import ROOT


def build(
    recipe: str = "listops",
    deepspeed: dict[str, Any] | None = None,
    overrides: tuple[str, ...] = (),
    world_size: int = 1,
    device_type: str = "cpu",
) -> RunConfig:
    return build_run_config(
        read_recipe(recipe), deepspeed, overrides, world_size=world_size, device_type=device_type
    )


@pytest.mark.parametrize("name", recipe_names())
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_recipe_is_valid_with_every_shipped_configuration(name: str, stage: int) -> None:
    deepspeed = json.loads((ROOT / "ds_configs" / f"zero{stage}.json").read_text())
    config = build(name, deepspeed)
    assert zero_stage(config.resolved) == stage
    assert "auto" not in json.dumps(config.resolved)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_has_every_key_in_one_order_and_each_with_a_comment(name: str) -> None:
    recipe, config = read_recipe(name), build(name)
    whole = config.to_mapping()
    for section in ("data", "model", "sparse_attention", "transition", "optimizer", "training"):
        assert set(recipe[section]) == set(whole[section]), section
        if section != "data":
            assert list(recipe[section]) == list(read_recipe("listops")[section]), section
    for line in (ROOT / "spion_ds" / "recipes" / f"{name}.yaml").read_text().splitlines():
        assert not line.startswith("  ") or " # " in line, f"{line} has no comment"


def test_the_published_listops_recipe() -> None:
    config = build("listops")
    model, optimizer = config.model, config.optimizer
    assert (model.dim, model.ffn_dim, model.layers, model.heads, model.head_dim) == (
        64,
        128,
        4,
        2,
        32,
    )
    assert (model.dropout, model.classifier_dim, model.pooling) == (0.1, 128, "masked_mean")
    assert (config.sparse_attention.block, config.sparse_attention.alpha) == (64, 0.98)
    assert (config.sparse_attention.density, config.sparse_attention.filter_size) == (0.04, 31)
    assert (config.training.steps, config.training.batch_size) == (30000, 256)
    assert (optimizer.lr, optimizer.warmup_steps, optimizer.eps) == (7e-4, 1000, 1e-6)
    assert (optimizer.clip_value, config.transition.check_every) == (1.0, 500)
    assert config.schedule.restart_at_switch


# Table of the published runs: tokens, layers, batch, peak rate, warm-up, steps, check, block,
# alpha, density.
PUBLISHED = {
    "image": (1024, 2, 128, 1e-4, 175, 10_000, 500, 32, 0.96, 0.04),
    "listops": (2048, 4, 256, 7e-4, 1000, 30_000, 500, 64, 0.98, 0.04),
    "retrieval": (4096, 2, 32, 3e-4, 800, 40_000, 200, 64, 0.99, 0.021),
    "text": (4096, 2, 32, 1e-4, 80, 30_000, 200, 64, 0.99, 0.03),
    "pathfinder32": (1024, 2, 256, 3e-4, 312, 50_000, 500, 32, 0.96, 0.05),
}


@pytest.mark.parametrize("task", PUBLISHED)
def test_the_published_recipes(task: str) -> None:
    config = build(task)
    # The published code hides token 0 everywhere; of pixels, Pathfinder needs it.
    own = {"layers": config.model.layers, "zero_is_padding": task == "pathfinder32"}
    assert (config.task, config.model) == (task, replace(build("listops").model, **own))
    attention = config.sparse_attention
    found = (
        config.data.sequence_length,
        config.model.layers,
        config.training.batch_size,
        config.optimizer.lr,
        config.optimizer.warmup_steps,
        config.training.steps,
        config.transition.check_every,
        attention.block,
        attention.alpha,
        attention.density,
    )
    assert found == PUBLISHED[task]


@pytest.mark.parametrize("recipe", [*PUBLISHED, "pathfinder128"])
@pytest.mark.parametrize("name", attention_names())
def test_every_recipe_takes_every_attention(recipe: str, name: str) -> None:
    mode = read_attention(name)["mode"]
    if mode not in MODES:
        pytest.skip(f"there is no mode {mode!r}")
    config = build_run_config(
        read_recipe(recipe), {}, (), world_size=1, device_type="cpu", attention=name
    )
    plain = build(recipe)
    assert config.recipe == f"{recipe}-{name}"
    assert config.sparse_attention.mode == mode
    assert config.sparse_attention.block == plain.sparse_attention.block
    assert (config.model, config.optimizer, config.data) == (
        plain.model,
        plain.optimizer,
        plain.data,
    )
    variant = name.partition("spion-")[2]
    if variant:
        assert config.sparse_attention.variant == variant
        assert config.sparse_attention.alpha == plain.sparse_attention.alpha
        assert config.sparse_attention.density == plain.sparse_attention.density
    if mode == "sat":
        published = {"image": 0.05, "listops": 0.04, "retrieval": 0.021}
        assert config.sparse_attention.density == published.get(
            recipe, plain.sparse_attention.density
        )
        assert config.transition.rule == "skewness"


def test_a_named_attention_yields_to_the_json_and_the_command_line() -> None:
    def with_bigbird(deepspeed: dict, *overrides: str) -> RunConfig:
        return build_run_config(
            read_recipe("image"),
            deepspeed,
            overrides,
            world_size=1,
            device_type="cpu",
            attention="bigbird",
        )

    assert with_bigbird({}).sparse_attention.num_random_blocks == 3
    block = {"sparse_attention": {"num_random_blocks": 2}}
    assert with_bigbird(block).sparse_attention.num_random_blocks == 2
    words = "sparse_attention.num_random_blocks=1"
    assert with_bigbird(block, words).sparse_attention.num_random_blocks == 1
    assert with_bigbird({}, "sparse_attention.mode=fixed").sparse_attention.mode == "fixed"
    with pytest.raises(
        ConfigError, match=r"unknown --attention 'bigbrid' \(did you mean 'bigbird'"
    ):
        read_attention("bigbrid")


def test_a_saved_configuration_reads_back_the_same() -> None:
    config = build("listops_small", {"zero_optimization": {"stage": 2}}, ("training.steps=201",))
    again = build_run_config(config.to_mapping(), None, (), world_size=1, device_type="cpu")
    assert again == config


def test_later_sources_win() -> None:
    block = {"sparse_attention": {"mode": "spion", "block": 32, "variant": "f"}}
    config = build("listops", block)
    assert (config.sparse_attention.block, config.sparse_attention.variant) == (32, "f")
    assert config.sparse_attention.alpha == 0.98
    assert not config.schedule.restart_at_switch
    assert build("listops", block, ("sparse_attention.block=128",)).sparse_attention.block == 128


def test_a_pattern_a_head_needs_maps_at_block_resolution() -> None:
    words = ("sparse_attention.different_layout_per_head=true", "transition.resolution=")
    with pytest.raises(
        ConfigError,
        match=r"different_layout_per_head is True; .*transition\.resolution=token.* set "
        r"transition\.resolution=block",
    ):
        build("listops", {}, (words[0], words[1] + "token"))
    config = build("listops", {}, (words[0], words[1] + "block"))
    assert config.sparse_attention.different_layout_per_head
    again = build_run_config(config.to_mapping(), None, (), world_size=1, device_type="cpu")
    assert again == config
    # Static patterns have no maps.
    build("listops", {}, ("sparse_attention.mode=fixed", words[0], words[1] + "token"))


def test_a_mode_of_the_json_or_the_command_line_leaves_the_recipes_pattern_behind() -> None:
    block = {"sparse_attention": {"mode": "bigbird", "num_random_blocks": 2}}
    config = build("listops", block)
    kept = {"mode": "bigbird", "block": 64, "different_layout_per_head": False}
    keys = {"num_sliding_window_blocks": 3, "num_global_blocks": 1, "attention": "bidirectional"}
    assert config.sparse_attention.to_mapping() == {**kept, "num_random_blocks": 2, **keys}
    assert config.is_sparse
    assert not config.switches
    assert not config.schedule.restart_at_switch
    words = ["sparse_attention.num_random_blocks=2", "sparse_attention.mode=bigbird"]
    for overrides in (words, words[::-1]):
        assert build("listops", {}, tuple(overrides)) == config
    again = build_run_config(config.to_mapping(), None, (), world_size=1, device_type="cpu")
    assert again == config
    with pytest.raises(ConfigError, match=r"sparse_attention\.alpha.*belongs to spion"):
        build("listops", block, ("sparse_attention.alpha=0.9",))
    fixed = build("listops", {}, ("sparse_attention.mode=fixed",)).to_mapping()
    json_block = {"sparse_attention": {"num_local_blocks": 2}}  # names no mode: the recipe's
    config = build_run_config(fixed, json_block, (), world_size=1, device_type="cpu")
    assert config.sparse_attention.num_local_blocks == 2


def test_sat_does_what_was_published_unless_told_otherwise() -> None:
    config = build("listops", {}, ("sparse_attention.mode=sat",))
    transition, schedule = config.transition, config.schedule
    assert config.switches
    assert (transition.rule, transition.check_every) == ("skewness", 1)
    assert (transition.min_skewness, transition.max_change_percent) == (1.7, 1.3)
    assert (schedule.at(5, None), schedule.at(5, 5)) != (3.5e-4, 3.5e-4)
    assert schedule.at(20000, 5) == 3.5e-4
    assert (config.sparse_attention.block, config.sparse_attention.density) == (64, 0.04)
    again = build_run_config(config.to_mapping(), None, (), world_size=1, device_type="cpu")
    assert again == config

    words = ("sparse_attention.mode=sat", "transition.check_every=20", "transition.rule=distance")
    transition = build("listops", {}, words).transition
    assert (transition.rule, transition.check_every) == ("distance", 20)
    # Back to SPION, SAT's own rule is left behind as well.
    back = build_run_config(
        config.to_mapping(), None, ("sparse_attention.mode=spion",), world_size=1, device_type="cpu"
    )
    assert (back.transition.rule, back.transition.check_every) == ("distance", 500)
    assert build("listops").transition.check_every == 500


def test_a_rule_that_is_not_the_modes_own_stays_with_the_mode() -> None:
    recipe = {**read_recipe("listops"), "transition": {"rule": "fixed", "switch_step": 9}}
    config = build_run_config(
        recipe, None, ("sparse_attention.mode=sat",), world_size=1, device_type="cpu"
    )
    assert (config.transition.rule, config.transition.switch_step) == ("fixed", 9)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("transition.rule=skew", "unknown transition.rule 'skew'.*known: distance, fixed, skewn"),
        ("transition.max_change_percent=0", r"max_change_percent is 0\.0; allowed: above 0"),
        ("transition.min_skewness=high", "min_skewness is 'high'; wanted: a finite number"),
        ("transition.switch_step=9", "the skewness rule does not use it; set transition.rule=fix"),
    ],
)
def test_wrong_values_of_sats_rule_are_named(override: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build("listops", {}, ("sparse_attention.mode=sat", override))


def test_deepspeed_never_sees_the_sparse_attention_block() -> None:
    given = {"sparse_attention": {"block": 32}}
    config = build("listops", given)
    assert "sparse_attention" not in config.resolved
    assert "sparse_attention" in given  # the caller's mapping is left alone


def test_auto_values_come_from_the_recipe() -> None:
    deepspeed = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    resolved = build("listops", deepspeed, world_size=4).resolved
    assert resolved["train_batch_size"] == 256
    assert resolved["train_micro_batch_size_per_gpu"] == 64
    assert resolved["gradient_accumulation_steps"] == 1
    assert resolved["optimizer"]["params"]["lr"] == 7e-4
    assert resolved["optimizer"]["params"]["betas"] == [0.9, 0.999]
    # DeepSpeed would clip by norm at 1.0 if nothing were said.
    assert resolved["gradient_clipping"] == 0.0
    assert resolved["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("deepspeed", "overrides", "world_size", "expected"),
    [
        ({}, (), 2, (128, 1)),
        ({}, ("training.micro_batch_size=32",), 2, (32, 4)),
        ({"gradient_accumulation_steps": 4}, (), 2, (32, 4)),
        ({"train_micro_batch_size_per_gpu": 16}, (), 4, (16, 4)),
    ],
)
def test_batch_sizes(
    deepspeed: dict[str, Any], overrides: tuple[str, ...], world_size: int, expected: tuple
) -> None:
    batches = build("listops", deepspeed, overrides, world_size=world_size).batches
    assert (batches.micro, batches.accumulation) == expected
    assert batches.micro * batches.accumulation * world_size == batches.total == 256


def test_precision_reaches_deepspeed() -> None:
    assert build("listops", {}, ("training.precision=bf16",)).resolved["bf16"]["enabled"] is True
    fp16 = build("listops", {}, ("training.precision=fp16",), device_type="cuda").resolved
    assert fp16["fp16"]["enabled"] is True


def test_a_dense_run_needs_no_transition() -> None:
    config = build("listops", {}, ("sparse_attention.mode=dense", "training.steps=1001"))
    assert not config.is_sparse


def test_lists_and_nested_values_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.betas"):
        build("listops", {}, ("optimizer.betas=[0.9]",))
    with pytest.raises(ConfigError, match=r"optimizer\.betas"):
        build("listops", {}, ("optimizer.betas=[0.9, 1.5]",))


def test_the_fixed_rule_is_asked_at_the_step_that_it_names() -> None:
    words = ("transition.rule=fixed", "transition.check_every=200", "transition.switch_step=900")
    assert build("listops", overrides=words).transition.steps_between_checks == 900
    assert build("listops", overrides=words[1:2]).transition.steps_between_checks == 200
