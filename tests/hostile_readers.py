"""The readers that hostile files meet, each with small files that it can read."""

from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spion_ds.data.image import ImageConfig
from spion_ds.data.listops.task import ListOpsConfig
from spion_ds.data.pathfinder.task import PathfinderConfig
from spion_ds.data.retrieval import FILES, RetrievalConfig
from spion_ds.data.storage.samples import read_samples
from spion_ds.data.tasks import get_task
from spion_ds.distributed.process_group import discover_ranks
from spion_ds.inference.commands import TrainedModel, open_model
from spion_ds.inference.mask_places import read_place
from spion_ds.models import EncoderClassifier, ModelConfig, save_model
from spion_ds.models.saved import write_sums
from spion_ds.sparsity import read_sparse_attention
from spion_ds.switching.mask_files import save_masks
from spion_ds.switching.masks import set_masks
from spion_ds.training.checkpoints import checkpoint
from spion_ds.training.checkpoints.checkpoint import TrainingState, check_harmless
from spion_ds.training.checkpoints.files import find_checkpoint, write_manifest, write_pointer
from spion_ds.training.config.recipe_files import read_deepspeed_json, read_recipe
from spion_ds.training.config.run import build_run_config
from spion_ds.training.reports.results import read_result
from spion_ds.training.step.evaluation import build_model
from tests.hostile_files import Reader
from tests.training.launching import TINY

STEP = "checkpoints/step-000004"


def _config() -> Any:
    return build_run_config(read_recipe(str(TINY)), {}, (), world_size=1, device_type="cpu")


def _known(trained: TrainedModel) -> Any:
    weights = trained.model.state_dict()
    masks = None if trained.masks is None else [mask.tolist() for mask in trained.masks]
    shown = {name: tensor.numpy().tobytes() for name, tensor in weights.items()}
    return shown, masks, trained.step, dataclasses.asdict(trained.data)


# A run: its checkpoint, and the configuration beside it.


def _make_run(folder: Path) -> list[Path]:
    import yaml

    config, step = _config(), folder / STEP
    step.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_mapping(), sort_keys=False))
    masks = [torch.eye(8, dtype=torch.bool)] * 2
    state = TrainingState(step=4, samples_seen=32, switch_step=2, masks=masks, switch={"phase": 1})
    checkpoint._save(checkpoint._pack(state, config, discover_ranks()), step / "state.pt")
    checkpoint._save(build_model(config).state_dict(), step / "weights.pt")
    checkpoint._save({"moments": torch.ones(8)}, step / "zero_optim_states.pt")
    write_manifest(step, 4, 4)
    for pointer in ("latest", "best"):
        write_pointer(folder / "checkpoints", pointer, step.name)
    return [step / name for name in ("manifest.json", "state.pt", "weights.pt")]


def _make_whole_run(folder: Path) -> list[Path]:
    files = _make_run(folder)
    return [*files, folder / "checkpoints" / "best", folder / "config.yaml"]


def _seal_run(folder: Path) -> None:
    (folder / STEP / "manifest.json").unlink()
    write_manifest(folder / STEP, 4, 4)


def _read_run(folder: Path) -> Any:
    trained = open_model(folder)
    return _known(trained)


def _resume(folder: Path) -> Any:
    step = find_checkpoint(folder, checksums=True)
    check_harmless(step)
    return step.name, (step / "zero_optim_states.pt").read_bytes()


# An exported model, and a masks file.


def _make_model(folder: Path) -> list[Path]:
    sizes = {"dim": 16, "ffn_dim": 32, "layers": 2, "heads": 2, "head_dim": 16}
    config = ModelConfig(**sizes, classifier_dim=16)
    block = read_sparse_attention({"mode": "spion", "block": 16})
    model = EncoderClassifier(config, block, 17, 10, 64).eval()
    set_masks(model, [torch.eye(4, dtype=torch.bool), torch.ones(4, 4, dtype=torch.bool)])
    data = {"sequence_length": 64, "max_length": 60, "min_length": 20}
    save_model(model, folder / "model", task="listops", data=data, trained={"step": 4})
    return sorted((folder / "model").iterdir())


