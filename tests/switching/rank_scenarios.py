"""What several ranks do with DenseToSparse; torchrun starts it, rank 0 writes what came out.

usage: rank_scenarios.py FOLDER SCENARIO...
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from spion_ds import DenseToSparse
from spion_ds.attention import PooledMapAccumulator
from spion_ds.attention.layout import BlockLayout
from spion_ds.attention.map_request import mean_row_weights, row_counts
from spion_ds.distributed.process_group import import_deepspeed
from spion_ds.errors import SpionError
from spion_ds.patterns import DistanceRule, FixedStepRule, SkewnessRule, TransitionReport
from spion_ds.switching import decision
from tests.switching.toy import BLOCK, FILTER, LENGTH, Toy, micro_batches, toy, train_step

SCENARIOS: dict[str, Callable[[int, int, Path], Any]] = {}


def scenario(function: Callable[[int, int, Path], Any]) -> Callable[[int, int, Path], Any]:
    SCENARIOS[function.__name__] = function
    return function


def bits(masks: Any) -> list[Any]:
    """Return masks as something JSON can hold."""
    return [mask.int().tolist() for mask in masks or []]


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def error_of(work: Callable[[], Any]) -> list[str]:
    """Return what every rank was told."""
    try:
        work()
    except SpionError as error:
        return everywhere(f"{type(error).__name__}: {error}")
    return everywhere("")


def steps_of(
    switch: DenseToSparse, model: nn.Module, steps: Any, *, announced: bool = True, micro: int = 1
) -> list[str]:
    """Train on this rank's share without averaging gradients; return the kinds of events."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    kinds = []
    for number in steps:
        batches = list(micro_batches(number, micro, dist.get_rank(), dist.get_world_size()))
        masks = [mask for _, mask, _ in batches] if announced else None
        with switch.step(number, padding_masks=masks) as look:
            train_step(model, optimizer, batches)
        kinds += [look.event.kind] if look.event else []
    return kinds


@scenario
def one_decision(rank: int, ranks: int, folder: Path) -> Any:
    """The same masks on every rank, whatever their number."""
    found = {}
    for name, arguments in {
        "shared": {},
        "per head": {"per_head": True},
        "mixed": {"heads": (2, 4), "blocks": (16, 8), "per_head": True},
    }.items():
        model = toy(**arguments)
        switch = DenseToSparse(model, FixedStepRule(), check_every=2)
        steps_of(switch, model, [1, 2])
        found[name] = everywhere(bits(switch.masks))
    return found


@scenario
def token_maps_and_skewness(rank: int, ranks: int, folder: Path) -> Any:
    found = []
    for resolution in ("token", "block"):
        model = toy()
        rule = SkewnessRule(-100.0, 1e9)
        switch = DenseToSparse(model, rule, check_every=1, resolution=resolution)
        kinds = steps_of(switch, model, [1, 2, 3])
        found.append([kinds, everywhere(bits(switch.masks))])
    return found


@scenario
def large_masks(rank: int, ranks: int, folder: Path) -> Any:
    """Masks travel a layer at a time."""
    decision._AT_ONCE_BYTES = 0
    try:
        return one_decision(rank, ranks, folder)
    finally:
        decision._AT_ONCE_BYTES = 16 << 20


@scenario
def damaged_on_the_way(rank: int, ranks: int, folder: Path) -> Any:
    """One rank receives another bit."""
    unpack = decision.unpack_mask

    def faulty(packed: bytes, shape: Any) -> torch.Tensor:
        mask = unpack(packed, shape)
        if rank == ranks - 1:
            mask.view(-1)[0] ^= True
        return mask

    decision.unpack_mask = faulty
    try:
        model = toy()
        switch = DenseToSparse(model, FixedStepRule(), check_every=1)
        return error_of(lambda: steps_of(switch, model, [1])), everywhere(switch.phase)
    finally:
        decision.unpack_mask = unpack


@scenario
def different_step_numbers(rank: int, ranks: int, folder: Path) -> Any:
    model = toy()
    switch = DenseToSparse(model, FixedStepRule(), check_every=100)
    switch.last_step = rank
    calls: list[int] = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    return error_of(lambda: steps_of(switch, model, [rank + 1])), everywhere(len(calls))


@scenario
def different_settings(rank: int, ranks: int, folder: Path) -> Any:
    model = toy()
    every = DenseToSparse(model, FixedStepRule(), check_every=1 + rank)
    announced = DenseToSparse(model, FixedStepRule(), check_every=1)
    return [
        error_of(lambda: steps_of(every, model, [1])),
        error_of(lambda: steps_of(announced, model, [1], announced=rank == 0)),
    ]


