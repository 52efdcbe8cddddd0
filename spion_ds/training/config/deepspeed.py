"""Fills a DeepSpeed configuration from the recipe, and refuses what contradicts it."""

from __future__ import annotations

import contextlib
import copy
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from spion_ds.distributed.heartbeat import lost_contact
from spion_ds.distributed.process_group import import_deepspeed
from spion_ds.errors import ConfigError, unknown_name
from spion_ds.training.config.sections import OptimizerConfig, TrainingConfig

# They write as soon as there is an engine: not for a rehearsal.
_WRITERS = ("tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler")


@dataclass(frozen=True)
class BatchSizes:
    """Samples a step: ``total`` = ``micro`` × ``accumulation`` × ranks."""

    total: int = 1
    micro: int = 1
    accumulation: int = 1


def resolve_deepspeed_config(
    given: dict[str, Any],
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    world_size: int | None,
    device_type: str,
) -> tuple[dict[str, Any], BatchSizes]:
    """Return the configuration as DeepSpeed gets it, and the batch sizes.

    A value that is ``"auto"`` or absent is filled from the recipe; one that differs from the
    recipe's is an error, so that there is one truth. Without a ``world_size`` the batch sizes are
    those of a number of ranks that fits, the one with the fewest accumulation steps.

    Raises:
        ConfigError: a contradiction, an ``"auto"`` at a place that the recipe says nothing about,
            a ZeRO stage or precision that cannot run, or batch sizes that do not divide.
    """
    config = copy.deepcopy(given)
    _check_supported(config)
    _fill_precision(config, training.precision, device_type)
    _fill(config, "train_batch_size", training.batch_size, "training.batch_size")
    batches = _batch_sizes(config, training, world_size)
    config["train_micro_batch_size_per_gpu"] = batches.micro
    config["gradient_accumulation_steps"] = batches.accumulation
    # DeepSpeed clips by norm, at 1.0 unless told otherwise; the recipe clips by value.
    if config.get("gradient_clipping", "auto") == "auto":
        config["gradient_clipping"] = 0.0
    clipping = config["gradient_clipping"]
    if not isinstance(clipping, int | float) or isinstance(clipping, bool) or clipping < 0:
        raise ConfigError(
            f"gradient_clipping is {clipping!r}; allowed: a norm from 0 up, or 'auto'"
        )
    if clipping and optimizer.clip_value is not None:
        raise ConfigError(
            f"gradient_clipping is {clipping} in the DeepSpeed configuration, a norm, and "
            f"optimizer.clip_value is {optimizer.clip_value}, so gradients would be clipped twice; "
            "set optimizer.clip_value=null to clip by norm, or remove gradient_clipping"
        )
    _fill_optimizer(config, optimizer, device_type)
    config.setdefault("steps_per_print", 10**9)
    # DeepSpeed's own clock would let the host wait for the device twice a step; StepTimer is ours.
    config.setdefault("timers", {"throughput": {"enabled": False}})
    for place in _autos(config):
        raise ConfigError(
            f"{place} is 'auto' in the DeepSpeed configuration, and the recipe has no value for "
            "it; give a number, or remove the key to take DeepSpeed's default"
        )
    return config, batches


def zero_stage(config: dict[str, Any]) -> int:
    """Return the ZeRO stage of a DeepSpeed configuration, 0 without one."""
    return config.get("zero_optimization", {}).get("stage", 0)


def check_with_deepspeed(resolved: dict[str, Any]) -> None:
    """Let DeepSpeed read a resolved configuration, before it gets to train with it.

    Raises:
        ConfigError: DeepSpeed refuses it, or does not look at one of its keys.
    """
    read_config = import_deepspeed().DeepSpeedConfig
    # It takes this process for the only one as long as there is no process group.
    world = dist.get_world_size() if dist.is_initialized() else 1
    share = resolved["train_micro_batch_size_per_gpu"] * resolved["gradient_accumulation_steps"]
    noted = _Noted({**copy.deepcopy(resolved), "train_batch_size": share * world})
    try:
        read = read_config(noted)
    except Exception as error:  # pydantic's, assertions, and whatever its readers stumble on
        raise ConfigError(f"DeepSpeed refuses its configuration: {_reason(error)}") from error
    for key in noted:
        if key not in noted.read:
            raise ConfigError(unknown_name("key of a DeepSpeed configuration", key, noted.read))
    _check_monitors(read)


