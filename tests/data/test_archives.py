"""Image and text from their official archives, written small: formats, checks, downloads."""

from __future__ import annotations

import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spion_ds.data import image, text
from spion_ds.data.image import ImageConfig, to_grey
from spion_ds.data.storage import archives
from spion_ds.data.storage.archives import Archive
from spion_ds.data.tasks import get_task
from spion_ds.data.text import TextConfig
from spion_ds.errors import ConfigError, DataError

CIFAR = ImageConfig(train=20, validation=5)
IMDB = TextConfig(train=8, validation=4, max_length=24, sequence_length=32)


def tar_gz(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def publish(monkeypatch: pytest.MonkeyPatch, module: object, path: Path) -> Archive:
    """Let the module's archive be the file at ``path``, published where it lies."""
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    archive = Archive(path.name, md5, path.absolute().as_uri())
    monkeypatch.setattr(module, "ARCHIVE", archive)
    return archive


def cifar_batches() -> dict[str, dict[bytes, object]]:
    generator = np.random.default_rng(2)
    names = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    return {
        f"cifar-10-batches-py/{name}": {
            b"batch_label": name.encode(),
            b"labels": generator.integers(0, 10, 5).tolist(),
            b"data": generator.integers(0, 256, (5, 3072), np.uint8),
            b"filenames": [b"x.png"] * 5,
        }
        for name in names
    }


def write_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    files = {name: pickle.dumps(batch, protocol=2) for name, batch in cifar_batches().items()}
    path = folder / "cifar-10-python.tar.gz"
    tar_gz(path, {"cifar-10-batches-py/readme.html": b"<html>", **files})
    return publish(monkeypatch, image, path)


def test_images_become_grey_pixels_row_by_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, monkeypatch)
    config = ImageConfig(str(tmp_path), CIFAR.train, CIFAR.validation)
    image.check_source(config)
    data = image.prepare(config, tmp_path / "data")
    batches = list(cifar_batches().values())
    planes = np.concatenate([batch[b"data"] for batch in batches])  # type: ignore[arg-type]
    labels = np.concatenate([batch[b"labels"] for batch in batches])  # type: ignore[arg-type]
    assert [len(s) for s in (data.train, data.validation, data.test)] == [20, 5, 5]
    ids = np.concatenate([s.input_ids for s in (data.train, data.validation, data.test)])
    assert ids.shape == (30, 1024)
    assert ids.dtype == np.uint8
    for row, pixel in ((0, 0), (7, 33), (29, 1023)):
        red, green, blue = (int(planes[row, 1024 * plane + pixel]) for plane in range(3))
        grey = (2989 * red + 5870 * green + 1140 * blue) // 10000
        assert ids[row, pixel] == grey
    found = np.concatenate([s.labels for s in (data.train, data.validation, data.test)])
    assert np.array_equal(found, labels)
    assert (data.test.lengths == 1024).all()


def test_grey_of_a_grey_pixel() -> None:
    # 0.2989 + 0.5870 + 0.1140 = 0.9999: white is 254.
    assert to_grey(np.array([[255, 0] * 3], np.uint8)).tolist() == [[254, 0]]


def imdb_files() -> dict[str, bytes]:
    files = {"aclImdb/README": b"about", "aclImdb/train/unsup/0_0.txt": b"no label"}
    for split, count in (("train", 6), ("test", 3)):
        for kind, stars in (("pos", 9), ("neg", 2)):
            for number in range(count):
                name = f"aclImdb/{split}/{kind}/{number}_{stars}.txt"
                files[name] = f"{split} {kind} {number} ".encode() + b"\xc3\xa9\xff" * (3 * number)
    return files


def write_imdb(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    path = folder / "aclImdb_v1.tar.gz"
    tar_gz(path, imdb_files())
    return publish(monkeypatch, text, path)


def test_reviews_become_bytes_plus_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_imdb(tmp_path, monkeypatch)
    config = TextConfig(str(tmp_path), 8, 4, 24, 32)
    text.check_source(config)
    data = text.prepare(config, tmp_path / "data")
    assert [len(s) for s in (data.train, data.validation, data.test)] == [8, 4, 6]
    read = {"train": set(), "test": set()}
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        assert split.input_ids.shape == (len(split), 32)
        for ids, length, label in zip(split.input_ids, split.lengths, split.labels, strict=True):
            assert (ids[:length] > 0).all()
            assert (ids[length:] == 0).all()
            content = bytes((ids[:length] - 1).astype(np.uint8))
            read["test" if name == "test" else "train"].add((content, int(label)))
    expected = {"train": set(), "test": set()}
    for name, content in imdb_files().items():
        if "/pos/" in name or "/neg/" in name:
            expected[name.split("/")[1]].add((content[:24], int("/pos/" in name)))
    assert read == expected  # each review once, cut to max_length
    assert 256 in data.train.input_ids or 256 in data.validation.input_ids  # byte 255
    other = text.prepare(TextConfig(str(tmp_path), 8, 4, 24, 32, seed=1), tmp_path / "data")
    assert not np.array_equal(other.train.input_ids, data.train.input_ids)


def test_nothing_of_an_archive_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = inside / "aclImdb_v1.tar.gz"
    tar_gz(
        path, {**imdb_files(), "../escaped.txt": b"x", "aclImdb/train/pos/../../../1_1.txt": b"x"}
    )
    publish(monkeypatch, text, path)
    text.prepare(TextConfig(str(inside), 8, 4, 24, 32), tmp_path / "data")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "inside"]
    assert [p.name for p in inside.iterdir()] == [path.name]


