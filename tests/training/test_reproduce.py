"""launch/reproduce.py: plans, the table, going on, stopping in time."""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from spion_ds.distributed.stopping import Stopped
from spion_ds.errors import ConfigError
from spion_ds.training.config.recipe_files import attention_names
from spion_ds.training.reports.published import published
from spion_ds.training.reports.reproduction import (
    Plan,
    ReproduceOptions,
    _train,
    _words,
    plan_runs,
    read_plan,
    reproduce,
)
from spion_ds.training.reports.results import RunResult, read_result, results_table
from tests.training.launching import ROOT, TINY, TRAIN, summary

SHIPPED = str(ROOT / "launch" / "reproduce.yaml")


def test_the_shipped_plan_is_valid() -> None:
    plan = read_plan(SHIPPED)
    runs = plan_runs(ReproduceOptions(plan, Path("train.py"), run_dir=Path("nowhere")))
    assert set(plan.attentions) == set(attention_names())
    assert len(runs) == len(plan.recipes) * len(plan.attentions) * len(plan.seeds)
    assert len({run.folder for run in runs}) == len(runs)
    modes = {run.attention: run.config.sparse_attention.mode for run in runs}
    assert (modes["dense"], modes["spion-f"], modes["sat"]) == ("dense", "spion", "sat")
    assert "listops-sat-seed2" in [run.folder.name for run in runs]
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_the_command_line_narrows_and_replaces(tmp_path: Path) -> None:
    plan = read_plan(SHIPPED, ["a"], ["bigbird"], [7], ["x=1"])
    assert plan == Plan(("a",), ("bigbird",), (7,), ("x=1",))
    text = "recipes: [b]\noverrides: [y=2]"
    (tmp_path / "plan.yaml").write_text(text)
    plan = read_plan(str(tmp_path / "plan.yaml"), overrides=["x=1"])
    assert plan == Plan(("b",), (), (0,), ("y=2", "x=1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipes: [listops]\nseed: [1]", "unknown key 'seed'.*did you mean 'seeds'"),
        ("recipes: [listops]\nattentions: dense", "attentions is 'dense'"),
        ("seeds: [1]", "no recipes to run"),
        ("recipes: listops", "recipes is 'listops'"),
        ("[1", "is not YAML"),
    ],
)
def test_a_wrong_plan_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_plan(str(tmp_path / "plan.yaml"))


