"""One validated run configuration from a recipe, a DeepSpeed JSON and the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from spion_ds.data.tasks import TASKS, get_task
from spion_ds.errors import ConfigError, unknown_name
from spion_ds.models import ModelConfig
from spion_ds.settings import read_dataclass, require
from spion_ds.sparsity import (
    AttentionConfig,
    read_sparse_attention,
    take_sparse_attention_block,
)
from spion_ds.sparsity.block import DEFAULT_MODE, MODES, merge_sparse_attention, mode_keys
from spion_ds.training.config.deepspeed import BatchSizes, resolve_deepspeed_config, zero_stage
from spion_ds.training.config.recipe_files import for_task, read_attention
from spion_ds.training.config.sections import OptimizerConfig, TrainingConfig, TransitionConfig
from spion_ds.training.step.acceleration import check_acceleration
from spion_ds.training.step.schedule import OneCycle

# What a mode does as published, where the recipe does not say otherwise.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "spion": {"rule": "distance"},
    "sat": {"rule": "skewness", "check_every": 1},
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run, validated.

    Attributes:
        recipe: the recipe's name, which also names the run.
        task: the task's name; ``data`` is that task's own configuration.
        deepspeed: the DeepSpeed configuration as the user gave it, without ``sparse_attention``.
        resolved: the same with every value filled in, as DeepSpeed gets it.
        batches: global, micro-batch and accumulation sizes for this number of ranks.
    """

    recipe: str
    task: str
    data: Any
    model: ModelConfig
    sparse_attention: AttentionConfig
    transition: TransitionConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    deepspeed: dict = field(default_factory=dict)
    resolved: dict = field(default_factory=dict)
    batches: BatchSizes = field(default_factory=BatchSizes)

    @property
    def schedule(self) -> OneCycle:
        """The learning rate; at the switch SPION-C's and -CF's restarts, and SAT's is halved."""
        return OneCycle(
            self.optimizer.lr,
            self.optimizer.warmup_steps,
            self.training.steps,
            restart_at_switch=self.sparse_attention.restarts_schedule,
            sparse_lr=0.5 * self.optimizer.lr if self.sparse_attention.restarts_optimizer else None,
        )

    @property
    def tokens_per_step(self) -> int:
        """Sequence positions of a step, padding included, over all ranks."""
        documents = get_task(self.task).documents
        return self.batches.total * documents * self.data.sequence_length

    @property
    def is_sparse(self) -> bool:
        """Whether the run is sparse at any time; a dense run stays dense throughout."""
        return self.sparse_attention.mode != "dense"

    @property
    def switches(self) -> bool:
        """Whether the run starts dense and is to switch; other patterns are there from step 1."""
        return self.sparse_attention.mode in _PUBLISHED

    def to_mapping(self) -> dict[str, Any]:
        """Return the configuration as plain nested mappings that ``load`` reads again."""
        plain = dataclasses.asdict(self)
        del plain["resolved"], plain["batches"]
        plain["sparse_attention"] = self.sparse_attention.to_mapping()
        return json.loads(json.dumps(plain))


_SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "transition": TransitionConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
}


def build_run_config(
    recipe: Mapping[str, Any],
    deepspeed: Mapping[str, Any] | None,
    overrides: Sequence[str],
    *,
    world_size: int | None,
    device_type: str,
    attention: str | None = None,
) -> RunConfig:
    """Return the validated configuration of a run.

    Values come from the recipe, then from the named attention, then from the ``sparse_attention``
    block of the DeepSpeed configuration, then from the command line.

    Args:
        recipe: nested mappings, from :func:`read_recipe` or a saved run.
        deepspeed: the DeepSpeed JSON; None takes the recipe's own ``deepspeed`` section.
        overrides: ``section.key=value`` texts; values are read as YAML.
        world_size: ranks that train; None if that is not known yet: a number that fits.
        device_type: ``"cpu"`` or ``"cuda"``.
        attention: one of ``recipe_files.attention_names()``; it is appended to the recipe's name.

    Raises:
        ConfigError: anything unknown, out of range or contradictory.
    """
    values: dict[str, Any] = {
        k: dict(v) if isinstance(v, Mapping) else v for k, v in recipe.items()
    }
    ds_values = json.loads(json.dumps(deepspeed or values.pop("deepspeed", {})))
    values.pop("deepspeed", None)
    layers = [values.pop("sparse_attention", None) or {}]
    mode = layers[0].get("mode", DEFAULT_MODE) if isinstance(layers[0], Mapping) else DEFAULT_MODE
    named = read_attention(attention) if attention else {"mode": mode}
    layers.append(take_sparse_attention_block(ds_values, named["mode"]) or {})
    transition = values.pop("transition", None) or {}
    for text in overrides:
        _override(values, text)
    layers.append(values.pop("sparse_attention", {}))
    known = ("recipe", "task", "data", "sparse_attention", *_SECTIONS)
    for key in values:
        if key not in known:
            raise ConfigError(unknown_name("key", key, known))
    if "task" not in values:
        raise ConfigError("the recipe names no task; add e.g. 'task: listops'")
    if attention:
        layers.insert(1, for_task(named, str(values["task"])))
        if named.get("variant") == "budget" and isinstance(transition, Mapping):
            transition = {**transition, "resolution": "block"}  # maps a head are pooled
    sparse_attention = read_sparse_attention(merge_sparse_attention(layers))
    values["transition"] = _published_or_given(
        transition, values.get("transition", {}), str(mode), sparse_attention.mode
    )
    task = get_task(str(values["task"]))
    data = read_dataclass(task.config_class, values.get("data") or {}, "data")
    sections: dict[str, Any] = {
        name: read_dataclass(cls, values.get(name) or {}, name) for name, cls in _SECTIONS.items()
    }
    config = RunConfig(
        recipe="-".join([str(values.get("recipe", "run")), *([attention] if attention else [])]),
        task=task.name,
        data=data,
        sparse_attention=sparse_attention,
        **sections,
    )
    return _validated(config, ds_values, world_size, device_type)