def test_an_archive_is_downloaded_once_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = tmp_path / "published"
    published.mkdir()
    archive = write_cifar(published, monkeypatch)
    data = image.prepare(CIFAR, tmp_path / "data")
    kept = tmp_path / "data" / "downloads"
    assert [path.name for path in kept.iterdir()] == [archive.name]
    (published / archive.name).unlink()  # whoever asks again gets an error
    other = image.prepare(ImageConfig(train=19, validation=5), tmp_path / "data")
    assert np.array_equal(other.train.input_ids, data.train.input_ids[:19])


def test_a_download_that_is_another_file_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write_cifar(tmp_path, monkeypatch)
    wrong = Archive(archive.name, "0" * 32, archive.address)
    monkeypatch.setattr(image, "ARCHIVE", wrong)
    with pytest.raises(DataError, match=rf"{archive.name} has 0000.*get it from"):
        image.prepare(CIFAR, tmp_path / "data")
    assert not list((tmp_path / "data" / "downloads").iterdir())
    assert not [path for path in (tmp_path / "data").glob("image-*") if path.is_dir()]


def test_without_a_network_file_and_address_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(address: str, timeout: float) -> None:
        raise archives.urllib.error.URLError("no route to host")

    monkeypatch.setattr(archives.urllib.request, "urlopen", unreachable)
    for module, config in ((image, ImageConfig()), (text, TextConfig())):
        name, address = module.ARCHIVE.name, module.ARCHIVE.address
        with pytest.raises(DataError, match=rf"{name} cannot be downloaded from {address}.*source"):
            module.prepare(config, tmp_path)
    for module, config in ((image, ImageConfig("here")), (text, TextConfig("here"))):
        with pytest.raises(DataError, match=rf"there is no here/{module.ARCHIVE.name}; get"):
            module.check_source(config)


def test_damaged_archives_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    write_cifar(tmp_path, monkeypatch)
    whole = path.read_bytes()
    path.write_bytes(whole[:-500])
    config = ImageConfig(str(tmp_path), 20, 5)
    with pytest.raises(DataError, match=r"md5 .* incomplete or another file"):
        image.prepare(config, tmp_path / "data")
    publish(monkeypatch, image, path)
    with pytest.raises(DataError, match=r"cannot be read|has no cifar-10"):
        image.prepare(config, tmp_path / "data")
    batches = cifar_batches()
    batches["cifar-10-batches-py/test_batch"][b"labels"] = [11] * 5
    tar_gz(path, {name: pickle.dumps(batch, 2) for name, batch in batches.items()})
    publish(monkeypatch, image, path)
    with pytest.raises(DataError, match=r"test_batch is not a batch of CIFAR-10.*labels from 11"):
        image.prepare(config, tmp_path / "data")


def test_odd_members_of_an_archive_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    name = "cifar-10-batches-py/test_batch"
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
        with tarfile.open(path, "w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, name  # a link to itself, for ever
            tar.addfile(member)
        publish(monkeypatch, image, path)
        with pytest.raises(DataError, match="has no cifar-10-batches-py/data_batch_1; get it"):
            image.prepare(ImageConfig(str(tmp_path), 20, 5), tmp_path / "data")


@pytest.mark.parametrize("module", [image, text])
def test_an_archive_that_is_damaged_inside_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    write, config = {
        image: (write_cifar, ImageConfig(str(tmp_path), 20, 5)),
        text: (write_imdb, TextConfig(str(tmp_path), 8, 4, 24, 32)),
    }[module]
    write(tmp_path, monkeypatch)
    path = tmp_path / module.ARCHIVE.name
    whole = path.read_bytes()
    for place in (60, len(whole) // 3, len(whole) // 2):
        path.write_bytes(whole[:place] + b"\xff" * 9 + whole[place + 9 :])
        publish(monkeypatch, module, path)
        with pytest.raises(DataError, match=f"{path}"):
            module.prepare(config, tmp_path / "data")


def test_a_folder_that_nobody_has_is_named() -> None:
    for name in ("text", "image", "listops", "retrieval", "pathfinder32"):
        task = get_task(name)
        with pytest.raises(DataError, match=r"data\.source is '~nobody-here/data'.*name a folder"):
            task.check_source(task.config_class(source="~nobody-here/data"))


def test_a_folder_in_the_place_of_a_download_is_named(tmp_path: Path) -> None:
    place = tmp_path / "downloads" / image.ARCHIVE.name
    place.mkdir(parents=True)
    with pytest.raises(DataError, match=f"{place} is not a regular file; remove it"):
        image.prepare(CIFAR, tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ImageConfig(train=46_000), r"data\.train \+ data\.validation is 51000"),
        (ImageConfig(validation=0), r"data\.validation"),
        (TextConfig(train=25_000), r"data\.train \+ data\.validation"),
        (TextConfig(max_length=5000), r"data\.max_length is 5000; allowed: at most"),
        (TextConfig(source=""), r"data\.source"),
    ],
)
def test_values_out_of_range_are_named(config: ImageConfig | TextConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.validate()