def rehearse(resolved: dict[str, Any]) -> None:
    """Let DeepSpeed take a step of a tiny model, on all ranks, before there is a run.

    Much of a configuration is read only then: an optimizer's parameters, numbers that divide.

    Raises:
        ConfigError: it cannot.
    """
    with torch.random.fork_rng(devices=[]):
        model = torch.nn.Linear(8, 8)
    config = {key: value for key, value in resolved.items() if key not in _WRITERS}
    try:
        engine, *_ = import_deepspeed().initialize(
            model=model, model_parameters=list(model.parameters()), config=copy.deepcopy(config)
        )
        dtype = next(model.parameters()).dtype
        for _ in range(resolved["gradient_accumulation_steps"]):
            inputs = torch.ones(1, 8, dtype=dtype, device=engine.device)
            engine.backward(engine(inputs).float().mean())
            engine.step()
    except Exception as error:  # whatever DeepSpeed and PyTorch stumble on
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if memory or lost_contact(error, error.__traceback__):
            raise  # no fault of the configuration
        place = traceback.extract_tb(error.__traceback__)[-1].line
        raise ConfigError(
            f"DeepSpeed cannot train with its configuration: {_reason(error)}, at {place!r}; "
            "correct or remove the key that this reads"
        ) from error


def _check_monitors(config: Any) -> None:
    """Raise ConfigError unless DeepSpeed's monitors, which rank 0 starts alone, have their package.

    Args:
        config: a DeepSpeedConfig.
    """
    from deepspeed.monitor import utils

    for name in ("tensorboard", "wandb", "comet"):
        if not getattr(config.monitor_config, name).enabled:
            continue
        check = "tb" if name == "tensorboard" else name
        try:
            with contextlib.redirect_stdout(None):  # its own advice
                getattr(utils, f"check_{check}_availability")()
        except ImportError as error:
            raise ConfigError(
                f"{name} is enabled in the DeepSpeed configuration, and its package cannot be "
                f"imported ({error}); install it, or remove the block"
            ) from error


class _Noted(dict):
    """A configuration that notes which of its keys are looked for; its copies note for it too."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.read: set[str] = set()

    def __copy__(self) -> _Noted:
        copied = _Noted(self)
        copied.read = self.read
        return copied

    def get(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.read.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        """Return what ``in`` asks this mapping of."""
        return self


def _reason(error: Exception) -> str:
    found = getattr(error, "errors", None)
    if found is None:
        return (str(error) or type(error).__name__).splitlines()[0]
    first = found()[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place} is {first['input']!r} ({getattr(error, 'title', '')}): {first['msg']}"


def with_universal_checkpoint(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a resolved configuration that loads a universal checkpoint."""
    checkpoint = {**config.get("checkpoint", {}), "load_universal": True}
    return {**config, "checkpoint": checkpoint}


def _check_supported(config: dict[str, Any]) -> None:
    zero = config.setdefault("zero_optimization", {"stage": 0})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else zero
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise ConfigError(f"zero_optimization.stage is {stage!r}; allowed: 0, 1, 2 or 3")
    if not isinstance(zero, dict):
        raise ConfigError(f"zero_optimization is {zero!r}; allowed: a mapping, with a stage")
    for what, stages in (("optimizer", (1, 2, 3)), ("param", (3,))):
        block = zero.get(f"offload_{what}") or {}
        if not isinstance(block, dict):
            raise ConfigError(
                f"zero_optimization.offload_{what} is {block!r}; allowed: a mapping, e.g. "
                '{"device": "cpu"}'
            )
        device = block.get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"zero_optimization.offload_{what}.device is {device!r}; allowed: 'cpu' or 'none'"
            )
        if _offloads(config, what) and stage not in stages:
            raise ConfigError(
                f"zero_optimization.offload_{what} is set at stage {stage}, which does not "
                f"partition it; allowed: stage {' or '.join(map(str, stages))}"
            )
    if "activation_checkpointing" in config:
        raise ConfigError(
            "the DeepSpeed configuration has an 'activation_checkpointing' block, which the model "
            "does not read; remove it and set model.activation_checkpointing=true in the recipe"
        )
    if "scheduler" in config:
        raise ConfigError(
            "the DeepSpeed configuration has a 'scheduler'; remove it: the learning rate comes "
            "from the recipe (optimizer.lr, optimizer.warmup_steps) and restarts at the switch"
        )


def _fill_precision(config: dict[str, Any], precision: str, device_type: str) -> None:
    enabled = {}
    for name in ("bf16", "fp16"):
        block = config.get(name, {})
        state = block.get("enabled", "auto") if isinstance(block, dict) else block
        wanted = precision == name
        if state not in ("auto", True, False):
            raise ConfigError(f"{name}.enabled is {state!r}; allowed: true, false or 'auto'")
        enabled[name] = wanted if state == "auto" else bool(state)
        if state != "auto" and bool(state) != wanted:
            raise ConfigError(
                f"{name}.enabled is {str(state).lower()} in the DeepSpeed configuration and "
                f"training.precision is {precision}; make them agree, or set the JSON's to 'auto'"
            )
        if isinstance(block, dict) and (block or enabled[name]):
            config[name] = {**block, "enabled": enabled[name]}
    if enabled["bf16"] and isinstance(config.get("bf16"), dict):
        # What is not finite StepGuard finds, without making the host wait for the device.
        config["bf16"].setdefault("check_grad_overflow", False)
    if all(enabled.values()):
        raise ConfigError("bf16 and fp16 are both enabled; allowed: one of them")
    if enabled["fp16"] and device_type == "cpu":
        raise ConfigError(
            "fp16 is asked for on a CPU, where DeepSpeed has none; set training.precision (or the "
            "JSON) to fp32 or bf16, or run on a GPU"
        )


