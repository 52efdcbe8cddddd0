"""Inputs to predict: text or token ids, and a bad one is named by its line."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from spion_ds.data.listops.task import encode
from spion_ds.data.storage.samples import read_samples
from spion_ds.data.tasks import get_task
from spion_ds.errors import DataError

LISTOPS = get_task("listops")
DATA = LISTOPS.config_class()


def test_text_and_ids_are_the_same_input() -> None:
    lines = ["[MAX 2 [MIN 7 3 ] ]\n", "\n", "12 3 11 8 4 15 15\n", "12, 3,11 ,8,4,15,15"]
    samples = list(read_samples(lines, LISTOPS, DATA, 20, "x"))
    assert [sample.line for sample in samples] == [1, 3, 4]
    for sample in samples:
        assert [ids.tolist() for ids in sample.documents] == [[12, 3, 11, 8, 4, 15, 15]]


def test_expressions_may_have_the_official_files_parentheses() -> None:
    assert np.array_equal(encode("( ( ( [SM 1 ) 2 ) ] )", DATA), encode("[SM 1 2 ]", DATA))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[MAX 2 seven ]", "'seven' is no token of ListOps; allowed: 0 to 9"),
        ("[MAX 2 3", "brackets that do not close"),
        ("[MAX 2 ] 3", "no single expression; allowed: one"),
        ("2 ] [MAX 1", "no single expression"),
        ("[MAX 1 [MIN ] ]", "an operator without operands; allowed: .* one operand or more"),
        ("1 2 17", "token id 17 is not in the vocabulary of listops; allowed: 0 to 16"),
        ("-1", "'-1' is no token"),
        ("1" * 5000, "a number with thousands of digits is no token id"),
        (",", "there is nothing in it"),
        ("1 " * 21, "21 tokens; allowed: up to 20"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^inputs, line 2: .*{message}"):
        list(read_samples(["3", line], LISTOPS, DATA, 20, "inputs"))


def test_an_image_has_all_its_pixels() -> None:
    task = dataclasses.replace(LISTOPS, padded=False)
    [sample] = read_samples(["1 2 3"], task, DATA, 3, "inputs")
    assert len(sample.documents[0]) == 3
    with pytest.raises(DataError, match="line 1: 2 tokens; allowed: 3, all pixels"):
        list(read_samples(["1 2"], task, DATA, 3, "inputs"))


def test_a_task_without_a_text_form_takes_ids() -> None:
    task = dataclasses.replace(LISTOPS, encode=None)
    with pytest.raises(DataError, match="takes whole numbers from 0 to 16"):
        list(read_samples(["[MAX 1 2 ]"], task, DATA, 20, "inputs"))


def test_two_documents_have_a_tab_between_them() -> None:
    task = dataclasses.replace(LISTOPS, documents=2)
    [sample] = read_samples(["1 2\t[SM 1 2 ]"], task, DATA, 20, "inputs")
    assert [ids.tolist() for ids in sample.documents] == [[1, 2], [14, 2, 3, 15]]
    for line, message in (("1 2", "allowed: two, with a tab"), ("1\t ", "nothing in it")):
        with pytest.raises(DataError, match=f"^inputs, line 1: .*{message}"):
            list(read_samples([line], task, DATA, 20, "inputs"))


@pytest.mark.parametrize("max_length", [8, 4000])
def test_reviews_and_papers_are_read_as_far_as_training_reads_them(max_length: int) -> None:
    review = "Not bad. é"
    reviews, papers = get_task("text"), get_task("retrieval")
    data = reviews.config_class(max_length=max_length)
    [sample] = read_samples([review + "\n"], reviews, data, 20, "inputs")
    expected = [byte + 1 for byte in review.encode()[:max_length]]
    assert [ids.tolist() for ids in sample.documents] == [expected]
    data = papers.config_class(max_length=max_length)
    [pair] = read_samples(["one\tlonger than eight\n"], papers, data, 20, "inputs")
    expected = [byte + 1 for byte in b"longer than eight"[:max_length]]
    assert [ids.tolist() for ids in pair.documents] == [[112, 111, 102], expected]
