"""Whole training steps: the trainer against a plain PyTorch loop of the same model.

    python benchmarks/train_step.py --recipes listops --out benchmarks/results/DATE-DEVICE-step.md
    python benchmarks/train_step.py --small          # seconds on a CPU
    python benchmarks/train_step.py --recipes pathfinder128 --density 0.02 \
        model.heads=8 model.head_dim=64 model.dim=512 training.batch_size=4   # L = 16 384

First the losses of both must be equal in fp32 without dropout; then steps are timed as the recipe
has them. The plain loop is AdamW, autocast and scaled_dot_product_attention, its batches on the
device beforehand. Random tokens: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from layouts import spion_like_mask
from timing import machine_lines, synchronize
from torch import Tensor, nn

from spion_ds.data.storage.cache import Dataset, Split
from spion_ds.data.tasks import get_task
from spion_ds.distributed.agreement import Agreement
from spion_ds.distributed.heartbeat import Watch
from spion_ds.distributed.process_group import Ranks, discover_ranks, join, leave
from spion_ds.distributed.stopping import StopRequest
from spion_ds.switching.masks import set_masks
from spion_ds.training.config.recipe_files import read_recipe
from spion_ds.training.config.run import RunConfig, build_run_config
from spion_ds.training.reports.run_log import peak_memory_bytes, read_rows, reset_peak_memory
from spion_ds.training.step.batches import Batch, BatchOrder, read_batch
from spion_ds.training.step.evaluation import build_model
from spion_ds.training.trainer import Trainer

# Relative difference of the fp32 losses of each of the first steps: other kernels add in another
# order, and AdamW's first steps are as long as the learning rate whatever the gradient's size.
TOLERANCE = 1e-3
GATE_STEPS = 5
SAMPLES = 4096
NEVER = 10**6
HEADER = (
    "| recipe | B, L | loop | attention | steps | ms/step | tokens/s | × plain | peak MiB "
    "| waits a step |"
)
SMALL = [
    "data.sequence_length=256",
    "data.max_length=200",
    "data.min_length=20",
    "training.batch_size=8",
    "sparse_attention.block=32",
]


class PlainEncoder(nn.Module):
    """The published encoder as one would write it; takes EncoderClassifier's state dict."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        model, task = config.model, get_task(config.task)
        dim, inner = model.dim, model.heads * model.head_dim
        self.config, self.padded = model, task.padded
        self.token_embedding = nn.Embedding(task.vocab_size, dim)
        self.position_embedding = nn.Embedding(config.data.sequence_length, dim)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention_norm": nn.LayerNorm(dim),
                    "qkv": nn.Linear(dim, 3 * inner),
                    "projection": nn.Linear(inner, dim),
                    "ffn_norm": nn.LayerNorm(dim),
                    "ffn_in": nn.Linear(dim, model.ffn_dim),
                    "ffn_out": nn.Linear(model.ffn_dim, dim),
                }
            )
            for _ in range(model.layers)
        )
        self.norm = nn.LayerNorm(dim)
        hidden = model.classifier_dim
        self.classifier = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, task.num_classes)
        )

    def forward(self, input_ids: Tensor, padding_mask: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        config = self.config
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.token_embedding(input_ids) + self.position_embedding(positions)
        x = F.dropout(x, config.dropout, self.training)
        p = config.attention_dropout if self.training else 0.0
        mask = padding_mask[:, None, None, :] if self.padded else None
        for layer in self.layers:
            qkv = layer["qkv"](layer["attention_norm"](x)).unflatten(-1, (3, config.heads, -1))
            q, k, v = (y.transpose(1, 2) for y in qkv.unbind(dim=2))
            out = F.scaled_dot_product_attention(q, k, v, mask, p)
            out = layer["projection"](out.transpose(1, 2).flatten(2))
            x = x + F.dropout(out, config.dropout, self.training)
            hidden = F.gelu(layer["ffn_in"](layer["ffn_norm"](x)))
            hidden = F.dropout(hidden, config.dropout, self.training)
            x = x + F.dropout(layer["ffn_out"](hidden), config.dropout, self.training)
        weight = padding_mask[..., None].to(x.dtype)
        pooled = (self.norm(x) * weight).sum(dim=1) / weight.sum(dim=1)
        return self.classifier(pooled)


class PlainLoop:
    """Trains a PlainEncoder from the run's own initial weights, schedule and batches."""

    def __init__(self, config: RunConfig, dataset: Dataset, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = PlainEncoder(config).to(device)
        try:
            self.model.load_state_dict(build_model(config).state_dict())
        except RuntimeError as error:
            raise SystemExit(f"{config.recipe} is not the published encoder: {error}") from None
        self.forward = torch.compile(self.model) if config.training.compile else self.model
        optimizer = config.optimizer
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=optimizer.lr,
            betas=optimizer.betas,
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )
        order = BatchOrder(len(dataset.train), config.batches.total, config.training.seed)
        epoch = range(len(dataset.train) // config.batches.total)
        self.batches: list[Batch] = [
            read_batch(dataset.train, order.samples(step), device) for step in epoch
        ]
        self.steps = 0

    def step(self) -> Tensor:
        """Take a step and return its loss, on the device."""
        batch = self.batches[self.steps % len(self.batches)]
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.schedule.at(self.steps, None)
        bf16 = self.config.training.precision == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits = self.forward(batch.input_ids, batch.padding_mask)
        loss = F.cross_entropy(logits.float(), batch.labels)
        loss.backward()
        if self.config.optimizer.clip_value is not None:
            nn.utils.clip_grad_value_(self.model.parameters(), self.config.optimizer.clip_value)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return loss.detach()


@dataclass(frozen=True)
class Bench:
    """What a row of the table needs: where to train, for how long, at which density."""

    ranks: Ranks
    agreement: Agreement
    density: float
    steps: int
    rounds: int

    def configure(self, recipe: str, small: bool, *overrides: str) -> RunConfig:
        """Return a recipe's configuration that only trains."""
        words = [*(SMALL if small else [])]
        words += [f"training.{name}_every={NEVER}" for name in ("log", "evaluate", "checkpoint")]
        words += [f"training.steps={NEVER}", f"transition.check_every={NEVER}"]
        words += ["transition.max_dense_steps=null", *overrides]
        device = self.ranks.device.type
        return build_run_config(read_recipe(recipe), None, words, world_size=1, device_type=device)


def draw(config: RunConfig) -> Dataset:
    """Return random tokens, of half to full length where the task has padding, as a dataset."""
    task, length = get_task(config.task), config.data.sequence_length
    shortest = length // 2 if task.padded else length
    generator = np.random.default_rng(0)

    def split(count: int) -> Split:
        lengths = generator.integers(shortest, length, count, endpoint=True, dtype=np.int32)
        ids = generator.integers(0, min(task.vocab_size, 256), (count, length), dtype=np.uint8)
        ids[np.arange(length) >= lengths[:, None]] = 0  # padding
        labels = generator.integers(0, task.num_classes, count).astype(np.uint8)
        return Split(ids, lengths, labels)

    return Dataset(split(SAMPLES), split(8), split(8), Path(), {})


def gate(bench: Bench, recipe: str, small: bool, overrides: Sequence[str]) -> float:
    """Return the largest relative difference of the losses of trainer and plain loop in fp32.

    Raises:
        SystemExit: it is above the tolerance, so comparing their speed would mean nothing.
    """
    config = bench.configure(
        recipe,
        small,
        *overrides,
        "training.precision=fp32",
        "model.dropout=0.0",
        "model.attention_dropout=0.0",
        "training.log_every=1",
        "training.batch_size=4",
        "optimizer.warmup_steps=1",
    )
    dataset = draw(config)
    plain = PlainLoop(config, dataset, bench.ranks.device)
    theirs = [plain.step().item() for _ in range(GATE_STEPS)]
    with _running(bench, config, dataset) as (trainer, folder):
        trainer.train(GATE_STEPS)
        ours = [row["loss"] for row in _train_rows(folder)]
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    if not worst < TOLERANCE:
        raise SystemExit(f"{recipe}: the losses differ by {worst:.1e}: {ours} and {theirs}")
    return worst


@dataclass(frozen=True)
class Timing:
    """Median seconds a step, peak bytes, and how often the host waits for the GPU in a step."""

    seconds: float
    memory: float
    waits: int | None


def count_waits(step: Callable[[], object], device: torch.device) -> int | None:
    """Return how often the host waits for the GPU in a step; None on a CPU."""
    if device.type != "cuda":
        return None
    # The debug mode sees operators, not who waits in so many words.
    asked = mock.patch.object(torch.cuda, "synchronize", wraps=torch.cuda.synchronize)
    with warnings.catch_warnings(record=True) as caught, asked as waiting:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    return found + waiting.call_count


def time_plain(bench: Bench, config: RunConfig, dataset: Dataset) -> Timing:
    """Time the plain loop."""
    loop = PlainLoop(config, dataset, bench.ranks.device)
    reset_peak_memory(bench.ranks.device)
    times = []
    for _ in range(1 + bench.rounds):
        synchronize(bench.ranks.device)
        started = time.perf_counter()
        for _ in range(bench.steps):
            loop.step()
        synchronize(bench.ranks.device)
        times.append((time.perf_counter() - started) / bench.steps)
    memory = peak_memory_bytes(bench.ranks.device)
    return Timing(statistics.median(times[1:]), memory, count_waits(loop.step, bench.ranks.device))


def time_trainer(bench: Bench, config: RunConfig, dataset: Dataset, sparse: bool) -> Timing:
    """Time the trainer in a phase, by its own clock."""
    with _running(bench, config, dataset) as (trainer, folder):
        if sparse:
            _switch(trainer, config, bench.density)
        reset_peak_memory(bench.ranks.device)
        for number in range(1, bench.rounds + 2):
            trainer.train(number * bench.steps)
        rows = _train_rows(folder)[1:]
        memory = max(row["memory_bytes"] for row in rows)
        trainer._step()  # starts the trainer's clock, which waits
        waits = count_waits(trainer._step, bench.ranks.device)
        return Timing(statistics.median(row["step_seconds"] for row in rows), memory, waits)


def _switch(trainer: Trainer, config: RunConfig, density: float) -> None:
    """Put a trainer into its sparse phase with the pattern of one layer for all."""
    blocks = -(-config.data.sequence_length // config.sparse_attention.block)
    masks = [spion_like_mask(blocks, density)] * config.model.layers
    set_masks(trainer.model, masks)
    trainer.state.masks, trainer.state.switch_step = masks, 0
    if trainer.switch is not None:
        trainer.switch.switch_step = 0
    trainer.model.prepare(config.batches.micro, trainer.device)


@contextmanager
def _running(bench: Bench, config: RunConfig, dataset: Dataset) -> Iterator[tuple[Trainer, Path]]:
    """Yield a trainer and its folder, which is removed afterwards."""
    timeout = config.training.rank_timeout_seconds
    with (
        tempfile.TemporaryDirectory() as name,
        StopRequest() as request,
        Watch(bench.ranks, bench.agreement, timeout) as watch,
    ):
        trainer = Trainer(
            config, dataset, bench.ranks, bench.agreement, watch, request, Path(name), None
        )
        try:
            yield trainer, Path(name)
        finally:
            trainer.log.close()
    del trainer
    gc.collect()


def _train_rows(folder: Path) -> list[dict]:
    return [row for row in read_rows(folder) if row["kind"] == "train"]


def measure(bench: Bench, recipe: str, small: bool, overrides: Sequence[str]) -> list[str]:
    """Return the table's lines for a recipe."""
    on_gpu = bench.ranks.device.type == "cuda"
    error = gate(bench, recipe, small, overrides)
    print(f"{recipe}: fp32 losses of {GATE_STEPS} steps differ by {error:.1e} at most", flush=True)
    lines: list[str] = []
    fastest = float("inf")
    for loop, attention, steps, words in _cases(on_gpu):
        config = bench.configure(recipe, small, *overrides, *words)
        dataset = draw(config)
        if loop == "plain":
            timing = time_plain(bench, config, dataset)
            fastest = min(fastest, timing.seconds)
        else:
            timing = time_trainer(bench, config, dataset, attention != "dense")
        seconds = timing.seconds
        tokens = config.batches.total * config.data.sequence_length
        cells = [
            recipe,
            f"{config.batches.total}, {config.data.sequence_length}",
            loop,
            attention if attention == "dense" else f"sparse, {bench.density:.1%}",
            steps,
            f"{1e3 * seconds:.2f}",
            f"{tokens / seconds:,.0f}",
            f"{fastest / seconds:.2f}",
            f"{timing.memory / 2**20:,.0f}",
            "–" if timing.waits is None else str(timing.waits),
        ]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], flush=True)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    return lines


def _cases(on_gpu: bool) -> list[tuple[str, str, str, list[str]]]:
    """Return (loop, attention, kind of steps, overrides); the plain ones first."""
    eager: list[str] = []
    compiled = ["training.compile=true"]
    if not on_gpu:
        return [
            ("plain", "dense", "eager", eager),
            ("trainer", "dense", "eager", eager),
            ("trainer", "sparse", "eager", eager),
        ]
    fastest = [*compiled, "training.cuda_graph=true"]
    return [
        ("plain", "dense", "eager", eager),
        ("plain", "dense", "compiled", compiled),
        ("trainer", "dense", "eager", eager),
        ("trainer", "dense", "compiled, replayed", fastest),
        ("trainer", "sparse", "eager", eager),
        ("trainer", "sparse", "compiled, replayed", fastest),
    ]


def main() -> None:
    """Check, time, print the table, and write it as a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["listops"])
    parser.add_argument("--density", type=float, default=0.045, help="of the sparse phase")
    parser.add_argument("--steps", type=int, default=20, help="of a round (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="timed, after one that warms up")
    parser.add_argument("--small", action="store_true", help="listops_small, cut down, in fp32")
    parser.add_argument("--out", type=Path, help="Markdown page to write")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    arguments = parser.parse_intermixed_args()
    ranks = discover_ranks()
    join(ranks)
    bench = Bench(ranks, Agreement(), arguments.density, arguments.steps, arguments.rounds)
    recipes = ["listops_small"] if arguments.small else arguments.recipes
    precision = "fp32" if arguments.small else "bf16"
    overrides = [f"training.precision={precision}", *arguments.overrides]
    lines = [HEADER, "|" + " --- |" * (HEADER.count("|") - 1)]
    for recipe in recipes:
        lines += measure(bench, recipe, arguments.small, overrides)
    if arguments.out is not None:
        arguments.out.write_text(page(lines, arguments.rounds, arguments.steps), encoding="utf-8")
    leave()


def page(lines: list[str], rounds: int, steps: int) -> str:
    """Return the page: what, where, how, table."""
    return "\n".join(
        [
            "# Whole training steps",
            "",
            *machine_lines(),
            f"Medians of {rounds} rounds of {steps} steps, after a round that warms up: forward, "
            "backward and optimizer, as the recipe has them, without checks and evaluations. The "
            "plain loop is PyTorch with AdamW (fused), autocast and scaled_dot_product_attention, "
            "its batches on the device beforehand; it first had the trainer's losses, in fp32 "
            f"without dropout, to a relative {TOLERANCE:g} in each of {GATE_STEPS} steps. × plain "
            "compares with the faster plain loop; waits are how often the host stands still until "
            "the GPU is done (torch.cuda.set_sync_debug_mode; torch.cuda.synchronize is counted). "
            "Tokens are sequence positions, padding included.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
