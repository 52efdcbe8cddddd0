"""A user's mistake is one clear error before training starts, and touches no file."""

from __future__ import annotations

import importlib.util
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spion_ds.distributed.process_group import discover_ranks
from spion_ds.errors import CheckpointError
from spion_ds.training.checkpoints.checkpoint import check_harmless
from spion_ds.training.checkpoints.files import find_checkpoint, write_manifest
from tests.hostile_files import Executes
from tests.training.launching import ROOT, TINY, TRAIN, command, drive, launch, session

FAULTY = Path(__file__).parent / "faulty.py"


def run_script(script: str, *words: object) -> int:
    """Call a launch script's main in this process with a command line; return its exit code."""
    path = ROOT / "launch" / f"{script}.py"
    spec = importlib.util.spec_from_file_location(f"launch_{script}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before, sys.argv = sys.argv, [str(path), *map(str, words)]
    try:
        return module.main()
    finally:
        sys.argv = before


def files_below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        monkeypatch.delenv(name, raising=False)


def assert_refused(capsys: pytest.CaptureFixture[str], words: list[object], *expected: str) -> None:
    before = files_below(Path.cwd())
    assert run_script("train", *words) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    for text in expected:
        assert text in error, error
    assert files_below(Path.cwd()) == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--recipe", "listop"], ["recipe 'listop'", "did you mean 'listops'", "listops_small"]),
        (["--recipe", "missing.yaml"], ["missing.yaml"]),
        (["task=listop"], ["task 'listop'", "did you mean 'listops'"]),
        (["training.stepz=3"], ["training.stepz", "did you mean 'training.steps'"]),
        (["trainning.steps=3"], ["trainning.steps", "did you mean 'training.steps'"]),
        (["data.min_len=3"], ["data.min_len", "data.min_length"]),
        (["training.steps"], ["section.key=value"]),
        (["training.steps=many"], ["training.steps", "'many'", "whole number"]),
        (["training.steps=0"], ["training.steps", "from 1 up"]),
        (["sparse_attention.alpha=1.2"], ["sparse_attention.alpha", "1.2", "between 0 and 1"]),
        (["sparse_attention.block=48"], ["sparse_attention.block", "48", "16, 32, 64 or 128"]),
        (["sparse_attention.density=0"], ["sparse_attention.density", "0", "above 0"]),
        (
            ["sparse_attention.density=0.05", "sparse_attention.variant=c"],
            ["sparse_attention.density", "0.05", "0.125 (the diagonal of 8×8 blocks"],
        ),
        (["sparse_attention.density=1.5"], ["sparse_attention.density", "1.5"]),
        (["sparse_attention.filter_size=30"], ["filter_size", "30", "odd"]),
        (["sparse_attention.variant=fc"], ["variant 'fc'", "known: budget, c, cf, f"]),
        (["sparse_attention.mode=bigbrd"], ["mode", "bigbrd", "dense", "spion"]),
        (
            ["data.sequence_length=64", "data.max_length=60", "sparse_attention.block=128"],
            ["sparse_attention.block", "128", "at most the sequence length, 64"],
        ),
        (["model.heads=0"], ["model.heads", "from 1 up"]),
        (["model.dropout=1"], ["model.dropout", "not including, 1"]),
        (["optimizer.lr=-1"], ["optimizer.lr", "-1", "above 0"]),
        (["optimizer.warmup_steps=1000"], ["optimizer.warmup_steps", "1000", "training.steps"]),
        (["transition.rule=distanse"], ["transition.rule", "did you mean 'distance'"]),
        (["transition.resolution=tokens"], ["transition.resolution", "did you mean 'token'"]),
        (["data.sequence_length=2097152"], ["resolution=token", "GiB", "resolution=block"]),
        (["transition.rule=fixed"], ["transition.switch_step is missing"]),
        (["transition.switch_step=5"], ["transition.switch_step", "distance rule"]),
        (["transition.max_dense_steps=12"], ["transition.max_dense_steps", "12", "1 to 11"]),
        (["training.batch_size=7", "training.micro_batch_size=2"], ["batch of 7", "multiple"]),
        (["training.batch_size=65"], ["training.batch_size", "65", "64"]),
        (["training.on_nonfinite=ignore"], ["training.on_nonfinite", "ignore", "skip, stop"]),
        (["training.rank_timeout_seconds=0"], ["rank_timeout_seconds", "0", "1 to 86400"]),
        (["training.precision=fp64"], ["training.precision", "fp64", "fp32"]),
        (["data.train=0"], ["data.train", "0"]),
        (["data.source=nowhere"], ["nowhere"]),
        (["--if_taken", "error", "--stop_at", "0"], ["--stop_at", "0"]),
        (["--ds_config", "nowhere.json"], ["nowhere.json"]),
        (["--run_name", ""], ["--run_name is ''", "a folder's name"]),
        (["--run_name", "../r"], ["--run_name is '../r'", "a folder's name"]),
        (["--run_name", "/r"], ["--run_name is '/r'", "a folder's name"]),
        (["recipe=a/b"], ["--run_name is 'a/b'", "a folder's name"]),
        (["=3"], ["'=3'", "section.key=value"]),
        (["training=3"], ["unknown key 'training'"]),
        (["training.steps.a=3"], ["training.steps.a", "did you mean 'training.steps'"]),
        (["training.steps=true"], ["training.steps is True", "a whole number"]),
        (["training.steps=99999999999999"], ["training.steps", "below 2^31"]),
        (["training.seed=[1"], ["training.seed=[1", "not YAML"]),
        (["training.seed=!!python/object/apply:os.getpid []"], ["not YAML"]),
        (["optimizer.lr=.inf"], ["optimizer.lr is inf", "a finite number"]),
        (["optimizer.lr=.nan"], ["optimizer.lr is nan", "a finite number"]),
        (["optimizer.lr=1e999"], ["optimizer.lr is '1e999'", "a finite number"]),
        (["optimizer.betas=[0.9, 1.5]"], ["optimizer.betas", "1.5"]),
        (["task=null"], ["unknown task"]),
        (["data={a: 1}"], ["unknown key 'data'"]),
        (["--resume"], ["there is no checkpoint in", "--resume"]),
        (["--resume", "nowhere"], ["there is no checkpoint in nowhere"]),
    ],
    ids=lambda value: "-".join(map(str, value))[:50] if isinstance(value, list) else None,
)
def test_command_line_and_recipe_mistakes(
    words: list[object], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--recipe", TINY] if "--recipe" not in words else []
    assert_refused(capsys, [*given, *words], *expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", ["not a YAML mapping"]),
        (b"- 1\n", ["not a YAML mapping"]),
        (b"training: {steps: 3", ["not YAML", "line 1, column 20"]),
        (b"training: {steps: 3}\ntraining: {steps: 4}\n", ["'training' is there twice", "line 2"]),
        (b"a: !!python/object/apply:os.mkdir [x]\n", ["not YAML", "python/object", "line 1"]),
        (b"task: &t [*t]\n", ["unknown task"]),
        (bytes(range(256)), ["not text in UTF-8 (byte 128)"]),
        ("task: listops".encode("utf-16"), ["not text in UTF-8"]),
        (b"[" * 100_000, ["not YAML"]),
        (b"training: {steps: 3}\n", ["names no task"]),
        (b"task: listops\ntraining: [1]\n", ["training is [1]", "mapping"]),
        (b"5: {a: 1}\n", ["unknown key 5"]),
    ],
    ids=lambda value: None if isinstance(value, list) else repr(value[:30]),
)
def test_recipe_files(
    content: bytes, expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert_refused(capsys, ["--recipe", "recipe.yaml"], *expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is refused on a CPU only")
def test_fp16_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(
        capsys, ["--recipe", TINY, "training.precision=fp16"], "fp16", "CPU", "fp32 or bf16"
    )


def test_batch_that_does_not_divide_over_the_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert discover_ranks().world_size == 3
    assert_refused(capsys, ["--recipe", TINY], "batch of 8 does not divide", "3 rank(s)")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"sparse_attention": {"blok": 16}}, ["blok", "did you mean 'sparse_attention.block'"]),
        ({"sparse_attention": {"mode": "fix"}}, ["mode 'fix'", "did you mean 'fixed'"]),
        ({"sparse_attention": {"mode": "fixed", "alpha": 0.9}}, ["alpha", "belongs to spion"]),
        ({"sparse_attention": [1]}, ["sparse_attention", "mapping"]),
        ({"sparse_atention": {"block": 16}}, ["sparse_atention", "sparse_attention"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage", "4", "0, 1, 2 or 3"]),
        ({"zero_optimization": 2}, ["zero_optimization is 2", "mapping"]),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer", "stage 0", "stage 1 or 2 or 3"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            ["offload_param", "stage 2", "allowed: stage 3"],
        ),
        ({"activation_checkpointing": {}}, ["model.activation_checkpointing=true"]),
        ({"scheduler": {"type": "OneCycle"}}, ["scheduler", "recipe"]),
        ({"train_batch_size": 16}, ["train_batch_size is 16", "training.batch_size is 8"]),
        ({"train_micro_batch_size_per_gpu": 3}, ["batch of 8 does not divide"]),
        ({"gradient_accumulation_steps": "two"}, ["gradient_accumulation_steps", "two"]),
        ({"optimizer": {"params": {"lr": 1}}}, ["optimizer has no type"]),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, ["lr is 1.0", "optimizer.lr"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled", "training.precision"]),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, ["reduce_bucket_size", "auto"]),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            ["offload_optimizer.device is 'nvme'", "'cpu' or 'none'"],
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": [1]}},
            ["offload_optimizer is [1]", "allowed: a mapping"],
        ),
        ({"zero_optimization": {"stge": 2}}, ["DeepSpeed refuses", "stge is 2", "ZeroConfig"]),
        ({"zero_optimisation": {}}, ["zero_optimisation", "did you mean 'zero_optimization'"]),
        ({"steps_per_prnt": 5}, ["steps_per_prnt", "did you mean 'steps_per_print'"]),
        ({"gradient_clipping": "a"}, ["gradient_clipping is 'a'", "from 0 up"]),
        ({"gradient_clipping": 1.0}, ["gradient_clipping is 1.0", "optimizer.clip_value=null"]),
        ({"wandb": {"enabled": True}}, ["wandb is enabled", "cannot be imported"]),
        ({"comet": {"enabled": True}}, ["comet is enabled", "cannot be imported"]),
        ({"optimizer": {"type": "AdamZ"}}, ["'AdamZ'", "'AdamW' or 'Adam'"]),
        ({"optimizer": {"type": "AdamW", "params": [1]}}, ["optimizer.params is [1]", "mapping"]),
        ({"fp16": "yes"}, ["fp16.enabled is 'yes'"]),
    ],
    ids=lambda value: json.dumps(value)[:50] if isinstance(value, dict) else None,
)
def test_deepspeed_configuration_mistakes(
    config: dict[str, Any],
    expected: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert_refused(capsys, ["--recipe", TINY, "--ds_config", "ds.json"], *expected)


@pytest.mark.ranks
def test_what_deepspeed_stumbles_on_while_it_trains_is_refused_before_there_is_a_run(
    tmp_path: Path,
) -> None:
    faults: list[tuple[dict[str, Any], str]] = [
        ({"optimizer": {"type": "AdamW", "params": {"foo": 1}}}, "argument 'foo'"),
        ({"steps_per_print": 0}, "% self.steps_per_print() == 0"),
        ({"gradient_predivide_factor": 0}, "division by zero"),
        ({"data_types": {"grad_accum_dtype": "fp99"}}, "'fp99' is not a valid DtypeEnum"),
        ({"zero_optimization": {"stage": 3}, "data_types": {"grad_accum_dtype": 9}}, "9 is not"),
    ]
    sessions = []
    for number, (config, _) in enumerate(faults):
        path = tmp_path / f"ds{number}.json"
        path.write_text(json.dumps(config))
        sessions.append(session(tmp_path, ds_config=str(path)))
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(sessions))
    launch([*command("python", 1), str(FAULTY), str(plan)], tmp_path)
    endings = [json.loads(line) for line in plan.with_suffix(".0").read_text().splitlines()]
    for ending, (_, expected) in zip(endings, faults, strict=True):
        assert ending.startswith("ConfigError: DeepSpeed cannot train with its configuration: ")
        assert expected in ending
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", ["not JSON"]),
        (b"", ["not JSON"]),
        (b"[1]", ["not a JSON object"]),
        (b"[" * 100_000, ["not JSON"]),
        (b'{"fp16": {}, "fp16": {}}', ["the key 'fp16' is there twice"]),
        (b'{"gradient_clipping": NaN}', ["NaN"]),
        (bytes(range(256)), ["not text in UTF-8 (byte 128)"]),
    ],
    ids=lambda value: None if isinstance(value, list) else repr(value[:30]),
)
def test_deepspeed_files_that_are_no_json_object(
    content: bytes, expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "ds.json").write_bytes(content)
    assert_refused(capsys, ["--recipe", TINY, "--ds_config", "ds.json"], "ds.json", *expected)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (None, ["basic_train.tsv"]),
        ("", ["basic_train.tsv"]),
        ("Question\tAnswer\n( [MAX 1 2 ] )\t2\n", ["basic_train.tsv", "Source"]),
        ("Source\tTarget\n( [MAX 1 2 ] )\t2\n( [MAX 1", ["basic_train.tsv"]),
    ],
    ids=["missing", "empty", "other-format", "truncated"],
)
def test_official_data_files(
    lines: str | None, expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "official"
    folder.mkdir()
    for split in ("train", "val", "test"):
        (folder / f"basic_{split}.tsv").write_text("Source\tTarget\n( [MAX 1 2 ] )\t2\n")
    if lines is None:
        (folder / "basic_train.tsv").unlink()
    else:
        (folder / "basic_train.tsv").write_text(lines)
    assert_refused(capsys, ["--recipe", TINY, f"data.source={folder}"], *expected)


@pytest.mark.ranks
def test_checkpoints_that_do_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    drive("python", 1, [{"run_name": "r", "stop_at": 3}], tmp_path)
    resume: list[object] = ["--recipe", TINY, "--resume", "runs/r"]
    for override, expected in (
        ("model.dim=8", "dim is 16 there and 8 here"),
        ("data.max_length=100", "max_length is 120 there and 100 here"),
        ("sparse_attention.alpha=0.9", "alpha is 0.8 there and 0.9 here"),
        ("training.seed=1", "training.seed=0"),
        ("training.batch_size=16", "training.batch_size=8"),
    ):
        assert_refused(capsys, [*resume, override], "runs/r/checkpoints/step-000003", expected)
    assert_refused(
        capsys,
        [*resume, "training.steps=3", "transition.max_dense_steps=2", "optimizer.warmup_steps=1"],
        "nothing is left to do",
    )

    checkpoint = tmp_path / "runs" / "r" / "checkpoints" / "step-000003"
    saved = tmp_path / "runs" / "r" / "config.yaml"
    text = saved.read_text()
    for content, expected in (
        ("training: {", "config.yaml is not YAML"),
        ("- 1", "config.yaml is not a YAML mapping"),
        ("task: listops\nfoo: 1\n", "unknown key 'foo'"),
    ):
        saved.write_text(content)
        assert_refused(capsys, ["--resume", "runs/r"], expected)
    saved.write_text(text)
    latest = checkpoint.parent / "latest"
    for content in ("", "step-", "../../elsewhere", "step-000099"):
        latest.write_text(content)  # names nothing: the newest whole one is meant
        assert find_checkpoint(tmp_path / "runs" / "r") == checkpoint
    latest.write_text("step-000003")
    manifest = (checkpoint / "manifest.json").read_text()
    for content in ("", "[]", "{}", '{"sha256": 5}', manifest.replace('"step": 3', '"step": 4')):
        (checkpoint / "manifest.json").write_text(content)
        assert_refused(capsys, resume, "manifest.json is damaged", "no checkpoint in")
    (checkpoint / "manifest.json").write_text(manifest)
    # Whole by its checksums, and full of code: it is not run, and the file is named.
    original = (checkpoint / "state.pt").read_bytes()
    for values, expected in (
        (Executes(Path("made-by-a-pickle")), "state.pt is damaged or not a checkpoint"),
        ([1], "state.pt is not a spion_ds checkpoint"),
        ({"format": 1}, "state.pt does not hold a training state"),
        ({"format": 1, "masks": 5, "state": {}, "run": {}}, "does not hold a training state"),
        ({"format": 1, "masks": None, "state": {"x": 1}, "run": {}}, "does not hold a training"),
    ):
        torch.save(values, checkpoint / "state.pt")
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint, 3, None)
        assert_refused(capsys, resume, expected)
    (checkpoint / "state.pt").write_bytes(original)
    (checkpoint / "manifest.json").write_text(manifest)
    whole = (checkpoint / "state.pt").read_bytes()
    (checkpoint / "state.pt").write_bytes(whole[: len(whole) // 2])
    assert_refused(capsys, resume, "state.pt", "damaged", "no checkpoint in")
    (checkpoint / "state.pt").unlink()
    assert_refused(capsys, resume, "step-000003", "state.pt is missing")


@pytest.mark.parametrize("legacy", [False, True])
def test_an_optimizer_file_with_code_in_it_is_not_read(legacy: bool, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-000003"
    checkpoint.mkdir()
    torch.save({"x": torch.ones(2), "scaler": torch.Size([2])}, checkpoint / "a.pt")
    check_harmless(checkpoint)
    values, path = (
        {"x": torch.ones(2), "y": Executes(Path("made-by-a-pickle"))},
        checkpoint / "zero_optim_states.pt",
    )
    torch.save(values, path, _use_new_zipfile_serialization=not legacy)
    before = files_below(tmp_path)
    with pytest.raises(CheckpointError, match=r"zero_optim_states\.pt .* could run code"):
        check_harmless(checkpoint)
    assert files_below(tmp_path) == before


@pytest.mark.ranks
def test_a_run_never_overwrites_another(tmp_path: Path) -> None:
    words = [*command("python", 1), str(TRAIN), "--recipe", str(TINY), "--stop_at", "1"]
    launch(words, tmp_path)
    launch(words, tmp_path)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2"]
    before = files_below(tmp_path / "runs")
    with pytest.raises(AssertionError, match="runs/tiny exists; give another --run_name"):
        launch([*words, "--if_taken", "error"], tmp_path)
    assert files_below(tmp_path / "runs") == before


@pytest.mark.ranks
def test_data_that_a_setting_cannot_read_are_refused_before_the_run_has_a_folder(
    tmp_path: Path,
) -> None:
    # Skyformer's files may have another vocabulary than ours.
    samples = [{"input_ids_0": [16, 2, 3, 15], "label": 2}] * 64
    for split in ("train", "dev", "test"):
        (tmp_path / f"lra-listops.{split}.pickle").write_bytes(pickle.dumps(samples))
    words = [*command("python", 1), str(TRAIN), "--recipe", str(TINY), f"data.source={tmp_path}"]
    with pytest.raises(AssertionError, match=r"training\.augment is True, but data\.source has"):
        launch([*words, "training.augment=true"], tmp_path)
    assert not (tmp_path / "runs").exists()
