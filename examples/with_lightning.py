"""Dense to sparse under Lightning, with a callback.

python examples/with_lightning.py FOLDER
torchrun --nproc_per_node 2 examples/with_lightning.py FOLDER    # started again, it goes on
"""

import os
import sys
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from model import Model, make_batch
from torch.utils.data import DataLoader

from spion_ds import DenseToSparse
from spion_ds.integrations.lightning import SwitchCallback
from spion_ds.masks import save_masks
from spion_ds.patterns import DistanceRule

STEPS, RANKS = 24, int(os.environ.get("WORLD_SIZE", 1))


class Task(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Model()
        driver = DenseToSparse(self.model, DistanceRule(15), check_every=4, max_dense_steps=12)
        self.switch = SwitchCallback(driver, padding_mask=lambda batch: batch[1])

    def configure_callbacks(self):
        return [self.switch]

    def train_dataloader(self):
        steps = range(self.switch.driver.last_step + 1, STEPS + 1)
        return DataLoader([make_batch(n, self.global_rank, RANKS) for n in steps], batch_size=None)

    def training_step(self, batch, _):
        return F.cross_entropy(self.model(*batch[:2]), batch[2])

    def on_train_batch_end(self, outputs, *_):
        driver, loss = self.switch.driver, outputs["loss"].item()
        self.print(f"step {driver.last_step}: loss {loss!r}, {driver.phase}")

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    torch.manual_seed(0)
    folder, task = Path(sys.argv[1]), Task()
    saving = ModelCheckpoint(folder, every_n_train_steps=4, save_last=True)
    own = {"callbacks": [saving], "devices": RANKS, "use_distributed_sampler": False}
    trainer, last = lightning.Trainer(max_steps=STEPS, **own), folder / "last.ckpt"
    trainer.fit(task, ckpt_path=last if last.exists() else None)
    if task.global_rank == 0:
        save_masks(task, folder / "masks.safetensors")
