"""The ListOps task: distribution, evaluation, official files, trivial readers, command line."""

from __future__ import annotations

import hashlib
import random
import re
import runpy
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spion_ds.data.listops import task as listops
from spion_ds.data.listops.official import OFFICIAL_FILES, parse_official
from spion_ds.data.listops.task import ListOpsConfig, fill_splits, prepare
from spion_ds.data.listops.trees import TreeShape, draw_trees, evaluate, truncated_value
from spion_ds.data.storage.cache import Split
from spion_ds.data.tasks import get_task
from spion_ds.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ListOpsConfig(
    min_length=20, max_length=120, sequence_length=128, train=300, validation=40, test=40
)
WORDS = ["<pad>", *"0123456789", "[MIN", "[MAX", "[MED", "[SM", "]", "<unknown>"]
PUBLISHED = TreeShape(min_length=500, max_length=2000, max_depth=10, max_operands=10)


def empty_split(config: ListOpsConfig, count: int) -> Split:
    return Split(
        np.zeros((count, config.sequence_length), np.uint8),
        np.zeros(count, np.int32),
        np.zeros(count, np.uint8),
    )


def generated(config: ListOpsConfig) -> list[Split]:
    splits = [empty_split(config, n) for n in (config.train, config.validation, config.test)]
    fill_splits(config, splits)
    return splits


def text_of(ids: np.ndarray) -> str:
    return " ".join(WORDS[token] for token in ids)


def ids_of(text: str) -> np.ndarray:
    return np.array([WORDS.index(word) for word in text.split()], np.uint8)


def parse_tree(text: str) -> int | tuple[str, list]:
    """An independent reading of the bracket string, by way of Python's own parser."""
    python = text
    for operator in ("MIN", "MAX", "MED", "SM"):
        python = python.replace(f"[{operator}", f"('{operator}', [")
    words = python.replace("]", "])").split()
    # "('MIN', [" is two words, and after every complete operand stands a comma.
    return eval(" ".join(word + ("," if word[-1] in "0123456789)" else "") for word in words))[0]


def recursive_value(tree: int | tuple[str, list]) -> int:
    if isinstance(tree, int):
        return tree
    operator, operands = tree
    values = [recursive_value(operand) for operand in operands]
    by_name = {
        "MIN": min(values),
        "MAX": max(values),
        "MED": int(statistics.median(values)),
        "SM": sum(values) % 10,
    }
    return by_name[operator]


def tree_depth(tree: int | tuple[str, list]) -> int:
    return 1 if isinstance(tree, int) else 1 + max(tree_depth(operand) for operand in tree[1])


def arities(tree: int | tuple[str, list]) -> list[int]:
    if isinstance(tree, int):
        return []
    return [len(tree[1])] + [n for operand in tree[1] for n in arities(operand)]


@pytest.fixture(scope="module")
def published_trees() -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """About 6 800 trees of the published shape, and how many draws they took."""
    draws = 81_920
    stream = np.random.PCG64(np.random.SeedSequence(3))
    return *draw_trees(PUBLISHED, draws, stream, 2048), draws


# Evaluation.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MIN 4 9 2 ]", 2),
        ("[MAX 4 9 2 ]", 9),
        ("[SM 4 9 2 ]", 5),
        ("[MED 4 9 2 ]", 4),
        ("[MED 9 0 4 5 ]", 4),  # 4.5, truncated
        ("[MED 1 2 ]", 1),
        ("[MAX 1 [MIN 8 [SM 9 9 ] ] 3 ]", 8),
    ],
)
def test_evaluate(text: str, value: int) -> None:
    assert evaluate(ids_of(text)) == value
    assert evaluate(ids_of(text + " <pad> <pad>").tolist()) == value


@pytest.mark.parametrize(
    "text", ["[MIN 4 9", "4 ]", "4 9", "", "[SM ]", "[MIN <unknown> 2 ]", "[MIN 1 ] ] [MAX 2"]
)
def test_evaluate_refuses_what_is_no_expression(text: str) -> None:
    with pytest.raises(DataError):
        evaluate(ids_of(text))


def test_labels_agree_with_two_independent_evaluations() -> None:
    train, *_ = generated(replace(SMALL, train=600))
    for ids, length, label in zip(train.input_ids, train.lengths, train.labels, strict=True):
        assert evaluate(ids) == label
        assert recursive_value(parse_tree(text_of(ids[:length]))) == label


def test_labels_of_published_trees_agree_with_the_evaluator(published_trees) -> None:
    ids, lengths, labels, _ = published_trees
    for row in range(0, len(ids), 20):
        assert evaluate(ids[row, : lengths[row]]) == labels[row]


