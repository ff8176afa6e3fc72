"""MMLU (Hendrycks et al. 2021, arXiv:2009.03300): questions of 57 subjects with four answers, after five examples."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lorafa.data.cells import MEND, Row, checked, text_of
from lorafa.errors import DataError, SourceError, warn
from lorafa.evals.benchmark import Official, asks_nothing, refuse_heldout, require_columns
from lorafa.evals.by_length import Progress
from lorafa.evals.choices import Choices, choices, log_probs, plain_ids
from lorafa.evals.entry import Evaluation, Measured, Scores, Source, Subject
from lorafa.evals.generation import context_of
from lorafa.evals.shares import in_words, share
from lorafa.settings.checks import check_int
from lorafa.storage.paths import user_path

LETTERS = ("A", "B", "C", "D")
DEV, TEST = "dev", "test"
"""Splits, and the folders of the official archive: examples, and what is asked."""
COPY = "the folder of the official csv files, with dev/ and test/ in it"
COLUMNS = ("question", "subject", "choices", "answer")


@dataclass(frozen=True, kw_only=True)
class MmluSettings:
    """How many questions are asked, and after how many examples."""

    size: int | None = None
    """Questions of each subject, at most; null all of them."""
    shots: int = 5
    """Examples of the subject before a question; fewer where they do not fit the model's context."""

    def __post_init__(self) -> None:
        if self.size is not None:
            check_int("eval.size", self.size, at_least=1)
        check_int("eval.shots", self.shots, at_least=0)


@dataclass(frozen=True)
class Question:
    """A question with its four answers."""

    subject: str
    text: str
    answers: tuple[str, ...]
    right: int
    """Which of them is right, from 0."""
    place: str = field(compare=False)
    shots: tuple[Question, ...] = field(default=(), compare=False)
    """Examples of the same subject."""

    def asked(self) -> str:
        """The question with its answers, up to where a letter is expected."""
        listed = "".join(f"\n{letter}. {answer}" for letter, answer in zip(LETTERS, self.answers, strict=True))
        return f"{self.text}{listed}\nAnswer:"

    def prompt(self, shots: int) -> str:
        """What the model reads: the subject, so many examples with their letters, the question."""
        subject = self.subject.replace("_", " ")
        examples = "".join(f"{one.asked()} {LETTERS[one.right]}\n\n" for one in self.shots[:shots])
        heading = f"The following are multiple choice questions (with answers) about {subject}."
        return f"{heading}\n\n{examples}{self.asked()}"


# ---- where they come from


def _read(source: Source, settings: MmluSettings) -> list[Question]:
    splits = {split: _of_hub(split) if source.name is None else _of_folder(source.name, split) for split in (DEV, TEST)}
    examples, taken = defaultdict[str, list[Question]](list), defaultdict[str, int](int)
    for one in splits[DEV]:
        examples[one.subject].append(one)
    found = []
    for one in splits[TEST]:
        taken[one.subject] += 1
        if settings.size is not None and taken[one.subject] > settings.size:
            continue
        shots = tuple(examples[one.subject][: settings.shots])
        if len(shots) < settings.shots:
            raise DataError(
                f"{one.place}: the subject {one.subject} has {len(shots)} examples, asked for eval.shots="
                f"{settings.shots}. Give {COPY}, or lower eval.shots."
            )
        found.append(Question(one.subject, one.text, one.answers, one.right, one.place, shots))
    return found


def _of_hub(split: str) -> list[Question]:
    rows = Official("the questions of MMLU", "cais/mmlu", "all", split, COPY).rows(None, "data=<folder>")
    require_columns(rows, COLUMNS, f"the columns {', '.join(COLUMNS)}")
    return [_of_row(row, place) for place, row in rows]


def _of_row(row: Row, place: str) -> Question:
    answers, right = row["choices"], row["answer"]
    if not isinstance(answers, list) or len(answers) != len(LETTERS) or right not in range(len(LETTERS)):
        raise DataError(
            f"{place}: {answers!r:.60} with the answer {right!r}, expected four texts and 0, 1, 2 or 3. {MEND}"
        )
    return Question(
        text_of(row, place, "subject"), text_of(row, place, "question"), tuple(map(str, answers)), right, place
    )


