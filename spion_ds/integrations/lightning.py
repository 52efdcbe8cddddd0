"""Lightning: a callback that puts DenseToSparse around every optimizer step.

    driver = DenseToSparse(module, DistanceRule(15), check_every=500, max_dense_steps=5000)
    trainer = lightning.Trainer(callbacks=[SwitchCallback(driver)])

The driver's state is saved and loaded with Lightning's checkpoints; masks come with the module's
state where its attentions have ``max_seq_length``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from spion_ds.switching import DenseToSparse, Event, Look


class SwitchCallback(Callback):
    """Lets a driver watch every optimizer step of a Trainer.

    Args:
        driver: of the module that trains.
        padding_mask: returns the bool mask (B, L) of a batch as attention will get it, True = real
            token; maps are then exact means over samples. Not with accumulate_grad_batches, where
            the batches to come are not known: the mean of every micro-batch then counts alike.

    Attributes:
        event: what was decided after the last optimizer step, None where nothing was.
    """

    def __init__(
        self, driver: DenseToSparse, padding_mask: Callable[[Any], Tensor] | None = None
    ) -> None:
        self.driver, self.padding_mask = driver, padding_mask
        self.event: Event | None = None
        self._step: AbstractContextManager[Look] | None = None
        self._look: Look | None = None
        self._began = 0

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin a step, unless this is a further micro-batch of one."""
        if self._step is not None:
            return
        masks: Sequence[Tensor] | None = None
        if self.padding_mask is not None and trainer.accumulate_grad_batches == 1:
            masks = [self.padding_mask(batch)]
        self._began = trainer.global_step
        self._step = self.driver.step(self.driver.last_step + 1, padding_masks=masks)
        self._look = self._step.__enter__()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End the step once the optimizer has stepped; all ranks then decide."""
        if self._step is None or self._look is None or trainer.global_step == self._began:
            return
        step, self._step = self._step, None
        step.__exit__(None, None, None)
        self.event = self._look.event

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of a step that was not ended."""
        if self._step is not None:
            step, self._step = self._step, None
            step.__exit__(type(exception), exception, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the driver's state."""
        return self.driver.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the driver's state."""
        self.driver.load_state_dict(state_dict)