def test_truncated_value_leaves_deeper_operators_out() -> None:
    ids = ids_of("[MAX 2 [MIN 5 [SM 1 2 ] ] [MED [SM 9 9 ] [MAX 7 8 ] ] ]")
    assert truncated_value(ids, 0) is None
    assert truncated_value(ids, 1) == 2
    assert truncated_value(ids, 2) == 5  # MIN sees its 5; MED has lost all of its operands
    assert truncated_value(ids, 3) == evaluate(ids) == 8


# The distribution.


def test_lengths_are_within_the_exclusive_bounds_and_padding_is_zero() -> None:
    for split in generated(SMALL):
        assert split.lengths.min() > SMALL.min_length
        assert split.lengths.max() < SMALL.max_length
        columns = np.arange(SMALL.sequence_length)
        np.testing.assert_array_equal(split.input_ids != 0, columns < split.lengths[:, None])


def test_every_length_between_the_bounds_occurs_and_no_other() -> None:
    config = replace(SMALL, min_length=30, max_length=36, train=400)
    train, *_ = generated(config)
    assert set(train.lengths.tolist()) == set(range(31, 36))


def test_depth_and_operands_keep_to_their_limits_and_reach_them() -> None:
    train, *_ = generated(replace(SMALL, max_depth=4, max_operands=5, train=600))
    trees = [
        parse_tree(text_of(ids[:n])) for ids, n in zip(train.input_ids, train.lengths, strict=True)
    ]
    assert max(map(tree_depth, trees)) == 4
    operands = {count for tree in trees for count in arities(tree)}
    assert operands == {2, 3, 4, 5}  # both ends included


def test_trees_are_distinct_over_all_splits() -> None:
    # Few trees are this short, so draws repeat often.
    config = replace(SMALL, min_length=3, max_length=6, train=3000, validation=200, test=200)
    splits = generated(config)
    trees = {ids.tobytes() for split in splits for ids in split.input_ids}
    assert len(trees) == 3400


def test_published_settings_keep_eight_percent_of_draws(published_trees) -> None:
    ids, lengths, _, draws = published_trees
    # A direct simulation of 1.2 million draws keeps 8.304 % with mean length 1035. Of this many
    # draws the standard error is 0.10 % and 5 tokens: 4 of them.
    assert len(ids) / draws == pytest.approx(0.0830, abs=0.0040)
    assert lengths.mean() == pytest.approx(1035, abs=20)
    assert lengths.min() > 500
    assert lengths.max() < 2000


def test_published_classes_are_balanced_as_known(published_trees) -> None:
    labels = published_trees[2]
    shares = np.bincount(labels, minlength=10) / len(labels)
    known = [0.170, 0.089, 0.077, 0.083, 0.090, 0.087, 0.076, 0.073, 0.088, 0.168]
    # Shares of 2.5 million draws; the standard error here is at most 0.0046: 4 of them.
    np.testing.assert_allclose(shares, known, atol=0.018)


def test_unbounded_draws_have_the_branching_of_the_specification() -> None:
    # With every length accepted: 3 in 4 roots are digits, operators and digits are uniform.
    shape = TreeShape(min_length=0, max_length=5000, max_depth=3, max_operands=4)
    ids, lengths, _ = draw_trees(shape, 40_000, np.random.PCG64(1), 5000)
    assert len(ids) == 40_000
    # Four standard errors of a share p of n: 4·sqrt(p(1-p)/n).
    assert (lengths == 1).mean() == pytest.approx(0.75, abs=0.0087)
    operators = ids[:, 0][lengths > 1]
    np.testing.assert_allclose(np.bincount(operators)[11:] / len(operators), 0.25, atol=0.018)
    digits = ids[:, 0][lengths == 1]
    np.testing.assert_allclose(np.bincount(digits)[1:] / len(digits), 0.1, atol=0.007)
    # E[length] = a(1): a(3) = 1, a(d) = 3/4 + 1/4·(2 + 3·a(d+1)), so a(2) = 2, a(1) = 2.75.
    assert lengths.mean() == pytest.approx(2.75, abs=4 * lengths.std() / 200)


