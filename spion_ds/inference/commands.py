"""What launch/evaluate.py does with a trained model: test it, compare it, predict, export it."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from spion_ds.data.storage.cache import Split
from spion_ds.data.storage.samples import Sample, read_samples
from spion_ds.data.tasks import get_task
from spion_ds.distributed.agreement import Agreement
from spion_ds.distributed.meeting import prepare_together
from spion_ds.distributed.process_group import Ranks, discover_ranks, join
from spion_ds.errors import CheckpointError, ConfigError, DataError, unknown_name
from spion_ds.models import EncoderClassifier, load_model, save_model
from spion_ds.models.saved import check_new_folder, is_saved_model, read_model_config
from spion_ds.settings import read_dataclass, require
from spion_ds.sparsity import read_sparse_attention
from spion_ds.switching.masks import density_text, get_masks
from spion_ds.training.checkpoints.checkpoint import load_state
from spion_ds.training.checkpoints.files import find_checkpoint
from spion_ds.training.checkpoints.resuming import check_identity
from spion_ds.training.config.run import build_run_config
from spion_ds.training.reports.run_log import peak_memory_bytes, reset_peak_memory
from spion_ds.training.session import prepare_data, saved_recipe
from spion_ds.training.step.batches import read_batch
from spion_ds.training.step.evaluation import Evaluation, evaluate, load_checkpoint_model

STDIN = "-"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class EvaluateOptions:
    """What ``launch/evaluate.py`` was asked to do.

    Attributes:
        model: a run's folder, which means its best checkpoint, a checkpoint's, or an exported
            model's.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        batch_size: samples a rank takes at once; None takes the run's micro-batch.
        precision: ``"fp32"`` or ``"bf16"``; None takes the weights' own.
        data_dir: folder that holds the data caches.
        compare: ``"dense"`` evaluates the same weights with dense attention too.
        input: file of inputs to predict, one a line, ``"-"`` for standard input; None evaluates
            the split.
        export: folder to write the model into, None for none.
    """

    model: Path
    split: str = "test"
    batch_size: int | None = None
    precision: str | None = None
    data_dir: Path = Path("data")
    compare: str | None = None
    input: str | None = None
    export: Path | None = None

    def validate(self) -> None:
        """Raise ConfigError for a value that is not allowed, or two that contradict."""
        if self.batch_size is not None:
            require(self.batch_size >= 1, "--batch_size", self.batch_size, "from 1 up")
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ConfigError(unknown_name("--precision", self.precision, PRECISIONS))
        require(self.compare in (None, "dense"), "--compare", self.compare, "dense")
        chosen = [name for name in ("compare", "input", "export") if getattr(self, name)]
        if len(chosen) > 1:
            raise ConfigError(
                f"{' and '.join(f'--{name}' for name in chosen)} are given; allowed: one of them"
            )
        if self.input not in (None, STDIN) and not Path(str(self.input)).is_file():
            raise ConfigError(
                f"--input {self.input!r} is not a file; allowed: a file with one input a line, or "
                "- for standard input"
            )
        if self.export is not None:
            check_new_folder(self.export)


@dataclass(frozen=True)
class TrainedModel:
    """A model, and what is known about it.

    Attributes:
        model: with its masks, in evaluation mode.
        task, data: the task's name and its ``data`` configuration.
        place: the folder it came from.
        phase: ``"dense"`` or ``"sparse"``.
        step: optimizer steps that it took.
        batch_size: of a rank, in training.
    """

    model: EncoderClassifier
    task: str
    data: Any
    place: Path
    phase: str
    step: int
    batch_size: int

    @property
    def masks(self) -> list[Tensor] | None:
        """The mask of each layer at the model's length, None if all blocks are kept."""
        return get_masks(self.model, self.model.sizes["max_length"])


