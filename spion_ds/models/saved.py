"""A trained model as a folder that runs anywhere: no DeepSpeed, nothing that could be code.

config.json          sizes, sparse_attention, task and preprocessing, where it was trained
model.safetensors    weights; each layer's block mask as bits, under masks.<layer>
SHA256SUMS           the sha256 of both, as ``sha256sum -c`` reads it
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spion_ds.durable_files import flush, read_json, sha256_of
from spion_ds.errors import CheckpointError, ConfigError
from spion_ds.models.config import ModelConfig
from spion_ds.models.encoder import EncoderClassifier
from spion_ds.models.weights import check_weights
from spion_ds.settings import read_dataclass
from spion_ds.sparsity import read_sparse_attention
from spion_ds.switching.mask_files import import_safetensors
from spion_ds.switching.masks import get_masks, mask_bits, mask_from_bits, set_masks

# 2 had no sums.
FORMAT = 3
_CONFIG, _WEIGHTS, _SUMS = "config.json", "model.safetensors", "SHA256SUMS"
_MASK = "masks."
# What values of other types and sizes than ours raise where a model is made of them.
_NONSENSE: tuple[type[Exception], ...] = (
    *(LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError),
    ConfigError,
)


def save_model(
    model: EncoderClassifier,
    folder: str | Path,
    *,
    task: str | None = None,
    data: Mapping[str, Any] | None = None,
    trained: Mapping[str, Any] | None = None,
) -> None:
    """Write a model's weights, masks and configuration into a new folder.

    Args:
        model: in any precision, on any device.
        folder: must not exist, or be empty.
        task: name of the task it was trained on.
        data: the task's ``data`` section: how inputs became token ids.
        trained: anything worth knowing about the training; JSON values.

    Raises:
        CheckpointError: a weight is not finite.
        ConfigError: the folder is taken, or cannot be written.
    """
    folder = Path(os.path.abspath(folder))
    check_new_folder(folder)
    masks = get_masks(model, model.sizes["max_length"])
    tensors = {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in model.state_dict().items()
    }
    check_weights(tensors, "the model to save")
    for layer, mask in enumerate(masks or []):
        tensors[f"{_MASK}{layer}"] = mask_bits(mask)
    config = {
        "format": FORMAT,
        "task": task,
        "data": None if data is None else dict(data),
        "model": dataclasses.asdict(model.config),
        "sparse_attention": model.sparse_attention.to_mapping(),
        "sizes": model.sizes,
        "mask_shapes": None if masks is None else [list(mask.shape) for mask in masks],
        "trained": None if trained is None else dict(trained),
    }
    _write(folder, tensors, json.dumps(config, indent=2) + "\n")


def load_model(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> EncoderClassifier:
    """Return the model that ``save_model`` wrote, with its masks, in evaluation mode.

    Args:
        folder: the saved model.
        device: where it is to run.
        dtype: torch.float32 or torch.bfloat16; None keeps the saved one.

    Raises:
        CheckpointError: a file is missing, damaged, of another format or of another model.
    """
    folder = Path(folder)
    config = read_model_config(folder)
    tensors = _read_tensors(folder)
    packed = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_MASK)}
    check_weights(tensors, str(folder / _WEIGHTS))
    try:
        model = EncoderClassifier(
            read_dataclass(ModelConfig, config["model"], "model"),
            read_sparse_attention(config["sparse_attention"]),
            **config["sizes"],
        )
        model.load_state_dict(tensors)
        set_masks(model, _unpack(packed, config, len(model.layers)), model.sizes["max_length"])
    except _NONSENSE as error:
        raise CheckpointError(
            f"{folder / _CONFIG} and {_WEIGHTS} do not make a model: {error}; export it again"
        ) from error
    return model.to(device=device, dtype=dtype or next(iter(tensors.values())).dtype).eval()


def is_saved_model(folder: Path) -> bool:
    """Return whether ``save_model`` wrote this folder."""
    return (folder / _WEIGHTS).is_file() and (folder / _CONFIG).is_file()


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the content of a saved model's config.json.

    Raises:
        CheckpointError: it is missing, damaged or of another format.
    """
    path = folder / _CONFIG
    try:
        config = read_json(path)
    except FileNotFoundError:
        raise CheckpointError(
            f"there is no saved model in {folder}: {_CONFIG} is missing; give a folder that "
            "save_model or launch/evaluate.py --export wrote"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); export the model again") from error
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is not of a saved model of format {FORMAT}; export the model again"
        )
    _check_sum(folder, _CONFIG)
    return config


def read_model_masks(folder: Path) -> list[Tensor] | None:
    """Return the masks of a saved model without its weights; None if all blocks are kept.

    Raises:
        CheckpointError: a file is missing, damaged or of another format.
    """
    config, packed = read_model_config(folder), _read_tensors(folder, _MASK)
    try:
        return _unpack(packed, config, config["model"]["layers"])
    except _NONSENSE as error:
        raise CheckpointError(
            f"{folder / _CONFIG} and {_WEIGHTS} do not hold masks: {error}; export the model again"
        ) from error


def check_new_folder(folder: Path) -> None:
    """Raise ConfigError unless ``folder`` can become a saved model without losing anything."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; give a new folder for the model")


def _write(folder: Path, tensors: dict[str, Tensor], config: str) -> None:
    library = import_safetensors()
    from safetensors import SafetensorError

    temporary = folder.with_name(f".{folder.name}.incomplete-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        library.save_file(tensors, temporary / _WEIGHTS)
        (temporary / _CONFIG).write_text(config)
        # The library makes files that only their owner may read.
        (temporary / _WEIGHTS).chmod((temporary / _CONFIG).stat().st_mode)
        write_sums(temporary)
        for path in [*temporary.iterdir(), temporary]:
            flush(path)
        os.replace(temporary, folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ConfigError(
            f"the model cannot be written to {folder}: {error}; make room there, or give another "
            "folder"
        ) from error


def write_sums(folder: Path) -> None:
    """Write the sha256 of a saved model's files beside them."""
    lines = [f"{sha256_of(folder / name)}  {name}\n" for name in (_CONFIG, _WEIGHTS)]
    (folder / _SUMS).write_text("".join(lines))


def _check_sum(folder: Path, name: str) -> None:
    path, sums = folder / name, folder / _SUMS
    for needed in (path, sums):
        if not needed.is_file():
            raise CheckpointError(f"{needed} is missing; export the model again")
    if f"{sha256_of(path)}  {name}" not in sums.read_text(errors="replace").splitlines():
        raise CheckpointError(
            f"{path} is damaged: it does not have its sha256 in {_SUMS}; export the model again, "
            f"or, if you changed it, run 'sha256sum {_CONFIG} {_WEIGHTS} > {_SUMS}' there"
        )


def _read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors whose names start with ``prefix``."""
    import_safetensors()
    from safetensors import SafetensorError, safe_open

    path = folder / _WEIGHTS
    _check_sum(folder, _WEIGHTS)
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; export the model again") from error


def _unpack(packed: dict[str, Tensor], config: dict[str, Any], layers: int) -> list[Tensor] | None:
    shapes = config["mask_shapes"]
    names = [f"{_MASK}{layer}" for layer in range(layers)] if shapes is not None else []
    if packed.keys() != set(names):
        raise ConfigError(f"there are masks {sorted(packed)}, and {layers} layers")
    if shapes is None:
        return None
    if len(shapes) != layers:
        raise ConfigError(f"mask_shapes has {len(shapes)} shapes, and there are {layers} layers")
    return [mask_from_bits(packed[name], shape) for name, shape in zip(names, shapes, strict=True)]
