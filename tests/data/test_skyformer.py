"""Skyformer's pickles of all tasks, in the format that its scripts write."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spion_ds.data.image import ImageConfig
from spion_ds.data.listops.task import ListOpsConfig
from spion_ds.data.pathfinder.task import PathfinderConfig
from spion_ds.data.retrieval import RetrievalConfig
from spion_ds.data.tasks import get_task
from spion_ds.data.text import TextConfig
from spion_ds.errors import DataError

# Task, stem, configuration, largest token, tokens with their padding.
CASES = [
    ("listops", "lra-listops", ListOpsConfig(sequence_length=2048), 16, 2048),
    ("image", "lra-image", ImageConfig(), 255, 1024),
    ("text", "lra-text", TextConfig(), 256, 4096),
    ("retrieval", "lra-retrieval", RetrievalConfig(), 256, 4096),
    (
        "pathfinder32",
        "lra-pathfinder32-curv_contour_length_14",
        PathfinderConfig(),
        255,
        1024,
    ),
]


def samples(task: str, largest: int, length: int, count: int) -> list[dict]:
    generator = np.random.default_rng(count)
    padded = task in ("listops", "text", "retrieval")
    made = []
    for _ in range(count):
        sample: dict = {}
        for document in range(get_task(task).documents):
            ids = generator.integers(int(padded), largest + 1, length).astype(np.int32)
            if padded:
                ids[int(generator.integers(1, length)) :] = 0
            sample[f"input_ids_{document}"] = ids
        sample["label"] = np.int64(generator.integers(0, 2))
        made.append(sample)
    return made


def write(folder: Path, stem: str, task: str, largest: int, length: int) -> dict[str, list]:
    made = {}
    for split, count in (("train", 6), ("dev", 3), ("test", 4)):
        made[split] = samples(task, largest, length, count)
        (folder / f"{stem}.{split}.pickle").write_bytes(pickle.dumps(made[split]))
    return made


@pytest.mark.parametrize(("task", "stem", "config", "largest", "length"), CASES)
def test_all_tasks_are_read(
    tmp_path: Path, task: str, stem: str, config: object, largest: int, length: int
) -> None:
    made = write(tmp_path, stem, task, largest, length)
    config = replace(config, source=str(tmp_path))  # type: ignore[type-var]
    get_task(task).check_source(config)
    data = get_task(task).prepare(config, tmp_path / "data")
    for name, split in (("train", "train"), ("validation", "dev"), ("test", "test")):
        found = getattr(data, name)
        assert len(found) == len(made[split])
        for row, sample in enumerate(made[split]):
            documents = found.input_ids[row].reshape(-1, length)
            lengths = found.lengths[row].reshape(-1)
            for document, (ids, tokens) in enumerate(zip(documents, lengths, strict=True)):
                expected = sample[f"input_ids_{document}"]
                assert np.array_equal(ids, expected)
                # A pixel of value 0 is a token like any other.
                padded = task in ("listops", "text", "retrieval")
                assert tokens == (np.flatnonzero(expected)[-1] + 1 if padded else length)
            assert found.labels[row] == sample["label"]
    baselines = get_task(task).baselines(data.train, data.test)
    assert 0.0 <= baselines["majority class"] <= 1.0


def test_mistakes_are_named(tmp_path: Path) -> None:
    config = TextConfig(source=str(tmp_path))
    prepare = get_task("text").prepare
    made = write(tmp_path, "lra-text", "text", 256, 4096)
    file = tmp_path / "lra-text.dev.pickle"

    def broken(content: object, message: str) -> None:
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=message):
            prepare(config, tmp_path / "data")

    good = made["dev"][0]
    broken({}, r"dev\.pickle is not a list of samples")
    broken([good, {"label": 1}], r"sample 1 has no whole numbers under 'input_ids_0'")
    broken([{**good, "label": 2}], r"sample 0: label goes from 2 to 2; allowed: 0 to 1")
    broken([{**good, "input_ids_0": [300]}], r"input_ids_0 goes from 300 to 300; allowed: 0 to 256")
    broken([{**good, "input_ids_0": np.ones(5000, int)}], r"5000 tokens do not fit")
    broken([{**good, "input_ids_0": Path("x")}], r"dev\.pickle cannot be read as a data pickle")
    broken([{**good, "label": [0, 1]}], r"sample 0 has 2 labels; allowed: one")
    broken([{**good, "input_ids_0": [[1], [2]]}], r"sample 0 has no whole numbers")
    file.unlink()
    with pytest.raises(DataError, match=r"dev\.pickle is missing"):
        get_task("text").check_source(config)


def test_an_image_without_all_its_pixels_is_named(tmp_path: Path) -> None:
    write(tmp_path, "lra-image", "image", 255, 1023)
    with pytest.raises(DataError, match="sample 0: 1023 pixels; allowed: 1024, the whole image"):
        get_task("image").prepare(ImageConfig(str(tmp_path)), tmp_path / "data")
