"""Faults put into training: what the user is told, and what the run is when it goes on.

Several sessions run in one process group where the fault leaves the processes alive.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spion_ds.distributed.heartbeat import LOST_RANK_EXIT, _Judge
from spion_ds.errors import CheckpointError
from spion_ds.training.checkpoints.files import (
    check_whole,
    find_checkpoint,
    prune_checkpoints,
    publish,
    write_manifest,
)
from tests.training.launching import (
    LIMIT_SECONDS,
    TINY,
    command,
    digest,
    launch,
    losses,
    rows,
    session,
    start_ranks,
    summary,
)

FAULTY = Path(__file__).parent / "faulty.py"
SAVE_OFTEN = "training.checkpoint_every=2"
KEEP_MANY = "training.keep_checkpoints=10"


def plan(folder: Path, sessions: list[dict[str, Any]], name: str = "plan") -> Path:
    path = folder / f"{name}.json"
    path.write_text(json.dumps([session(folder, **values) for values in sessions]))
    return path


def endings(folder: Path, ranks: int, sessions: list[dict[str, Any]]) -> list[list[str]]:
    """Run the sessions in one process group and return how each ended, on each rank."""
    path = plan(folder, sessions)
    launch([*command("torchrun", ranks), str(FAULTY), str(path)], folder)
    texts = [path.with_suffix(f".{rank}").read_text().splitlines() for rank in range(ranks)]
    return [[json.loads(line) for line in session] for session in zip(*texts, strict=True)]


def fails(folder: Path, ranks: int, values: dict[str, Any]) -> tuple[list[int], str]:
    """Run one session of its own processes; return exit codes and output.

    A rank that the fault froze is killed when the others have ended.
    """
    path, log = plan(folder, [values]), folder / "log.txt"
    processes = start_ranks(ranks, [str(FAULTY), str(path)], folder, log)
    frozen = values["fault"]["rank"]
    try:
        for rank, process in enumerate(processes):
            if rank != frozen:
                process.wait(LIMIT_SECONDS)
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes], log.read_text()


@pytest.mark.ranks
def test_faults_that_all_ranks_survive(tmp_path: Path) -> None:
    nan = {"kind": "nan", "place": "loss", "rank": 1}
    full = {"kind": "full", "place": "write", "rank": 0}
    stop = {"kind": "terminate", "place": "step", "rank": 1, "at": 4}
    masks = {"kind": "other", "place": "layouts", "rank": 1, "at": 2}
    nan_map = {"kind": "nan", "place": "map", "rank": 0, "at": 3}  # layer 0's, of step 4
    skip = ["training.on_nonfinite=skip"]
    often = [SAVE_OFTEN, KEEP_MANY]
    rarely = ["training.log_every=100"]
    tiny = str(TINY)
    sessions: list[dict[str, Any]] = [
        {"run_name": "whole"},
        {"run_name": "nan", "fault": {**nan, "at": 3}, "overrides": often},
        {"run_name": "skip", "fault": {**nan, "at": 3}, "overrides": skip},
        {"run_name": "skips", "fault": {**nan, "at": 1, "times": 99}, "overrides": skip},
        {"run_name": "full", "fault": {**full, "at": 3}, "overrides": often, "stage": 2},
        {"resume": str(tmp_path / "runs" / "full"), "stage": 2},
        {"run_name": "stop", "resume": "auto", "recipe": tiny, "fault": stop, "overrides": rarely},
        {"run_name": "stop", "resume": "auto", "recipe": tiny},
        {"run_name": "masks", "fault": masks},
        {"run_name": "map", "fault": nan_map},
        {"run_name": "skipmap", "fault": nan_map, "overrides": skip},
        {"run_name": "stop", "resume": "auto", "recipe": tiny},
    ]
    found = endings(tmp_path, 2, sessions)
    whole, nan_stop, skipped, skips, disk, gone_on, stopped, resumed, other_masks = found[:9]
    map_stop, map_skipped, again = found[9:]
    runs = tmp_path / "runs"

    assert whole == gone_on == resumed == skipped == ["finished"] * 2
    for ending in nan_stop:
        assert ending.startswith("TrainingError: step 3 (dense phase): the loss and classifier")
    assert (runs / "nan" / "checkpoints" / "latest").read_text() == "step-000002"
    for ending in skips:
        assert ending.startswith("TrainingError: step 11")

    assert [row["step"] for row in rows(runs / "skip", "skipped")] == [3]
    assert sorted(losses(runs / "skip")) == [1, 2, *range(4, 13)]
    assert summary(runs / "skip")["phase"] == "sparse"

    assert disk[0] == disk[1]
    assert disk[0].startswith("CheckpointError: a checkpoint cannot be written to")
    assert "No space left on device" in disk[0]
    assert not list((runs / "full" / "checkpoints").glob(".incomplete*"))
    assert digest(runs / "full") == digest(runs / "whole")

    # Asked in step 4, stopped after it, although no row of the log was due.
    assert stopped == ["Stopped: "] * 2
    undisturbed = losses(runs / "whole")
    assert sorted(losses(runs / "stop")) == list(range(4, 13))
    assert all(losses(runs / "stop")[step] == undisturbed[step] for step in range(5, 13))

    # Finished, it is left alone.
    assert again == ["finished"] * 2
    assert len(rows(runs / "stop", "test")) == 1
    assert len(list((runs / "stop").glob("events.*"))) == 2

    for ending in other_masks:
        assert ending.startswith("TrainingError: step 6: the layouts of rank(s) 1 differ")

    for ending in map_stop:
        assert ending.startswith("TrainingError: step 4: rank 0 could not decide")
        assert "the map of layer 0 has NaN" in ending
    # Looking changes nothing, so a look that is left out does not either.
    assert map_skipped == ["finished"] * 2
    assert [row["step"] for row in rows(runs / "skipmap", "skipped")] == [4]
    assert losses(runs / "skipmap") == undisturbed


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("kind", "place", "expected"),
    [
        ("kill", "broadcast", "rank 1 gave no more signs of life; the last: rank 1 at step"),
        ("freeze", "step", "rank 1 gave no more signs of life; the last: rank 1 at step"),
        ("hang", "step", "rank 1 did not move for 2 s: rank 1 at step"),
        ("crash", "step", "rank 1 failed: RuntimeError: a fault was put here"),
    ],
)
def test_a_lost_rank_is_named_and_the_others_end(
    kind: str, place: str, expected: str, tmp_path: Path
) -> None:
    fault = {"kind": kind, "place": place, "rank": 1, "at": 2}
    values = {"run_name": "r", "fault": fault, "overrides": ["training.rank_timeout_seconds=2"]}
    codes, output = fails(tmp_path, 2, values)
    assert codes[0] == LOST_RANK_EXIT, output
    assert f"error: {expected}" in output, output


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (1, "rank 1 gave no more signs of life; the last: rank 1 at step "),
        (0, "rank 0 is gone or does not answer"),
    ],
)
def test_a_dead_rank_is_missed_though_no_collective_fails(
    rank: int, expected: str, tmp_path: Path
) -> None:
    # So it is with NCCL. The ranks' timeout is far above the test's.
    fault = {"kind": "kill", "place": "step", "rank": rank, "at": 2, "others": "hang"}
    codes, output = fails(tmp_path, 2, {"run_name": "r", "fault": fault})
    assert codes[1 - rank] == LOST_RANK_EXIT, output
    assert f"error: {expected}" in output, output


@pytest.mark.ranks
def test_torchrun_brings_back_a_killed_rank_by_itself(tmp_path: Path) -> None:
    # The 8th step of a process: once. From the checkpoint of step 6 there are six to go.
    fault = {"kind": "kill", "place": "step", "rank": 1, "at": 8}
    auto = {"run_name": "r", "resume": "auto", "recipe": str(TINY), "overrides": [SAVE_OFTEN]}
    path = plan(tmp_path, [{**auto, "fault": fault}])
    start = [*command("torchrun", 2), "--max_restarts=1", str(FAULTY), str(path)]
    result = launch(start, tmp_path)
    assert "resumed from step-000006" in result.stdout
    run = tmp_path / "runs" / "r"
    assert sorted(losses(run)) == list(range(1, 13))
    assert summary(run)["phase"] == "sparse"


def save(root: Path, step: int, best_step: int | None = None) -> Path:
    """Make a checkpoint's folder with files of any content."""
    folder, incomplete = root / f"step-{step:06d}", root / "incomplete"
    (incomplete / "optimizer").mkdir(parents=True)
    for name in ("state.pt", "weights.pt", "optimizer/rank0.pt"):
        (incomplete / name).write_bytes(bytes(range(256)))
    write_manifest(incomplete, step, best_step)
    publish(incomplete, folder)
    return folder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[77] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.pt", "weights.pt", "optimizer/rank0.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    damage: Callable[[Path], None], name: str, tmp_path: Path
) -> None:
    first, second, third = (save(tmp_path / "checkpoints", step) for step in (1, 2, 3))
    assert find_checkpoint(tmp_path, checksums=True) == third
    damage(third / name)
    damage(second / "state.pt")
    passed_over: list[str] = []
    assert find_checkpoint(tmp_path, checksums=True, passed_over=passed_over) == first
    assert [str(third / name) in passed_over[0], str(second) in passed_over[1]] == [True, True]
    with pytest.raises(CheckpointError, match=f"{third}.*the one before it is step-000002"):
        find_checkpoint(third, checksums=True)
    damage(first / "weights.pt")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        find_checkpoint(tmp_path, checksums=True)