def test_aborting_long_draws_does_not_change_what_is_accepted() -> None:
    # Plain recursion without any abort, over the same shape.
    shape = TreeShape(min_length=30, max_length=90, max_depth=6, max_operands=10)
    generator = random.Random(5)

    def length(depth: int) -> int:
        if depth == shape.max_depth or generator.random() > 0.25:
            return 1
        return 2 + sum(length(depth + 1) for _ in range(generator.randint(2, 10)))

    plain = [n for n in (length(1) for _ in range(40_000)) if 30 < n < 90]
    _, drawn, _ = draw_trees(shape, 80_000, np.random.PCG64(2), 90)
    # Each share is near 6 %, each mean has standard deviation 17 over >= 2 000 trees; 4 errors.
    assert len(drawn) / 80_000 == pytest.approx(len(plain) / 40_000, abs=0.006)
    assert drawn.mean() == pytest.approx(statistics.mean(plain), abs=1.9)


def test_the_set_of_a_seed_never_changes() -> None:
    # If this fails on purpose, raise GENERATOR_VERSION: caches of the old trees must not be used.
    assert listops.GENERATOR_VERSION == 1
    digest = hashlib.sha256(b"".join(split.input_ids.tobytes() for split in generated(SMALL)))
    assert digest.hexdigest()[:16] == "a3d1db3637444ce8"


def test_seeds_give_different_sets_and_a_seed_the_same_one() -> None:
    first, again = generated(SMALL)[0], generated(SMALL)[0]
    other = generated(replace(SMALL, seed=1))[0]
    np.testing.assert_array_equal(first.input_ids, again.input_ids)
    rows = {ids.tobytes() for ids in first.input_ids}
    # Trees of 20 and more tokens do not meet by chance.
    assert not rows & {ids.tobytes() for ids in other.input_ids}


def test_a_larger_training_split_begins_with_the_smaller_one() -> None:
    small, large = generated(SMALL)[0], generated(replace(SMALL, train=2000))[0]
    np.testing.assert_array_equal(large.input_ids[: len(small)], small.input_ids)


# Configuration.


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"train": 0}, "data.train"),
        ({"validation": -1}, "data.validation"),
        ({"test": 1.5}, "data.test"),
        ({"seed": -1}, "data.seed"),
        ({"seed": True}, "data.seed"),
        ({"min_length": -1}, "data.min_length"),
        ({"max_length": 500}, "data.max_length"),
        ({"max_length": 501}, "data.max_length"),
        ({"max_depth": 1}, "data.max_depth"),
        ({"max_operands": 1}, "data.max_operands"),
        ({"sequence_length": 1998}, "data.sequence_length"),
        ({"source": ""}, "data.source"),
    ],
)
def test_validate_names_the_key_and_what_is_allowed(change: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} is .*allowed"):
        replace(ListOpsConfig(), **change).validate()


def test_the_longest_tree_fits_exactly() -> None:
    ListOpsConfig(sequence_length=1999).validate()


@pytest.mark.parametrize(
    "impossible",
    [
        {"max_depth": 2, "min_length": 500, "max_length": 2000},  # at most 12 tokens
        {"max_depth": 2, "min_length": 3, "max_length": 5},  # 400 trees, more are asked for
    ],
)
def test_an_impossible_configuration_ends_with_an_error(impossible: dict, monkeypatch) -> None:
    monkeypatch.setattr(listops, "BARREN_DRAWS", 200_000)
    config = replace(SMALL, sequence_length=2048, train=500, **impossible)
    with pytest.raises(ConfigError, match=r"data\.max_depth 2.*distinct trees and then none"):
        generated(config)


# Official files.


def nested(tree: int | tuple[str, list]) -> str:
    """The official files' way to write a tree: "( ( ( [MIN 1 ) 2 ) ] )"."""
    if isinstance(tree, int):
        return str(tree)
    text = f"[{tree[0]}"
    for operand in tree[1]:
        text = f"( {text} {nested(operand)} )"
    return f"( {text} ] )"


def write_official(folder: Path, splits: list[Split], newline: str = "\r\n") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in zip(OFFICIAL_FILES.values(), splits, strict=True):
        lines = ["Source\tTarget"]
        for ids, length, label in zip(split.input_ids, split.lengths, split.labels, strict=True):
            lines.append(f"{nested(parse_tree(text_of(ids[:length])))}\t{label}")
        (folder / name).write_text(newline.join(lines) + newline, newline="")