def _of_folder(name: str, split: str) -> list[Question]:
    folder = user_path(name) / split
    files = sorted(folder.glob(f"*_{split}.csv")) if folder.is_dir() else []
    if not files:
        raise SourceError(f"{folder} holds no files *_{split}.csv. Give {COPY}: data=<folder>.")
    return [question for file in files for question in _of_file(file, file.stem.removesuffix(f"_{split}"))]


def _of_file(file: Path, subject: str) -> list[Question]:
    """The questions of an official file: six cells a row, no header."""
    found = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            for number, cells in enumerate(csv.reader(lines, strict=True), 1):
                place = f"{file}, row {number}"
                if len(cells) != 2 + len(LETTERS) or cells[-1].strip() not in LETTERS:
                    raise DataError(
                        f"{place}: {len(cells)} cells, the last of them {cells[-1:]!r:.40}, expected a question, four "
                        f"answers and A, B, C or D. {MEND}"
                    )
                texts = [checked(cell, place) for cell in cells]
                found.append(
                    Question(subject, texts[0], tuple(texts[1:-1]), LETTERS.index(texts[-1].strip()), place)
                )
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror or error}. Check the path.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file} is no csv file in UTF-8: {error}. Fetch it again.") from error
    return found


# ---- how they are asked


def _asked(subject: Subject, questions: Sequence[Question]) -> tuple[list[Choices], int]:
    """Prompts and letters in tokens, and how many had fewer examples than there are."""
    ids, context, shorter = plain_ids(subject.tokenizer), context_of(subject.model), 0
    found = []
    for question in questions:
        shots = len(question.shots)
        while True:
            one = choices(ids, question.prompt(shots), [f" {letter}" for letter in LETTERS])
            longest = len(one.prompt) + max(map(len, one.tails))
            if context is None or longest <= context:
                break
            if not shots:
                raise DataError(
                    f"{question.place}: the question has {longest} tokens without any example, which exceeds the "
                    f"model's context of {context}. Leave it out."
                )
            shots -= 1
        shorter += shots < len(question.shots)
        found.append(one)
    return found, shorter


def _check(subject: Subject, questions: Sequence[Question], settings: MmluSettings) -> None:
    if not questions:
        refuse_heldout("mmlu")


def _measure(
    subject: Subject, questions: Sequence[Question], settings: MmluSettings, batch_size: int, progress: Progress
) -> Scores:
    asked, shorter = _asked(subject, questions)
    if several := sum(not one.single for one in asked):
        warn(
            f"This tokenizer writes an answer's letter in several tokens for {several} of {len(asked)} questions: "
            "their log-probabilities are added up."
        )
    if shorter:
        warn(f"{shorter} of {len(asked)} questions have fewer examples, as more do not fit the model's context.")
    found = log_probs(subject.model, asked, subject.tokenizer.pad_token_id or 0, batch_size, progress)
    chosen = [max(range(len(row)), key=row.__getitem__) for row in found]
    right = [choice == question.right for choice, question in zip(chosen, questions, strict=True)]
    by_subject = defaultdict[str, list[bool]](list)
    for question, one in zip(questions, right, strict=True):
        by_subject[question.subject].append(one)
    subjects = {name: sum(each) / len(each) for name, each in by_subject.items()}
    answers = [
        {"question": question.text, "gold": LETTERS[question.right], "output": LETTERS[choice], "correct": one}
        for question, choice, one in zip(questions, chosen, right, strict=True)
    ]
    numbers = {
        **share(right),
        "mean_of_subjects": sum(subjects.values()) / len(subjects),
        "subjects": subjects,
        "shorter": shorter,
    }
    words = f"{in_words(right)}, {len(subjects)} subjects"
    return Scores(words, numbers, answers, Measured("accuracy", list(map(float, right))))


MMLU = Evaluation(asks=asks_nothing, of_run=False, check=_check, measure=_measure, read=_read, settings=MmluSettings)
"""Questions of 57 subjects with four answers, after examples: which letter the model finds likeliest."""
