"""metrics.jsonl, pictures and the end table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from spion_ds.training.reports.pictures import map_picture, mask_picture
from spion_ds.training.reports.run_log import RunLog, seconds_per_step
from spion_ds.training.reports.summary import summary_table


def test_resuming_drops_the_rows_that_are_taken_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path, steps=10, start=0)
    for step in range(1, 6):
        log.row(step, "train", loss=float(step), phase="dense", step_seconds=0.1 * step)
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "ki')  # a crash in the middle of a line
    log = RunLog(tmp_path, steps=10, start=3)
    log.row(4, "train", loss=40.0, phase="sparse", step_seconds=0.01)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["loss"] == 40.0


def test_step_times_leave_out_the_first_row_of_a_phase(tmp_path: Path) -> None:
    log = RunLog(tmp_path, steps=10, start=0)
    for step, seconds in enumerate((9.0, 0.2, 0.3, 0.4), start=1):
        log.row(step, "train", phase="dense", step_seconds=seconds)
    log.row(5, "train", phase="sparse", step_seconds=0.1)
    log.row(6, "validation", phase="sparse", accuracy=1.0)
    log.close()
    assert seconds_per_step(tmp_path) == {"dense": 0.3, "sparse": 0.1}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(None, steps=10, start=0)
    log.row(1, "train", loss=1.0)
    log.progress(1, loss="1")
    log.say("hello")
    log.pictures(1, [torch.ones(4, 4)], [torch.ones(2, 2)])
    log.text("summary", "text")
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_pictures_show_what_is_there() -> None:
    mask = torch.eye(4, dtype=torch.bool)
    picture = mask_picture(mask)
    assert picture.shape == (384, 384, 3)
    assert picture.dtype == np.uint8
    light, dark = picture[0, 0].astype(int).sum(), picture[0, -1].astype(int).sum()
    assert light > dark
    attention = torch.zeros(1000, 1000)
    attention[:, 0] = 1.0
    picture = map_picture(attention).astype(int).sum(axis=-1)
    assert picture[:, 0].min() > picture[:, 100:].max()


def test_a_mask_a_head_is_a_picture_a_head() -> None:
    masks = torch.zeros(5, 4, 4, dtype=torch.bool)
    for head in range(5):
        masks[head, head % 4, :] = True
    picture = mask_picture(masks)
    assert picture.dtype == np.uint8
    # Three columns and two rows of 192 pixels, with 4 between them; the sixth place is empty.
    assert picture.shape == (2 * 192 + 4, 3 * 192 + 2 * 4, 3)
    for head in range(5):
        top, left = 196 * (head // 3), 196 * (head % 3)
        one = picture[top : top + 192, left : left + 192]
        assert np.array_equal(one, mask_picture(masks[head])[::2, ::2])
    assert (picture[196:, 2 * 196 :] == 255).all()


def test_a_map_a_head_is_a_picture_a_head_with_its_own_lightest_entry() -> None:
    maps = torch.zeros(2, 384, 384)
    maps[0, :, :192], maps[1, :, 192:] = 1.0, 0.01
    picture = map_picture(maps).astype(int).sum(axis=-1)
    assert picture.shape == (192, 2 * 192 + 4)
    lightest = picture[:, :96]
    assert (lightest == lightest[0, 0]).all()
    assert (picture[:, -96:] == lightest).all()
    assert (picture[:, 96:192] < lightest[0, 0]).all()


def test_masks_of_many_blocks_a_head_are_reduced() -> None:
    masks = torch.zeros(2, 768, 768, dtype=torch.bool)
    masks[:, :, ::2] = True
    picture = mask_picture(masks)
    assert picture.shape == (192, 2 * 192 + 4, 3)
    assert (picture[:, :192] == picture[0, 0]).all()  # half of the blocks everywhere


def test_summary_table_says_what_was_measured() -> None:
    row = {"steps": 5, "seconds_per_step": 0.5, "tokens_per_second": 100.0, "density": [1.0]}
    summary = {
        "dense": row,
        "sparse": {**row, "seconds_per_step": 0.25, "density": [0.05]},
        "speed_up": 2.0,
        "phase": "sparse",
        "best_step": 10,
        "validation_accuracy": 0.4,
        "test_accuracy": 0.3812,
        "baselines": {"majority class": 0.17},
    }
    table = summary_table(summary)
    for text in ("500.0", "250.0", "5.0%", "2.00×", "38.12%", "17.00%", "step 10, sparse"):
        assert text in table
    untimed = {**row, "seconds_per_step": None, "steps": 0}
    dense = {**summary, "speed_up": None, "phase": "dense", "sparse": untimed}
    assert "stayed dense" in summary_table(dense)
    static = {**summary, "speed_up": None, "dense": untimed}
    assert "sparse from its first step" in summary_table(static)