@scenario
def one_rank_skips(rank: int, ranks: int, folder: Path) -> Any:
    model = toy()
    switch = DenseToSparse(model, FixedStepRule(), check_every=2)
    steps_of(switch, model, [1])
    with switch.step(2) as look:
        for x, mask, _ in micro_batches(2, 1, rank, ranks):
            model(x, mask)
        if rank == ranks - 1:
            look.skipped()
    assert look.event is not None
    kinds = [look.event.kind, *steps_of(switch, model, [3])]
    return everywhere(kinds)


@scenario
def rule_fails_on_rank_0(rank: int, ranks: int, folder: Path) -> Any:
    class Broken(FixedStepRule):
        def update(self, maps: Any, *, hold: bool = False) -> TransitionReport:
            raise KeyError("mine")

    model = toy()
    switch = DenseToSparse(model, Broken(), check_every=1)
    return error_of(lambda: steps_of(switch, model, [1])), everywhere(switch.phase)


@scenario
def other_lengths(rank: int, ranks: int, folder: Path) -> Any:
    """Ranks whose inputs have other lengths: with a length of the layer's own, or refused."""

    def step(switch: DenseToSparse, model: nn.Module) -> None:
        with switch.step(1):
            for x, mask, _ in micro_batches(1, 1, rank, ranks):
                length = LENGTH - 20 * rank
                model(x[:, :length], mask[:, :length])

    model, short = toy(max_seq_length=LENGTH), toy()
    switch = DenseToSparse(model, FixedStepRule(), check_every=1)
    step(switch, model)
    other = DenseToSparse(short, FixedStepRule(), check_every=1)
    return everywhere(bits(switch.masks)), error_of(lambda: step(other, short))


class HeadsOfALayer(Toy):
    """What a tensor parallel rank holds: some of the heads of each layer, all samples."""

    def __init__(self, whole: Toy, rank: int, ranks: int, per_head: bool) -> None:
        count = 4 // ranks
        super().__init__(heads=(count, count), per_head=per_head)
        self.whole, self.place = whole, slice(rank * count, (rank + 1) * count)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.whole.embedding(x) + self.whole.positions(torch.arange(x.shape[1]))
        for layer, own in zip(self.whole.layers, self.layers, strict=True):
            qkv = layer.qkv(layer.norm(hidden)).unflatten(-1, (3, 4, -1)).unbind(2)
            q, k, v = (part.transpose(1, 2) for part in qkv)
            part = own.attention(*(t[:, self.place] for t in (q, k, v)), mask)
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, part.contiguous())
            joined = torch.cat(parts, dim=1)
            hidden = hidden + layer.out(joined.transpose(1, 2).flatten(2))
        return hidden.mean(dim=1)


@scenario
def heads_on_ranks(rank: int, ranks: int, folder: Path) -> Any:
    """Tensor parallel: each rank has some heads of every layer, and the same samples."""
    alone = [dist.new_group([other]) for other in range(ranks)][rank]
    found = {}
    for per_head in (False, True):
        whole = toy(heads=(4, 4), per_head=per_head)
        batches = list(micro_batches(1, 1))
        x, mask, _ = batches[0]
        weights = mean_row_weights(row_counts(mask, 1 if per_head else 4))
        with torch.no_grad():
            seen = [
                PooledMapAccumulator(BLOCK, FILTER, weights, per_head=per_head)
                for _ in whole.layers
            ]
            for layer, maps in zip(whole.layers, seen, strict=True):
                layer.attention.observer = maps
            whole(x, mask)
            wanted = []
            for layer, maps in zip(whole.layers, seen, strict=True):
                layer.attention.observer = None
                wanted.append(layer.attention.sparsity_config.find_pattern(maps.total))
            part = HeadsOfALayer(whole, rank, ranks, per_head)
            switch = DenseToSparse(
                nn.ModuleList(part.layers),
                FixedStepRule(),
                check_every=1,
                group=alone,
                head_offset=rank * 4 // ranks,
            )
            with switch.step(1, padding_masks=[batches[0][1]]):
                part(*batches[0][:2])
        mine = [BlockLayout.from_mask(m, BLOCK).heads_of(rank, ranks).to_mask() for m in wanted]
        found[str(per_head)] = everywhere([bits(switch.masks), bits(mine)])
    return found


@scenario
def layers_on_ranks(rank: int, ranks: int, folder: Path) -> Any:
    """Pipeline parallel: each rank has a layer of its own; patterns look at all layers."""
    alone = [dist.new_group([other]) for other in range(ranks)][rank]
    seen: list[int] = []

    def patterns(configs: Any, maps: Any) -> Any:
        seen.append(len(configs))
        kept = sum(maps) > float(torch.stack(list(maps)).sum(0).median())
        return [kept | torch.eye(4, dtype=torch.bool)] * len(configs)

    model = toy(seed=rank)
    stage = nn.ModuleList([model.layers[0]])
    switch = DenseToSparse(
        stage, FixedStepRule(), check_every=1, group=alone, layer_offset=rank, patterns=patterns
    )
    x, mask, _ = next(micro_batches(1, 1))
    with switch.step(1, padding_masks=[mask]):
        stage[0](model.embedding(x), mask)
    return everywhere([bits(switch.masks), seen])


