"""Dataset caches: whole or absent, checked, and built by one process at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spion_ds.data.listops.task import ListOpsConfig, prepare
from spion_ds.data.storage import cache
from spion_ds.data.storage.cache import cache_folder, create_split, open_cache, prepare_cache
from spion_ds.data.tasks import get_task
from spion_ds.errors import DataError

REPOSITORY = Path(__file__).resolve().parents[2]
PARAMETERS = {"seed": 3, "length": 8}
FILES = [f"{s}_{a}.npy" for s in cache.SPLITS for a in ("input_ids", "lengths", "labels")]


def build(folder: Path) -> None:
    for number, name in enumerate(cache.SPLITS, start=1):
        split = create_split(folder, name, 4 * number, 8)
        split.input_ids[:] = np.arange(8) + number
        split.lengths[:] = 8
        split.labels[:] = number


def no_build(folder: Path) -> None:
    raise AssertionError("the cache is there: it must not be built")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return prepare_cache(tmp_path, "toy", PARAMETERS, build).folder


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_cache_is_built_once_and_then_opened(folder: Path) -> None:
    dataset = prepare_cache(folder.parent, "toy", PARAMETERS, no_build)
    assert dataset.folder == folder == cache_folder(folder.parent, "toy", PARAMETERS)
    assert names(folder) == sorted([*FILES, "manifest.json"])
    assert names(folder.parent) == [folder.name, folder.name + ".lock"]
    assert [len(s) for s in (dataset.train, dataset.validation, dataset.test)] == [4, 8, 12]
    assert dataset.validation.labels.tolist() == [2] * 8
    assert dataset.train.input_ids[0].tolist() == list(range(1, 9))
    assert dataset.manifest["parameters"] == PARAMETERS
    dtypes = [a.dtype.name for a in vars(dataset.train).values()]
    assert dtypes == ["uint8", "int32", "uint8"]


def test_opened_arrays_are_read_only_maps(folder: Path) -> None:
    dataset = open_cache(folder)
    assert isinstance(dataset.train.input_ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        dataset.train.input_ids[0, 0] = 1


def test_parameters_and_task_decide_the_folder(tmp_path: Path) -> None:
    folders = {
        cache_folder(tmp_path, "toy", PARAMETERS),
        cache_folder(tmp_path, "toy", {**PARAMETERS, "seed": 4}),
        cache_folder(tmp_path, "other", PARAMETERS),
    }
    assert len(folders) == 3
    backwards = dict(reversed(PARAMETERS.items()))
    assert cache_folder(tmp_path, "toy", backwards) in folders


def test_the_bytes_do_not_depend_on_the_root(tmp_path: Path) -> None:
    config = ListOpsConfig(
        min_length=10, max_length=60, sequence_length=64, train=50, validation=5, test=5
    )
    first, second = prepare(config, tmp_path / "a"), prepare(config, tmp_path / "b")
    assert first.manifest == second.manifest
    assert first.manifest["parameters"]["seed"] == 0
    assert first.manifest["parameters"]["generator_version"] == 1


# Damage.


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_by_the_checksum(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} .*sha256.*delete the folder .*{folder.name}"):
        open_cache(folder)
    open_cache(folder, verify=False)  # sizes and shapes still hold


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_found(folder: Path, name: str, verify: bool) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes.*delete the folder"):
        open_cache(folder, verify=verify)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_missing_file_is_found(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name} is missing; delete the folder"):
        open_cache(folder, verify=False)


def test_a_damaged_header_is_found_without_checksums(folder: Path) -> None:
    path = folder / "test_labels.npy"
    content = path.read_bytes()
    path.write_bytes(b"X" + content[1:])
    with pytest.raises(DataError, match=r"test_labels\.npy is not a readable \.npy file"):
        open_cache(folder, verify=False)


def test_pickled_arrays_are_never_loaded(folder: Path) -> None:
    path = folder / "train_labels.npy"
    np.save(path, np.array([{}] * 4, dtype=object), allow_pickle=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][path.name]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"train_labels\.npy is not a readable"):
        open_cache(folder, verify=False)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(format_version=99), r"manifest\.json has format 99, not 1"),
        (lambda m: m["parameters"].update(seed=4), r"manifest\.json describes the cache toy-"),
        (lambda m: m.update(task="text"), r"manifest\.json describes the cache text-"),
        (lambda m: m.pop("files"), r"manifest\.json cannot be read as a manifest"),
        (lambda m: m["files"].pop("test_labels.npy"), r"manifest\.json cannot be read"),
        (lambda m: m["files"]["test_labels.npy"].pop("sha256"), r"does not describe test_labels"),
        (
            lambda m: m["files"].update({"test_labels.npy": ["bytes", "shape", "dtype", "sha256"]}),
            r"does not describe test_labels",
        ),
        (lambda m: m["files"].update({"test_labels.npy": [[]]}), r"does not describe test_labels"),
        (lambda m: m.update(parameters=["x" * 5000]), r"manifest\.json describes the cache toy-"),
        (lambda m: m["files"]["test_labels.npy"].update(bytes=5), r"test_labels\.npy has \d+ by"),
        (lambda m: m["files"]["test_labels.npy"].update(shape=[5]), r"test_labels\.npy has .*\[12"),
        (
            lambda m: m["files"]["test_labels.npy"].update(dtype="int8"),
            r"test_labels\.npy has .*t8",
        ),
        (lambda m: m["files"]["test_labels.npy"].update(sha256="0"), r"test_labels\.npy .*sha256"),
    ],
)
def test_an_edited_manifest_is_found(folder: Path, edit, message: str) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        open_cache(folder)


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"', "\x00", "[" * 100_000])
def test_an_unreadable_manifest_is_found(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json cannot be read.*delete the folder"):
        open_cache(folder)


def test_a_message_does_not_repeat_the_damaged_file(folder: Path) -> None:
    path = folder / "manifest.json"
    for content in (b"\xff" * 9999, json.dumps({"format_version": "x" * 9999}).encode()):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"manifest\.json cannot be read") as caught:
            open_cache(folder)
        assert len(str(caught.value)) < 500 + 2 * len(str(folder))


def test_a_damaged_cache_is_never_overwritten(folder: Path) -> None:
    (folder / "train_labels.npy").unlink()
    with pytest.raises(DataError, match="is missing"):
        prepare_cache(folder.parent, "toy", PARAMETERS, no_build)
    assert (folder / "test_labels.npy").exists()


def test_no_cache_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no dataset cache at .*prepare_data\.py"):
        open_cache(tmp_path / "toy-0")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"test_labels": np.zeros(11, np.uint8)}, r"have no rows, or differ in rows"),
        ({"test_lengths": np.zeros((12, 2), np.int32)}, r"have no rows, or differ in rows"),
        (
            {
                "test_labels": np.zeros(0, np.uint8),
                "test_lengths": np.zeros(0, np.int32),
                "test_input_ids": np.zeros((0, 8), np.uint8),
            },
            r"have no rows, or differ in rows",
        ),
        ({"test_input_ids": np.zeros((12, 9), np.uint8)}, r"splits of different lengths"),
        ({"test_input_ids": np.zeros((12, 8), np.float32)}, r"not a 2-dimensional array of uint8"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_found(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    def uneven(folder: Path) -> None:
        build(folder)
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)

    with pytest.raises(DataError, match=message):
        prepare_cache(tmp_path, "toy", PARAMETERS, uneven)


@pytest.mark.parametrize("name", ["manifest.json", "test_labels.npy"])
def test_a_pipe_or_a_folder_in_place_of_a_file_is_found(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DataError, match=rf"{name} is missing; delete the folder"):
        open_cache(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(DataError, match=rf"{name} is missing; delete the folder"):
        open_cache(folder)


def test_what_is_in_the_cache_s_place_is_named(tmp_path: Path) -> None:
    place = cache_folder(tmp_path, "toy", PARAMETERS)
    place.write_text("")
    with pytest.raises(DataError, match=rf"{place.name} is not a folder.*remove it"):
        prepare_cache(tmp_path, "toy", PARAMETERS, no_build)
    place.unlink()
    os.mkfifo(f"{place}.lock")
    with pytest.raises(DataError, match=rf"{place.name}\.lock is not a regular file; remove it"):
        prepare_cache(tmp_path, "toy", PARAMETERS, no_build)


LISTOPS = ListOpsConfig(
    min_length=4, max_length=30, sequence_length=32, train=20, validation=5, test=5
)


@pytest.mark.parametrize(
    ("array", "value", "message"),
    [
        ("labels", 10, "labels that are not from 0 to 9"),
        ("lengths", -1, "lengths that are not from 0 to 32"),
        ("lengths", 33, "lengths that are not from 0 to 32"),
        ("input_ids", 17, "input_ids that are not from 0 to 16"),
    ],
)
def test_values_that_the_task_does_not_have_are_found(
    tmp_path: Path, array: str, value: int, message: str
) -> None:
    def other(folder: Path) -> None:
        for name in cache.SPLITS:
            split = create_split(folder, name, 3, 32)
            getattr(split, array)[1] = value

    task = get_task("listops")
    parameters = task.prepare(LISTOPS, tmp_path / "whole").manifest["parameters"]
    prepare_cache(tmp_path / "other", "listops", parameters, other)
    with pytest.raises(DataError, match=f"the train split has {message}; delete the folder"):
        task.prepare(LISTOPS, tmp_path / "other")


def test_samples_of_another_shape_than_the_task_s_are_found(tmp_path: Path) -> None:
    def other(folder: Path) -> None:
        for name in cache.SPLITS:
            create_split(folder, name, 3, 32, documents=2)

    task = get_task("listops")
    parameters = task.prepare(LISTOPS, tmp_path / "whole").manifest["parameters"]
    prepare_cache(tmp_path / "other", "listops", parameters, other)
    with pytest.raises(DataError, match=r"samples of shape \(2, 32\), not \(32,\); delete"):
        task.prepare(LISTOPS, tmp_path / "other", verify=False)


def test_a_root_that_cannot_be_written_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match=r"cannot write the dataset cache .*another data folder"):
        prepare_cache(tmp_path / "file", "toy", PARAMETERS, build)


# Interruption.


def test_a_failing_build_leaves_nothing(tmp_path: Path) -> None:
    def failing(folder: Path) -> None:
        build(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_cache(tmp_path, "toy", PARAMETERS, failing)
    assert [name for name in names(tmp_path) if not name.endswith(".lock")] == []
    prepare_cache(tmp_path, "toy", PARAMETERS, build)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of a test: none outlives it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


# Generates ListOps; after the first chunk of trees it says so and waits to be killed.
HALFWAY = """
import sys
from pathlib import Path
from spion_ds.data.listops import task as listops

