"""The retrieval task: official files, streamed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spion_ds.data import retrieval
from spion_ds.data.retrieval import FILES, RetrievalConfig, check_source, prepare
from spion_ds.errors import ConfigError, DataError

TINY = RetrievalConfig(max_length=20, sequence_length=32)


def write(folder: Path, rows: int = 6) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split, name in FILES.items():
        lines = [
            f'{float(row % 2)}\tP{row}\tQ{row}\t{split} "first {row}\t{"é" * row} second'
            for row in range(rows)
        ]
        # The last line may lack its end.
        (folder / name).write_bytes("\n".join(lines).encode())


def test_pairs_become_bytes_plus_one(tmp_path: Path) -> None:
    write(tmp_path / "lra_release" / "tsv_data")
    config = replace(TINY, source=str(tmp_path))
    check_source(config)
    data = prepare(config, tmp_path / "data")
    for name in ("train", "validation", "test"):
        split = getattr(data, name)
        assert split.input_ids.shape == (6, 2, 32)
        assert split.lengths.shape == (6, 2)
        assert split.labels.tolist() == [0, 1, 0, 1, 0, 1]
        for row in range(6):
            texts = [f'{name} "first {row}', f"{'é' * row} second"]
            for document, content in enumerate(texts):
                length = split.lengths[row, document]
                ids = split.input_ids[row, document]
                assert bytes((ids[:length] - 1).astype(np.uint8)) == content.encode()[:20]
                assert (ids[length:] == 0).all()


def test_a_cache_belongs_to_the_files(tmp_path: Path) -> None:
    write(tmp_path)
    config = replace(TINY, source=str(tmp_path))
    first = prepare(config, tmp_path / "data")
    assert prepare(config, tmp_path / "data").folder == first.folder
    write(tmp_path, rows=7)
    assert len(prepare(config, tmp_path / "data").train) == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"2.0\ta\tb\tx\ty", r"line 2: expected label 0 or 1.*5 columns from b'2\.0'"),
        (b"1.0\ta\tb\tx", r"line 2: expected label 0 or 1.*4 columns"),
        (b"", r"line 2: expected label 0 or 1.*1 columns"),
    ],
)
def test_damaged_lines_are_named(tmp_path: Path, line: bytes, message: str) -> None:
    write(tmp_path)
    (tmp_path / FILES["train"]).write_bytes(b"1.0\ta\tb\tx\ty\n" + line + b"\n")
    with pytest.raises(DataError, match=message):
        prepare(replace(TINY, source=str(tmp_path)), tmp_path / "data")
    assert not [path for path in (tmp_path / "data").glob("retrieval-*") if path.is_dir()]


def test_missing_files_and_the_address_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"data\.source is not set.*{retrieval.ADDRESS}"):
        check_source(TINY)
    write(tmp_path)
    (tmp_path / FILES["validation"]).unlink()
    with pytest.raises(DataError, match=r"new_aan_pairs\.eval\.tsv is missing"):
        check_source(replace(TINY, source=str(tmp_path)))
    (tmp_path / FILES["validation"]).write_bytes(b"")
    with pytest.raises(DataError, match=r"eval\.tsv is empty"):
        check_source(replace(TINY, source=str(tmp_path)))


def test_values_out_of_range_are_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length is 40"):
        replace(TINY, max_length=40).validate()
