"""Training from dense to sparse on tasks other than ListOps, tiny."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from spion_ds.training.checkpoints.checkpoint import load_weights
from spion_ds.training.config.run import build_run_config
from spion_ds.training.session import saved_recipe
from spion_ds.training.step.evaluation import build_model
from tests.data.test_retrieval import write
from tests.training.launching import TINY, digest, drive, losses, rows, summary

pytestmark = pytest.mark.ranks


def recipe(folder: Path, task: str, data: str) -> str:
    """Write the tiny recipe for another task and return its path."""
    kept = [line for line in TINY.read_text().splitlines() if line[:5] not in ("task:", "data:")]
    path = folder / f"{task}.yaml"
    path.write_text("\n".join([f"task: {task}", f"data: {{{data}}}", *kept]))
    return str(path)


def test_pairs_and_pixels_train_and_masks_do_not_depend_on_the_ranks(tmp_path: Path) -> None:
    write(tmp_path / "aan", rows=24)
    pairs = recipe(
        tmp_path, "retrieval", f"source: {tmp_path / 'aan'}, max_length: 60, sequence_length: 64"
    )
    pixels = recipe(
        tmp_path,
        "pathfinder32",
        "image_size: 12, seed_distance: 2, contour_length: 2, distractors: 0, train: 64, "
        "validation: 22, test: 22",
    )
    everything = {
        "overrides": [
            "model.positions=rotary",
            "model.masked_token_loss=0.5",
            "training.pretrain_steps=4",
            "training.augment=true",
            "training.keep_checkpoints=9",
        ]
    }
    # What attention sees then depends on the augmentation: it turns the black pixels too.
    black = {
        "recipe": pixels,
        "overrides": ["model.zero_is_padding=true", "training.augment=true", "training.steps=7"],
    }
    blocks = [*black["overrides"], "transition.resolution=block"]
    one = [
        {**black, "run_name": "token"},
        {**black, "run_name": "still", "overrides": black["overrides"][:1], "stop_at": 1},
        {**black, "run_name": "block", "overrides": blocks},
        {"recipe": pairs, "run_name": "pairs"},
        {"recipe": pixels, "run_name": "pixels", "attention": "bigbird"},
        {**everything, "run_name": "open", "stage": 3},
        {**everything, "run_name": "stopped", "stage": 3, "stop_at": 3},
        {"resume": str(tmp_path / "runs" / "stopped")},
    ]
    two = [
        {"recipe": pairs, "run_name": "pairs-2"},
        {**everything, "run_name": "open-2", "stage": 2},
    ]
    drive("python", 1, one, tmp_path)
    drive("torchrun", 2, two, tmp_path)
    runs = tmp_path / "runs"
    for name in ("pairs", "open"):
        assert digest(runs / name) == digest(runs / f"{name}-2")
        for step, loss in losses(runs / name).items():
            # Sums of another order, in fp32.
            assert losses(runs / f"{name}-2")[step] == pytest.approx(loss, rel=1e-4)
    # Augmentation, masks and the weight of each loss go on where they were.
    assert losses(runs / "stopped") == losses(runs / "open")
    assert digest(runs / "stopped") == digest(runs / "open")
    # The first steps learn from guessing alone: the classifier is as it was drawn.
    early = runs / "stopped" / "checkpoints" / "step-000003"
    weights = load_weights(early)
    config = build_run_config(saved_recipe(early), None, (), world_size=1, device_type="cpu")
    fresh = build_model(config).state_dict()
    unchanged = {name for name, weight in weights.items() if torch.equal(weight, fresh[name])}
    assert unchanged == {name for name in fresh if name.startswith("classifier.")}
    # An untrained model guesses among 17 tokens: ln 17 = 2.8, give or take its random weights.
    assert rows(runs / "open", "train")[0]["masked_token_loss"] == pytest.approx(2.8, abs=0.5)
    assert digest(runs / "token") == digest(runs / "block")
    assert losses(runs / "token")[1] != losses(runs / "still")[1]  # of images that were turned
    found = summary(runs / "pairs")
    assert found["phase"] == "sparse"
    assert set(found["baselines"]) == {"majority class"}
    # Both documents of 8 pairs a step count.
    row = rows(runs / "pairs", "train")[-1]
    assert row["tokens_per_second"] * row["step_seconds"] == pytest.approx(8 * 2 * 64)
    assert summary(runs / "pixels")["dense"]["steps"] == 0
    assert (runs / "pixels" / "config.yaml").read_text().startswith("recipe: pathfinder32-bigbird")
