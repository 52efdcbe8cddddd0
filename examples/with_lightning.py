"""Dense to sparse under Lightning: a callback around each optimizer step.

python examples/with_lightning.py FOLDER
torchrun --nproc_per_node 2 examples/with_lightning.py FOLDER    # started again, it goes on
"""

import os
import sys
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from model import Model

from spion_ds import DenseToSparse
from spion_ds.patterns import DistanceRule

STEPS = 24
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Switch(Callback):
    """Its state is saved and loaded with Lightning's checkpoints."""

    def __init__(self, model):
        self.driver = DenseToSparse(model, DistanceRule(15), check_every=4, max_dense_steps=12)
        self.state_dict, self.load_state_dict = self.driver.state_dict, self.driver.load_state_dict

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.step = self.driver.step(self.driver.last_step + 1, padding_masks=[batch[1]])
        self.look = self.step.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.step.__exit__(None, None, None)
        event = f", {self.look.event.kind}" if self.look.event else ""
        if RANK == 0:
            loss = outputs["loss"].item()
            print(f"step {self.driver.last_step}: loss {loss!r}, {self.driver.phase}{event}")


class Task(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Model()

    def training_step(self, batch, _):
        return F.cross_entropy(self.model(*batch[:2]), batch[2])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Batches(IterableDataset):
    """The steps' batches, from the one after the driver's last."""

    def __init__(self, driver):
        self.driver = driver

    def __iter__(self):
        for number in range(self.driver.last_step + 1, STEPS + 1):
            yield make_batch(number, RANK, RANKS)


def main(folder: Path) -> None:
    """Train to the last step, from the newest checkpoint in ``folder`` if there is one."""
    torch.manual_seed(0)
    task = Task()
    switch, saving = Switch(task), ModelCheckpoint(folder, every_n_train_steps=4, save_last=True)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        callbacks=[switch, saving],
        devices=RANKS,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    loader = DataLoader(Batches(switch.driver), batch_size=None)
    trainer.fit(task, loader, ckpt_path=last if last.exists() else None)
    if RANK == 0:
        save_masks(task, folder / "masks.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
