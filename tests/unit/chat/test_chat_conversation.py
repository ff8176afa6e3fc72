"""Everyone remembers the questions with its own answers."""

from __future__ import annotations

from lorafa.chat.conversation import Conversation
from toys.chats import turns


def test_each_remembers_its_own_answers() -> None:
    said = Conversation("Be brief.")
    said.add("One?", {"a": "1", "b": "I"})
    said.add("Two?", {"a": ""})
    first = (("system", "Be brief."), ("user", "One?"))
    assert said.messages("a", "Three?") == turns(
        *first, ("assistant", "1"), ("user", "Two?"), ("assistant", ""), ("user", "Three?")
    )
    assert said.messages("b", "Three?") == turns(*first, ("assistant", "I"), ("user", "Three?"))
    assert said.messages("c", "Three?") == turns(first[0], ("user", "Three?"))
    assert said.asked == 2


def test_asking_alone_changes_nothing() -> None:
    said = Conversation()
    assert said.messages("a", "One?") == said.messages("a", "One?") == turns(("user", "One?"))
    assert said.asked == 0


def test_it_begins_anew() -> None:
    said = Conversation("Be brief.")
    said.add("One?", {"a": "1"})
    said.reset(None)
    assert (said.messages("a", "Two?"), said.system, said.asked) == (turns(("user", "Two?")), None, 0)
