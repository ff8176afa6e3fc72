"""Rows for preference and reward training: pairs of answers, answers that are judged, and prompts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from lorafa.data.cells import MEND, Row, given, label_of
from lorafa.data.records import Message, Record
from lorafa.data.rows import FORMS, Form, Reading, pair, record_of, turns
from lorafa.data.turns import writes_turns
from lorafa.data.unanswered import prompt_of
from lorafa.errors import DataError

CHOSEN, REJECTED = "chosen", "rejected"
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0")


def _pair_of_answers(row: Row, place: str) -> Record:
    """A prompt with a better and a worse answer; texts, lists of messages, or a prompt beside two conversations."""
    _require_both(row, place)
    if isinstance(row.get("prompt"), str) and _lists(row, CHOSEN) and not writes_turns(row.get("prompt")):
        return _pair_of_conversations(row, place)
    better, worse = (pair(row, place, "prompt", column) for column in (CHOSEN, REJECTED))
    read = _length_of_prompt(better)
    return _joined(better.messages[:read], better, better.messages[read:], worse.messages[read:], place)


def _pair_of_conversations(row: Row, place: str) -> Record:
    """Two conversations that begin alike; what they begin with is the prompt, before which a text may stand alone."""
    _require_both(row, place)
    better, worse = (turns(row, place, column) for column in (CHOSEN, REJECTED))
    alike = 0
    for one, other in zip(better.messages, worse.messages, strict=False):
        if (one.role, one.content, one.extra) != (other.role, other.content, other.extra):
            break
        alike += 1
    if alike == len(better.messages) == len(worse.messages):
        alike -= 1  # the same answer twice, which is found later
    prompt = list(better.messages[:alike])
    text = given(row, "prompt")
    if text is not None and text not in (message.content for message in prompt):
        if any(message.role == "user" for message in prompt):
            raise DataError(
                f"{place}: the column 'prompt' ({text!r:.40}) is no turn that {CHOSEN!r} and {REJECTED!r} begin with. "
                f"Take it out, or let both begin with it."
            )
        prompt = [*prompt, Message("user", text)]
    if not any(message.role in ("user", "tool") for message in prompt):
        raise DataError(
            f"{place}: {CHOSEN!r} and {REJECTED!r} begin with no common turn of a user, so they answer "
            f"no one question. {MEND}"
        )
    return _joined(prompt, better, better.messages[alike:], worse.messages[alike:], place)


def _joined(
    prompt: Sequence[Message], better: Record, chosen: Sequence[Message], rejected: Sequence[Message], place: str
) -> Record:
    """One record: the turns of the prompt are read, and each answer is one turn of the assistant."""
    for column, answer in ((CHOSEN, chosen), (REJECTED, rejected)):
        if [message.role for message in answer] != ["assistant"]:
            roles = ", ".join(message.role for message in answer) or "none"
            raise DataError(
                f"{place}: where the two answers part, {column!r} goes on with the roles {roles}, and one turn of the "
                f"assistant is expected. Put earlier turns into the prompt. {MEND}"
            )
        if not answer[0].content.strip() and not answer[0].extra:
            raise DataError(f"{place}: {column!r} is an answer without text. {MEND}")
    read = tuple(replace(message, trained=False) for message in prompt)
    record = record_of((*read, replace(chosen[0], trained=True)), place, better.tools)
    return replace(record, rejected=(replace(rejected[0], trained=True),))


def _judged(row: Row, place: str) -> Record:
    """A prompt, an answer, and whether it is a good one."""
    return replace(pair(row, place, "prompt", "completion"), desirable=_verdict(row.get("label"), place))


def _verdict(found: Any, place: str) -> bool:
    text = str(found).strip().lower()
    if isinstance(found, bool | int | str) and text in (*_YES, *_NO):
        return text in _YES
    raise DataError(
        f"{place}: column 'label' holds {found!r:.40}, expected true (a good answer) or false (a bad one). {MEND}"
    )


def _unanswered(row: Row, place: str) -> Record:
    """A prompt alone: its answer is the empty text, which is not trained."""
    asked = prompt_of(row, place)
    return Record((*asked.messages, Message("assistant", "", trained=False)), tools=asked.tools, place=place)


def _require_both(row: Row, place: str) -> None:
    """Raises DataError for a row that lacks one of the two answers."""
    for column in (CHOSEN, REJECTED):
        if given(row, column) is None:
            raise DataError(
                f"{place}: no {column!r} answer, and a pair has two to compare. Delete the row, or give it one."
            )


def _lists(row: Row, column: str) -> bool:
    return isinstance(row.get(column), list) or writes_turns(row.get(column))


def _length_of_prompt(record: Record) -> int:
    """How many turns stand before the answer of a record that was made of a prompt and its answer."""
    trained = (at for at, message in enumerate(record.messages) if message.role == "assistant" and message.trained)
    return next(trained)


PAIRS = Reading(
    "pairs",
    (
        Form(("prompt", CHOSEN, REJECTED), _pair_of_answers),
        Form((CHOSEN, REJECTED), _pair_of_conversations, "chosen + rejected (conversations that begin alike)"),
    ),
    takes_columns=False,
)
"""Rows with a better and a worse answer to one prompt."""
JUDGED = Reading("judged answers", (Form(("prompt", "completion", "label"), _judged),), takes_columns=False)
"""Rows with an answer and whether it is a good one."""
PROMPTS = Reading(
    "prompts",
    (
        *FORMS[:-1],  # a plain text asks nothing
        Form(
            ("prompt", "answer"),
            partial(pair, prompt_column="prompt", completion_column="answer", answer_of=label_of),
        ),
        Form(("prompt",), _unanswered),
    ),
)
"""Rows with a prompt, which the model answers itself, and an answer to compare with where there is one."""
