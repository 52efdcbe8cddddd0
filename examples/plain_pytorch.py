"""Dense to sparse in a plain PyTorch loop with DistributedDataParallel.

python examples/plain_pytorch.py FOLDER
torchrun --nproc_per_node 2 examples/plain_pytorch.py FOLDER    # started again, it goes on
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from model import Model, make_batch
from torch.nn.parallel import DistributedDataParallel

from spion_ds import DenseToSparse
from spion_ds.masks import save_masks
from spion_ds.patterns import DistanceRule

STEPS, SAVE_EVERY = 24, 4


def main(folder: Path) -> None:
    """Train to the last step, from the checkpoint in ``folder`` if there is one."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    torch.manual_seed(0)
    model = Model()
    if ranks > 1:
        dist.init_process_group("gloo")
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    # Asked every 4 steps whether attention has settled; sparse after step 12 at the latest.
    switch = DenseToSparse(model, DistanceRule(15), check_every=4, max_dense_steps=12)
    if (folder / "checkpoint.pt").exists():
        saved = torch.load(folder / "checkpoint.pt", weights_only=True)
        for name, part in (("model", model), ("optimizer", optimizer), ("switch", switch)):
            part.load_state_dict(saved[name])  # the masks are in the model's state
    for number in range(switch.last_step + 1, STEPS + 1):
        x, mask, y = make_batch(number, rank, ranks)
        with switch.step(number, padding_masks=[mask]) as look:
            loss = F.cross_entropy(wrapped(x, mask), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0:
            event = f", {look.event.kind}" if look.event else ""
            print(f"step {number}: loss {loss.item()!r}, {switch.phase}{event}", flush=True)
        if rank == 0 and number % SAVE_EVERY == 0:
            parts = {"model": model, "optimizer": optimizer, "switch": switch}
            torch.save({k: part.state_dict() for k, part in parts.items()}, folder / "next.pt")
            os.replace(folder / "next.pt", folder / "checkpoint.pt")
    if rank == 0:
        save_masks(model, folder / "masks.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