@pytest.fixture
def official(tmp_path: Path) -> ListOpsConfig:
    config = replace(SMALL, train=30, validation=10, test=10)
    write_official(tmp_path / "official", generated(config))
    return replace(SMALL, source=str(tmp_path / "official"))


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("below", ["", "listops-1000"])
def test_official_files_round_trip(tmp_path: Path, newline: str, below: str) -> None:
    splits = generated(replace(SMALL, train=30, validation=10, test=10))
    write_official(tmp_path / "official" / below, splits, newline)
    config = ListOpsConfig(source=str(tmp_path / "official"), sequence_length=128)
    listops.check_source(config)
    dataset = prepare(config, tmp_path / "data")
    for read, written in zip(
        (dataset.train, dataset.validation, dataset.test), splits, strict=True
    ):
        np.testing.assert_array_equal(read.input_ids, written.input_ids)
        np.testing.assert_array_equal(read.lengths, written.lengths)
        np.testing.assert_array_equal(read.labels, written.labels)


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("( ( ( [MIN 1 ) seven ) ] )", "seven"),
        ("[MEDIAN 1 5 8 ]", "[MEDIAN"),
        ("[ MAX 2 3 ]", "["),
        # With a token that is unknown the rest was not looked at.
        ("[MAX x ] 3 ] [MIN", "x"),
        ("hello world", "hello"),
    ],
)
def test_official_files_and_inputs_refuse_the_same_tokens(
    tmp_path: Path, text: str, token: str
) -> None:
    path = tmp_path / "basic_val.tsv"
    path.write_text(f"Source\tTarget\n{text}\t1\n")
    message = f"{re.escape(repr(token))} is no token of ListOps; allowed: 0 to 9"
    with pytest.raises(DataError, match=rf"^{path}, line 2: {message}.*unpack"):
        list(parse_official(path, 2048))
    with pytest.raises(DataError, match=f"^{message}"):
        listops.encode(text, None)


def test_changed_official_files_get_another_cache(official: ListOpsConfig, tmp_path: Path) -> None:
    before = prepare(official, tmp_path / "data")
    path = Path(official.source) / "basic_test.tsv"
    path.write_text("Source\tTarget\n( ( ( [MAX 1 ) 8 ) ] )\t8\n")
    after = prepare(official, tmp_path / "data")
    assert before.folder != after.folder
    assert after.test.labels.tolist() == [8]


def test_a_missing_official_file_is_named(official: ListOpsConfig, tmp_path: Path) -> None:
    (Path(official.source) / "basic_val.tsv").unlink()
    with pytest.raises(DataError, match=r"lacks basic_val\.tsv; give the folder"):
        listops.check_source(official)
    with pytest.raises(DataError, match=r"basic_val\.tsv"):
        prepare(official, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_misspelt_source_is_recognised() -> None:
    with pytest.raises(DataError, match="did you mean 'generate'"):
        listops.check_source(ListOpsConfig(source="genrate"))


LINE = "( ( ( [MIN 1 ) 2 ) ] )"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"basic_train\.tsv, line 1: expected the header.*found nothing"),
        ("Source\tTarget\n", r"basic_train\.tsv, line 2: .*truncated"),
        (f"source,target\n{LINE}\t1\n", r"line 1: expected the header 'Source<TAB>Target'"),
        (f"Source\tTarget\n{LINE}\t1\n{LINE}", r"no tab .*truncated"),
        (f"Source\tTarget\n{LINE}\t1\n( ( [MI", r"no tab .*truncated"),
        (f"Source\tTarget\n{LINE}\t1\n{LINE}\t", r"the value nothing"),
        (f"Source\tTarget\n{LINE}\t10\n", r"line 2: .*the value '10'.*not a digit"),
        (f"Source\tTarget\n{LINE}\t-1\n", r"line 2: .*the value '-1'"),
        (f"Source\tTarget\n{LINE}\tMIN\n", r"line 2: .*the value 'MIN'"),
        ("Source\tTarget\n( [MIN 1 2\t1\n", r"line 2: .*brackets that do not close"),
        ("Source\tTarget\n\t1\n", r"line 2: .*no expression"),
        (
            "Source\tTarget\n[MAX 1 [MIN ] ]\t1\n",
            r"line 2: an operator without operands; allowed: .* one operand or more",
        ),
        ("Source\tTarget\n[MAX 1 ] [MIN 2 ]\t1\n", r"line 2: no single expression"),
        ("Source\tTarget\n1 ] [MAX 2\t1\n", r"line 2: no single expression"),
        (f"Source\tTarget\n{LINE}\t1\n\n", r"no tab"),
        (
            "Source\tTarget\n" + "[MAX " + "5 " * 127 + "]\t5\n",
            r"129 tokens do not fit data.sequence_length",
        ),
    ],
)
def test_damaged_official_files_are_errors_before_anything_is_written(
    official: ListOpsConfig, tmp_path: Path, content: str, message: str
) -> None:
    path = Path(official.source) / "basic_train.tsv"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        listops.check_source(official)
    with pytest.raises(DataError, match=message):
        prepare(official, tmp_path / "data")
    assert not (tmp_path / "data").exists()
    with pytest.raises(DataError, match=r"basic_train\.tsv, line \d"):
        list(parse_official(path, 128))


