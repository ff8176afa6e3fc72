"""The questions of the eight commonsense tasks on the Hub, in the words of LLM-Adapters (Hu et al. 2023,
arXiv:2304.01933).

Each task's own data set has its rows in a form of its own. Here they become what the published files hold: an
instruction that ends with the words one of which is an answer, and that word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafa.data.cells import MEND, Row, text_of
from lorafa.errors import DataError
from lorafa.evals.benchmark import Official, require_columns

CONVERTED = "refs/convert/parquet"
"""The branch with the rows as tables, of data sets that are a script otherwise."""


@dataclass(frozen=True)
class Published:
    """A task as LLM-Adapters writes it."""

    official: Official
    """Where its questions are."""
    columns: tuple[str, ...]
    """What each row has."""
    before: str
    """What stands before the question."""
    word: str
    """What an answer is called: "ending" of ending1, ending2 ..."""
    asked: Callable[[Row, str], tuple[str, Sequence[str], int]]
    """(row, where it stands) -> the question, its answers, and which of them is right, from 0."""
    between: str = " "
    """What stands between two answers."""
    after: str = "\n\n"
    """What stands between the last answer and the words."""

    def row(self, row: Row, place: str) -> dict[str, str]:
        """``instruction`` and ``answer`` of a row of the Hub.

        Raises:
            DataError: the row has a column less, or no right answer.
        """
        require_columns([(place, row)], self.columns, f"the columns {', '.join(self.columns)}")
        question, answers, right = self.asked(row, place)
        words = [f"{self.word}{number}" for number, _ in enumerate(answers, 1)]
        if right not in range(len(answers)):
            raise DataError(f"{place}: none of the {len(answers)} answers is the right one. {MEND}")
        listed = self.between.join(f"{word.capitalize()}: {text}" for word, text in zip(words, answers, strict=True))
        form = f"Answer format: {'/'.join(words)}"
        return {"instruction": f"{self.before}{question}\n\n{listed}{self.after}{form}", "answer": words[right]}


class BoolQ(Published):
    """The one whose answers are no list."""

    def row(self, row: Row, place: str) -> dict[str, str]:
        """As :meth:`Published.row`."""
        require_columns([(place, row)], self.columns, f"the columns {', '.join(self.columns)}")
        question, words, right = self.asked(row, place)
        form = f"Answer format: {'/'.join(words)}"
        return {"instruction": f"{self.before}{question}?\n\n{form}", "answer": words[right]}


def _number(row: Row, place: str, column: str, first: int) -> int:
    """Which answer a column names, from 0: a number or its text, counted from ``first``."""
    text = str(row[column]).strip()
    if not text.isdecimal():
        raise DataError(f"{place}: {column} is {row[column]!r:.40}, expected a number. {MEND}")
    return int(text) - first


def _texts(row: Row, place: str, *columns: str) -> list[str]:
    return [text_of(row, place, column) for column in columns]


def _boolq(row: Row, place: str) -> tuple[str, Sequence[str], int]:
    if not isinstance(row["answer"], bool):
        raise DataError(f"{place}: answer is {row['answer']!r:.40}, expected true or false. {MEND}")
    return text_of(row, place, "question"), ("true", "false"), int(not row["answer"])


def _piqa(row: Row, place: str) -> tuple[str, Sequence[str], int]:
    return text_of(row, place, "goal"), _texts(row, place, "sol1", "sol2"), _number(row, place, "label", 0)


def _social(row: Row, place: str) -> tuple[str, Sequence[str], int]:
    asked = " ".join(_texts(row, place, "context", "question"))
    return asked, _texts(row, place, "answerA", "answerB", "answerC"), _number(row, place, "label", 1)


def _hellaswag(row: Row, place: str) -> tuple[str, Sequence[str], int]:
    asked, endings = ": ".join(_texts(row, place, "activity_label", "ctx")), row["endings"]
    if not isinstance(endings, list):
        raise DataError(f"{place}: endings is {endings!r:.40}, expected a list. {MEND}")
    return asked, [str(ending) for ending in endings], _number(row, place, "label", 0)


def _winogrande(row: Row, place: str) -> tuple[str, Sequence[str], int]:
    return text_of(row, place, "sentence"), _texts(row, place, "option1", "option2"), _number(row, place, "answer", 1)


def _choice(question: str) -> Callable[[Row, str], tuple[str, Sequence[str], int]]:
    """A question in a column of this name with choices that have labels: A, B ... or 1, 2 ..."""

    def asked(row: Row, place: str) -> tuple[str, Sequence[str], int]:
        choices: Any = row["choices"]
        if not isinstance(choices, Mapping) or not {"text", "label"} <= choices.keys():
            raise DataError(f"{place}: choices is {choices!r:.40}, expected texts and labels. {MEND}")
        labels = [str(label) for label in choices["label"]]
        right = labels.index(str(row["answerKey"])) if str(row["answerKey"]) in labels else -1
        return text_of(row, place, question), [str(text) for text in choices["text"]], right

    return asked


ANSWER = "Please choose the correct answer to the question: "


def _official(task: str, hub_id: str, subset: str | None, split: str, revision: str | None = None) -> Official:
    copy = f"a copy of the published file (dataset/{task}/test.json of the repository of LLM-Adapters)"
    return Official(f"the questions of {task}", hub_id, subset, split, copy, revision)


PUBLISHED: Mapping[str, Published] = {
    "boolq": BoolQ(
        _official("boolq", "google/boolq", None, "validation"),
        ("question", "answer"),
        "Please answer the following question with true or false, question: ",
        "",
        _boolq,
    ),
    "piqa": Published(
        _official("piqa", "ybisk/piqa", None, "validation", CONVERTED),
        ("goal", "sol1", "sol2", "label"),
        "Please choose the correct solution to the question: ",
        "solution",
        _piqa,
        between="\n\n",
    ),
    "social_i_qa": Published(
        _official("social_i_qa", "allenai/social_i_qa", None, "validation", CONVERTED),
        ("context", "question", "answerA", "answerB", "answerC", "label"),
        ANSWER,
        "answer",
        _social,
    ),
    "hellaswag": Published(
        _official("hellaswag", "Rowan/hellaswag", None, "validation"),
        ("activity_label", "ctx", "endings", "label"),
        "Please choose the correct ending to complete the given sentence: ",
        "ending",
        _hellaswag,
    ),
    "winogrande": Published(
        _official("winogrande", "allenai/winogrande", "winogrande_xl", "validation"),
        ("sentence", "option1", "option2", "answer"),
        "Please choose the correct answer to fill in the blank to complete the given sentence: ",
        "option",
        _winogrande,
        after=" ",
    ),
    **{
        task: Published(
            _official(task, "allenai/ai2_arc", task, "test"),
            ("question", "choices", "answerKey"),
            ANSWER,
            "answer",
            _choice("question"),
        )
        for task in ("ARC-Easy", "ARC-Challenge")
    },
    "openbookqa": Published(
        _official("openbookqa", "allenai/openbookqa", "main", "test"),
        ("question_stem", "choices", "answerKey"),
        ANSWER,
        "answer",
        _choice("question_stem"),
    ),
}
"""Task -> where its questions are, and how they are written."""
