"""python -m spion_ds.masks, on masks files and on what a tiny run left."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from spion_ds.inference.commands import export_checkpoint
from spion_ds.inference.mask_commands import compare_layers, main, masks_table
from spion_ds.inference.mask_pictures import draw_masks
from spion_ds.inference.mask_places import read_place
from spion_ds.masks import LayerMask, load_masks, read_masks, save_masks
from spion_ds.models import load_model
from spion_ds.switching.mask_files import layers_digest, write_masks
from spion_ds.switching.masks import find_attentions, get_masks, set_masks
from spion_ds.training.checkpoints.checkpoint import load_state
from spion_ds.training.checkpoints.files import find_checkpoint
from tests.training.launching import drive, environment

pytest.importorskip("safetensors")

DENSE_STEPS = 3


def mask(*shape: int, seed: int = 1) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.7


def mixed_layers() -> dict[str, LayerMask]:
    return {
        "a.shared": LayerMask(mask(8, 8), 64, 4),
        "a.heads": LayerMask(mask(3, 16, 16), 32, 3),
        "a.dense": LayerMask(None, 64, 4),
    }


def command(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "spion_ds.masks", *map(str, words)],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "masks.safetensors"
    write_masks(mixed_layers(), path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sparse run ``r``, the dense run ``d``, and ``model``, r's export.

    The layers of run ``h`` have a mask a head.
    """
    folder = tmp_path_factory.mktemp("trained")
    heads = [
        "sparse_attention.mode=fixed",
        "sparse_attention.different_layout_per_head=true",
        "sparse_attention.num_different_global_patterns=2",
        "training.steps=4",
    ]
    sessions = [
        {"run_name": "r"},
        {"run_name": "d", "stop_at": DENSE_STEPS},
        {"run_name": "h", "overrides": heads},
    ]
    drive("python", 1, sessions, folder)
    export_checkpoint(folder / "runs" / "r", folder / "model")
    return folder


# show


def test_show_has_a_line_a_layer_and_the_digest(file: Path) -> None:
    shown = command("show", file)
    assert (shown.returncode, shown.stderr) == (0, "")
    title, shared, heads, dense, digest = shown.stdout.splitlines()
    assert title.split()[:5] == ["layer", "heads", "block", "n", "kept"]
    assert digest == f"digest {layers_digest(mixed_layers())}"
    one = mask(8, 8)
    kept, density = int(one.sum()), f"{float(one.float().mean()):.1%}"
    assert shared.split()[:8] == ["a.shared", "4", "64", "8", f"{kept}", "of", "64", density]
    each = mask(3, 16, 16).double().mean(dim=(1, 2))
    assert heads.split()[:4] == ["a.heads", "3", "32", "16"]
    assert heads.endswith(f"{float(each.min()):.1%} to {float(each.max()):.1%}")
    assert dense.split()[-1] == "dense"


def test_the_diagonals_share_counts_diagonal_blocks_alone() -> None:
    half = torch.zeros(4, 4, dtype=torch.bool)
    half[0, 0] = half[1, 1] = half[0, 3] = True
    assert "50.0%" in masks_table({"a": LayerMask(half, 16, 1)}).splitlines()[1]


