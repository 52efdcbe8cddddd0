"""Block masks as a file that knows no model class: save_masks, load_masks, read_masks.

A safetensors file. A tensor for each attention that has a mask, under the name of its module:
(bytes,) uint8, the mask's bits row by row, highest bit first. Its metadata, all of it text:

    format       "spion_ds.masks"
    version      "1"
    layers       JSON: {name: {"shape": [n, n] or [heads, n, n], "block": …, "heads": …}}; the
                 shape of a dense layer, which has no tensor, is null
    digest       sha256 of the names, shapes, blocks, heads and bits of all layers
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spion_ds.attention import SparseSelfAttention
from spion_ds.durable_files import flush
from spion_ds.errors import CheckpointError, ConfigError, SpionError, near_matches
from spion_ds.switching.masks import (
    find_attentions,
    freeze_learned_patterns,
    get_mask,
    is_switchable,
    mask_bits,
    mask_from_bits,
    misfit,
    replace_masks,
)

FORMAT, VERSION = "spion_ds.masks", "1"
# Modules that wrap others and add a word to the names of those inside.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(frozen=True, eq=False)
class LayerMask:
    """What one attention keeps.

    Attributes:
        mask: (n, n) bool for all heads, or (heads, n, n), on the CPU; None for a dense layer.
        block: side of a block in tokens.
        heads: the layer's attention heads (of queries).
    """

    mask: Tensor | None
    block: int
    heads: int


def save_masks(model: nn.Module, path: str | Path, *, seq_len: int | None = None) -> str:
    """Write the masks of all SparseSelfAttention modules of a model into a safetensors file.

    The file appears under its name when it is whole. A masks file of that name is replaced. With
    several ranks one of them is enough: all have the same masks.

    Args:
        model: any model, in any wrapper; a layer without a mask is saved as dense.
        path: the file.
        seq_len: tokens of an input; needed for layers with a static pattern (Fixed, BigBird, …).

    Returns:
        The digest of the masks, sha256, hexadecimal.

    Raises:
        ConfigError: the model has no such module, ``seq_len`` is missing, or the path is taken by
            something else or cannot be written.
    """
    return write_masks(
        {
            name: LayerMask(
                get_mask(attention, seq_len),
                attention.sparsity_config.block,
                attention.sparsity_config.num_heads,
            )
            for name, attention in _named_attentions(model).items()
        },
        path,
    )


def load_masks(model: nn.Module, path: str | Path) -> str:
    """Give a model the masks that ``save_masks`` wrote; layers saved as dense become dense.

    Static patterns are compared with the file's. With masks SAT's patterns are frozen.

    Args:
        model: has an attention for each name in the file, and no others.
        path: the file.

    Returns:
        The digest of the masks, sha256, hexadecimal.

    Raises:
        CheckpointError: the file is missing, damaged, of another kind or of another model; the
            model is unchanged.
        ConfigError: the model has no SparseSelfAttention.
    """
    attentions, layers = _named_attentions(model), read_masks(path)
    _check_names(path, attentions, layers)
    for name, layer in layers.items():
        attention = attentions[name]
        if (reason := _misfit(attention, layer)) is not None:
            raise CheckpointError(
                f"the mask of {name!r} in {path} {reason}; load the masks of this model"
            )
    masks = {name: layer.mask for name, layer in layers.items()}
    try:
        replace_masks(attentions, masks)
    except ConfigError as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from error
    if any(mask is not None for mask in masks.values()):
        freeze_learned_patterns(model)
    return layers_digest(layers)


def read_masks(path: str | Path) -> dict[str, LayerMask]:
    """Return what a masks file holds, by module name, in the model's order.

    Raises:
        CheckpointError: it is missing, damaged, of another kind or of another version.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path} is a masks file of version {metadata.get('version')}, and this spion_ds reads "
            f"version {VERSION}; use the spion_ds that wrote it"
        )
    try:
        entries = json.loads(metadata["layers"])
        layers = {name: _layer(name, entry, tensors) for name, entry in entries.items()}
        digest = metadata["digest"]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); save the masks again") from error
    if tensors.keys() != {name for name, layer in layers.items() if layer.mask is not None}:
        raise CheckpointError(f"{path} is damaged (tensors without a layer); save the masks again")
    if digest != layers_digest(layers):
        raise CheckpointError(
            f"{path} is damaged or was changed: its masks do not have its digest; save them again"
        )
    return layers


def write_masks(layers: Mapping[str, LayerMask], path: str | Path) -> str:
    """Write a masks file and return its digest; arguments, errors as :func:`save_masks`."""
    path, library, digest = Path(path), import_safetensors(), layers_digest(layers)
    _check_free(path)
    tensors = {name: mask_bits(one.mask) for name, one in layers.items() if one.mask is not None}
    entries = {name: _entry(layer) for name, layer in layers.items()}
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "layers": json.dumps(entries, ensure_ascii=False),
        "digest": digest,
    }
    write_atomically(path, library.save(tensors, metadata))
    return digest


