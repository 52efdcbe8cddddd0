"""Dense to sparse in a DeepSpeed loop of one's own, with gradient accumulation, at any ZeRO stage.

deepspeed --num_gpus 2 examples/own_deepspeed.py FOLDER
torchrun --nproc_per_node 2 examples/own_deepspeed.py FOLDER    # started again, it goes on
"""

import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.nn.functional as F
from model import Model, make_batch

from spion_ds import DenseToSparse
from spion_ds.masks import save_masks
from spion_ds.patterns import DistanceRule

STEPS, SAVE_EVERY, MICRO_BATCHES = 24, 4, 2


def main(folder: Path) -> None:
    """Train to the last step, from the checkpoint in ``folder`` if there is one."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    model = Model()
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "zero_optimization": {"stage": 2},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    switch = DenseToSparse(model, DistanceRule(15), check_every=4, max_dense_steps=12)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    _, client = engine.load_checkpoint(str(folder))  # (None, None) at the first start
    if client:
        switch.load_state_dict(client["spion_ds"])
    for number in range(switch.last_step + 1, STEPS + 1):
        share = (part.to(engine.device) for part in make_batch(number, rank, ranks))
        batches = list(zip(*(part.chunk(MICRO_BATCHES) for part in share), strict=True))
        with switch.step(number, padding_masks=[mask for _, mask, _ in batches]) as look:
            for x, mask, y in batches:
                loss = F.cross_entropy(engine(x, mask), y)
                engine.backward(loss)
                engine.step()
            if not engine.was_step_applied():
                look.skipped()
        if rank == 0:
            event = f", {look.event.kind}" if look.event else ""
            print(f"step {number}: loss {loss.item()!r}, {switch.phase}{event}", flush=True)
        if number % SAVE_EVERY == 0:
            engine.save_checkpoint(str(folder), client_state={"spion_ds": switch.state_dict()})
    if rank == 0:
        save_masks(model, folder / "masks.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