def _read_model(folder: Path) -> Any:
    trained = open_model(folder / "model")
    return _known(trained), list(read_place(folder / "model"))


def _make_masks(folder: Path) -> list[Path]:
    _make_model(folder)
    model = open_model(folder / "model").model
    shutil.rmtree(folder / "model")
    save_masks(model, folder / "masks.safetensors", seq_len=64)
    return [folder / "masks.safetensors"]


def _read_masks(folder: Path) -> Any:
    layers = read_place(folder / "masks.safetensors")
    return {name: (one.block, one.heads, one.mask.tolist()) for name, one in layers.items()}


# What a run reports.


def _make_reports(folder: Path) -> list[Path]:
    rows = [
        {"kind": "train", "step": 1, "phase": "dense", "memory_bytes": 5, "step_seconds": 0.1},
        {"kind": "switch", "step": 2, "density": [0.25, 0.5]},
        {"kind": "train", "step": 3, "phase": "sparse", "memory_bytes": 4, "step_seconds": 0.05},
    ]
    metrics, summary = folder / "metrics.jsonl", folder / "summary.json"
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"sparse": {"density": [0.25, 0.5]}, "test_accuracy": 0.5, "validation_accuracy": 0.4}
    summary.write_text(json.dumps({**values, "baselines": {"majority": 0.2}}))
    return [metrics, summary]


def _read_reports(folder: Path) -> Any:
    return read_result(folder, _config())


# Configurations.


def _make_recipe(folder: Path) -> list[Path]:
    return [Path(shutil.copy(TINY, folder / "tiny.yaml"))]


def _read_recipe(folder: Path) -> Any:
    recipe = read_recipe(str(folder / "tiny.yaml"))
    return build_run_config(recipe, {}, (), world_size=1, device_type="cpu").to_mapping()


def _make_deepspeed(folder: Path) -> list[Path]:
    path = folder / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2, "overlap_comm": false}, "timers": {}}\n')
    return [path]


def _read_deepspeed(folder: Path) -> Any:
    values = read_deepspeed_json(str(folder / "zero.json"))
    recipe = read_recipe(str(TINY))
    return build_run_config(recipe, values, (), world_size=1, device_type="cpu").resolved


# Data: official files, Skyformer's pickles, and their caches.

LISTOPS = ListOpsConfig(min_length=4, max_length=30, sequence_length=32)
PAIRS = RetrievalConfig(max_length=16, sequence_length=16)
IMAGES = PathfinderConfig(
    image_size=16, seed_distance=1, contour_length=2, distractors=0, train=8, validation=4, test=4
)


def _digest(dataset: Any) -> Any:
    splits = (dataset.train, dataset.validation, dataset.test)
    return [[np.asarray(x).tobytes() for x in (s.input_ids, s.lengths, s.labels)] for s in splits]


def _prepare(task: str, config: Any, folder: Path) -> Any:
    config = replace(config, source=str(folder))
    get_task(task).check_source(config)
    return _digest(get_task(task).prepare(config, folder / "data"))


def _make_listops(folder: Path) -> list[Path]:
    paths = [folder / f"basic_{split}.tsv" for split in ("train", "val", "test")]
    for path in paths:
        lines = [f"( ( ( [MAX {n} ) 3 ) ] )\t{max(n, 3)}" for n in range(6)]
        path.write_text("\n".join(["Source\tTarget", *lines]) + "\n")
    return paths[:1]


def _make_pairs(folder: Path) -> list[Path]:
    paths = [folder / name for name in FILES.values()]
    for path in paths:
        rows = [f"{n % 2}.0\tP{n}\tQ{n}\tone {n}\ttwo {n}" for n in range(6)]
        path.write_text("\n".join(rows) + "\n")
    return paths[:1]