def _published_or_given(
    recipe: Any, overrides: Mapping[str, Any], recipe_mode: str, mode: str
) -> Any:
    """Return the ``transition`` section: what the mode does as published, recipe, overrides.

    A recipe of another mode leaves behind that mode's own rule, and how often it checks.
    """
    if not isinstance(recipe, Mapping):
        return recipe  # for the reader to refuse
    published = _PUBLISHED.get(mode, _PUBLISHED["spion"])
    before = _PUBLISHED.get(recipe_mode, _PUBLISHED["spion"])
    if published != before and recipe.get("rule", before["rule"]) == before["rule"]:
        recipe = {k: v for k, v in recipe.items() if k not in ("rule", "check_every")}
    return {**published, **recipe, **overrides}


def _validated(
    config: RunConfig, deepspeed: dict[str, Any], world_size: int | None, device_type: str
) -> RunConfig:
    config.data.validate()
    config.model.validate()
    config.training.validate()
    require(
        config.training.pretrain_steps == 0 or config.model.masked_token_loss > 0.0,
        "training.pretrain_steps",
        config.training.pretrain_steps,
        "0 where model.masked_token_loss is 0",
    )
    require(
        not config.training.cuda_graph or config.model.masked_token_loss == 0.0,
        "training.cuda_graph",
        True,
        "false where model.masked_token_loss is above 0",
    )
    for key in ("nesting_levels", "subexpression_loss"):
        value = getattr(config.model, key)
        require(
            value == 0 or get_task(config.task).brackets is not None,
            f"model.{key}",
            value,
            f"0 for the task {config.task}, which has no brackets; above 0 for listops",
        )
    augmented = [name for name, task in TASKS.items() if task.augmentation is not None]
    require(
        not config.training.augment or config.task in augmented,
        "training.augment",
        True,
        f"false for the task {config.task}; true for {', '.join(augmented)}",
    )
    config.sparse_attention.validate(config.data.sequence_length)
    if config.switches:
        config.transition.validate(config.training.steps)
        require(
            not config.sparse_attention.different_layout_per_head
            or config.transition.resolution != "token",
            "sparse_attention.different_layout_per_head",
            True,
            "false with transition.resolution=token, whose maps are means over the heads; for a "
            "pattern a head set transition.resolution=block",
        )
    config.optimizer.validate(config.training.steps)
    require(
        config.training.batch_size <= config.data.train,
        "training.batch_size",
        config.training.batch_size,
        f"at most the training samples, {config.data.train}",
    )
    resolved, batches = resolve_deepspeed_config(
        deepspeed, config.training, config.optimizer, world_size, device_type
    )
    check_acceleration(
        config.training, resolved, zero_stage(resolved), device_type, batches.accumulation
    )
    return dataclasses.replace(config, deepspeed=deepspeed, resolved=resolved, batches=batches)


def _override(values: dict[str, Any], text: str) -> None:
    place, separator, value = text.partition("=")
    if not separator or not place:
        raise ConfigError(f"override {text!r} is not section.key=value, e.g. training.steps=100")
    section, dot, key = place.partition(".")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of override {text!r} is not YAML") from error
    if not dot:
        if section not in ("task", "recipe"):
            raise ConfigError(unknown_name("key", section, ["task", *_dotted_keys()]))
        values[section] = parsed
        return
    if section not in (*_SECTIONS, "sparse_attention", "data"):
        raise ConfigError(unknown_name("key", place, _dotted_keys()))
    values[section] = {**(values.get(section) or {}), key: parsed}


def _dotted_keys() -> list[str]:
    keys = {f"sparse_attention.{key}" for mode in MODES for key in mode_keys(mode)}
    return [
        *(f"{s}.{f.name}" for s, cls in _SECTIONS.items() for f in dataclasses.fields(cls)),
        *sorted(keys),
    ]