distinct_trees = listops._distinct_trees

def first_chunk_then_wait(config):
    yield next(distinct_trees(config))
    print("halfway", flush=True)
    sys.stdin.read()

listops._distinct_trees = first_chunk_then_wait
listops.prepare(listops.ListOpsConfig(train=1000, validation=10, test=10), Path(sys.argv[1]))
"""


def test_a_killed_generation_leaves_no_cache_and_the_next_one_succeeds(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    process = python(HALFWAY, tmp_path)
    processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "halfway\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    left = [name for name in names(tmp_path) if not name.endswith(".lock")]
    assert len(left) == 1, "the killed process was to leave its temporary folder"
    assert ".tmp-" in left[0]
    with pytest.raises(DataError):
        open_cache(tmp_path / left[0])

    config = ListOpsConfig(train=1000, validation=10, test=10)
    dataset = prepare(config, tmp_path)
    assert len(dataset.train) == 1000
    assert names(tmp_path) == [dataset.folder.name, dataset.folder.name + ".lock"]


# Builds the toy cache; says that it builds, and goes on when it is told to.
TOY = """
import sys
from pathlib import Path
from spion_ds.data.storage.cache import SPLITS, create_split, prepare_cache

def build(folder):
    print("building", flush=True)
    sys.stdin.readline()
    for name in SPLITS:
        create_split(folder, name, 4, 8)