def _make_images(folder: Path) -> list[Path]:
    pixels = np.random.default_rng(5).integers(0, 256, (16, 16, 16), np.uint8)
    for name in ("imgs/0", "metadata"):
        (folder / name).mkdir(parents=True)
    rows = []
    for number, image in enumerate(pixels):
        name = f"sample_{number}.png"
        Image.fromarray(image).save(folder / "imgs" / "0" / name)
        rows.append([f"imgs/0 {name} {number} {number % 2} 1.8 14 4 2\n"])
    np.save(folder / "metadata" / "0.npy", np.array([row[0].split() for row in rows]))
    return [folder / "metadata" / "0.npy", folder / "imgs" / "0" / "sample_3.png"]


def _make_pickles(folder: Path) -> list[Path]:
    paths = [folder / f"lra-image.{split}.pickle" for split in ("train", "dev", "test")]
    for path in paths:
        ids = np.random.default_rng(1).integers(0, 256, (4, 1024)).astype(np.int32)
        made = [{"input_ids_0": row, "label": np.int64(n)} for n, row in enumerate(ids)]
        path.write_bytes(pickle.dumps(made))
    return paths[:1]


def _make_cache(folder: Path) -> list[Path]:
    _make_listops(folder)
    _prepare("listops", LISTOPS, folder)
    [cache] = [path.parent for path in (folder / "data").rglob("manifest.json")]
    return sorted(cache.iterdir())


def _read_cache(folder: Path) -> Any:
    # Other places have other caches: the one that was copied is opened as it is.
    from spion_ds.data.storage.cache import open_cache

    [cache] = {path.parent for path in (folder / "data").rglob("train_input_ids.npy*")} or [folder]
    return _digest(open_cache(cache))


def _make_inputs(folder: Path) -> list[Path]:
    (folder / "inputs.txt").write_text("[MAX 1 [MIN 2 3 ] ]\n[SM 1 2 ]\n11, 2, 3, 15\n")
    return [folder / "inputs.txt"]


def _read_inputs(folder: Path) -> Any:
    from spion_ds.inference.commands import EvaluateOptions, _decoded, _open

    source = str(folder / "inputs.txt")
    EvaluateOptions(folder, input=source).validate()
    with _open(source) as lines:
        decoded = _decoded(lines, source)
        samples = read_samples(decoded, get_task("listops"), LISTOPS, 32, source)
        return [[document.tolist() for document in sample.documents] for sample in samples]


def _files(task: str, config: Any, make: Callable[[Path], Iterable[Path]]) -> Reader:
    return Reader(f"files of {task}", make, functools.partial(_prepare, task, config))


READERS = [
    Reader("a run", _make_whole_run, _read_run, summed=True, seal=_seal_run),
    Reader(
        "a run to resume",
        lambda folder: [
            *_make_run(folder),
            folder / STEP / "zero_optim_states.pt",
            folder / "checkpoints" / "latest",
        ],
        _resume,
        summed=True,
        seal=_seal_run,
    ),
    Reader(
        "a model",
        _make_model,
        _read_model,
        summed=True,
        seal=lambda folder: write_sums(folder / "model"),
    ),
    Reader("masks", _make_masks, _read_masks, summed=True),
    Reader("reports", _make_reports, _read_reports),
    Reader("a recipe", _make_recipe, _read_recipe),
    Reader("a DeepSpeed JSON", _make_deepspeed, _read_deepspeed),
    Reader("inputs", _make_inputs, _read_inputs),
    _files("listops", LISTOPS, _make_listops),
    _files("retrieval", PAIRS, _make_pairs),
    _files("pathfinder32", IMAGES, _make_images),
    Reader(
        "Skyformer's pickles",
        _make_pickles,
        functools.partial(_prepare, "image", ImageConfig()),
    ),
    Reader("a cache of data", _make_cache, _read_cache, summed=True),
]
