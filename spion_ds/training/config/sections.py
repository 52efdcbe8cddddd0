"""The sections of a run's configuration that are the trainer's own: each value, and its range."""

from __future__ import annotations

from dataclasses import dataclass

from spion_ds.errors import ConfigError, unknown_name
from spion_ds.patterns import DistanceRule, FixedStepRule, SkewnessRule, TransitionRule
from spion_ds.settings import require

RULES = ("distance", "fixed", "skewness")
RESOLUTIONS = ("token", "block")
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

    @property
    def steps_between_checks(self) -> int:
        """Steps from one look at the maps to the next; the fixed rule looks once, and fires."""
        if self.rule == "fixed" and self.switch_step is not None:
            return self.switch_step
        return self.check_every

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
