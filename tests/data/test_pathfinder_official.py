"""Official Pathfinder files: imgs/<batch>/sample_<n>.png and metadata/<batch>.npy."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spion_ds.data.pathfinder.official import read_image
from spion_ds.data.pathfinder.task import PathfinderConfig, check_source, prepare
from spion_ds.errors import DataError


def write_official(folder: Path, batches: int = 2, images: int = 10) -> np.ndarray:
    pixels = np.random.default_rng(5).integers(0, 256, (batches, images, 16, 16), np.uint8)
    (folder / "metadata").mkdir(parents=True)
    for batch in range(batches):
        (folder / "imgs" / str(batch)).mkdir(parents=True)
        rows = []
        for number in range(images):
            name = f"sample_{number}.png"
            Image.fromarray(pixels[batch, number]).save(folder / "imgs" / str(batch) / name)
            rows.append([f"imgs/{batch}", name, number, (batch + number) % 2, 1.8, 14, 4, 2])
        path = folder / "metadata" / f"{batch}.npy"
        if batch % 2 == 0:  # the released files are text …
            path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
        else:  # … and a generator's own are arrays of text
            np.save(path, np.array([[str(word) for word in row] for row in rows]))
    return pixels.reshape(batches * images, -1)


OFFICIAL = PathfinderConfig(image_size=16, seed_distance=1)


def test_official_files_are_read_in_both_formats(tmp_path: Path) -> None:
    folder = tmp_path / "pathfinder16" / "curv_contour_length_14"
    pixels = write_official(folder)
    (folder / "imgs" / "0" / "sample_3.png").write_bytes(b"")  # the official set has one such
    config = replace(OFFICIAL, source=str(tmp_path))
    check_source(config)
    data = prepare(config, tmp_path / "data")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [15, 2, 2]
    every = np.concatenate([s.input_ids for s in (data.train, data.validation, data.test)])
    labels = np.concatenate([s.labels for s in (data.train, data.validation, data.test)])
    kept = [row for row in range(20) if row != 3]
    assert np.array_equal(every, pixels[kept])
    assert labels.tolist() == [(row // 10 + row % 10) % 2 for row in kept]
    assert (data.train.lengths == 256).all()


def test_other_images_under_the_same_metadata_are_another_cache(tmp_path: Path) -> None:
    pixels = write_official(tmp_path, batches=1)
    config = replace(OFFICIAL, source=str(tmp_path))
    before = prepare(config, tmp_path / "data")
    assert prepare(config, tmp_path / "data").folder == before.folder
    image = Image.fromarray(255 - pixels[4].reshape(16, 16))
    image.save(tmp_path / "imgs" / "0" / "sample_4.png")
    after = prepare(config, tmp_path / "data")
    assert np.array_equal(after.train.input_ids[4], 255 - pixels[4])
    assert prepare(config, tmp_path / "data", verify=False).folder == after.folder


def test_mistakes_in_official_files_are_named(tmp_path: Path) -> None:
    config = replace(OFFICIAL, source=str(tmp_path))
    with pytest.raises(DataError, match=r"has no metadata/<number>\.npy.*'generate'"):
        check_source(config)
    write_official(tmp_path, batches=1)
    with pytest.raises(DataError, match=r"has 16×16 pixels; data\.image_size is 32"):
        check_source(replace(config, image_size=32))
    image = tmp_path / "imgs" / "0" / "sample_9.png"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"sample_9\.png cannot be read as a PNG image"):
        prepare(config, tmp_path / "data")
    image.unlink()
    with pytest.raises(DataError, match=r"0\.npy, row 10: .*sample_9\.png is missing"):
        prepare(config, tmp_path / "data")
    (tmp_path / "metadata" / "0.npy").write_text("imgs/0 sample_0.png 0 2 1.8\n")
    with pytest.raises(DataError, match=r"0\.npy, row 1: expected folder, file, number and label"):
        check_source(config)
    assert not list((tmp_path / "data").glob("*/"))


def png(folder: Path, pixels: np.ndarray) -> Path:
    path = folder / "image.png"
    Image.fromarray(pixels).save(path, "PNG")
    return path


@pytest.mark.parametrize("dtype", [bool, np.uint8])
@pytest.mark.parametrize("shape", [(16, 16), (16, 16, 3)])
def test_images_of_up_to_8_bits_are_read(tmp_path: Path, dtype: type, shape: tuple) -> None:
    pixels = np.ones(shape, dtype)
    if shape[2:] and dtype is bool:
        pixels = pixels.astype(np.uint8)
    value = 255 if pixels.dtype == bool else 1
    assert (read_image(png(tmp_path, pixels), 16) == value).all()


def test_other_formats_are_not_opened_whatever_their_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow chose a format"))
    path = tmp_path / "image.png"
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n" + bytes(99), b"GIF89a"):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{path} cannot be read as a PNG image"):
            read_image(path, 16)


def test_images_of_16_bits_are_refused(tmp_path: Path) -> None:
    path = png(tmp_path, np.full((16, 16), 1000, np.uint16))
    with pytest.raises(DataError, match="has 16 bits a channel; allowed: up to 8"):
        read_image(path, 16)


@pytest.mark.filterwarnings("error")
def test_a_huge_image_is_refused_by_its_header(tmp_path: Path) -> None:
    path = png(tmp_path, np.zeros((16, 16), np.uint8))
    content = bytearray(path.read_bytes())
    content[16:24] = b"\x00\x01\x00\x00" * 2
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"has 65536×65536 pixels; data\.image_size is 16"):
        read_image(path, 16)
    path.write_bytes(png(tmp_path, np.zeros((16, 16), np.uint8)).read_bytes()[:33] + content[8:])
    with pytest.raises(DataError, match="cannot be read as a PNG image"):
        read_image(path, 16)


def test_damaged_images_are_named_whatever_is_damaged(tmp_path: Path) -> None:
    whole = png(tmp_path, np.zeros((16, 16), np.uint8)).read_bytes()
    path = tmp_path / "damaged.png"
    for place in range(len(whole)):
        for content in (whole[:place], whole[:place] + b"\xff" + whole[place + 1 :]):
            path.write_bytes(content)
            with contextlib.suppress(DataError):
                assert read_image(path, 16).shape == (256,)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 8)),
        np.array(["imgs/0 sample_0.png 0 1"]),
        np.zeros((0, 8), "U1"),
        np.array([[None] * 8]),
    ],
)
def test_metadata_that_are_no_table_of_text_are_named(tmp_path: Path, array: np.ndarray) -> None:
    write_official(tmp_path, batches=1)
    path = tmp_path / "metadata" / "0.npy"
    np.save(path, array, allow_pickle=True)
    with pytest.raises(DataError, match=rf"{path} is neither text nor a \.npy array of text"):
        check_source(replace(OFFICIAL, source=str(tmp_path)))


def test_metadata_that_say_more_than_there_is_are_named(tmp_path: Path) -> None:
    write_official(tmp_path, batches=1)
    path = tmp_path / "metadata" / "0.npy"
    config = replace(OFFICIAL, source=str(tmp_path))
    form = "{'descr': '<U%d', 'fortran_order': False, 'shape': (99999999999, %d), }"
    texts = [form % sizes for sizes in ((9, 8), (0, 8), (9, 0))]
    for text in (*(text.encode() for text in texts), b"(" * 9000 + b"\n"):
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text)
        with pytest.raises(DataError, match=rf"{path} is neither text"):
            check_source(config)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=rf"{path} is neither text.*not a regular file"):
        check_source(config)
    path.unlink()
    image = tmp_path / "imgs" / "0" / "sample_0.png"
    image.unlink()
    os.mkfifo(image)
    path.write_text("imgs/0 sample_0.png 0 1\n")
    with pytest.raises(DataError, match=rf"row 1: {image} is not a regular file"):
        check_source(config)
    path.write_text("imgs/0 sample\x00.png 0 1\n")
    with pytest.raises(DataError, match=r"row 1: .* is missing"):
        check_source(config)