def layers_digest(layers: Mapping[str, LayerMask]) -> str:
    """Return the sha256 of names, shapes, blocks, heads and bits, hexadecimal.

    It does not depend on the order of the layers.
    """
    digest = hashlib.sha256()
    for name in sorted(layers):
        layer = layers[name]
        # A line of JSON holds no line break: what follows cannot be taken for another layer's.
        digest.update(json.dumps([name, _entry(layer)], sort_keys=True).encode() + b"\n")
        if layer.mask is not None:
            digest.update(mask_bits(layer.mask).numpy().tobytes())
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that appears under its name when it is whole and on disk.

    Raises:
        ConfigError: it cannot be written; a file of that name is as it was.
    """
    temporary = path.with_name(f".{path.name}.incomplete-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def import_safetensors() -> Any:
    """Return ``safetensors.torch``.

    Raises:
        SpionError: the package is missing.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise SpionError(
            "the package safetensors is missing, in which models and masks are saved; install it "
            "with 'pip install safetensors'"
        ) from None
    return safetensors.torch


def _named_attentions(model: nn.Module) -> dict[str, SparseSelfAttention]:
    """Return a model's attentions by the names that they have without any wrapper."""
    found = find_attentions(model)
    if not found:
        raise ConfigError(
            f"the {type(model).__name__} has no SparseSelfAttention, so it has no masks; give a "
            "model whose attentions are spion_ds.attention.SparseSelfAttention"
        )
    words = {name: [w for w in name.split(".") if w not in _WRAPPERS] for name in found}
    # DistributedDataParallel, DeepSpeed's engine and their like hold the model as "module".
    while all(parts[:1] == ["module"] for parts in words.values()):
        words = {name: parts[1:] for name, parts in words.items()}
    return {".".join(words[name]): attention for name, attention in found.items()}


def _check_names(
    path: str | Path, attentions: Mapping[str, SparseSelfAttention], layers: Mapping[str, LayerMask]
) -> None:
    lacking = [name for name in attentions if name not in layers]
    unknown = [name for name in layers if name not in attentions]
    if not lacking and not unknown:
        return
    parts = []
    if unknown:
        near = near_matches(unknown[0], attentions)
        parts.append(f"it has masks of {_some(unknown)}, which the model has not{near}")
    if lacking:
        parts.append(f"it has no mask of {_some(lacking)}")
    raise CheckpointError(
        f"{path} is of another model: {', and '.join(parts)}; load the masks of this model"
    )


def _some(names: list[str]) -> str:
    shown = ", ".join(map(repr, names[:2]))
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more"


def _misfit(attention: SparseSelfAttention, layer: LayerMask) -> str | None:
    sparsity = attention.sparsity_config
    if layer.block != sparsity.block:
        return f"is of blocks of {layer.block} tokens, and the layer's are of {sparsity.block}"
    if layer.heads != sparsity.num_heads:
        return f"is of a layer of {layer.heads} heads, and the layer has {sparsity.num_heads}"
    return misfit(attention, layer.mask, _blocks(attention))


def _blocks(attention: SparseSelfAttention) -> int | None:
    """Return the blocks a side of a layer's masks, None where any number will do."""
    length = attention.max_seq_length
    if length is not None:
        return -(-length // attention.sparsity_config.block)
    present = get_mask(attention) if is_switchable(attention) else None
    return None if present is None else present.shape[-1]


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    import_safetensors()
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        raise CheckpointError(f"there is no masks file {path}; write one with save_masks")
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; give a masks file, which save_masks wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} is a safetensors file without masks; give one that save_masks wrote"
                )
            # Copied: what is checked is what is used.
            return metadata, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} is damaged, or no masks file ({error}); save the masks again"
        ) from error


def _layer(name: str, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> LayerMask:
    shape, block, heads = entry["shape"], entry["block"], entry["heads"]
    if not all(type(number) is int and number >= 1 for number in (block, heads)):
        raise ValueError(f"{name!r} has block {block!r} and heads {heads!r}")
    if shape is None:
        return LayerMask(None, block, heads)
    if len(shape) == 3 and shape[0] != heads:
        raise ValueError(f"{name!r} has masks of {shape[0]} heads, and {heads} heads")
    return LayerMask(mask_from_bits(tensors[name], shape), block, heads)


def _entry(layer: LayerMask) -> dict[str, Any]:
    shape = None if layer.mask is None else list(layer.mask.shape)
    return {"shape": shape, "block": layer.block, "heads": layer.heads}


def _check_free(path: Path) -> None:
    """Raise ConfigError if there is something else than a masks file."""
    if not path.exists():
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            ours = (file.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        ours = False
    if not ours:
        raise ConfigError(f"{path} exists and is no masks file; give another name, or remove it")
