"""DeepSpeed's engine as the trainer needs it; no other file of the package reaches into DeepSpeed.

What is relied on here without being promised by DeepSpeed is tested piece by piece, by
tests/training/test_deepspeed_contract.py, at both ends of the range that setup.py allows.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spion_ds.distributed.process_group import import_deepspeed
from spion_ds.errors import CheckpointError
from spion_ds.training.config.deepspeed import zero_stage


class DeepSpeedEngine:
    """Trains a model on all ranks: forward, backward and step at any ZeRO stage, and checkpoints.

    Calling it is the model's forward pass. All ranks call everything alike.

    Args:
        model: is moved to its device and cast, and partitioned at stage 3, in place.
        config: a resolved DeepSpeed configuration.
        clip_value: largest magnitude of a gradient element in an optimizer step, None for any.

    Attributes:
        model: that is trained.
        stage: of ZeRO, 0 to 3.
    """

    def __init__(
        self, model: nn.Module, config: dict[str, Any], *, clip_value: float | None = None
    ) -> None:
        self.model, self.stage = model, zero_stage(config)
        self._accumulates = config.get("gradient_accumulation_steps", 1) > 1
        self._skipping = False
        self._engine: Any
        self._engine, *_ = import_deepspeed().initialize(
            model=model, model_parameters=list(model.parameters()), config=config
        )
        # The optimizer inside DeepSpeed's, PyTorch's own for one.
        self._inner: torch.optim.Optimizer = self._engine.basic_optimizer
        if self.stage == 0 and dist.get_world_size() == 1:
            self._engine.enable_backward_allreduce = False  # DeepSpeed would copy for nobody
        clip_by_value(self._inner, clip_value)
        step_unless(self._inner, lambda: self._skipping)
        step_without_waiting(self._engine)
        # The engine's own, taken in fp32 at stage 0, walks through all modules.
        self._engine.zero_grad = self._engine.optimizer.zero_grad

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Return what the model's forward pass does."""
        return self._engine(*inputs, **named)

    def train(self) -> None:
        """Set the model to training mode."""
        self._engine.train()

    def eval(self) -> None:
        """Set the model to evaluation mode."""
        self._engine.eval()

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradients, each its share of the mean over the step's micro-batches.

        Args:
            loss: () float32, the micro-batch's mean.
        """
        # Divided by one it would be the same loss, and two operators more.
        self._engine.backward(loss, scale_wrt_gas=self._accumulates)

    def step(self, *, skip: bool = False) -> None:
        """End a micro-batch; the step's last one moves the weights and drops the gradients.

        Args:
            skip: leave weights and optimizer as they are, and drop the gradients all the same.
        """
        self._skipping = skip
        self._engine.step()

    @property
    def step_applied(self) -> bool:
        """Whether the last :meth:`step` moved the weights.

        Not between micro-batches, not where it was skipped, and not where a gradient overflowed
        under loss scaling.
        """
        return not self._skipping and self._engine.was_step_applied()

    def set_learning_rate(self, rate: float) -> None:
        """Let the next step be taken at ``rate``."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate

    def restart_optimizer(self) -> None:
        """Let the optimizer go on as a new one."""
        restart(self._inner)

    @property
    def has_whole_gradients(self) -> bool:
        """Whether each parameter holds its whole gradient between backward pass and step.

        At other stages DeepSpeed takes it apart as soon as autograd has made it; a hook on the
        parameter still sees it whole.
        """
        return self.stage == 0

    @property
    def keeps_gradients(self) -> bool:
        """Whether a parameter may hold a gradient after a step; otherwise each ends with None."""
        return self.stage != 0

    def gathered(
        self, parameters: Sequence[nn.Parameter]
    ) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which parameters are whole, to be read; all ranks enter it."""
        if self.stage == 3:
            return import_deepspeed().zero.GatheredParameters(list(parameters))
        return contextlib.nullcontext()

    def weights(self) -> dict[str, Tensor]:
        """Return the whole state dict on the CPU; call it on all ranks, use it on rank 0."""
        with self.gathered(list(self.model.parameters())):
            return {
                name: tensor.detach().to("cpu", copy=True)
                for name, tensor in self.model.state_dict().items()
            }

    def save_checkpoint(self, folder: Path) -> list[str]:
        """Write DeepSpeed's files of a checkpoint, on all ranks, and its recovery scripts above it.

        Args:
            folder: the checkpoint's; its name is DeepSpeed's tag.

        Returns:
            What could not be written by this rank. It is not raised: the other ranks would wait
            in DeepSpeed's barriers.
        """
        failures: list[str] = []
        with _failures_noted(self._engine, failures):
            self._engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
        return failures

    def load_checkpoint(self, folder: Path) -> None:
        """Go on from DeepSpeed's files of a checkpoint. They are pickles, and run no code here.

        Raises:
            CheckpointError: there are none, or this rank's hold what could run code.
        """
        try:
            with restricted_loads():
                found, _ = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        except pickle.UnpicklingError as error:
            raise could_run_code(f"a file of DeepSpeed's in {folder}", error) from error
        if found is None:
            raise CheckpointError(
                f"{folder} has no files of DeepSpeed's; use another checkpoint of the run"
            )


def could_run_code(what: str, error: Exception) -> CheckpointError:
    """Return the error for a file that ``restricted_loads`` refused with ``error``."""
    named = re.search(r"GLOBAL (\S+)", str(error))
    return CheckpointError(
        f"{what} holds more than tensors and DeepSpeed's own records"
        f"{f' ({named[1]})' if named else ''}, and could run code when it is read; use "
        "another checkpoint"
    )


@contextlib.contextmanager
def restricted_loads() -> Iterator[None]:
    """Let every ``torch.load`` read tensors, plain values and DeepSpeed's own records alone.

    DeepSpeed unpickles its files freely. The environment overrules what it asks for, in child
    processes too; anything else in a file is an UnpicklingError, and does not run.
    """
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in forced}
    records = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    os.environ.update(forced)
    try:
        with torch.serialization.safe_globals(records):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def step_unless(optimizer: torch.optim.Optimizer, skipping: Callable[[], bool]) -> None:
    """Let DeepSpeed take its step as ever, but the optimizer inside it only unless skipping."""
    step = optimizer.step

    def guarded(*arguments: Any, **named: Any) -> Any:
        return None if skipping() else step(*arguments, **named)

    vars(optimizer)["step"] = guarded


def restart(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimizer inside DeepSpeed's go on as a new one: moments, steps, gradients are 0.

    In place, since DeepSpeed holds references to the state's tensors.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value.zero_()
            elif isinstance(value, int | float):
                state[name] = 0
        # Offload keeps gradients: a parameter that gets none from now on would leave its last one
        # there, and move on.
        if parameter.grad is not None:
            parameter.grad.zero_()
    for group in optimizer.param_groups:
        if "step" in group:  # where fused optimizers count
            group["step"] = 0


def clip_by_value(optimizer: torch.optim.Optimizer, bound: float | None) -> None:
    """Clip every gradient element just before the optimizer uses it.

    Elementwise, so it is as right on ZeRO's flat partitions as on whole gradients.
    """
    if bound is None:
        return

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if gradients:  # a rank of ZeRO may own none
            torch._foreach_clamp_min_(gradients, -bound)
            torch._foreach_clamp_max_(gradients, bound)

    optimizer.register_step_pre_hook(clip)


def step_without_waiting(engine: Any) -> None:
    """Let a bf16 engine at ZeRO stage 0 take its step without the host waiting for the device.

    There DeepSpeed asks each gradient whether it is finite and how long it is, one after the
    other, and copies parameter by parameter. StepGuard asks all at once, the recipe clips by
    value, and the rest is the same arithmetic: bf16 gradients to float32, AdamW on the float32
    weights, these to bf16. Everything else (fp16, clipping by norm) is left as it is.
    """
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer

    optimizer = engine.optimizer
    if not isinstance(optimizer, FP16_UnfusedOptimizer) or not engine.bfloat16_enabled():
        return
    if optimizer.clip_grad > 0.0 or optimizer.loss_scale != 1.0:
        return
    masters = [p for group in optimizer.fp32_groups for p in group]
    weights = [p for group in optimizer.fp16_groups for p in group]
    gradients = [torch.zeros_like(master) for master in masters]
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient

    @torch.no_grad()
    def step(closure: None = None) -> bool:
        given = [weight.grad for weight in weights]
        if all(gradient is not None for gradient in given):
            torch._foreach_copy_(gradients, given)
        else:
            for gradient, found in zip(gradients, given, strict=True):
                gradient.zero_() if found is None else gradient.copy_(found)
        optimizer.optimizer.step()
        torch._foreach_copy_(weights, masters)
        return False

    vars(optimizer)["step"] = step


@contextlib.contextmanager
def _failures_noted(engine: Any, failures: list[str]) -> Iterator[None]:
    """Let a write of DeepSpeed's fail without leaving the other ranks waiting in its barriers."""

    def noting(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> None:
            try:
                write(*arguments, **named)
            except (OSError, RuntimeError) as error:
                failures.append(str(error) or type(error).__name__)

        return call

    places = [(engine.checkpoint_engine, "save"), (engine, "_copy_recovery_script")]
    for owner, method in places:
        vars(owner)[method] = noting(getattr(owner, method))
    try:
        yield
    finally:
        for owner, method in places:
            del vars(owner)[method]