def test_the_newest_checkpoints_and_their_best_are_kept(tmp_path: Path) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 5)):
        save(tmp_path, step, best)
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == [
        "step-000002",
        "step-000004",
        "step-000005",
    ]
    # Gone on from step 2: what came after it is another attempt's, and stays until replaced.
    save(tmp_path, 3, 2)
    prune_checkpoints(tmp_path, keep=1)
    assert (tmp_path / "latest").read_text() == "step-000003"
    check_whole(tmp_path / "step-000003", checksums=True)
    assert (tmp_path / "step-000005").is_dir()


def test_of_a_linked_checkpoint_the_link_alone_is_removed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for step in (1, 2, 3):
        save(tmp_path / "r", step)
    shutil.move(tmp_path / "r" / "step-000001", elsewhere)
    (tmp_path / "r" / "step-000001").symlink_to(elsewhere)
    prune_checkpoints(tmp_path / "r", keep=1)
    assert [path.name for path in (tmp_path / "r").glob("step-*")] == ["step-000003"]
    check_whole(elsewhere, checksums=True)


def test_pruning_leaves_what_is_no_checkpoint_of_the_runs(tmp_path: Path) -> None:
    (tmp_path / "step-000001").write_text("a plain file")
    (tmp_path / "step-000002-copy").mkdir()
    (tmp_path / "step-000003").symlink_to("nowhere")
    save(tmp_path, 4)
    save(tmp_path, 5)
    prune_checkpoints(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-000001",
        "step-000002-copy",
        "step-000003",
        "step-000005",
    ]


def test_a_rank_that_waits_for_a_hung_one_is_not_named_though_it_stopped_first() -> None:
    judge = _Judge(world_size=2, limit=2, timeout=2.0)
    # Rank 0 waits in a collective operation, a poll before rank 1 hangs outside of one.
    moves = [(1, 1), (2, 1), (2, 2), (2, 2), (2, 2)]
    verdicts = [
        judge.verdict([[beat, first, 1, "waiting", True], [beat, second, 1, "hanging", False]])
        for beat, (first, second) in enumerate(moves, start=1)
    ]
    assert verdicts == [None] * 4 + ["rank 1 did not move for 2 s: rank 1 at step 1, hanging"]