def open_model(
    place: Path, device: torch.device | str = "cpu", precision: str | None = None
) -> TrainedModel:
    """Return the model of a run's best checkpoint, of a checkpoint, or an exported one.

    A checkpoint holds the whole model whatever its ZeRO stage; DeepSpeed is not asked.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    device = torch.device(device)
    dtype = None if precision is None else PRECISIONS[precision]
    if is_saved_model(place):
        config = read_model_config(place)
        told: dict[str, Any] = {"phase": "sparse", "step": 0, "batch_size": 32}
        if isinstance(config.get("trained"), dict):
            told |= config["trained"]
        facts = {name: told[name] for name in ("phase", "step", "batch_size")}
        known = isinstance(config.get("task"), str) and isinstance(config.get("data"), dict)
        if not known or [type(value) for value in facts.values()] != [str, int, int]:
            raise CheckpointError(
                f"the model in {place} was saved without its task, or with values of other types "
                "in 'trained'; save it with task= and data=, "
                "or export a checkpoint with --export"
            )
        data = read_dataclass(get_task(config["task"]).config_class, config["data"], "data")
        model = load_model(place, device, dtype)
        return TrainedModel(model, config["task"], data, place, **facts)
    folder = find_checkpoint(place, "best")
    state, saved = load_state(folder)
    # DeepSpeed's values and these fit the ranks and devices that trained, not those that evaluate.
    recipe = {**saved_recipe(folder), "deepspeed": {}}
    training_only = ("precision=fp32", "cuda_graph=false", "micro_batch_size=null")
    run = build_run_config(
        recipe,
        None,
        [f"training.{override}" for override in training_only],
        world_size=1,
        device_type=device.type,
    )
    check_identity(folder, saved, run)
    model = load_checkpoint_model(folder, run, device)
    if dtype is not None:
        model = model.to(dtype)
    share = saved["batch_size"] // saved["world_size"]
    batch_size = saved.get("micro_batch_size", share)  # early checkpoints do not say
    return TrainedModel(model, run.task, run.data, folder, state.phase, state.step, batch_size)


def export_checkpoint(place: str | Path, folder: str | Path) -> None:
    """Write a run's best checkpoint, or one named, as a model that ``load_model`` reads.

    Raises:
        SpionError: there is no such checkpoint, or the folder is taken.
    """
    check_new_folder(Path(folder))
    trained = open_model(Path(place))
    save_model(
        trained.model,
        folder,
        task=trained.task,
        data=dataclasses.asdict(trained.data),
        trained={
            "checkpoint": trained.place.name,
            "phase": trained.phase,
            "step": trained.step,
            "batch_size": trained.batch_size,
        },
    )


def dense_copy(model: EncoderClassifier) -> EncoderClassifier:
    """Return a model with the same weights, in evaluation mode, whose attention is dense."""
    block = {"mode": "dense", "block": model.sparse_attention.block}
    copy = EncoderClassifier(model.config, read_sparse_attention(block), **model.sizes)
    weights = model.state_dict()
    copy.load_state_dict({name: weights[name] for name in copy.state_dict()})
    parameter = next(model.parameters())
    return copy.to(parameter.device, parameter.dtype).eval()


def run_evaluate(options: EvaluateOptions) -> None:
    """Do what ``launch/evaluate.py`` was asked to do, on this rank.

    Raises:
        SpionError: the model, the data or an input cannot be read.
    """
    options.validate()
    ranks = discover_ranks()
    if options.export is None and options.input is None:
        evaluate_split(options, ranks)
        return
    if ranks.world_size > 1:
        name = "--export" if options.export else "--input"
        raise ConfigError(f"{name} was started on {ranks.world_size} ranks; start one process")
    if options.export is not None:
        export_checkpoint(options.model, options.export)
        print(f"exported {options.model} to {options.export}")
        return
    trained = open_model(options.model, ranks.device, options.precision)
    _predict_all(trained, str(options.input), options.batch_size or trained.batch_size)


def evaluate_split(options: EvaluateOptions, ranks: Ranks) -> Evaluation:
    """Evaluate a model on this rank's share of a split; rank 0 prints the result."""

    def prepare() -> TrainedModel:
        trained = open_model(options.model, ranks.device, options.precision)
        get_task(trained.task).check_source(trained.data)
        return trained

    trained = prepare_together(ranks, prepare)
    join(ranks)
    agreement = Agreement()
    dataset = prepare_data(trained.task, trained.data, options.data_dir, ranks, agreement)
    split: Split = getattr(dataset, options.split)
    batch_size = options.batch_size or trained.batch_size
    if options.compare is not None:
        compared = _compare(trained, split, batch_size, ranks)
        result = compared[0].result
    else:
        result = evaluate(trained.model, split, batch_size, ranks, ranks.device)
    if not ranks.is_first:
        return result
    kind = "model" if is_saved_model(trained.place) else "checkpoint"
    print(f"{kind}   {trained.place}")
    print(f"phase        {trained.phase}, step {trained.step}")
    masks = trained.masks
    print(f"density      {'100 %' if masks is None else ', '.join(map(density_text, masks))}")
    print(f"throughput   {result.tokens_per_second:,.0f} tokens/s on {ranks.device.type}")
    print(f"{options.split} accuracy {result.accuracy:.2%} of {result.samples} samples")
    for name, accuracy in get_task(trained.task).baselines(dataset.train, split).items():
        print(f"  {name:<22}{accuracy:>7.2%}  (baseline)")
    if options.compare is not None:
        print("\n" + _comparison_table(compared, ranks.device))
    return result


@dataclass(frozen=True)
class _Pass:
    """One evaluation of a comparison: its name, its result, the most memory held, agreement."""

    name: str
    result: Evaluation
    memory_bytes: int
    agreement: float


