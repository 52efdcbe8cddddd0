"""One validated run configuration from a recipe, a DeepSpeed JSON and the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from spion_ds.data import get_task
from spion_ds.errors import ConfigError, unknown_name
from spion_ds.models import ModelConfig
from spion_ds.patterns import DistanceRule, FixedStepRule, SkewnessRule, TransitionRule
from spion_ds.settings import read_dataclass, require
from spion_ds.sparsity import (
    AttentionConfig,
    read_sparse_attention,
    take_sparse_attention_block,
)
from spion_ds.sparsity.block import DEFAULT_MODE, MODES, merge_sparse_attention, mode_keys
from spion_ds.training.acceleration import check_acceleration
from spion_ds.training.augmentation import AUGMENTED_TASKS
from spion_ds.training.deepspeed_config import BatchSizes, resolve_deepspeed_config, zero_stage
from spion_ds.training.recipe_files import for_task, read_attention
from spion_ds.training.schedule import OneCycle

RULES = ("distance", "fixed", "skewness")
RESOLUTIONS = ("token", "block")
# What a mode does as published, where the recipe does not say otherwise.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "spion": {"rule": "distance"},
    "sat": {"rule": "skewness", "check_every": 1},
}
PRECISIONS = ("fp32", "bf16", "fp16")
ON_NONFINITE = ("stop", "skip")


@dataclass(frozen=True)
class TransitionConfig:
    """When training goes from dense to sparse.

    Attributes:
        rule: ``"distance"`` (SPION's, the default), ``"skewness"`` (SAT's, mode ``sat``'s
            default) or ``"fixed"`` (after ``switch_step`` steps).
        resolution: of the maps: ``"token"``, (L, L) as published, or ``"block"``, pooled to (n, n)
            while they are computed. The rules compare these. SPION's patterns of a step are the
            same with both, SAT's do not come from maps, and skewness is always a token-level
            map's.
        check_every: steps between two checks of a rule that looks at maps; 1 in mode ``sat``.
        threshold_percent: the distance's change below which the distance rule fires.
        min_skewness: of every layer's map for the skewness rule to fire.
        max_change_percent: the distance's change below which the skewness rule fires.
        min_gain_percent: points of validation accuracy above the majority class's that a model must
            have had before a rule that looks at maps may fire. On a plateau, where nothing is
            learned, maps are steady too, and their patterns worth nothing. 0: at once, as
            published.
        switch_step: dense steps under the fixed rule.
        max_dense_steps: dense steps after which the switch is forced; null waits for the rule.
    """

    rule: str = "distance"
    resolution: str = "token"
    check_every: int = 500
    threshold_percent: int = 15
    min_skewness: float = 1.7
    max_change_percent: float = 1.3
    min_gain_percent: float = 0.0
    switch_step: int | None = None
    max_dense_steps: int | None = None

    def validate(self, steps: int) -> None:
        """Raise ConfigError unless every value is in range for a run of ``steps`` steps."""
        at = "transition."
        if self.rule not in RULES:
            raise ConfigError(unknown_name(f"{at}rule", self.rule, RULES))
        if self.resolution not in RESOLUTIONS:
            raise ConfigError(unknown_name(f"{at}resolution", self.resolution, RESOLUTIONS))
        require(self.check_every >= 1, f"{at}check_every", self.check_every, "from 1 up")
        require(
            1 <= self.threshold_percent <= 100,
            f"{at}threshold_percent",
            self.threshold_percent,
            "1 to 100",
        )
        change = self.max_change_percent
        require(change > 0.0, f"{at}max_change_percent", change, "above 0, e.g. 1.3")
        gain = self.min_gain_percent
        require(0.0 <= gain < 100.0, f"{at}min_gain_percent", gain, "0 up to, not including, 100")
        within = f"1 to {steps - 1} (fewer than training.steps), or null"
        for name in ("switch_step", "max_dense_steps"):
            value = getattr(self, name)
            require(value is None or 1 <= value < steps, f"{at}{name}", value, within)
        if self.rule == "fixed" and self.switch_step is None:
            raise ConfigError(f"{at}switch_step is missing; the fixed rule needs it: {within}")
        if self.rule != "fixed" and self.switch_step is not None:
            raise ConfigError(
                f"{at}switch_step is {self.switch_step}, but the {self.rule} rule does not use it; "
                f"set {at}rule=fixed, or {at}max_dense_steps instead"
            )

    def build(self) -> TransitionRule:
        """Return a new rule."""
        if self.rule == "skewness":
            return SkewnessRule(self.min_skewness, self.max_change_percent)
        return DistanceRule(self.threshold_percent) if self.rule == "distance" else FixedStepRule()

    def is_check(self, step: int) -> bool:
        """Return whether the maps of the ``step``-th step (from 1) are looked at."""
        if self.rule == "fixed":
            return step >= (self.switch_step or 0) or self.is_forced(step)
        return step % self.check_every == 0 or self.is_forced(step)

    def is_forced(self, step: int) -> bool:
        """Return whether the switch comes after this step whatever the rule says."""
        return self.max_dense_steps is not None and step >= self.max_dense_steps

    def holds(self, accuracy: float, majority: float) -> bool:
        """Return whether a rule that looks at maps has to wait for the model to learn.

        Args:
            accuracy: best one of the validation split so far, in [0, 1]; below 0 for none yet.
            majority: that of always naming the most frequent class.
        """
        return self._waits and 100.0 * (accuracy - majority) < self.min_gain_percent

    def check_gain(self, majority: float) -> None:
        """Raise ConfigError if no model can be so much better than the majority class."""
        most = 100.0 * (1.0 - majority)
        require(
            not self._waits or self.min_gain_percent < most,
            "transition.min_gain_percent",
            self.min_gain_percent,
            f"below {most:g}, or 0: the majority class has {majority:.1%} of the validation split",
        )

    @property
    def _waits(self) -> bool:
        return self.rule != "fixed" and self.min_gain_percent > 0.0


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its one-cycle learning rate.

    Attributes:
        lr: peak learning rate.
        warmup_steps: steps of the rise.
        betas, eps, weight_decay: AdamW's.
        clip_value: bound of every gradient element, null for none.
    """

    lr: float = 1e-3
    warmup_steps: int = 100
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.0
    clip_value: float | None = 1.0

    def validate(self, steps: int) -> None:
        """Raise ConfigError unless every value is in range for a run of ``steps`` steps."""
        at = "optimizer."
        require(self.lr > 0.0, f"{at}lr", self.lr, "above 0")
        require(
            0 <= self.warmup_steps < steps,
            f"{at}warmup_steps",
            self.warmup_steps,
            f"0 to {steps - 1} (fewer than training.steps)",
        )
        require(all(0.0 <= b < 1.0 for b in self.betas), f"{at}betas", self.betas, "0 up to 1")
        require(self.eps > 0.0, f"{at}eps", self.eps, "above 0")
        require(self.weight_decay >= 0.0, f"{at}weight_decay", self.weight_decay, "from 0 up")
        clip = self.clip_value
        require(clip is None or clip > 0.0, f"{at}clip_value", clip, "above 0, or null")


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how.

    Attributes:
        steps: optimizer steps of the whole run.
        pretrain_steps: steps at the start that learn from ``model.masked_token_loss`` alone.
        batch_size: samples of a step, over all ranks.
        micro_batch_size: samples a rank takes at once; null takes its whole share.
        precision: ``"fp32"``, ``"bf16"`` or (GPU only) ``"fp16"``.
        seed: of weights, data order and dropout.
        log_every: steps between two rows of the log.
        evaluate_every: steps between two evaluations on the validation split.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: how many of the latest are kept, beside the best.
        on_nonfinite: what a NaN or infinity in loss or gradients does: ``"stop"`` ends the run,
            ``"skip"`` leaves out the optimizer step.
        rank_timeout_seconds: how long a rank may be silent or not move before all end.
        augment: whether training inputs are changed in ways that keep the label: operands of
            ListOps shuffled, images of Pathfinder flipped and turned.
        compile: whether TorchInductor compiles the training steps (ZeRO 0 to 2).
        cuda_graph: whether each phase's steps are replayed from a CUDA graph (GPU, ZeRO 0 to 2,
            one micro-batch a step).
    """

    steps: int = 1000
    pretrain_steps: int = 0
    batch_size: int = 32
    micro_batch_size: int | None = None
    precision: str = "fp32"
    seed: int = 0
    log_every: int = 10
    evaluate_every: int = 500
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    on_nonfinite: str = "stop"
    rank_timeout_seconds: float = 600.0
    augment: bool = False
    compile: bool = False
    cuda_graph: bool = False

    def validate(self) -> None:
        """Raise ConfigError unless every value is in range."""
        for name in (
            "steps",
            "batch_size",
            "log_every",
            "evaluate_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "from 1 up")
        most = self.steps - 1
        pretrain = self.pretrain_steps
        require(0 <= pretrain <= most, "training.pretrain_steps", pretrain, f"0 to {most}")
        micro = self.micro_batch_size
        require(micro is None or micro >= 1, "training.micro_batch_size", micro, "from 1 up")
        require(0 <= self.seed < 2**31, "training.seed", self.seed, "0 to 2^31 - 1")
        if self.precision not in PRECISIONS:
            raise ConfigError(unknown_name("training.precision", self.precision, PRECISIONS))
        if self.on_nonfinite not in ON_NONFINITE:
            raise ConfigError(
                unknown_name("training.on_nonfinite", self.on_nonfinite, ON_NONFINITE)
            )
        timeout = self.rank_timeout_seconds
        require(1.0 <= timeout <= 86400.0, "training.rank_timeout_seconds", timeout, "1 to 86400")


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
    require(
        not config.training.augment or config.task in AUGMENTED_TASKS,
        "training.augment",
        True,
        f"false for the task {config.task}; true for {', '.join(AUGMENTED_TASKS)}",
    )
    config.sparse_attention.validate(config.data.sequence_length)
    if config.switches:
        config.transition.validate(config.training.steps)
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
