"""A rule that looks at maps waits, where told to, for a model that is better than the majority."""

from __future__ import annotations

from pathlib import Path

import pytest

from spion_ds.data.baselines import majority_baseline
from spion_ds.data.storage.cache import open_cache
from spion_ds.errors import ConfigError
from spion_ds.training.config.sections import TransitionConfig
from tests.training.launching import drive, losses, rows

GAIN = 5.0
# The distance rule fires at its third look, were it not for the wait; short expressions, whose
# operator alone says enough, are learned within some steps.
EAGER = [
    *("transition.check_every=1", "transition.threshold_percent=100"),
    *("transition.max_dense_steps=null", "training.steps=28", "training.evaluate_every=4"),
    *("data.min_length=5", "data.max_length=24", "data.max_depth=3", "data.sequence_length=32"),
    *("data.train=2000", "data.validation=100", "training.batch_size=32", "optimizer.lr=2e-2"),
    *(
        "model.dim=32",
        "model.dropout=0",
        "model.attention_dropout=0",
        "sparse_attention.filter_size=3",
    ),
]


@pytest.mark.parametrize(
    ("config", "accuracy", "waits"),
    [
        (TransitionConfig(), 0.0, False),
        (TransitionConfig(min_gain_percent=2.0), -1.0, True),
        (TransitionConfig(min_gain_percent=2.0), 0.519, True),
        (TransitionConfig(min_gain_percent=2.0), 0.521, False),
        (TransitionConfig(rule="skewness", min_gain_percent=2.0), 0.519, True),
        (TransitionConfig(rule="fixed", switch_step=9, min_gain_percent=2.0), 0.519, False),
    ],
)
def test_rules_that_look_at_maps_wait_for_the_gain(
    config: TransitionConfig, accuracy: float, waits: bool
) -> None:
    assert config.holds(accuracy, 0.5) is waits


@pytest.mark.ranks
def test_the_switch_comes_when_the_model_has_learned(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    waiting = [*EAGER, f"transition.min_gain_percent={GAIN}"]
    sessions = [
        {"run_name": "at_once", "overrides": EAGER, "stop_at": 4},
        {"run_name": "forced", "overrides": [*waiting, "transition.max_dense_steps=4"]},
        {"run_name": "waits", "overrides": waiting},
    ]
    drive("python", 1, sessions, tmp_path)
    [at_once], [forced], [switch] = (
        rows(runs / name, "switch") for name in ("at_once", "forced", "waits")
    )
    assert (at_once["step"], at_once["forced"]) == (3, False)
    assert (forced["step"], forced["forced"]) == (4, True)

    [folder] = (path for path in (tmp_path / "data").iterdir() if path.is_dir())
    data = open_cache(folder)
    enough = majority_baseline(data.train, data.validation) + GAIN / 100.0
    learned = [
        row["step"] for row in rows(runs / "waits", "validation") if row["accuracy"] > enough
    ]
    # A look comes before the evaluation of its step; the model did not know it all from the start.
    assert switch["step"] == learned[0] + 1 > 3
    assert not switch["forced"]

    # That it has learned is remembered.
    resumed = [
        {"run_name": "stopped", "overrides": waiting, "stop_at": learned[0]},
        {"resume": str(runs / "stopped")},
    ]
    drive("python", 1, resumed, tmp_path)
    assert losses(runs / "stopped") == losses(runs / "waits")
    assert rows(runs / "stopped", "switch") == [switch]


@pytest.mark.ranks
def test_a_gain_that_no_model_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"min_gain_percent is 95.0; allowed: below"):
        drive("python", 1, [{"overrides": [*EAGER, "transition.min_gain_percent=95"]}], tmp_path)
    assert not (tmp_path / "runs").exists()


def test_only_a_rule_that_waits_needs_a_gain_that_can_be_had() -> None:
    # All of a few validation samples may be of one class.
    TransitionConfig().check_gain(1.0)
    TransitionConfig(rule="fixed", switch_step=9, min_gain_percent=2.0).check_gain(1.0)
    TransitionConfig(min_gain_percent=2.0).check_gain(0.97)
    with pytest.raises(ConfigError, match=r"min_gain_percent is 2.0; allowed: below 1.5, or 0"):
        TransitionConfig(min_gain_percent=2.0).check_gain(0.985)
