"""launch/evaluate.py and stopping by a signal, as a user meets them."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from spion_ds.data.storage.cache import Split
from spion_ds.errors import ConfigError, DataError
from spion_ds.inference.commands import EvaluateOptions, open_model, run_evaluate
from spion_ds.models import load_model
from spion_ds.switching.masks import get_masks
from spion_ds.training import session
from spion_ds.training.checkpoints.checkpoint import TrainingState
from spion_ds.training.config.deepspeed import BatchSizes
from spion_ds.training.trainer import Trainer
from tests.training.launching import (
    LIMIT_SECONDS,
    ROOT,
    TINY,
    TRAIN,
    command,
    drive,
    environment,
    launch,
    losses,
    summary,
)

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the run ``runs/r``, trained at ZeRO stage 3."""
    folder = tmp_path_factory.mktemp("trained")
    drive("python", 1, [{"run_name": "r", "stage": 3}], folder)
    return folder


def test_evaluate_reports_what_training_reported(trained: Path) -> None:
    run = trained / "runs" / "r"
    agreements = set()
    for launcher, ranks in (("python", 1), ("torchrun", 2)):
        words = [*command(launcher, ranks), str(ROOT / "launch" / "evaluate.py"), str(run)]
        out = launch([*words, "--compare", "dense"], trained).stdout
        best = summary(run)["best_step"]
        assert f"phase        sparse, step {best}" in out
        assert f"test accuracy {summary(run)['test_accuracy']:.2%} of 22 samples" in out
        for word in ("density", "tokens/s", "majority class", "root operator only"):
            assert word in out
        table = {line[:13].strip(): line[13:].split() for line in out.splitlines()}
        assert table["attention"] == ["sparse", "dense"]
        assert table["accuracy"][0] == f"{summary(run)['test_accuracy']:.2%}"
        for row in ("loss", "seconds", "tokens/s", "RAM, peak"):
            assert len(table[row]) >= 2
        agreements.add(re.search(r"predictions agree on ([\d.]+%)", out)[1])
    assert len(agreements) == 1  # whatever the number of ranks


def test_a_checkpoint_opens_where_its_run_could_not_train(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    shutil.copytree(trained / "runs" / "r", run)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["training"].update(precision="fp16", cuda_graph=True, micro_batch_size=2)
    # Of four ranks with a GPU each.
    config["deepspeed"] = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    opened = open_model(run)
    assert opened.step == summary(run)["best_step"]
    assert opened.batch_size == 8  # what a rank took at once when the checkpoint was written


def test_an_exported_model_predicts_what_its_checkpoint_does(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("safetensors")
    run, model, inputs = trained / "runs" / "r", tmp_path / "model", tmp_path / "inputs"
    inputs.write_text("[MAX 2 [MIN 7 3 ] ]\n\n11 3 4 15\n5\n")
    run_evaluate(EvaluateOptions(run, export=model))
    loaded = load_model(model)
    assert get_masks(loaded, loaded.sizes["max_length"]) is not None

    def predictions(*options: Any, **named: Any) -> list[dict]:
        capsys.readouterr()
        run_evaluate(EvaluateOptions(*options, **named))
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    of_model = predictions(model, input=str(inputs), batch_size=2)
    assert [row["line"] for row in of_model] == [1, 3, 4]
    for row in of_model:
        assert sum(row["probabilities"]) == pytest.approx(1.0, abs=1e-5)  # six decimals each
        assert row["label"] == int(np.argmax(row["probabilities"]))
    assert predictions(run, input=str(inputs), batch_size=2) == of_model
    monkeypatch.setattr("sys.stdin", io.StringIO(inputs.read_text()))
    assert [row["label"] for row in predictions(model, input="-", batch_size=1)] == [
        row["label"] for row in of_model
    ]

    inputs.write_text("5\n[MAX 2 x ]\n")
    capsys.readouterr()
    with pytest.raises(DataError, match="inputs, line 2: 'x' is no token"):
        run_evaluate(EvaluateOptions(model, input=str(inputs)))
    assert capsys.readouterr().out == ""  # a bad line is found before the first prediction
    for options, message in (
        ({"export": trained}, "exists and is not empty"),
        ({"input": str(tmp_path / "none")}, "is not a file"),
        ({"input": str(inputs), "compare": "dense"}, "allowed: one of them"),
        ({"batch_size": 0}, "--batch_size is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_evaluate(EvaluateOptions(model, **options))


def test_a_signal_ends_the_run_with_a_checkpoint_that_resumes(tmp_path: Path) -> None:
    drive("python", 1, [{"run_name": "whole"}], tmp_path)
    words = [*command("torchrun", 2), str(TRAIN), "--recipe", str(TINY), "--run_name", "r"]
    # Long enough that the signal comes before the end.
    words += ["training.steps=100000", "training.evaluate_every=100000"]
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "runs" / "r" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and losses(metrics.parent)):
        pass
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=LIMIT_SECONDS)
    assert "go on with --resume" in out, out
    stopped = max(losses(metrics.parent))
    assert (metrics.parent / "checkpoints" / "latest").read_text() == f"step-{stopped:06d}"


def test_the_last_test_moves_for_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[int] = []
    trainer: Any = Trainer.__new__(Trainer)
    trainer.watch, trainer.state = SimpleNamespace(tick=ticks.append), TrainingState(step=12)
    cpu = torch.device("cpu")
    ranks: Any = SimpleNamespace(rank=0, world_size=1, is_first=False, device=cpu)
    ids, ones = np.ones((6, 4), np.uint8), np.ones(6, np.int64)
    dataset: Any = SimpleNamespace(test=Split(ids, ones, ones))
    config: Any = SimpleNamespace(batches=BatchSizes(total=2, micro=2))
    model = lambda input_ids, padding_mask: torch.zeros(len(input_ids), 10)  # noqa: E731
    monkeypatch.setattr(session, "find_checkpoint", lambda *_: Path())
    monkeypatch.setattr(session, "load_checkpoint_model", lambda *_: model)
    session._sum_up(trainer, config, dataset, ranks, Path())
    assert ticks == [12, 12, 12]