@pytest.mark.ranks
def test_a_run_its_checkpoint_its_export_and_its_masks_file_show_the_same(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained / "runs" / "r"
    of_run = command("show", run, cwd=tmp_path).stdout
    assert "layers.0.attention" in of_run
    assert main(["export", str(run), str(tmp_path / "masks")]) == 0
    for place in (find_checkpoint(run, "best"), trained / "model", tmp_path / "masks"):
        capsys.readouterr()
        assert main(["show", str(place)]) == 0
        assert capsys.readouterr().out == of_run


@pytest.mark.ranks
def test_the_names_of_a_runs_layers_are_its_models(trained: Path) -> None:
    model = load_model(trained / "model")
    assert list(read_place(trained / "model")) == list(find_attentions(model))


@pytest.mark.ranks
def test_a_run_means_its_best_checkpoint_and_without_one_its_latest(
    trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained / "runs" / "r", run)
    checkpoints = run / "checkpoints"
    # The dense phase's one becomes the best.
    dense = find_checkpoint(trained / "runs" / "d")
    shutil.copytree(dense, checkpoints / dense.name)
    (checkpoints / "best").write_text(dense.name)
    assert {layer.mask for layer in read_place(run).values()} == {None}
    (checkpoints / "best").unlink()
    state, _ = load_state(find_checkpoint(run, "latest"))
    found = [layer.mask for layer in read_place(run).values()]
    assert all(torch.equal(a, b) for a, b in zip(found, state.masks, strict=True))


@pytest.mark.ranks
def test_masks_a_head_go_from_a_run_through_its_export_into_a_file(
    trained: Path, tmp_path: Path
) -> None:
    run = trained / "runs" / "h"
    export_checkpoint(run, tmp_path / "model")
    state, _ = load_state(find_checkpoint(run, "best"))
    for place in (run, tmp_path / "model"):
        assert main(["export", str(place), str(tmp_path / "masks")]) == 0
        found = [layer.mask for layer in read_masks(tmp_path / "masks").values()]
        assert [tuple(one.shape) for one in found] == [(2, 8, 8)] * 2
        assert all(torch.equal(a, b) for a, b in zip(found, state.masks, strict=True))
    load_masks(load_model(tmp_path / "model"), tmp_path / "masks")


# export


@pytest.mark.ranks
def test_an_exported_file_makes_a_dense_copy_the_model_again(trained: Path, tmp_path: Path) -> None:
    result = command("export", trained / "runs" / "r", tmp_path / "masks")
    assert (result.returncode, result.stderr) == (0, "")
    model, other = load_model(trained / "model"), load_model(trained / "model")
    set_masks(other, None)
    assert get_masks(other, 128) is None
    load_masks(other, tmp_path / "masks")
    ids = torch.randint(1, 16, (2, 128), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert torch.equal(other(ids, ids > 0), model(ids, ids > 0))
    assert save_masks(model, tmp_path / "own") == layers_digest(read_masks(tmp_path / "masks"))


# diff


def test_diff_of_the_same_masks_is_0(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path / "copy")
    result = command("diff", file, tmp_path / "copy")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines()[-1] == "the same blocks"


def test_diff_of_other_masks_is_1_and_counts_blocks(file: Path, tmp_path: Path) -> None:
    layers = mixed_layers()
    other = mask(8, 8, seed=2)
    layers["a.shared"] = LayerMask(other, 64, 4)
    write_masks(layers, tmp_path / "other")
    result = command("diff", file, tmp_path / "other")
    assert result.returncode == 1
    ours, line = mask(8, 8), result.stdout.splitlines()[3]
    both, either = int((ours & other).sum()), int((ours | other).sum())
    counts = [both, int((ours & ~other).sum()), int((other & ~ours).sum())]
    assert line.split() == ["a.shared", *map(str, counts), f"{both / either:.3f}"]
    assert result.stdout.splitlines()[-1] == "different in 1 of 3 layers"


def test_diff_names_layers_that_only_one_place_has(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers = mixed_layers()
    layers["b"] = layers.pop("a.dense")
    write_masks(layers, tmp_path / "other")
    assert main(["diff", str(file), str(tmp_path / "other")]) == 1
    out = capsys.readouterr().out
    assert "a.dense   the layer is only in A" in out
    assert "b         the layer is only in B" in out


@pytest.mark.ranks
def test_diff_of_a_dense_run_and_a_sparse_one_counts_what_is_gone(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = trained / "runs"
    assert main(["diff", str(runs / "d"), str(runs / "r")]) == 1
    one = read_place(runs / "r")["layers.0.attention"].mask
    kept = int(one.sum())
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("layers.0"))
    assert line.split()[1:4] == [str(kept), str(64 - kept), "0"]


def test_masks_that_cannot_be_compared_say_why() -> None:
    ours = LayerMask(mask(8, 8), 64, 4)
    for theirs, note in (
        (LayerMask(mask(8, 8), 32, 4), "block is 64 in A and 32 in B"),
        (LayerMask(mask(8, 8), 64, 8), "heads is 4 in A and 8 in B"),
        (LayerMask(mask(4, 4), 64, 4), "n is 8 in A and 4 in B"),
    ):
        found = compare_layers(ours, theirs)
        assert (found.note, found.same) == (note, False)


def test_a_shared_mask_and_the_same_one_for_each_head_are_the_same() -> None:
    shared = LayerMask(mask(8, 8), 64, 4)
    each = mask(8, 8).expand(4, 8, 8).clone()
    assert compare_layers(shared, LayerMask(each, 64, 4)).same
    each[3, 0, 0] ^= True
    assert not compare_layers(shared, LayerMask(each, 64, 4)).same


# png


def light_pixels(picture: Image.Image) -> int:
    """Return how many pixels have the colour of a kept block; text and background have others."""
    return int((np.asarray(picture) == (250, 240, 160)).all(axis=-1).sum())


def test_png_draws_each_block_of_each_layer_and_head(file: Path, tmp_path: Path) -> None:
    result = command("png", file, tmp_path / "masks.png")
    assert (result.returncode, result.stderr) == (0, "")
    with Image.open(tmp_path / "masks.png") as picture:
        assert picture.format == "PNG"
        light = light_pixels(picture)
    # Panels of 144 pixels: blocks of 18 and of 9.
    kept = 18**2 * int(mask(8, 8).sum()) + 9**2 * int(mask(3, 16, 16).sum())
    assert light == kept + 144**2  # the dense layer


def test_a_picture_of_many_heads_is_no_wider_than_a_page() -> None:
    layers = {
        f"model.decoder.layers.{i}.self_attn": LayerMask(mask(64, 16, 16), 64, 64) for i in range(2)
    }
    picture = draw_masks(layers)
    assert picture.width <= 1440
    assert light_pixels(picture) == 2 * 9**2 * int(mask(64, 16, 16).sum())


def test_a_picture_of_many_blocks_is_reduced() -> None:
    half = torch.zeros(2048, 2048, dtype=torch.bool)
    half[:, :1024] = True
    picture = draw_masks({"a": LayerMask(half, 16, 1)})
    assert picture.width < 600
    assert light_pixels(picture) == 512 * 256


def test_png_replaces_a_picture_and_nothing_else(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture, notes = tmp_path / "masks.png", tmp_path / "notes"
    notes.write_text("mine")
    assert [main(["png", str(file), str(picture)]) for _ in range(2)] == [0, 0]
    assert main(["png", str(file), str(notes)]) == 2
    assert notes.read_text() == "mine"
    assert "exists and is no PNG picture" in capsys.readouterr().err


# Errors are one line on stderr and exit code 2.


@pytest.mark.parametrize(
    "words", ["show none", "png none out", "export none out", "diff none none"]
)
def test_a_place_without_masks_is_exit_code_2(
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: there is no none; give a run's folder")
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_fails_says_one_line_and_ends_with_2(file: Path, tmp_path: Path) -> None:
    result = command("diff", file, tmp_path / "none")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: there is no {tmp_path / 'none'}; give")
    assert len(result.stderr.splitlines()) == 1


def test_what_holds_no_masks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    for name, message in (
        ("empty", f"there are no masks in the folder {tmp_path / 'empty'}"),
        ("text", f"{tmp_path / 'text'} is damaged, or no masks file"),
    ):
        assert main(["show", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.ranks
def test_a_damaged_export_is_exit_code_2(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained / "model", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert main(["show", str(model)]) == 2
    assert "model.safetensors is damaged" in capsys.readouterr().err


def test_export_overwrites_no_other_file(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes"
    notes.write_text("mine")
    assert main(["export", str(file), str(notes)]) == 2
    assert "exists and is no masks file" in capsys.readouterr().err
    assert notes.read_text() == "mine"


@pytest.mark.parametrize("words", [(), ("paint", "x"), ("show",), ("diff", "x")])
def test_a_wrong_command_line_is_exit_code_2(words: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