def _compare(
    trained: TrainedModel, split: Split, batch_size: int, ranks: Ranks
) -> tuple[_Pass, _Pass]:
    """Evaluate as trained and with dense attention, one after the other on the same samples."""
    passes: list[_Pass] = []
    first = None
    for name in (trained.phase, "dense"):
        model = trained.model if first is None else dense_copy(trained.model)
        # Kernels are compiled and memory is reserved before the clock runs.
        batch = read_batch(split, np.arange(min(batch_size, len(split))), ranks.device)
        with torch.no_grad():
            model(batch.input_ids, batch.padding_mask)
        del batch
        reset_peak_memory(ranks.device)
        result = evaluate(model, split, batch_size, ranks, ranks.device, f"evaluating {name}")
        memory = peak_memory_bytes(ranks.device)
        first = result.predictions if first is None else first
        same = (first == result.predictions).sum().double().to(ranks.device)
        if dist.is_initialized():
            dist.all_reduce(same)
        passes.append(_Pass(name, result, memory, same.item() / result.samples))
    return passes[0], passes[1]


def _comparison_table(compared: Iterable[_Pass], device: torch.device) -> str:
    ours, dense = compared
    rows = [
        ("attention", ours.name if ours.name == "sparse" else "as trained", "dense"),
        *(
            (name, form(ours), form(dense))
            for name, form in (
                ("accuracy", lambda x: f"{x.result.accuracy:.2%}"),
                ("loss", lambda x: f"{x.result.loss:.4f}"),
                ("seconds", lambda x: f"{x.result.seconds:.2f}"),
                ("tokens/s", lambda x: f"{x.result.tokens_per_second:,.0f}"),
                (_memory_name(device), lambda x: f"{x.memory_bytes / 2**20:,.0f} MiB"),
            )
        ),
    ]
    lines = [f"{name:<13}{left:>14}{right:>14}" for name, left, right in rows]
    lines.append(f"the predictions agree on {dense.agreement:.2%} of the samples")
    return "\n".join(lines)


def _memory_name(device: torch.device) -> str:
    return "GPU memory" if device.type == "cuda" else "RAM, peak"


def _predict_all(trained: TrainedModel, source: str, batch_size: int) -> None:
    """Print a JSON line for each line of ``source``: its line, label and probabilities."""
    task, length = get_task(trained.task), trained.model.sizes["max_length"]
    name = "standard input" if source == STDIN else source
    if source != STDIN:
        # Find a bad line before the first prediction; what comes through a pipe cannot be.
        with _open(source) as lines:
            for _ in read_samples(_decoded(lines, name), task, trained.data, length, name):
                pass
    with _open(source) as lines:
        samples = read_samples(_decoded(lines, name), task, trained.data, length, name)
        while batch := list(itertools.islice(samples, batch_size)):
            for sample, probabilities in zip(batch, predict(trained, batch), strict=True):
                row = {"line": sample.line, "label": int(np.argmax(probabilities))}
                rounded = [round(float(p), 6) for p in probabilities]
                print(json.dumps({**row, "probabilities": rounded}))
            sys.stdout.flush()


@torch.no_grad()
def predict(trained: TrainedModel, samples: list[Sample]) -> np.ndarray:
    """Return the probabilities (samples, classes) float32 of a batch of inputs."""
    model = trained.model
    device = next(model.parameters()).device
    documents, length = len(samples[0].documents), model.sizes["max_length"]
    ids = torch.zeros(len(samples), documents, length, dtype=torch.int64)
    lengths = torch.zeros(len(samples), documents, 1, dtype=torch.int64)
    for row, sample in enumerate(samples):
        for place, document in enumerate(sample.documents):
            ids[row, place, : len(document)] = torch.from_numpy(document)
            lengths[row, place] = len(document)
    padding_mask = torch.arange(length) < lengths
    if documents == 1:
        ids, padding_mask = ids[:, 0], padding_mask[:, 0]
    logits = model(ids.to(device), padding_mask.to(device)).float()
    return logits.softmax(dim=-1).cpu().numpy()


def _open(source: str) -> Any:
    # With or without the byte order mark of Windows's editors; never as the locale has it.
    if source != STDIN:
        return Path(source).open(encoding="utf-8-sig")
    if sys.stdin is None:
        raise DataError("standard input is closed; give --input a file, or inputs through a pipe")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    return nullcontext(sys.stdin)


def _decoded(lines: TextIO, name: str) -> Iterator[str]:
    mend = "save it as UTF-8, with one input a line"
    try:
        for line in lines:
            if "\0" in line:  # what UTF-16 without a byte order mark looks like
                raise DataError(f"{name} is not UTF-8 text: it has null characters; {mend}")
            yield line
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text: {error}; {mend}") from error
