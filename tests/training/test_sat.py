"""SAT trains dense → sparse: the dense run's first phase, exact resuming, any ranks and stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spion_ds.patterns import sat_pattern
from spion_ds.training.checkpoints.checkpoint import load_state, load_weights
from spion_ds.training.step.deepspeed_engine import restart
from tests.training.launching import digest, drive, losses, rows, summary

STEPS = 12
DENSITY = 0.3  # the tiny recipe's
# The maps of so small a model are hardly skewed, and change by tens of per cent a step.
MIN_SKEWNESS, MAX_CHANGE = 1.0, 58.0
SAT = [
    "sparse_attention.mode=sat",
    f"transition.min_skewness={MIN_SKEWNESS}",
    f"transition.max_change_percent={MAX_CHANGE}",
    "training.keep_checkpoints=9",
]
# Before, at and after the switch.
STOPS = (3, 5, 8)


def stopped(folder: Path, name: str, **values: Any) -> list[dict]:
    """Sessions of one run that stops in every phase."""
    run = str(folder / "runs" / name)
    first, *later = [{"stop_at": stop} for stop in STOPS] + [{}]
    return [
        {"run_name": name, "overrides": SAT, **values, **first},
        *({"resume": run, **session} for session in later),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sat")
    dense = [
        {"run_name": "whole", "overrides": SAT},
        *stopped(folder, "stopped"),
        {"run_name": "dense", "overrides": ["sparse_attention.mode=dense", "training.steps=12"]},
    ]
    split = ["training.micro_batch_size=2", "model.activation_checkpointing=true"]
    block = ["transition.resolution=block", "transition.max_dense_steps=3"]
    dense.append({"run_name": "block", "overrides": [*SAT, *block], "stop_at": 4})
    drive("python", 1, dense, folder)
    sessions = [
        {"run_name": "zero2", "stage": 2, "overrides": [*SAT, *split]},
        *stopped(folder, "zero3", stage=3),
        {"run_name": "split_block", "overrides": [*SAT, *split, *block], "stop_at": 4},
    ]
    drive("torchrun", 2, sessions, folder)
    return folder / "runs"


def patterns(run: Path) -> dict[int, list[Tensor]]:
    """Return W of every layer in each checkpoint of a run."""
    found = {}
    for folder in (run / "checkpoints").glob("step-*"):
        weights = load_weights(folder)
        names = sorted(name for name in weights if name.endswith("pattern.weight"))
        found[int(folder.name.removeprefix("step-"))] = [weights[name] for name in names]
    return found


@pytest.mark.ranks
def test_it_switches_at_the_first_check_that_its_rule_accepts(trained: Path) -> None:
    run = trained / "whole"
    checks, [switch] = rows(run, "check"), rows(run, "switch")
    assert not switch["forced"]
    assert [row["step"] for row in checks] == list(range(1, switch["step"] + 1))
    accepted = [
        row["step"]
        for row in checks[2:]
        if all(100 * change < MAX_CHANGE for change in row["change"])
        and all(skewness >= MIN_SKEWNESS for skewness in row["skewness"])
    ]
    assert accepted == [switch["step"]]
    assert switch["step"] == STOPS[1]
    dense, sparse = summary(run)["dense"], summary(run)["sparse"]
    assert (dense["steps"], sparse["steps"]) == (switch["step"], STEPS - switch["step"])
    assert dense["seconds_per_step"] is not None  # with its checks


@pytest.mark.ranks
def test_the_dense_phase_is_that_of_a_dense_run_bit_for_bit(trained: Path) -> None:
    sat, dense = losses(trained / "whole"), losses(trained / "dense")
    switch = STOPS[1]
    assert [sat[step] for step in range(1, switch + 1)] == [
        dense[step] for step in range(1, switch + 1)
    ]
    assert sat[switch + 1] != dense[switch + 1]


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["stopped", "zero2", "zero3"])
def test_masks_do_not_depend_on_ranks_stages_or_stops(name: str, trained: Path) -> None:
    assert digest(trained / name) == digest(trained / "whole")
    exact = name == "stopped"
    # Two ranks and smaller micro-batches add in another order.
    expected = losses(trained / "whole")
    assert losses(trained / name) == (expected if exact else pytest.approx(expected, rel=1e-4))
    if exact:
        for kind in ("validation", "test"):
            assert rows(trained / name, kind) == rows(trained / "whole", kind)
        ours, theirs = (load_weights(path / f"checkpoints/step-{STEPS:06}") for path in (
            trained / name, trained / "whole"))  # fmt: skip
        for key, weight in theirs.items():
            assert torch.equal(ours[key], weight), key


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["stopped", "zero3"])
def test_the_masks_are_those_of_w_which_is_learned_until_the_switch(
    name: str, trained: Path
) -> None:
    learned = patterns(trained / name)
    before, at, *after = (learned[step] for step in (*STOPS, STEPS))
    state, _ = load_state(trained / name / "checkpoints" / f"step-{STOPS[1]:06}")
    assert state.masks is not None
    for mask, weight in zip(state.masks, at, strict=True):
        assert torch.equal(mask, sat_pattern(weight, DENSITY))
    assert not torch.equal(at[0], before[0])
    for later in after:
        assert all(torch.equal(*pair) for pair in zip(later, at, strict=True))


@pytest.mark.ranks
def test_the_log_has_the_pattern_loss_and_the_halved_rate(trained: Path) -> None:
    for row in rows(trained / "whole", "train"):
        dense = row["step"] <= STOPS[1]
        assert ("pattern_loss" in row) is dense
        if not dense:
            assert row["lr"] == 0.5e-2  # half of the tiny recipe's peak
    learned = [row["pattern_loss"] for row in rows(trained / "whole", "train")[: STOPS[1]]]
    assert learned[-1] < learned[0]
    events = b"".join(path.read_bytes() for path in (trained / "whole").glob("events.*"))
    for name in (b"train/pattern_loss", b"check/skewness_layer1", b"mask/layer1"):
        assert name in events


@pytest.mark.ranks
def test_pooled_maps_have_the_skewness_of_token_level_maps_on_any_ranks(trained: Path) -> None:
    whole, one, two = (
        rows(trained / run, "check")[:3] for run in ("whole", "block", "split_block")
    )
    for token, block, split in zip(whole, one, two, strict=True):
        # Probabilities are float32, and so is the token-level mean map.
        assert block["skewness"] == pytest.approx(token["skewness"], rel=1e-5)
        # Weights that were learned with sums in another order.
        assert split["skewness"] == pytest.approx(token["skewness"], rel=1e-3)
    assert one[1]["distance"] == pytest.approx(two[1]["distance"], rel=1e-3)
    assert one[1]["distance"] != pytest.approx(whole[1]["distance"], rel=1e-3)
    learned = patterns(trained / "split_block")[4]
    state, _ = load_state(trained / "split_block" / "checkpoints" / "step-000004")
    assert state.switch_step == 3
    assert state.masks is not None
    for mask, weight in zip(state.masks, learned, strict=True):
        assert torch.equal(mask, sat_pattern(weight, DENSITY))


@pytest.mark.gpu
@pytest.mark.ranks
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_gpus_pooled_maps_have_the_skewness_of_token_level_maps(tmp_path: Path) -> None:
    short = [*SAT, "transition.max_dense_steps=3", "training.micro_batch_size=2"]
    sessions = [
        {"run_name": name, "overrides": [*short, f"transition.resolution={name}"], "stop_at": 4}
        for name in ("token", "block")
    ]
    drive("torchrun", min(2, torch.cuda.device_count()), sessions, tmp_path, gpu=True)
    token, block = (rows(tmp_path / "runs" / run, "check") for run in ("token", "block"))
    assert len(token) == len(block) == 3
    for expected, found in zip(token, block, strict=True):
        # Gradients are summed in no fixed order, so the second check sees slightly other weights.
        assert found["skewness"] == pytest.approx(expected["skewness"], rel=1e-3)


def test_a_restarted_optimizer_is_a_new_one() -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(6, 3, 5, generator=generator)
    weight = torch.nn.Parameter(torch.randn(3, 5, generator=generator))
    optimizer = torch.optim.AdamW([weight], lr=1e-2)

    def steps(optimizer: torch.optim.Optimizer, parameter: Tensor, number: slice) -> None:
        for gradient in gradients[number]:
            parameter.grad = gradient.clone()
            optimizer.step()

    steps(optimizer, weight, slice(0, 3))
    kept = list(optimizer.state[weight].values())
    restart(optimizer)
    assert all(a is b for a, b in zip(optimizer.state[weight].values(), kept, strict=True))
    assert weight.grad is not None
    assert not weight.grad.any()
    other = torch.nn.Parameter(weight.detach().clone())
    steps(optimizer, weight, slice(3, 6))
    steps(torch.optim.AdamW([other], lr=1e-2), other, slice(3, 6))
    assert torch.equal(weight, other)
