"""The Pathfinder tasks: what is drawn, that it is reproducible and resumable, official files."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spion_ds.data.pathfinder import snakes as pathfinder_snakes
from spion_ds.data.pathfinder import task as pathfinder
from spion_ds.data.pathfinder.snakes import Scene, draw_images
from spion_ds.data.pathfinder.strokes import FIRST_DIRECTIONS, WEIGHT_ONE, Strokes, make_strokes
from spion_ds.data.pathfinder.task import (
    SHARD_IMAGES,
    PathfinderConfig,
    PathXConfig,
    draw_shard,
    prepare,
)
from spion_ds.data.storage import processes
from spion_ds.errors import ConfigError, DataError

TINY = PathfinderConfig(
    image_size=16,
    train=600,
    validation=100,
    test=60,
    seed_distance=3,
    contour_length=4,
    distractors=1,
    distractor_length=2,
)
SCENE_32 = Scene(7, 14, 5, 4, 1.5, 2, 1.5, 2.0)
SCENE_128 = Scene(20, 14, 8, 4, 3.0, 2, 0.9, 0.9)


def strokes_32() -> Strokes:
    return make_strokes(32, 1, 1, 2, 0.5, 2, 1.0)


def strokes_128() -> Strokes:
    return make_strokes(128, 1, 2, 5, 1.5, 2, 1.8)


def random() -> np.random.BitGenerator:
    return np.random.PCG64(11)


@pytest.mark.parametrize(
    ("strokes", "scene", "count", "share"),
    [(strokes_32(), SCENE_32, 600, 0.66), (strokes_128(), SCENE_128, 40, 0.86)],
    ids=["32", "128"],
)
def test_images_look_like_the_published_ones(
    strokes: Strokes, scene: Scene, count: int, share: float
) -> None:
    images = draw_images(strokes, scene, count, random())
    # Of the public generator, to two digits; so many images are good to less than one point.
    assert (images.pixels == 0).mean() == pytest.approx(share, abs=0.02)
    assert (images.pixels.min(axis=(1, 2)) == 0).all()
    assert (images.pixels.max(axis=(1, 2)) == 255).all()
    # Five standard deviations of a fair coin.
    assert images.labels.mean() == pytest.approx(0.5, abs=2.5 / math.sqrt(count))


@pytest.mark.parametrize(
    ("strokes", "scene", "reach"),
    [(strokes_32(), SCENE_32, 2 * (2 + 1)), (strokes_128(), SCENE_128, 2 * (5 + 2))],
    ids=["32", "128"],
)
def test_the_label_says_whether_a_dashed_path_joins_the_discs(
    strokes: Strokes, scene: Scene, reach: int
) -> None:
    images = draw_images(strokes, scene, 40, random())
    for pixels, label, discs, tips in zip(
        images.pixels, images.labels, images.discs, images.tips, strict=True
    ):
        # As bright as a full pixel: strokes of a higher contrast may be brighter.
        highest = max(1.0, scene.contrast, scene.distractor_contrast)
        for row, column in discs:
            assert pixels[row, column] >= 0.98 * 255 / highest
        # Each snake is a chain: every tip is lit, and the next is a stroke and its gaps away.
        assert (pixels[tips[..., 0], tips[..., 1]] > 0).all()
        gaps = np.linalg.norm(np.diff(tips, axis=1), axis=-1)
        # A step's pivot and tip are both rounded to pixels.
        assert gaps.max() <= reach + 2 * math.sqrt(2)
        # The two snakes start the seed distance apart; tips are rounded to pixels.
        apart = np.linalg.norm(tips[0, 0] - tips[1, 0])
        assert apart == pytest.approx(scene.seed_distance, abs=math.sqrt(0.5))
        ends = [{tuple(snake[0]), tuple(snake[-1])} for snake in tips.tolist()]
        assert ({tuple(disc) for disc in discs.tolist()} in ends) == bool(label)
    assert set(images.labels) == {0, 1}


def test_distractors_are_as_many_and_as_bright_as_in_the_public_generator() -> None:
    strokes, images = strokes_32(), {}
    for contrast in (1.5, 2.0, 4.0):
        scene = replace(SCENE_32, distractor_contrast=contrast)
        images[contrast] = draw_images(strokes, scene, 600, random()).pixels
    none = draw_images(strokes, replace(SCENE_32, distractors=0), 600, random()).pixels
    # The contrast changes nothing but their light, relative to the brightest pixel.
    assert all((pixels.max(axis=(1, 2)) == 255).all() for pixels in images.values())
    assert images[4.0].mean() < images[2.0].mean() < none.mean() + 10
    # 27 % of its images have no distractor (1000 images of a private rerun); five standard
    # deviations of 600 are 9 points.
    alike = (images[1.5] == images[4.0]).all(axis=(1, 2)).mean()
    assert alike == pytest.approx(0.27, abs=0.09)


def test_no_two_strokes_of_a_snake_share_their_core() -> None:
    strokes = strokes_128()
    images = draw_images(strokes, replace_scene(distractors=0), 10, random())
    for tips in images.tips:
        for snake in tips:
            distances = np.linalg.norm(snake[:, None] - snake[None], axis=-1)
            apart = distances[~np.eye(len(snake), dtype=bool)]
            # Masks reach the margin of 2 around a stroke 1.5 wide.
            assert apart.min() > 2


def replace_scene(**changes: int) -> Scene:
    return replace(SCENE_128, **changes)


@pytest.mark.parametrize("continuity", [1.0, 1.8])
def test_steps_are_weighted_by_the_squared_cosine_of_the_turn(continuity: float) -> None:
    strokes = make_strokes(64, 1, 2, 5, 1.5, 2, continuity)
    for direction in (0, 90, 233):
        heading = math.radians(direction - 180)
        for tip, turn, weight in zip(
            strokes.tips[direction],
            strokes.turns[direction],
            strokes.weights[direction],
            strict=True,
        ):
            assert turn >= FIRST_DIRECTIONS
            row, column = divmod(int(tip) + 10 * strokes.width + 10, strokes.width)
            delta = abs(math.atan2(row - 10, column - 10) - heading)
            delta = min(delta, 2 * math.pi - delta)
            expected = math.cos(min(continuity * delta, math.pi / 2)) ** 2
            assert weight / WEIGHT_ONE == pytest.approx(expected, abs=1 / WEIGHT_ONE)


@pytest.mark.ranks
def test_the_bytes_do_not_depend_on_the_number_of_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for cores in (1, 5):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        found.append(prepare(TINY, tmp_path / str(cores)))
    sums = [[entry["sha256"] for entry in data.manifest["files"].values()] for data in found]
    assert sums[0] == sums[1]


@pytest.mark.ranks
def test_splits_share_no_image_and_images_do_not_depend_on_the_sizes(tmp_path: Path) -> None:
    data = prepare(TINY, tmp_path)
    assert [len(s) for s in (data.train, data.validation, data.test)] == [600, 100, 60]
    every = np.concatenate([s.input_ids for s in (data.train, data.validation, data.test)])
    assert every.shape == (760, 256)
    assert len(np.unique(every, axis=0)) == 760
    assert (data.test.lengths == 256).all()
    assert set(data.validation.labels) == {0, 1}
    other = prepare(replace(TINY, train=300, validation=30), tmp_path)
    assert np.array_equal(other.train.input_ids, every[:300])
    assert np.array_equal(other.validation.input_ids, every[300:330])
    seeds = prepare(replace(TINY, seed=1), tmp_path)
    assert not np.array_equal(seeds.train.input_ids, data.train.input_ids)


@pytest.mark.ranks
def test_training_images_may_have_shorter_contours_than_the_others(tmp_path: Path) -> None:
    # Shards 0 and 1 are training images alone, shard 2 is shared, validation ends in shard 3.
    mixed = replace(TINY, train=600, validation=300, train_contour_lengths=(2, 3))
    data, plain = (
        prepare(mixed, tmp_path),
        prepare(replace(mixed, train_contour_lengths=()), tmp_path),
    )
    shards = [draw_shard(replace(TINY, contour_length=n), i)[0] for i, n in enumerate((2, 3))]
    assert np.array_equal(data.train.input_ids[: 2 * SHARD_IMAGES], np.concatenate(shards))
    assert np.array_equal(data.train.input_ids[2 * SHARD_IMAGES :], plain.train.input_ids[500:])
    assert np.array_equal(data.validation.input_ids, plain.validation.input_ids)
    assert np.array_equal(data.test.input_ids, plain.test.input_ids)
    assert "train_contour_lengths" not in plain.manifest["parameters"]  # caches keep their names


def test_an_interrupted_generation_keeps_its_finished_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(TINY, tmp_path / "whole")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    drawn: list[int] = []

    def interrupted(config: PathfinderConfig, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number == 2:
            raise KeyboardInterrupt
        return draw(config, number)

    def draw(config: PathfinderConfig, number: int) -> tuple[np.ndarray, np.ndarray]:
        drawn.append(number)
        return draw_shard(config, number)

    written: list[Path] = []
    save = np.savez_compressed

    def record(path: Path, **arrays: np.ndarray) -> None:
        written.append(path)
        save(path, **arrays)

    monkeypatch.setattr(np, "savez_compressed", record)
    monkeypatch.setattr(pathfinder, "draw_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(TINY, tmp_path)
    [shards] = tmp_path.glob("*.shards")
    assert [path.name for path in sorted(shards.iterdir())[:2]] == ["000000.npz", "000001.npz"]
    # A shard that the machine cut short is drawn again.
    (shards / "000001.npz").write_bytes((shards / "000001.npz").read_bytes()[:1000])
    # Another process was killed while it wrote one.
    killed = Path(str(written[0]).replace(f"-{os.getpid()}", "-1"))
    assert killed != written[0]
    killed.touch()

    monkeypatch.setattr(pathfinder, "draw_shard", draw)
    drawn.clear()
    resumed = prepare(TINY, tmp_path)
    assert 0 not in drawn
    assert 1 in drawn
    assert not shards.exists()
    assert not killed.exists()
    assert resumed.manifest["files"] == whole.manifest["files"]


@pytest.mark.ranks
@pytest.mark.parametrize("end", ["interrupted", "killed"])
def test_an_interruption_ends_all_processes_and_a_second_run_goes_on(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, train=8 * SHARD_IMAGES)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    whole = prepare(config, tmp_path / "whole")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    started: list[subprocess.Popen] = []

    def start(*args: Any, start: Any = subprocess.Popen, **options: Any) -> subprocess.Popen:
        started.append(start(*args, **options))
        return started[-1]

    def stop(*_: object) -> None:
        if end == "interrupted":
            raise KeyboardInterrupt
        started[0].kill()

    with monkeypatch.context() as patch:
        patch.setattr(processes.subprocess, "Popen", start)
        patch.setattr(pathfinder, "_scatter", stop)
        with pytest.raises((KeyboardInterrupt, DataError)) as raised:
            prepare(config, tmp_path)
    if end == "killed":
        sentence = rf"^process {started[0].pid}, .* ended with signal 9 \(Killed\).*run again"
        assert re.search(sentence, str(raised.value))
    codes = [process.returncode for process in started]
    assert codes == [-signal.SIGKILL if end == "killed" else 0, 0]
    [shards] = tmp_path.glob("*.shards")
    kept = sorted(path.name for path in shards.iterdir())
    if end == "interrupted":  # what is killed cannot clear up
        assert all(re.fullmatch(r"\d{6}\.npz", name) for name in kept)
    assert "000000.npz" in kept
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {shards.name, "whole"}

    resumed = prepare(config, tmp_path)
    assert resumed.manifest["files"] == whole.manifest["files"]
    assert not shards.exists()


def test_strokes_that_can_start_no_snake_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.paddle_length 1 and .* 0\.5 at margin 1; allowed"
    ):
        prepare(replace(TINY, paddle_length=1), tmp_path)
    assert not list(tmp_path.glob("*.shards"))


def test_first_strokes_leave_room_in_every_quadrant() -> None:
    degrees = np.flatnonzero(strokes_32().starts) - 180
    # A rerun of the public generator finds places for -150 to -121 degrees of all 360; at -120 the
    # last bit of a sine decides, which is rounded here.
    assert degrees.tolist() == list(range(-150, -119))


def test_snakes_that_never_fit_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder_snakes, "BARREN_PAIRS", 4000)
    with pytest.raises(ConfigError, match=r"contour_length 40 do not fit"):
        draw_shard(replace(TINY, contour_length=40), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 14}, r"data\.image_size is 14; allowed: .* = 15 up"),
        ({"margins": ()}, r"data\.margins"),
        ({"margins": (0,)}, r"data\.margins"),
        ({"paddle_thickness": 0.3}, r"data\.paddle_thickness"),
        ({"continuity": 0.5}, r"data\.continuity"),
        ({"contrast": 0.0}, r"data\.contrast"),
        ({"distractor_contrast": 101.0}, r"data\.distractor_contrast is 101\.0; allowed: .* 100"),
        ({"contour_length": 1}, r"data\.contour_length"),
        (
            {"train_contour_lengths": (6, 1)},
            r"data\.train_contour_lengths is \(6, 1\); allowed: .*2",
        ),
        ({"train": 0}, r"data\.train"),
        ({"source": ""}, r"data\.source"),
    ],
)
def test_values_out_of_range_are_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change).validate()


def test_the_published_configurations_are_valid() -> None:
    PathfinderConfig().validate()
    PathXConfig().validate()
    assert PathXConfig().sequence_length == 16384


def test_every_shard_has_the_same_number_of_images() -> None:
    pixels, labels = draw_shard(TINY, 7)
    assert pixels.shape == (SHARD_IMAGES, 256)
    assert labels.shape == (SHARD_IMAGES,)


def test_a_shard_that_is_damaged_in_any_way_is_drawn_again(tmp_path: Path) -> None:
    path = tmp_path / "000000.npz"
    pixels, labels = np.ones((SHARD_IMAGES, 256), np.uint8), np.zeros(SHARD_IMAGES, np.uint8)
    np.savez_compressed(path, pixels=pixels, labels=labels)
    assert pathfinder._read_shard(path, 256) is not None
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + b"\xff" * 7 + whole[place + 7 :])
        found = pathfinder._read_shard(path, 256)
        assert found is None or (found[0] == pixels).all()
    np.savez_compressed(path, pixels=pixels.astype(float), labels=labels)
    assert pathfinder._read_shard(path, 256) is None
    path.unlink()
    os.mkfifo(path)
    assert pathfinder._read_shard(path, 256) is None
