"""N-best lists: what a row says, word errors, rates, and what is refused with its place."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from lorafa.data.nbest import NBest, read_nbest, word_error_rate, word_errors
from lorafa.errors import DataError, SourceError
from toys.records import load, write_rows

TOLD = {
    "hypotheses": [{"text": "a cat sat", "score": 1.5, "errors": 1}, {"text": "the cat sat", "score": 2, "errors": 0}],
    "words": 3,
}
COUNTED = {
    "hypotheses": [{"text": "the cats at", "score": -3.25}, {"text": "", "score": 0}, {"text": "the cat", "score": -3}],
    "reference": "the cat sat",
}


def read(folder: Path, *rows: Any, **settings: Any) -> list[NBest]:
    return read_nbest(write_rows(folder / "lists.jsonl", rows), **settings)


def test_errors_and_words_are_those_of_the_row_or_counted_against_its_reference(tmp_path: Path) -> None:
    told, counted = read(tmp_path, TOLD, COUNTED)
    assert [(one.text, one.score, one.errors) for one in told.hypotheses] == [
        ("a cat sat", 1.5, 1),
        ("the cat sat", 2.0, 0),
    ]
    assert [one.errors for one in counted.hypotheses] == [2, 3, 1]
    assert (told.words, counted.words) == (3, 3)
    assert (told.first_pass(), told.oracle()) == (0, 1)
    assert (counted.first_pass(), counted.oracle()) == (0, 2)
    assert counted.place.endswith("lists.jsonl, line 2")


def test_scores_of_which_the_higher_is_better_are_taken_with_the_other_sign(tmp_path: Path) -> None:
    (told,) = read(tmp_path, TOLD, higher_is_better=True)
    assert [one.score for one in told.hypotheses] == [-1.5, -2.0]
    assert told.first_pass() == 1


def test_errors_of_the_row_count_where_it_has_a_reference_too(tmp_path: Path) -> None:
    (found,) = read(tmp_path, TOLD | {"reference": "one two three four"})
    assert [one.errors for one in found.hypotheses] == [1, 0]
    assert found.words == 3


@pytest.mark.parametrize("ending", [".json", ".jsonl.gz", ".csv", ".tsv", ".parquet"])
def test_lists_are_the_same_in_files_of_every_kind(tmp_path: Path, ending: str) -> None:
    rows = [TOLD | {"reference": "the cat sat"}, TOLD | {"words": 4, "reference": "the cat sat down"}]
    cells = [row | {"hypotheses": json.dumps(row["hypotheses"])} for row in rows]
    there = write_rows(tmp_path / f"d{ending}", cells if ending in (".csv", ".tsv") else rows)
    expected, found = read(tmp_path, *rows), read_nbest(there)
    assert [(one.hypotheses, one.words) for one in found] == [(one.hypotheses, one.words) for one in expected]


@pytest.mark.parametrize(
    ("text", "reference", "errors"),
    [
        ("", "", 0), ("", "a b", 2), ("a b", "", 2), ("a b c", "a b c", 0), ("a x c", "a b c", 1), ("b c", "a b c", 1),
        ("a b c d", "a b d", 1), ("b a", "a b", 2), ("a  b", " a b\n", 0), ("A b", "a b", 1), ("x y z", "a b", 3),
        ("kitten sits on it", "it kitten sits", 3),
    ],
)  # fmt: skip
def test_word_errors_are_the_fewest_changes(text: str, reference: str, errors: int) -> None:
    assert word_errors(text, reference) == word_errors(reference, text) == errors


def test_word_errors_are_a_distance_and_agree_with_the_definition() -> None:
    texts = [" ".join(words) for size in range(4) for words in itertools.product("ab", repeat=size)]

    def by_definition(said: tuple[str, ...], meant: tuple[str, ...]) -> int:
        if not said or not meant:
            return len(said) + len(meant)
        return min(
            by_definition(said[1:], meant) + 1,
            by_definition(said, meant[1:]) + 1,
            by_definition(said[1:], meant[1:]) + (said[0] != meant[0]),
        )

    for one, other in itertools.product(texts, texts):
        assert word_errors(one, other) == by_definition(tuple(one.split()), tuple(other.split()))


def test_a_word_error_rate_is_over_the_words_of_all_lists(tmp_path: Path) -> None:
    lists = read(tmp_path, TOLD, COUNTED | {"reference": "the cat sat on it"})
    assert word_error_rate(lists, [0, 2]) == (1 + 3) / 8
    assert word_error_rate(lists, [one.oracle() for one in lists]) == 3 / 8


def test_a_rate_without_words_to_divide_by_is_refused(tmp_path: Path) -> None:
    lists = read(tmp_path, TOLD, {"hypotheses": TOLD["hypotheses"]})
    with pytest.raises(DataError, match=r"lists\.jsonl, line 2: no word error rate without .* Give .* 'reference'"):
        word_error_rate(lists, [0, 0])
    silence = read(tmp_path, COUNTED | {"reference": ""})
    with pytest.raises(DataError, match="the references have no word"):
        word_error_rate(silence, [0])


FIRST = r"line 1, hypothesis 1"


def changed(**values: Any) -> dict[str, Any]:
    """A row whose first hypothesis has other values; None takes one out."""
    first = {name: value for name, value in (TOLD["hypotheses"][0] | values).items() if value is not None}  # type: ignore[index]
    return TOLD | {"hypotheses": [first, TOLD["hypotheses"][1]]}  # type: ignore[index]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "completion": "b"}, r"line 1: no column 'hypotheses'; this row has prompt, completion\."),
        (TOLD | {"hypotheses": []}, r"line 1: column 'hypotheses' holds nothing, expected a list of \{\"text\""),
        (TOLD | {"hypotheses": None}, r"line 1: column 'hypotheses' holds nothing"),
        (TOLD | {"hypotheses": 5}, r"line 1: column 'hypotheses' holds 5"),
        (TOLD | {"hypotheses": "a cat"}, r"line 1: column 'hypotheses' holds 'a cat'"),
        (TOLD | {"hypotheses": "[{]"}, r"line 1, column 'hypotheses': not valid JSON"),
        (TOLD | {"hypotheses": ["a cat"]}, rf"{FIRST}: found 'a cat', expected \{{\"text\""),
        (changed(text=None), rf"{FIRST}: no 'text'; it has score, errors\."),
        (changed(text=7), rf"{FIRST}, 'text': found 7, expected text"),
        (changed(text="\ud800"), rf"{FIRST}, 'text': '\\ud800' at character 1 is half a character"),
        (changed(score=None), rf"{FIRST}: no 'score'"),
        (changed(score="1.5"), rf"{FIRST}: 'score' is '1.5', expected a finite number"),
        (changed(score=True), rf"{FIRST}: 'score' is True"),
        (changed(score=float("nan")), rf"{FIRST}: 'score' is nan"),
        (changed(score=10**400), rf"{FIRST}: 'score' is 10000"),
        (changed(errors=-1), rf"{FIRST}, 'errors': found -1, expected a whole number, 0 or more"),
        (changed(errors=0.5), rf"{FIRST}, 'errors': found 0\.5"),
        (changed(errors=False), rf"{FIRST}, 'errors': found False"),
        (changed(errors=None), rf"{FIRST}: no 'errors', and the row has no 'reference'"),
        (changed(errors=None) | {"reference": "a"}, r"line 1: hypothesis 1 has no 'errors', and others .* have"),
        (TOLD | {"reference": 3}, r"line 1, column 'reference': found 3, expected text"),
        (TOLD | {"words": -3}, r"line 1, column 'words': found -3, expected a whole number"),
        (TOLD | {"words": "many"}, r"line 1, column 'words': found 'many'"),
    ],
)
def test_a_row_that_is_no_list_is_named(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    (tmp_path / "lists.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"lists\.jsonl, {words}"):
        read_nbest(tmp_path / "lists.jsonl")


def test_a_file_of_no_lists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lists.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"lists\.jsonl holds no rows\. Each row has 'hypotheses'"):
        read_nbest(tmp_path / "lists.jsonl")
    with pytest.raises(SourceError, match=r"No file '.*other\.jsonl'\. Did you mean 'lists\.jsonl'"):
        read_nbest(tmp_path / "other.jsonl")


def test_records_to_train_on_are_no_n_best_lists_and_the_error_points_to_the_recipe(tmp_path: Path) -> None:
    there = write_rows(tmp_path / "lists.jsonl", [TOLD, TOLD])
    words = r"lists\.jsonl holds n-best lists \(its columns are: hypotheses, words\), .* recipes/rescoring\.py trains"
    with pytest.raises(DataError, match=words):
        load(there)