def test_every_configuration_is_checked_before_any_run() -> None:
    for plan, message in (
        (Plan(("listops",), overrides=("model.layer=2",)), r"model\.layer"),
        (Plan(("listops",), ("dense", "bigbrid")), "'bigbrid' .did you mean 'bigbird'"),
        (Plan(("listops",), ("sat", "dense", "sat")), "two runs of the plan would be .*-sat-seed0"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_runs(ReproduceOptions(plan, Path("train.py")))


def test_batches_that_only_a_launchers_ranks_can_take_are_planned(tmp_path: Path) -> None:
    ds_config = tmp_path / "ds.json"
    ds_config.write_text('{"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2}')
    fits, never = ("training.batch_size=64",), ("training.batch_size=40",)
    options = ReproduceOptions(Plan(("listops",), overrides=fits), TRAIN, ds_config=str(ds_config))
    with pytest.raises(ConfigError, match=r"1 rank\(s\) × 2 .* × micro-batch 8"):
        plan_runs(options)
    [run] = plan_runs(dataclasses.replace(options, launcher="torchrun --nproc_per_node 4"))
    assert dataclasses.astuple(run.config.batches) == (64, 8, 2)
    [_] = plan_runs(dataclasses.replace(options, table_only=True))
    plan = Plan(("listops",), overrides=never)
    with pytest.raises(ConfigError, match="a batch of 40 does not divide"):
        plan_runs(dataclasses.replace(options, launcher="srun", plan=plan))


def test_without_a_known_number_of_ranks_the_fewest_steps_accumulate() -> None:
    overrides = ("training.batch_size=64", "training.micro_batch_size=16")
    options = ReproduceOptions(Plan(("listops",), overrides=overrides), TRAIN, launcher="srun")
    [run] = plan_runs(options)
    # So that a limit on accumulation, like that of CUDA graphs, refuses no run that may keep it.
    assert run.config.batches.accumulation == 1


def test_several_ranks_of_it_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    run_dir = tmp_path / "runs"
    with pytest.raises(ConfigError, match=r"started on 4 ranks; .* --launcher"):
        reproduce(ReproduceOptions(Plan(("listops",)), TRAIN, run_dir=run_dir))
    assert not run_dir.exists()


def test_without_attentions_the_recipes_own_is_trained() -> None:
    options = ReproduceOptions(Plan(("listops",)), Path("train.py"))
    [run] = plan_runs(options)
    assert run.folder.name == "listops-seed0"
    assert "--attention" not in _words(run, options)
    assert run.config.sparse_attention.mode == "spion"


def result(name: str, **known: Any) -> RunResult:
    return RunResult(name, "listops", known.pop("step", 10), 10, **known)


def test_the_table_has_means_spreads_and_what_is_missing() -> None:
    groups = {
        ("listops", "cf"): [
            result("a", finished=True, test_accuracy=0.36, switch_step=4, density=0.05),
            result(
                "b",
                finished=True,
                test_accuracy=0.40,
                switch_step=4,
                density=0.05,
                step_seconds={"dense": 0.2, "sparse": 0.1},
                memory_bytes={"dense": 2.0**31, "sparse": 2.0**30},
                baselines={"majority class": 0.173},
            ),
            result("c", step=3),
        ],
        ("listops", "dense"): [result("d", finished=True, test_accuracy=0.38)],
    }
    table = results_table(groups, ["training.precision=bf16"])
    # The sample standard deviation of 36 and 40 is 2.83.
    row = "| listops | cf | 38.00 ± 2.83 | – | 2 of 3 | 4 ± 0 | 5.0 ± 0.0 | 200.0 | 100.0 | 2.00 |"
    assert row in table
    assert "| listops | dense | 38.00 | – | 1 of 1 | – | – | – | – | – | – |" in table
    assert "| majority class | 17.30 | trivial reader" in table
    assert "| c | 3 of 10 |" in table
    assert "All runs with `training.precision=bf16`" in table
    for model, accuracy, source in published("listops"):
        assert f"| {model} | {accuracy} | {source} |" in table
    assert "SPION" not in table  # its own table is not known


def test_published_figures_belong_to_their_task() -> None:
    figures = {(model, accuracy) for model, accuracy, _ in published("pathfinder32")}
    assert ("Transformer", "65.3") in figures
    assert ("BigBird", "74.9") in figures
    assert published("my own task") == []


def test_a_run_is_asked_to_stop_when_time_is_over(tmp_path: Path) -> None:
    waits = [sys.executable, "-c", "import signal; signal.pause()"]
    assert _train(waits, tmp_path / "r", time.monotonic(), lambda: False) is None
    assert _train(waits, tmp_path / "r", None, lambda: True) is None
    fails = [sys.executable, "-c", "print('why'); raise SystemExit(2)"]
    assert _train(fails, tmp_path / "r", None, lambda: False) == 2
    assert "why" in (tmp_path / "r" / "output.log").read_text()


@pytest.mark.ranks
def test_runs_are_made_once_and_what_is_left_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plan, table = Plan((str(TINY),), ("spion-f",)), tmp_path / "results.md"
    options = ReproduceOptions(plan, TRAIN, run_dir=tmp_path, data_dir=tmp_path / "data")

    with pytest.raises(Stopped):
        reproduce(dataclasses.replace(options, minutes=1e-9))
    assert "| tiny-spion-f-seed0 | 0 of 12 |" in table.read_text()

    reproduce(options)
    run = tmp_path / "tiny-spion-f-seed0"
    assert "variant: f\n" in (run / "config.yaml").read_text()
    assert f"| tiny | spion-f | {100 * summary(run)['test_accuracy']:.2f} |" in table.read_text()
    [planned] = plan_runs(options)
    found = read_result(run, planned.config)
    assert found.finished
    assert found.step == 12
    assert found.switch_step == 6

    written = (run / "summary.json").stat().st_mtime_ns
    reproduce(options)
    assert (run / "summary.json").stat().st_mtime_ns == written
    changed = dataclasses.replace(plan, overrides=("training.steps=13",))
    with pytest.raises(ConfigError, match=r"is a finished run with another training\.steps"):
        reproduce(dataclasses.replace(options, plan=changed))
