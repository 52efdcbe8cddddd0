"""Dense to sparse under Accelerate: its state carries the masks and the driver.

python examples/with_accelerate.py FOLDER
accelerate launch --num_processes 2 examples/with_accelerate.py FOLDER    # goes on if started again
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from model import Model, make_batch

from spion_ds import DenseToSparse
from spion_ds.masks import save_masks
from spion_ds.patterns import DistanceRule

STEPS, SAVE_EVERY = 24, 4


def main(folder: Path) -> None:
    """Train to the last step, from the newest state in ``folder`` if there is one."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    rank, ranks = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    switch = DenseToSparse(model, DistanceRule(15), check_every=4, max_dense_steps=12)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(switch)  # beside the model, whose state has the masks
    done = sorted(folder.glob("state-*/done"))  # the last file of a state that was saved whole
    if done:
        accelerator.load_state(str(done[-1].parent))
    for number in range(switch.last_step + 1, STEPS + 1):
        batch = make_batch(number, rank, ranks)
        x, mask, y = (part.to(accelerator.device) for part in batch)
        with switch.step(number, padding_masks=[mask]) as look:
            loss = F.cross_entropy(wrapped(x, mask), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.optimizer_step_was_skipped:
                look.skipped()
        event = f", {look.event.kind}" if look.event else ""
        accelerator.print(f"step {number}: loss {loss.item()!r}, {switch.phase}{event}", flush=True)
        if number % SAVE_EVERY == 0:
            place = folder / f"state-{number:04d}"
            accelerator.save_state(str(place))
            accelerator.wait_for_everyone()
            if accelerator.is_main_process:
                (place / "done").touch()
    if accelerator.is_main_process:
        save_masks(model, folder / "masks.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