def test_damage_in_the_middle_leaves_no_cache(official: ListOpsConfig, tmp_path: Path) -> None:
    path = Path(official.source) / "basic_train.tsv"
    lines = path.read_text().splitlines()
    lines[6] = lines[6].replace("\t", " ")
    path.write_text("\n".join(lines))
    listops.check_source(official)  # looks at the ends only
    with pytest.raises(DataError, match=r"basic_train\.tsv, line 7: .*no tab"):
        prepare(official, tmp_path / "data")
    assert [entry.suffix for entry in (tmp_path / "data").iterdir()] == [".lock"]


# Trivial readers.


def split_of(*rows: tuple[str, int]) -> Split:
    split = empty_split(ListOpsConfig(sequence_length=32), len(rows))
    for row, (text, label) in enumerate(rows):
        ids = ids_of(text)
        split.input_ids[row, : len(ids)] = ids
        split.lengths[row], split.labels[row] = len(ids), label
    return split


def test_baselines_count_on_train_and_score_on_the_other_split() -> None:
    train = split_of(
        ("[MIN 0 3 ]", 0), ("[MIN 0 4 ]", 0), ("[MAX 9 3 ]", 9), ("[MAX 9 4 ]", 9), ("[SM 1 8 ]", 9)
    )
    split = split_of(
        ("[MIN 0 5 ]", 0), ("[MIN 6 5 ]", 5), ("[MAX 9 5 ]", 9), ("[MED 9 9 [MIN 9 9 ] ]", 9)
    )
    assert listops.majority_baseline(train, split) == 0.5  # always 9
    assert listops.root_operator_baseline(train, split) == 0.75  # MED unseen: the majority, 9
    assert listops.depth_baseline(train, split, 0) == 0.75
    assert listops.depth_baseline(train, split, 1) == 1.0


def test_trivial_readers_score_as_published() -> None:
    config = ListOpsConfig(train=4000, validation=1, test=2000)
    train, _, test = generated(config)
    accuracies = listops.trivial_baselines(train, test)
    published = {
        "majority class": 0.17,
        "root operator only": 0.365,
        "exact down to depth 1": 0.48,
        "exact down to depth 2": 0.67,
        "exact down to depth 3": 0.78,
        "exact down to depth 4": 0.87,
    }
    # Both numbers come from 2 000 sequences: a standard error of 1.5 points between them; 3.
    assert accuracies == pytest.approx(published, abs=0.045)


def test_unknown_tokens_leave_the_depth_readers_out() -> None:
    split = split_of(("[MIN <unknown> 3 ]", 3))
    assert set(listops.trivial_baselines(split, split)) == {"majority class", "root operator only"}


# The task table and the command line.


def test_an_unknown_task_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'listops'"):
        get_task("listop")


def prepare_data(*arguments: str) -> int:
    return runpy.run_path(str(REPOSITORY / "launch/prepare_data.py"))["main"](arguments)


def test_the_command_line_prepares_and_describes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = prepare_data(
        "--data_dir", str(tmp_path), "train=100", "data.validation=20", "test=20",
        "min_length=20", "max_length=100", "sequence_length=128",
    )  # fmt: skip
    said = capsys.readouterr()
    assert code == 0, said.err
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    assert f"data: {folder}" in said.out
    assert "train: 100 sequences" in said.out
    assert "root operator only" in said.out


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("trian=5", "error: unknown key 'data.trian' (did you mean 'data.train'"),
        ("train=many", "error: data.train is 'many'; wanted: a whole number"),
        ("train", "error: data.train has no value"),
        ("train=0", "error: data.train is 0; allowed: a whole number from 1 up"),
        ("train={a", "error: the value of 'train={a' is not YAML"),
        ("train=2001-99-99", "error: the value of 'train=2001-99-99' is not YAML"),
        ("train=" + "[" * 500, "error: the value of 'train=[[["),
        ("--task=imdb", "error: unknown task 'imdb'"),
        ("source=/nowhere", "error: data.source is '/nowhere'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], argument: str, message: str
) -> None:
    assert prepare_data("--data_dir", str(tmp_path / "data"), argument) == 2
    said = capsys.readouterr()
    assert said.err.startswith(message)
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert not (tmp_path / "data").exists()
