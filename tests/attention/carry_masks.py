"""Run by test_packed_mask_ranks.py on two ranks: a library carries the masks of a model.

torchrun --nproc_per_node=2 carry_masks.py ddp | fsdp | zero FOLDER
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spion_ds.attention import SparseSelfAttention
from spion_ds.sparsity import SpionSparsityConfig

LENGTH, BLOCK, HEADS, BLOCKS = 64, 16, 2, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        config = SpionSparsityConfig(HEADS, BLOCK, different_layout_per_head=True)
        self.attention = SparseSelfAttention(config, max_seq_length=LENGTH)

    def forward(self, x: Tensor) -> Tensor:
        # (B, L, H · D) → (B, H, L, D)
        q = self.linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        return self.attention(q, q, q)


def mask(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(HEADS, BLOCKS, BLOCKS, generator=generator) < 0.4
    return kept | torch.eye(BLOCKS, dtype=torch.bool)


def batch() -> Tensor:
    torch.manual_seed(dist.get_rank())
    return torch.randn(2, LENGTH, 16)


def check(model: Model, seed: int) -> None:
    """After a pass each rank computes with the mask."""
    layout = model.attention.layout(LENGTH, torch.device("cpu"))
    assert layout is not None
    assert torch.equal(layout.to_mask(), mask(seed)), f"rank {dist.get_rank()} has another mask"


def ddp(_: str) -> None:
    model = Model()
    if dist.get_rank() == 0:  # as if it alone had read a checkpoint
        model.attention.set_mask(mask(0))
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(batch()).sum().backward()
    check(model, 0)
    if dist.get_rank() == 0:
        model.attention.set_mask(mask(1))
    wrapped(batch()).sum().backward()
    check(model, 1)


def fsdp(_: str) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    source = Model()
    source.attention.set_mask(mask(0))
    with torch.device("meta"):
        model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    model.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    whole = source.state_dict() if dist.get_rank() == 0 else {}
    set_model_state_dict(model, whole, options=options)
    model(batch()).sum().backward()
    check(model, 0)
    model.attention.set_mask(mask(1))
    saved = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        assert torch.equal(saved["attention.packed_mask"], model.attention.packed_mask)


def zero(folder: str) -> None:
    from spion_ds.distributed.process_group import import_deepspeed

    deepspeed = import_deepspeed()
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
    }

    def engine_of(model: Model) -> Any:
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config=config
        )
        return engine

    model = Model()
    engine = engine_of(model)
    model.attention.set_mask(mask(0))
    engine.backward(engine(batch().bfloat16()).float().sum())
    engine.step()
    check(model, 0)
    engine.save_checkpoint(folder)
    loaded = Model()
    again = engine_of(loaded)
    again.load_checkpoint(folder)
    again(batch().bfloat16())
    check(loaded, 0)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    {"ddp": ddp, "fsdp": fsdp, "zero": zero}[sys.argv[1]](sys.argv[2])
    dist.destroy_process_group()