@scenario
def groups_that_overlap(rank: int, ranks: int, folder: Path) -> Any:
    alone = [dist.new_group([other]) for other in range(ranks)][rank]
    model = toy()
    same = DenseToSparse(model, FixedStepRule(), group=alone)
    gap = DenseToSparse(model, FixedStepRule(), group=alone, layer_offset=5 * rank)
    return [error_of(lambda one=one: steps_of(one, model, [1])) for one in (same, gap)]


def engine_run(
    wrap: Callable[[nn.Module], tuple[nn.Module, Callable[[Any], None]]], rank: int, ranks: int
) -> Any:
    """Train dense to sparse with an engine; return kinds and every rank's masks."""
    model = toy(per_head=True, max_seq_length=LENGTH)
    switch = DenseToSparse(
        model, DistanceRule(1), check_every=2, max_dense_steps=3, refresh_every=2
    )
    _, train = wrap(model)
    kinds = []
    for number in range(1, 6):
        batches = list(micro_batches(number, 1, rank, ranks))
        with switch.step(number, padding_masks=[batches[0][1]]) as look:
            train(batches)
        kinds += [look.event.kind] if look.event else []
    return kinds, everywhere(bits(switch.masks))


@scenario
def plain_ddp(rank: int, ranks: int, folder: Path) -> Any:
    def wrap(model: nn.Module) -> Any:
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(wrapped.parameters(), 1e-2)
        return wrapped, lambda batches: train_step(wrapped, optimizer, batches)

    return engine_run(wrap, rank, ranks)


@scenario
def fully_sharded(rank: int, ranks: int, folder: Path) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def wrap(model: nn.Module) -> Any:
        mesh = init_device_mesh("cpu", (ranks,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        return model, lambda batches: train_step(model, optimizer, batches)

    return engine_run(wrap, rank, ranks)


def zero_engine(model: nn.Module, stage: int, ranks: int, **more: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 6 // ranks,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
        **more,
    }
    engine, *_ = import_deepspeed().initialize(model=model, config=config)
    return engine


def train_engine(engine: Any, batches: Any) -> float:
    total = 0.0
    for x, mask, y in batches:
        loss = nn.functional.cross_entropy(engine(x, mask).float(), y)
        engine.backward(loss)
        engine.step()
        total += float(loss)
    return total


@scenario
def zero_stages(rank: int, ranks: int, folder: Path) -> Any:
    found = {}
    for stage in (0, 1, 2, 3):

        def wrap(model: nn.Module, stage: int = stage) -> Any:
            engine = zero_engine(model, stage, ranks)
            return engine, lambda batches: train_engine(engine, batches)

        found[str(stage)] = engine_run(wrap, rank, ranks)
    return found


@scenario
def zero_3_saved_and_loaded(rank: int, ranks: int, folder: Path) -> Any:
    """An own model under ZeRO-3: masks a head, refreshed twice, saved and loaded."""

    def start() -> tuple[Any, DenseToSparse]:
        model = toy(per_head=True, max_seq_length=LENGTH)
        switch = DenseToSparse(
            model, DistanceRule(1), check_every=2, max_dense_steps=2, refresh_every=2
        )
        return zero_engine(model, 3, ranks), switch

    def train(engine: Any, switch: DenseToSparse, steps: Any) -> list[Any]:
        rows = []
        for number in steps:
            batches = list(micro_batches(number, 1, rank, ranks))
            with switch.step(number, padding_masks=[batches[0][1]]) as look:
                loss = train_engine(engine, batches)
            rows.append([loss, look.event.kind if look.event else None, bits(switch.masks)])
        return rows

    engine, switch = start()
    whole = train(engine, switch, range(1, 9))
    engine, switch = start()
    first = train(engine, switch, range(1, 5))
    engine.save_checkpoint(str(folder / "zero3"), client_state={"spion_ds": switch.state_dict()})
    engine, switch = start()
    _, client = engine.load_checkpoint(str(folder / "zero3"))
    switch.load_state_dict(client["spion_ds"])
    rest = train(engine, switch, range(switch.last_step + 1, 9))
    return {
        "same": everywhere(first + rest == whole),
        "kinds": [row[1] for row in whole],
        "agree": everywhere(whole[-1][2]),
    }


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    import_deepspeed()
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for name in names:
        result = SCENARIOS[name](rank, ranks, folder)
        if rank == 0:
            (folder / f"{name}-{ranks}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
