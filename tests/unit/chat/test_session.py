"""Lines of a chat: what is asked of whom, what is remembered, what commands do."""

from __future__ import annotations

import io
import os
import re
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from lorafa.chat.decoding import Answer, write
from lorafa.chat.engine import Engine
from lorafa.chat.options import Options
from lorafa.chat.printable import printable
from lorafa.chat.session import Session
from lorafa.data.records import Message
from lorafa.errors import ConfigError, DataError
from toys.chats import turns
from toys.speakers import make_speakers

SPEAKERS, ALONE = make_speakers(), make_speakers()
"""The same model again: one thread alone may use a model, and that is the engine's."""
SHORT = Options(max_new_tokens=6)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(SPEAKERS) as running:
        yield running


class Heard:
    """A session, and what it has said."""

    def __init__(
        self, engine: Engine, options: Options = SHORT, system: str | None = None, *, strict: bool = True
    ) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        consoles = [Console(file=file, width=200) for file in (self.out, self.err)]
        self.session = Session(engine, options, system, *consoles, strict=strict)

    def lines(self, *lines: str) -> str:
        before = len(self.out.getvalue())
        self.session.run(iter(lines))
        return self.out.getvalue()[before:]

    @property
    def notices(self) -> str:
        return " ".join(self.err.getvalue().split())


def answer(name: str, messages: Sequence[Message], options: Options = SHORT, place: int = 0) -> str:
    one = Answer(ALONE, ALONE.row(ALONE.find(name), messages, options, place))
    write(ALONE.model, [one])
    return one.text


def shown(answers: dict[str, str]) -> str:
    return "".join(f"--- {name}\n{text}\n\n" for name, text in answers.items())


def test_everyone_answers_as_alone_and_remembers_its_own_answers(engine: Engine) -> None:
    heard, first, second = Heard(engine, system="Be brief."), {}, {}
    for name in SPEAKERS.by_name:
        asked = (("system", "Be brief."), ("user", "One?"))
        first[name] = answer(name, turns(*asked))
        second[name] = answer(name, turns(*asked, ("assistant", first[name]), ("user", "Two?")))
    assert heard.lines("One?\n") == printable(shown(first))
    assert heard.lines("\n", "Two?") == printable(shown(second))
    assert len(set(first.values())) == 3


def test_what_was_cut_off_is_said(engine: Engine) -> None:
    heard = Heard(engine, Options(max_new_tokens=2))
    heard.lines("One?")
    assert "cut off at 2 tokens" in heard.notices


def test_commands(engine: Engine) -> None:
    heard = Heard(engine)
    first = heard.lines("One?")
    assert heard.lines("/reset", "One?") == first
    assert heard.lines("One?") != first
    assert heard.lines("/system Be rude.", "One?") != first
    assert heard.lines("/system", "One?") == first
    assert heard.session.conversation.system is None
    alone = heard.lines("/reset", "/adapters german", "One?")
    assert alone.strip() == first.partition("--- german\n")[2].partition("\n\n---")[0].strip()
    assert "* german french" in heard.notices
    assert heard.lines("/reset", "/adapters all", "One?") == first
    assert heard.lines("/help", "/quit", "One?") == ""
    assert "Ctrl-C stops an answer" in heard.notices


def test_a_question_may_begin_with_a_slash(engine: Engine) -> None:
    heard = Heard(engine)
    heard.lines("//reset")
    assert heard.session.conversation.messages("tiny", "")[0].content == "/reset"


def test_who_was_not_asked_remembers_nothing(engine: Engine) -> None:
    heard = Heard(engine)
    heard.lines("/adapters german", "One?", "/adapters all")
    assert len(heard.session.conversation.messages("german", "Two?")) == 3
    assert heard.session.conversation.messages("tiny", "Two?") == turns(("user", "Two?"))


@pytest.mark.parametrize(
    ("line", "kind", "text"),
    [
        ("/rest", ConfigError, "There is no command /rest. Did you mean 'reset'? There are: /adapters, /system"),
        ("/adapters germa", ConfigError, "There is no 'germa' here. Did you mean 'german'? There are: tiny, german"),
        ("a" * 600, DataError, "leaves no room for an answer"),
    ],
)
def test_what_cannot_be_done_changes_nothing(line: str, kind: type[Exception], text: str, engine: Engine) -> None:
    heard = Heard(engine)
    heard.lines("One?")
    before = heard.session.conversation.messages("german", "Two?")
    with pytest.raises(kind, match=re.escape(text)):
        heard.lines(line)
    lenient = Heard(engine, strict=False)
    assert lenient.lines(line, "One?") == Heard(engine).lines("One?")
    assert lenient.notices.startswith("error:")
    assert text in lenient.notices
    assert heard.session.conversation.messages("german", "Two?") == before
    assert heard.session.names == list(SPEAKERS.by_name)


def test_drawn_answers_are_those_of_the_seed_and_the_number_of_the_question(engine: Engine) -> None:
    drawn = Options(max_new_tokens=6, temperature=1.0, seed=5)
    heard = [Heard(engine, drawn).lines("One?", "One?") for _ in range(2)]
    assert heard[0] == heard[1]
    assert heard[0] != Heard(engine, Options(max_new_tokens=6, temperature=1.0, seed=6)).lines("One?", "One?")


def test_ctrl_c_stops_an_answer_and_what_was_said_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = {name: replace(one, ends=frozenset()) for name, one in SPEAKERS.by_name.items()}
    take, count = Answer.take, 0

    def interrupting(self: Any, token: int) -> None:
        nonlocal count
        count += 1
        if count == 9:
            os.kill(os.getpid(), signal.SIGINT)
        take(self, token)

    monkeypatch.setattr(Answer, "take", interrupting)
    before = signal.getsignal(signal.SIGINT)
    with Engine(replace(SPEAKERS, by_name=endless)) as engine:
        heard = Heard(engine, Options(max_new_tokens=400))
        heard.lines("One?")
    assert signal.getsignal(signal.SIGINT) is before
    assert "Stopped." in heard.notices
    turns_now = heard.session.conversation.messages("german", "Two?")
    assert [turn.role for turn in turns_now] == ["user", "assistant", "user"]
    assert 0 < len(turns_now[1].content) < 200
