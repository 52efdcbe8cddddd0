"""Maps pooled on the way: the masks of token-level maps, on any ranks, resumed at any step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spion_ds.distributed.process_group import Ranks
from spion_ds.errors import CheckpointError, ConfigError
from spion_ds.training.checkpoints.checkpoint import TrainingState, load_state
from spion_ds.training.checkpoints.files import find_checkpoint
from spion_ds.training.checkpoints.resuming import check_switch_state
from spion_ds.training.config.map_memory import check_map_memory, token_map_bytes
from spion_ds.training.config.recipe_files import read_recipe
from spion_ds.training.config.run import RunConfig, build_run_config
from tests.training.launching import TINY, digest, drive, losses, rows

BLOCK = ["transition.resolution=block"]


@pytest.mark.ranks
def test_block_resolution_gives_the_masks_of_token_resolution_and_resumes(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    micro = [*BLOCK, "training.micro_batch_size=2", "training.keep_checkpoints=5"]
    stopped = [
        {"run_name": "stopped", "overrides": micro, "stop_at": 5},
        {"resume": str(runs / "stopped")},
    ]
    two = [{"run_name": "two", "overrides": micro}, *stopped]
    drive("torchrun", 2, two, tmp_path)
    one = [
        {"run_name": "token"},
        {"run_name": "one", "overrides": BLOCK},
        {"run_name": "f", "overrides": [*BLOCK, "sparse_attention.variant=f"], "stop_at": 6},
        {"run_name": "token_f", "overrides": ["sparse_attention.variant=f"], "stop_at": 6},
    ]
    drive("python", 1, one, tmp_path)

    assert digest(runs / "one") == digest(runs / "two") == digest(runs / "token")
    assert digest(runs / "f") == digest(runs / "token_f")
    # Looking changes nothing: the dense steps, and with the same masks the sparse ones, are equal.
    assert losses(runs / "one") == losses(runs / "token")
    # The rule compares other maps, so its distances are others.
    distances = [[row["distance"] for row in rows(runs / n, "check")] for n in ("one", "token")]
    assert distances[0] != distances[1]

    assert losses(runs / "stopped") == losses(runs / "two")
    assert digest(runs / "stopped") == digest(runs / "two")
    assert rows(runs / "stopped", "validation") == rows(runs / "two", "validation")
    before = find_checkpoint(runs / "stopped" / "checkpoints" / "step-000005")
    assert [tuple(a.shape) for a in load_state(before)[0].switch["rule"]["before"]] == [
        (8, 8),
        (8, 8),
    ]
    assert [a.dtype for a in load_state(before)[0].switch["rule"]["before"]] == [torch.float64] * 2

    events = EventAccumulator(str(runs / "one"), size_guidance={"images": 0})
    events.Reload()
    pictures = events.Tags()["images"]
    assert {"map/layer0", "map/layer1", "mask/layer0", "mask/layer1"} <= set(pictures)
    assert [event.step for event in events.Images("map/layer0")] == [2, 4, 6]


@pytest.mark.gpu
@pytest.mark.ranks
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_pattern_is_captured_at_65536_tokens(tmp_path: Path) -> None:
    length = 65536
    overrides = [
        *(*BLOCK, f"data.sequence_length={length}", "data.train=4", "data.validation=1"),
        *("data.test=1", "sparse_attention.block=64", "model.attention_dropout=0"),
        *("transition.check_every=1", "transition.max_dense_steps=4", "training.steps=6"),
        *("training.batch_size=1", "training.precision=bf16", "optimizer.warmup_steps=1"),
    ]
    drive("python", 1, [{"run_name": "long", "overrides": overrides}], tmp_path, gpu=True)
    [switch] = rows(tmp_path / "runs" / "long", "switch")
    assert switch["step"] in (3, 4)
    train = rows(tmp_path / "runs" / "long", "train")
    assert [row["phase"] for row in train][-1] == "sparse"
    # Less than a byte for each pair of tokens.
    assert max(row["memory_bytes"] for row in train) < length**2


def test_a_rule_goes_on_only_with_maps_of_its_own_resolution() -> None:
    state = TrainingState(
        switch={"rule": {"check": 1, "before": [torch.zeros(8, 8)], "distances": []}}
    )
    recipe = read_recipe(str(TINY))
    token, block = (
        build_run_config(recipe, {}, overrides, world_size=1, device_type="cpu")
        for overrides in ([], BLOCK)
    )
    check_switch_state(Path("here"), state, block)
    with pytest.raises(CheckpointError, match=r"resolution is token.*transition.resolution=block"):
        check_switch_state(Path("here"), state, token)
    # Once it has fired, and before the first check, there is nothing to go on with.
    check_switch_state(Path("here"), TrainingState(switch={"rule": {}}), token)


def test_large_token_level_maps_are_told_before_training() -> None:
    recipe, ranks = read_recipe(str(TINY)), Ranks(0, 2, 0, 2)

    def config(length: int, *more: str) -> RunConfig:
        overrides = [f"data.sequence_length={length}", *more]
        return build_run_config(recipe, {}, overrides, world_size=2, device_type="cpu")

    assert check_map_memory(config(2048), ranks) == ""
    # Two layers: float64 sums on each rank, three float32 maps on the first; or one on the first
    # and, while a layer's are made, two float64 maps more on each of the ranks.
    assert token_map_bytes(config(8192), 1) == 2 * 8192**2 * (8 + 3 * 4)
    assert token_map_bytes(config(8192), 2) == 8192**2 * (2 * (2 * 8 + 4) + 2 * 16)
    assert "4.5 GiB at a check" in check_map_memory(config(8192), ranks)
    assert check_map_memory(config(2**21, *BLOCK), ranks) == ""
    sat = check_map_memory(config(8192, "sparse_attention.mode=sat"), ranks)
    assert "keeps queries and keys instead, though the rule may fire at another step" in sat
    with pytest.raises(ConfigError, match=r"294912\.0 GiB at a check, and the cpu has"):
        check_map_memory(config(2**21), ranks)


def test_a_run_of_an_earlier_version_is_not_gone_on_with() -> None:
    config = build_run_config(read_recipe(str(TINY)), {}, (), world_size=1, device_type="cpu")
    with pytest.raises(CheckpointError, match=r"earlier version.*launch/evaluate\.py"):
        check_switch_state(Path("here"), TrainingState(), config)
