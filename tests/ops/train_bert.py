"""Trains small BERTs under ZeRO-2 on a fixed batch with padding; started by torchrun.

usage: train_bert.py FILE, which gets the losses of each kind of attention as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import BertConfig, BertForSequenceClassification

from spion_ds.distributed.process_group import (
    discover_ranks,
    end_process,
    import_deepspeed,
    join,
    leave,
)
from spion_ds.ops.sparse_attention import (
    BigBirdSparsityConfig,
    DenseSparsityConfig,
    SparseAttentionUtils,
)

HEADS, LENGTH, BATCH, STEPS = 4, 96, 8, 8
SPARSITY = {
    "original": None,
    "dense": DenseSparsityConfig(HEADS),
    "bigbird": BigBirdSparsityConfig(HEADS, num_random_blocks=1),
}


def tiny_config(**changes) -> BertConfig:
    values = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": 64,
        "max_position_embeddings": LENGTH,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**{**values, **changes})


def padded_batch(device: torch.device) -> dict[str, torch.Tensor]:
    """Tokens, a padding mask (1 = real token) and labels; every sample has its own length."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.linspace(20, LENGTH, BATCH).long()
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.randint(1, 50, (BATCH, LENGTH), generator=draw) * mask
    labels = torch.arange(BATCH) % 2
    return {
        name: x.to(device)
        for name, x in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()
    }


def train(kind: str) -> list[float]:
    """Return the global loss of each step."""
    ranks = discover_ranks()
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_config())
    if SPARSITY[kind] is not None:
        SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(
            model, LENGTH, SPARSITY[kind]
        )
    engine, *_ = import_deepspeed().initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config={
            "train_micro_batch_size_per_gpu": BATCH // ranks.world_size,
            "zero_optimization": {"stage": 2},
            "optimizer": {"type": "AdamW", "params": {"lr": 5e-3, "torch_adam": True}},
        },
    )
    share = slice(ranks.rank, None, ranks.world_size)
    batch = {name: x[share] for name, x in padded_batch(ranks.device).items()}
    losses = []
    for _ in range(STEPS):
        loss = engine(**batch).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach() / ranks.world_size
        dist.all_reduce(mean)
        losses.append(mean.item())
    for parameter in engine.module.parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, parameter), "the ranks hold different weights"
    return losses


def main() -> None:
    ranks = discover_ranks()
    join(ranks)
    losses = {kind: train(kind) for kind in SPARSITY}
    if ranks.is_first:
        Path(sys.argv[-1]).write_text(json.dumps(losses))
    leave()


if __name__ == "__main__":
    main()
    end_process(0)