def _batch_sizes(
    config: dict[str, Any], training: TrainingConfig, world_size: int | None
) -> BatchSizes:
    total = training.batch_size
    micro = _number(config, "train_micro_batch_size_per_gpu")
    if micro is None:
        micro = training.micro_batch_size
    elif training.micro_batch_size not in (None, micro):
        raise ConfigError(
            f"train_micro_batch_size_per_gpu is {micro} in the DeepSpeed configuration and "
            f"training.micro_batch_size is {training.micro_batch_size}; make them agree, or set "
            "the JSON's to 'auto'"
        )
    accumulation = _number(config, "gradient_accumulation_steps")
    if world_size is None:
        world_size = max(1, total // ((micro or total) * (accumulation or 1)))
    if micro is not None and accumulation is None:
        accumulation = max(1, total // (micro * world_size))
    if accumulation is None:
        accumulation = 1
    if micro is None:
        micro = max(1, total // (accumulation * world_size))
    if micro * accumulation * world_size != total:
        fits = max(1, total // (accumulation * world_size)) * accumulation * world_size
        raise ConfigError(
            f"a batch of {total} does not divide: {world_size} rank(s) × {accumulation} "
            f"accumulation step(s) × micro-batch {micro} = {micro * accumulation * world_size}; "
            f"set training.batch_size to a multiple, e.g. {fits}, or change "
            "training.micro_batch_size, gradient_accumulation_steps or the number of ranks"
        )
    return BatchSizes(total, micro, accumulation)


def _fill_optimizer(config: dict[str, Any], optimizer: OptimizerConfig, device_type: str) -> None:
    block = config.setdefault("optimizer", {"type": "AdamW"})
    if not isinstance(block, dict) or "type" not in block:
        raise ConfigError("the DeepSpeed configuration's optimizer has no type; e.g. 'AdamW'")
    if block["type"] not in ("Adam", "AdamW"):
        raise ConfigError(
            f"the DeepSpeed configuration's optimizer is {block['type']!r}; allowed: 'AdamW' or "
            "'Adam', which the recipe's optimizer section describes"
        )
    params = block.setdefault("params", {})
    if not isinstance(params, dict):
        raise ConfigError(f"optimizer.params is {params!r}; allowed: a mapping")
    _fill(params, "lr", optimizer.lr, "optimizer.lr")
    _fill(params, "betas", list(optimizer.betas), "optimizer.betas")
    _fill(params, "eps", optimizer.eps, "optimizer.eps")
    _fill(params, "weight_decay", optimizer.weight_decay, "optimizer.weight_decay")
    # PyTorch's AdamW instead of a fused one that would be compiled first. On a GPU with the
    # optimizer in RAM DeepSpeed's vectorised one is worth it.
    if not _offloads(config, "optimizer"):
        params.setdefault("torch_adam", True)
        # ZeRO's flat partitions are few tensors; whole parameters are many, and one kernel serves.
        if params["torch_adam"] and device_type == "cuda" and zero_stage(config) == 0:
            params.setdefault("fused", True)
    elif device_type == "cpu":
        params.setdefault("torch_adam", True)
        config.setdefault("zero_force_ds_cpu_optimizer", not params["torch_adam"])


def _offloads(config: dict[str, Any], what: str) -> bool:
    block = config["zero_optimization"].get(f"offload_{what}") or {}
    return block.get("device", "none") != "none"


def _fill(block: dict[str, Any], key: str, value: Any, recipe_key: str) -> None:
    given = block.get(key, "auto")
    if given != "auto" and given != value:
        raise ConfigError(
            f"{key} is {given!r} in the DeepSpeed configuration and {recipe_key} is {value!r}; "
            "make them agree, or set the JSON's to 'auto'"
        )
    block[key] = value


def _number(config: dict[str, Any], key: str) -> int | None:
    value = config.get(key, "auto")
    if value == "auto":
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key} is {value!r}; allowed: a whole number from 1 up, or 'auto'")
    return value


def _autos(value: Any, place: str = "") -> Iterator[str]:
    if value == "auto":
        yield place
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _autos(inner, f"{place}.{key}" if place else str(key))
