"""DenseToSparse on several ranks: one decision, whatever the ranks share."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from filelock import FileLock

from tests.switching import rank_scenarios
from tests.training.launching import ROOT, command, launch

pytestmark = pytest.mark.ranks
ON_ONE = ["one_decision", "token_maps_and_skewness"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run every scenario on two ranks, some on one; each number of ranks is started once.

    The processes of pytest-xdist share the results: their temporary folders have one parent.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "rank_scenarios"
    folder.mkdir(exist_ok=True)
    found = {}
    with FileLock(folder / "lock"):
        for ranks, names in ((1, ON_ONE), (2, list(rank_scenarios.SCENARIOS))):
            missing = [name for name in names if not (folder / f"{name}-{ranks}.json").exists()]
            if missing:
                words = ["-m", "tests.switching.rank_scenarios", str(folder), *missing]
                launch([*command("torchrun", ranks), *words], ROOT)
            for name in names:
                found[f"{name}-{ranks}"] = json.loads((folder / f"{name}-{ranks}.json").read_text())
    return found


@pytest.mark.parametrize("kind", ["shared", "per head", "mixed"])
def test_masks_do_not_depend_on_world_size(results: dict[str, Any], kind: str) -> None:
    [alone] = results["one_decision-1"][kind]
    first, second = results["one_decision-2"][kind]
    assert alone
    assert alone == first == second


def test_token_maps_and_skewness_do_not_depend_on_world_size(results: dict[str, Any]) -> None:
    for (kinds, [alone]), (same, both) in zip(
        results["token_maps_and_skewness-1"], results["token_maps_and_skewness-2"], strict=True
    ):
        assert kinds == same == ["check", "check", "switch"]
        assert both == [alone, alone]


def test_large_masks_travel_a_layer_at_a_time(results: dict[str, Any]) -> None:
    assert results["large_masks-2"] == results["one_decision-2"]


def test_a_bit_that_changes_on_the_way_is_an_error_on_every_rank(results: dict[str, Any]) -> None:
    errors, phases = results["damaged_on_the_way-2"]
    assert all("differ from those that rank 0 sent" in error for error in errors)
    assert phases == ["dense", "dense"]


def test_different_step_numbers_are_refused_before_anything_is_computed(
    results: dict[str, Any],
) -> None:
    errors, calls = results["different_step_numbers-2"]
    assert all("step numbers: 1 on rank 0 and 2 on rank 1" in error for error in errors)
    assert calls == [0, 0]


def test_different_settings_are_refused_on_every_rank(results: dict[str, Any]) -> None:
    every, announced = results["different_settings-2"]
    assert all("check_every" in error for error in every)
    assert all("padding_masks" in error for error in announced)


def test_a_step_that_one_rank_skips_is_skipped_by_all(results: dict[str, Any]) -> None:
    assert results["one_rank_skips-2"] == [["skipped", "switch"]] * 2


def test_a_rule_that_fails_on_rank_0_is_told_to_all(results: dict[str, Any]) -> None:
    errors, phases = results["rule_fails_on_rank_0-2"]
    assert all("KeyError('mine')" in error for error in errors)
    assert phases == ["dense", "dense"]


def test_ranks_with_inputs_of_other_lengths_need_a_length_of_the_layers(
    results: dict[str, Any],
) -> None:
    masks, errors = results["other_lengths-2"]
    assert masks[0]
    assert masks[0] == masks[1]
    assert all("max_seq_length" in error for error in errors)


@pytest.mark.parametrize("per_head", ["False", "True"])
def test_heads_on_several_ranks_get_the_whole_models_patterns(
    results: dict[str, Any], per_head: str
) -> None:
    for found, wanted in results["heads_on_ranks-2"][per_head]:
        assert found
        assert found == wanted


def test_patterns_of_all_pipeline_stages_are_made_together(results: dict[str, Any]) -> None:
    (first, seen), (second, nothing) = results["layers_on_ranks-2"]
    assert first
    assert first == second
    assert seen == [2]
    assert nothing == []


def test_groups_that_hold_the_same_or_leave_gaps_are_refused(results: dict[str, Any]) -> None:
    same, gap = results["groups_that_overlap-2"]
    assert all("are held twice" in error for error in same)
    assert all("no rank holds layer 2" in error for error in gap)


ENGINES = ["plain_ddp", "fully_sharded", *(f"zero_{stage}" for stage in range(4))]


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_switches_and_refreshes_alike(results: dict[str, Any], engine: str) -> None:
    if engine.startswith("zero"):
        kinds, masks = results["zero_stages-2"][engine[-1]]
    else:
        kinds, masks = results[f"{engine}-2"]
    assert kinds == ["check", "switch", "refresh"]
    assert masks[0]
    assert masks[0] == masks[1]


def test_zero_3_goes_on_exactly_with_masks_a_head_that_were_refreshed_twice(
    results: dict[str, Any],
) -> None:
    found = results["zero_3_saved_and_loaded-2"]
    assert found["same"] == [True, True]
    assert found["kinds"].count("refresh") == 3
    assert found["agree"][0] == found["agree"][1]
