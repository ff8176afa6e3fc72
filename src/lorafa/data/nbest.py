"""N-best lists: several hypotheses for one utterance, each with its first-pass score and its word errors.

A row is ``{"hypotheses": [{"text": ..., "score": ..., "errors": ...}, ...], "reference": ..., "words": ...}``. Without
``errors`` they are counted against ``reference``; without ``words`` those of ``reference`` are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafa.data.cells import MEND, Row, checked, columns, given, listed
from lorafa.data.files import read_rows
from lorafa.errors import DataError


@dataclass(frozen=True)
class Hypothesis:
    """One text of a list."""

    text: str
    """It may be empty: nothing was heard."""
    score: float
    """The first-pass cost; lower is better."""
    errors: int
    """Words that are wrong in it: substituted, left out or put in."""


@dataclass(frozen=True)
class NBest:
    """The hypotheses for one utterance, in the order of the file."""

    hypotheses: tuple[Hypothesis, ...]
    """One or more."""
    words: int | None
    """Words of the reference, which a word error rate divides by; None where nothing says how many."""
    place: str
    """Where the row stands, for messages."""

    def first_pass(self) -> int:
        """The number of the hypothesis of lowest first-pass cost, the first of equal ones."""
        return min(range(len(self.hypotheses)), key=lambda number: self.hypotheses[number].score)

    def oracle(self) -> int:
        """The number of the hypothesis of fewest errors, the first of equal ones: the best that choosing can do."""
        return min(range(len(self.hypotheses)), key=lambda number: self.hypotheses[number].errors)


def read_nbest(path: Path, *, higher_is_better: bool = False) -> list[NBest]:
    """All n-best lists of a file of rows.

    Args:
        path: of any kind that :func:`lorafa.data.files.read_rows` reads; a csv file has the hypotheses as JSON.
        higher_is_better: the scores are log-probabilities or their like, and are taken with the other sign.

    Raises:
        SourceError: there is no file of rows.
        DataError: it is damaged, holds no rows, or a row is no n-best list.
    """
    sign = -1.0 if higher_is_better else 1.0
    lists = [_nbest(row, place, sign) for place, row in read_rows(path)]
    if not lists:
        raise DataError(f"{path} holds no rows. Each row has 'hypotheses', a list of {_EXAMPLE}.")
    return lists


def word_errors(text: str, reference: str) -> int:
    """The word edit distance: the fewest words to substitute, leave out or put in that make one of the other.

    Words are what stands between spaces, compared as they are written: normalize case and punctuation before.
    """
    said, meant = text.split(), reference.split()
    row = list(range(len(meant) + 1))  # errors of the words so far against each beginning of the reference
    for number, word in enumerate(said, 1):
        left, row = row, [number]
        for at, other in enumerate(meant, 1):
            row.append(min(left[at] + 1, row[-1] + 1, left[at - 1] + (word != other)))
    return row[-1]


def word_error_rate(lists: Sequence[NBest], chosen: Sequence[int]) -> float:
    """Errors of the chosen hypotheses, one a list, over the words of all references.

    Raises:
        DataError: a row does not say how many words its reference has, or there is no word in any.
    """
    total = 0
    for one in lists:
        if one.words is None:
            raise DataError(
                f"{one.place}: no word error rate without the number of words of the reference. Give the row "
                "'reference', or 'words'."
            )
        total += one.words
    if not total:
        raise DataError("There is no word error rate: the references have no word in them.")
    return sum(one.hypotheses[number].errors for one, number in zip(lists, chosen, strict=True)) / total


_EXAMPLE = '{"text": ..., "score": ..., "errors": ...}'


def _nbest(row: Row, place: str, sign: float) -> NBest:
    if "hypotheses" not in row:
        raise DataError(
            f"{place}: no column 'hypotheses'; this row has {columns(row)}. An n-best list is a list of {_EXAMPLE}."
        )
    listing = listed(row["hypotheses"], place, "hypotheses")
    if not isinstance(listing, list) or not listing:
        found = "nothing" if not listing and not isinstance(listing, int | float) else f"{listing!r:.40}"
        raise DataError(f"{place}: column 'hypotheses' holds {found}, expected a list of {_EXAMPLE}. {MEND}")
    reference = row.get("reference")
    if reference is not None:
        reference = _text(reference, f"{place}, column 'reference'")
    hypotheses = tuple(
        _hypothesis(one, f"{place}, hypothesis {number}", reference, sign) for number, one in enumerate(listing, 1)
    )
    counted = [one.get("errors") is None for one in listing]
    if any(counted) and not all(counted):
        raise DataError(
            f"{place}: hypothesis {counted.index(True) + 1} has no 'errors', and others of the list have. Give them to "
            "all, or to none and a 'reference' to count them against."
        )
    words = given(row, "words")
    if words is None:
        return NBest(hypotheses, None if reference is None else len(reference.split()), place)
    if isinstance(words, str) and words.isdecimal():  # as cells of a csv file are
        words = int(words)
    return NBest(hypotheses, _count(words, f"{place}, column 'words'"), place)


def _hypothesis(one: Any, place: str, reference: str | None, sign: float) -> Hypothesis:
    if not isinstance(one, dict):
        raise DataError(f"{place}: found {one!r:.40}, expected {_EXAMPLE}. {MEND}")
    for name in ("text", "score"):
        if one.get(name) is None:
            raise DataError(f"{place}: no {name!r}; it has {columns(one)}. Expected is {_EXAMPLE}. {MEND}")
    text = _text(one["text"], f"{place}, 'text'")
    score = one["score"]
    if isinstance(score, bool) or not isinstance(score, int | float) or not _is_finite(score):
        raise DataError(f"{place}: 'score' is {score!r:.40}, expected a finite number. {MEND}")
    if one.get("errors") is not None:
        errors = _count(one["errors"], f"{place}, 'errors'")
    elif reference is not None:
        errors = word_errors(text, reference)
    else:
        raise DataError(
            f"{place}: no 'errors', and the row has no 'reference' to count them against. Give one of the two."
        )
    return Hypothesis(text, sign * float(score), errors)


def _is_finite(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond all floats
        return False


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: found {value!r:.40}, expected text. {MEND}")
    return checked(value, place)


def _count(value: Any, place: str) -> int:
    if isinstance(value, float) and value.is_integer():  # as tables have them where a column has gaps
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DataError(f"{place}: found {value!r:.40}, expected a whole number, 0 or more. {MEND}")
    return value
