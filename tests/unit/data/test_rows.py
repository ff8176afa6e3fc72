"""What of a row becomes a conversation: columns, turns, parts, weights, tools."""

from __future__ import annotations

from typing import Any

import pytest

from lorafa.data.records import Message, Record
from lorafa.data.rows import converter
from lorafa.errors import DataError

ASKED = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def record_of(row: dict[str, Any]) -> Record:
    return converter("rows.jsonl", row, None, None)(row, "rows.jsonl, line 1")


def turns_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in record_of(row).messages]


def test_columns_system_and_history_are_read_before_a_pair() -> None:
    row = {"system": "s", "instruction": "i", "output": "o", "history": [["q1", "a1"], ["q2", "a2"]]}
    assert turns_of(row) == [
        ("system", "s"), ("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"),
        ("user", "i"), ("assistant", "o"),
    ]  # fmt: skip
    assert [message.trained for message in record_of(row).messages if message.role == "assistant"] == [
        False, False, True,
    ]  # fmt: skip
    assert turns_of({"system": "", "history": None, "prompt": "p", "completion": "c"}) == [
        ("user", "p"), ("assistant", "c"),
    ]  # fmt: skip


def test_a_column_system_stands_before_messages_and_beside_no_system_turn() -> None:
    assert turns_of({"system": "s", "messages": [ASKED, ANSWER]})[0] == ("system", "s")
    with pytest.raises(DataError, match=r"line 1: a column 'system' and a system turn in 'messages'\. Keep one"):
        record_of({"system": "s", "messages": [{"role": "system", "content": "t"}, ASKED, ANSWER]})


@pytest.mark.parametrize("history", ["q", [["q"]], [["q", None]], [{"q": "a"}]])
def test_a_history_that_is_no_list_of_pairs_is_named(history: Any) -> None:
    with pytest.raises(DataError, match=r"line 1: 'history' must be a list of pairs, a question and its answer"):
        record_of({"prompt": "p", "completion": "c", "history": history})


def test_what_stands_beside_role_and_content_is_kept_for_the_template_unless_it_is_empty() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "", "name": None}
    record = record_of({"messages": [ASKED, answer], "tools": '[{"type": "function"}]'})
    assert record.messages[1] == Message("assistant", "", {"tool_calls": [call]})
    assert record.tools == ({"type": "function"},)
    assert record.place == "rows.jsonl, line 1"
    assert hash(record) == hash(record_of({"messages": [ASKED, answer]}))


@pytest.mark.parametrize("tools", ["{", "{}", {"a": 1}, ["f"]])
def test_tools_that_are_no_list_of_objects_are_named(tools: Any) -> None:
    with pytest.raises(DataError, match=r"line 1.*tools'"):
        record_of({"messages": [ASKED, ANSWER], "tools": tools})


@pytest.mark.parametrize("role", ["tool", "function", "ipython", "developer"])
def test_the_roles_of_tools_are_read(role: str) -> None:
    assert turns_of({"messages": [ASKED, {"role": role, "content": "x"}, ANSWER]})[1] == (role, "x")


def test_parts_of_text_are_joined_and_others_are_refused() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert turns_of({"messages": [{"role": "user", "content": parts}, ANSWER]})[0] == ("user", "one two")
    picture = [*parts, {"type": "image", "url": "x"}]
    with pytest.raises(DataError, match=r"line 1: message 1 has a part that is no text: {'type': 'image'"):
        record_of({"messages": [{"role": "user", "content": picture}, ANSWER]})


def test_a_weight_says_whether_a_turn_is_trained() -> None:
    record = record_of({"messages": [ASKED, ANSWER | {"weight": 0}, ASKED, ANSWER | {"weight": 1.0}]})
    assert [message.trained for message in record.messages] == [True, False, True, True]
    with pytest.raises(DataError, match=r"line 1: message 2 has the weight 0\.5\. Give 0 .* only read, else 1"):
        record_of({"messages": [ASKED, ANSWER | {"weight": 0.5}]})
    with pytest.raises(DataError, match=r"line 1: all assistant turns have the weight 0"):
        record_of({"messages": [ASKED, ANSWER | {"weight": 0}]})


def test_half_a_character_is_found_wherever_it_stands() -> None:
    for broken in (
        {"messages": [ASKED, ANSWER | {"reasoning_content": "\udfff"}]},
        {"messages": [ASKED, ANSWER], "tools": [{"name": "\udfff"}]},
        {"prompt": "p", "completion": "c", "history": [["\udfff", "a"]]},
        {"prompt": "p", "completion": "c", "system": "\udfff"},
    ):
        with pytest.raises(DataError, match=r"line 1: '.udfff' at character 1 is half a character"):
            record_of(broken)


def test_a_text_of_its_own_is_one_turn_that_is_written_without_a_template() -> None:
    record = record_of({"text": " Some text.\n", "id": 3})
    assert record == Record((Message("assistant", " Some text.\n"),), plain=True)
    assert record.question == ()
    assert record.answer is None
    assert not record_of({"text": "t", "instruction": "i", "output": "o"}).plain
    assert not record_of({"text": "t", "conversations": [{"from": "gpt", "value": "a"}]}).plain


@pytest.mark.parametrize("beside", ["system", "history", "tools"])
def test_what_says_more_of_a_conversation_is_refused_beside_a_text(beside: str) -> None:
    with pytest.raises(DataError, match=rf"line 1: a column '{beside}' beside 'text', which would not be read\. A"):
        record_of({"text": "t", beside: [["q", "a"]]})
    with pytest.raises(DataError, match=r"line 1: column 'text' holds '  ', expected text"):
        record_of({"text": "  "})


def test_tools_are_read_beside_a_pair_too() -> None:
    assert record_of({"prompt": "p", "completion": "c", "tools": [{"name": "f"}]}).tools == ({"name": "f"},)


def test_a_column_that_is_named_is_read_as_what_it_is_named_for() -> None:
    row = {"system": "q", "history": "a", "tools": None}
    record = converter("rows.jsonl", row, "system", "history")(row, "rows.jsonl, line 1")
    assert [(message.role, message.content) for message in record.messages] == [("user", "q"), ("assistant", "a")]
