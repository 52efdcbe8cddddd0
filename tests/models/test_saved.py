"""A saved model is the same model, anywhere, and a damaged one says so."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spion_ds.errors import CheckpointError, ConfigError
from spion_ds.models import EncoderClassifier, ModelConfig, load_model, save_model
from spion_ds.models.saved import write_sums
from spion_ds.sparsity import read_sparse_attention
from spion_ds.switching.masks import get_masks, set_masks

load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

LENGTH, BLOCK = 70, 16  # a last block that is not full
SPION = {"mode": "spion", "block": BLOCK}
FIXED = {"mode": "fixed", "block": BLOCK, "num_local_blocks": 2, "different_layout_per_head": True}


def tiny_model(block: dict[str, Any], documents: int = 1, **named: Any) -> EncoderClassifier:
    torch.manual_seed(0)
    sizes = {"dim": 16, "ffn_dim": 32, "layers": 2, "heads": 2, "head_dim": 16}
    config = ModelConfig(**sizes, classifier_dim=16, **named)
    block_config = read_sparse_attention(block)
    return EncoderClassifier(
        config, block_config, 17, 10, LENGTH, documents, brackets=(11, 14, 15)
    ).eval()


def sparse_model(block: dict[str, Any] = SPION, **named: Any) -> EncoderClassifier:
    model = tiny_model(block, **named)
    first, second = torch.eye(5, dtype=torch.bool), torch.eye(5, dtype=torch.bool)
    first[:, 1], second[3] = True, True
    set_masks(model, [first, second])
    return model


def inputs() -> tuple[Tensor, Tensor]:
    ids = torch.randint(1, 17, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(LENGTH) < torch.tensor([[70], [33], [1]])


@torch.no_grad()
def logits(model: EncoderClassifier) -> Tensor:
    return model(*inputs())


@pytest.mark.parametrize("kind", ["sparse", "dense", "one layout a head"])
def test_a_loaded_model_is_the_saved_one(kind: str, tmp_path: Path) -> None:
    made = {"sparse": sparse_model, "dense": lambda: tiny_model(SPION)}
    model = made.get(kind, lambda: tiny_model(FIXED))()
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    masks, before = (get_masks(m, m.sizes["max_length"]) for m in (loaded, model))
    assert (masks is None) == (before is None) == (kind == "dense")
    assert all(torch.equal(a, b) for a, b in zip(masks or [], before or [], strict=True))


def test_a_mask_that_does_not_fit_its_layer_is_refused_and_changes_nothing() -> None:
    model = sparse_model()
    before = get_masks(model, LENGTH)
    good, heads = torch.eye(5, dtype=torch.bool), torch.ones(2, 5, 5, dtype=torch.bool)
    for masks, message in (
        ([good], "masks of 1 layers, and the model has 2"),
        ([good, good, good], "masks of 3 layers"),
        ([good, good[:4]], r"layer 1 has the shape \(4, 5\)"),
        ([good, good[:4, :4]], "layer 1 has 4 blocks a side, and the layer has 5"),
        ([good, heads[:1]], "layer 1 is of 1 heads, and the layer has 2"),
        ([good, heads], "layer 1 is one a head, and the heads of the layer's Spion.* share one"),
    ):
        with pytest.raises(CheckpointError, match=message):
            set_masks(model, masks, LENGTH)
    assert all(torch.equal(a, b) for a, b in zip(before, get_masks(model, LENGTH), strict=True))


def test_rotary_positions_token_head_pairs_and_sats_w_are_saved(tmp_path: Path) -> None:
    sat = {"mode": "sat", "block": BLOCK}
    named = {"positions": "rotary", "masked_token_loss": 1.0, "zero_is_padding": True}
    model = sparse_model(sat, documents=2, **named)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == model.config
    ids, padding_mask = (torch.stack([x, x.flip(0)], dim=1) for x in inputs())
    ids[:, :, 5] = 0
    with torch.no_grad():
        assert torch.equal(loaded(ids, padding_mask), model(ids, padding_mask))
        guesses = [m(ids, padding_mask, guess_tokens=True) for m in (loaded, model)]
    assert torch.equal(*guesses)
    assert torch.equal(loaded.patterns[1].weight, model.patterns[1].weight)
    # Its pattern is there: trained on, it learns no other.
    loaded.train()(ids, padding_mask)
    assert loaded.take_pattern_loss() is None
    assert not loaded.patterns[0].weight.requires_grad


def test_brackets_and_a_pooling_that_attends_are_saved(tmp_path: Path) -> None:
    named = {"pooling": "attention", "nesting_levels": 3, "subexpression_loss": 1.0}
    model = sparse_model(**named)
    save_model(model, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert (loaded.config, loaded.sizes) == (model.config, model.sizes)
    assert torch.equal(logits(loaded), logits(model))


def test_it_runs_in_bf16(tmp_path: Path) -> None:
    model = sparse_model()
    save_model(model, tmp_path / "fp32")
    half = load_model(tmp_path / "fp32", dtype=torch.bfloat16)
    # bf16 keeps 8 bits of each activation: some hundredths of logits of size 1.
    torch.testing.assert_close(logits(half).float(), logits(model), atol=0.05, rtol=0.05)
    save_model(half, tmp_path / "bf16")
    assert torch.equal(logits(load_model(tmp_path / "bf16")), logits(half))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_it_runs_on_a_gpu_as_on_a_cpu(tmp_path: Path) -> None:
    model = sparse_model()
    save_model(model, tmp_path / "model")
    ids, padding_mask = inputs()
    # Other kernels: float32 rounding through two layers; bf16 as in the test above.
    for dtype, bound in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
        loaded = load_model(tmp_path / "model", device="cuda", dtype=dtype)
        with torch.no_grad():
            out = loaded(ids.cuda(), padding_mask.cuda()).float().cpu()
        torch.testing.assert_close(out, logits(model), atol=bound, rtol=bound)


def test_loading_needs_no_deepspeed(tmp_path: Path) -> None:
    save_model(sparse_model(), tmp_path / "model")
    lines = [
        "from spion_ds.models import load_model",
        f"load_model({str(tmp_path / 'model')!r})",
        "import sys",
        "assert 'deepspeed' not in sys.modules",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ConfigError, match="exists and is not empty"):
        save_model(sparse_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("room", [100, 9000])
def test_a_disk_that_fills_up_leaves_nothing_and_is_named(room: int, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = sparse_model()
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # as a full disk: a write fails
    try:
        with pytest.raises(ConfigError, match=r"cannot be written to .*make room there"):
            save_model(model, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        load_model(tmp_path)
    folder = tmp_path / "model"
    save_model(sparse_model(), folder)
    config, weights = folder / "config.json", folder / "model.safetensors"
    good, text = weights.read_bytes(), config.read_text()

    weights.write_bytes(good[:-10])
    write_sums(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_model(folder)
    weights.write_bytes(good)

    values = json.loads(text)
    for changed, message in (
        ({"format": 9}, "not of a saved model of format 3"),
        ({"sizes": {**values["sizes"], "vocab_size": 5}}, "size mismatch"),
        ({"mask_shapes": [[9, 9], [5, 5]]}, "cannot be a packed mask"),
        ({"mask_shapes": [[5, 5]]}, "mask_shapes has 1 shapes, and there are 2 layers"),
        ({"mask_shapes": [[5, 5], [25]]}, "is no shape of a mask"),
        ({"mask_shapes": [[5, 5], [1, 5, 5]]}, "the mask of layer 1 is of 1 heads"),
        ({"mask_shapes": None}, "there are masks"),
        ({"model": {**values["model"], "width": 3}}, "unknown key 'model.width'"),
    ):
        config.write_text(json.dumps({**values, **changed}))
        write_sums(folder)
        with pytest.raises(CheckpointError, match=message):
            load_model(folder)
    config.write_text(text[:-20])
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "SHA256SUMS"])
def test_a_model_with_one_bit_changed_is_not_loaded(name: str, tmp_path: Path) -> None:
    save_model(sparse_model(), tmp_path / "model")
    path = tmp_path / "model" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="export the model again"):
        load_model(tmp_path / "model")


def test_sha256sum_reads_the_sums(tmp_path: Path) -> None:
    save_model(sparse_model(), tmp_path / "model")
    words = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    result = subprocess.run(words, cwd=tmp_path / "model", capture_output=True, check=True)
    assert result.stdout == b"config.json: OK\nmodel.safetensors: OK\n"


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    model = sparse_model()
    save_model(model, tmp_path / "model")
    with torch.no_grad():
        model.classifier[-1].bias[0] = torch.inf
    message = r"NaN or infinite \(classifier\.\d\.bias\)"
    with pytest.raises(CheckpointError, match=message):
        save_model(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, **model.state_dict()}, weights)
    write_sums(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "model")
