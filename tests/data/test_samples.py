"""Inputs to predict: text or token ids, and a bad one is named by its line."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from spion_ds.data import get_task
from spion_ds.data.listops import encode
from spion_ds.data.samples import read_samples
from spion_ds.errors import DataError

LISTOPS = get_task("listops")


def test_text_and_ids_are_the_same_input() -> None:
    lines = ["[MAX 2 [MIN 7 3 ] ]\n", "\n", "12 3 11 8 4 15 15\n", "12, 3,11 ,8,4,15,15"]
    samples = list(read_samples(lines, LISTOPS, 20, "x"))
    assert [sample.line for sample in samples] == [1, 3, 4]
    for sample in samples:
        assert [ids.tolist() for ids in sample.documents] == [[12, 3, 11, 8, 4, 15, 15]]


def test_expressions_may_have_the_official_files_parentheses() -> None:
    assert np.array_equal(encode("( ( ( [SM 1 ) 2 ) ] )"), encode("[SM 1 2 ]"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[MAX 2 seven ]", "'seven' is no token of ListOps; allowed: 0 to 9"),
        ("[MAX 2 3", r"1 bracket\(s\) do not close"),
        ("[MAX 2 ] 3", "ends at token 3 of 4"),
        ("2 ] [MAX 1", "ends at token 1 of 4"),
        ("1 2 17", "token id 17 is not in the vocabulary of listops; allowed: 0 to 16"),
        ("-1", "'-1' is no token"),
        (",", "there is nothing in it"),
        ("1 " * 21, "21 tokens; allowed: up to 20"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^inputs, line 2: .*{message}"):
        list(read_samples(["3", line], LISTOPS, 20, "inputs"))


def test_a_task_without_a_text_form_takes_ids() -> None:
    task = dataclasses.replace(LISTOPS, encode=None)
    with pytest.raises(DataError, match="takes whole numbers from 0 to 16"):
        list(read_samples(["[MAX 1 2 ]"], task, 20, "inputs"))


def test_two_documents_have_a_tab_between_them() -> None:
    task = dataclasses.replace(LISTOPS, documents=2)
    [sample] = read_samples(["1 2\t[SM 1 2 ]"], task, 20, "inputs")
    assert [ids.tolist() for ids in sample.documents] == [[1, 2], [14, 2, 3, 15]]
    for line, message in (("1 2", "allowed: two, with a tab"), ("1\t ", "nothing in it")):
        with pytest.raises(DataError, match=f"^inputs, line 1: .*{message}"):
            list(read_samples([line], task, 20, "inputs"))


def test_reviews_and_papers_come_as_they_are() -> None:
    [sample] = read_samples(["Not bad. é\n"], get_task("text"), 20, "inputs")
    assert [ids.tolist() for ids in sample.documents] == [[b + 1 for b in "Not bad. é".encode()]]
    [pair] = read_samples(["one\ttwo\n"], get_task("retrieval"), 20, "inputs")
    assert [ids.tolist() for ids in pair.documents] == [[112, 111, 102], [117, 120, 112]]