dataset = prepare_cache(Path(sys.argv[1]), "toy", {}, build)
print("opened", len(dataset.train), flush=True)
"""


def let_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_processes_that_start_together_build_once(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    first = python(TOY, tmp_path)
    processes.append(first)
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    others = [python(TOY, tmp_path) for _ in range(2)]
    processes.extend(others)
    for other in others:
        let_go(other)  # if it built, it would not have to wait for us
        assert other.stderr is not None
        assert "another process is preparing" in other.stderr.readline()
    out, _ = first.communicate("go\n")
    assert out == "opened 4\n"
    for other in others:
        out, _ = other.communicate()
        assert out == "opened 4\n"  # and never "building"


def test_a_waiting_process_builds_when_the_builder_dies(
    tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    first = python(TOY, tmp_path)
    processes.append(first)
    assert first.stdout is not None
    assert first.stdout.readline() == "building\n"
    second = python(TOY, tmp_path)
    processes.append(second)
    let_go(second)
    assert second.stderr is not None
    assert "another process is preparing" in second.stderr.readline()
    first.kill()
    out, _ = second.communicate()
    assert out == "building\nopened 4\n"
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_file_system_without_locks_still_gets_its_cache(tmp_path: Path, monkeypatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(cache.errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(cache.fcntl, "flock", no_locks)
    assert len(prepare_cache(tmp_path, "toy", PARAMETERS, build).test) == 12


def test_without_locks_the_faster_of_two_builders_wins(tmp_path: Path, monkeypatch) -> None:
    def overtaken(folder: Path) -> None:
        build(folder)
        monkeypatch.setattr(cache.socket, "gethostname", lambda: "another-node")
        prepare_cache(tmp_path, "toy", PARAMETERS, build)

    monkeypatch.setattr(cache, "_NO_LOCKS", (cache.errno.ENOSYS,))
    monkeypatch.setattr(
        cache.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(cache.errno.ENOSYS, ""))
    )
    dataset = prepare_cache(tmp_path, "toy", PARAMETERS, overtaken)
    assert len(dataset.train) == 4
    assert not list(tmp_path.glob("*.tmp-*"))
