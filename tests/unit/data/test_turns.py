"""Turns as ShareGPT writes them, and lists of messages as prompt and completion."""

from __future__ import annotations

from typing import Any

import pytest

from lorafa.data.records import Message, Record
from lorafa.data.rows import converter
from lorafa.errors import DataError

HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
ASKED, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def record_of(row: dict[str, Any]) -> Record:
    return converter("rows.jsonl", row, None, None)(row, "rows.jsonl, line 1")


def turns_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in record_of(row).messages]


def test_who_speaks_in_sharegpt_is_a_role() -> None:
    said = [("system", "s"), ("human", "q"), ("gpt", "a"), ("observation", "o"), ("tool", "t"), ("chatgpt", "b")]
    turns = [{"from": speaker, "value": text} for speaker, text in said]
    assert turns_of({"conversations": turns}) == [
        ("system", "s"), ("user", "q"), ("assistant", "a"), ("tool", "o"), ("tool", "t"), ("assistant", "b"),
    ]  # fmt: skip
    assert turns_of({"system": "s", "conversations": [HUMAN, GPT]})[0] == ("system", "s")
    assert turns_of({"messages": [HUMAN, GPT]}) == turns_of({"conversations": [ASKED, ANSWER]})


def test_a_function_call_of_sharegpt_is_a_call_of_the_assistant_that_is_trained() -> None:
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    record = record_of({"conversations": [HUMAN, call, {"from": "observation", "value": "2"}, GPT], "tools": "[]"})
    function = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert record.messages[1] == Message("assistant", "", {"tool_calls": [function]})
    assert record.messages[1].trained
    two = {"from": "function_call", "value": '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'}
    assert len(record_of({"conversations": [HUMAN, two]}).messages[1].extra["tool_calls"]) == 2


@pytest.mark.parametrize("value", ['{"name": "f"}', '{"name": "f", "arguments": {}, "id": 1}', "[]", "f(x)", None])
def test_a_call_that_cannot_be_kept_whole_is_refused_with_its_row(value: Any) -> None:
    with pytest.raises(DataError, match=r"line 1, message 2: .*Write \{\"name\": \.\.\., \"arguments\""):
        record_of({"conversations": [HUMAN, {"from": "function_call", "value": value}]})


def test_a_weight_and_what_else_a_turn_of_sharegpt_has_is_kept() -> None:
    record = record_of({"conversations": [HUMAN, GPT | {"weight": 0, "name": "n", "markdown": None}, HUMAN, GPT]})
    assert [message.trained for message in record.messages if message.role == "assistant"] == [False, True]
    assert record.messages[1].extra == {"name": "n"}


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "alien", "value": "a"}, r"line 1: message 2 needs a 'from' \(human, .*function_call, tool_call\)"),
        ({"from": "gpt", "value": None}, r"line 1: message 2 needs a 'from' .* and a 'value' that is text, found"),
        ({"from": "gpt", "value": 5}, r"line 1: message 2 needs a role .* and a content that is text"),
        ({"from": "gpt", "value": "a", "role": "assistant"}, r"line 1: message 2 has both 'role' and 'from' with"),
        ({"value": "a", "content": "a"}, r"line 1: message 2 has both 'content' and 'from' with 'value'\. Keep one"),
    ],
)
def test_a_turn_of_sharegpt_that_cannot_be_read_is_named(turn: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        record_of({"conversations": [HUMAN, turn]})
    with pytest.raises(DataError, match=r"line 1: 'conversations' must be a list of"):
        record_of({"conversations": "q"})


def test_of_two_lists_of_messages_the_first_is_read_and_the_second_trained() -> None:
    earlier = [{"role": "system", "content": "s"}, ASKED, ANSWER, ASKED]
    record = record_of({"prompt": earlier, "completion": [ANSWER], "tools": [{"type": "function"}]})
    assert [(turn.role, turn.trained) for turn in record.messages if turn.role == "assistant"] == [
        ("assistant", False), ("assistant", True),
    ]  # fmt: skip
    assert record.question == record.messages[:-1]
    assert record.tools == ({"type": "function"},)
    named = {"q": [ASKED], "r": [ANSWER]}
    assert (
        converter("d", named, "q", "r")(named, "d, row 1").messages == record_of({"messages": [ASKED, ANSWER]}).messages
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [ASKED], "completion": "a"}, r"line 1: of 'prompt' and 'completion' one is a list of messages and"),
        ({"prompt": "q", "completion": [ANSWER]}, r"one is not\. Give two texts, or two lists"),
        ({"prompt": [ASKED], "completion": [ASKED]}, r"line 1: 'completion' has no assistant turn, .* roles are: user"),
        ({"prompt": [ASKED], "completion": [ANSWER | {"weight": 0}]}, r"line 1: all assistant turns have the weight 0"),
        ({"prompt": [], "completion": [ANSWER]}, r"line 1: 'prompt' must be a list of"),
    ],
)
def test_two_columns_of_which_one_cannot_be_trained_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        record_of(row)


@pytest.mark.parametrize("form", [{"messages": [ASKED, ANSWER]}, {"prompt": [ASKED], "completion": [ANSWER]}])
def test_a_column_that_would_not_be_read_beside_a_list_of_messages_is_refused(form: dict[str, Any]) -> None:
    assert record_of(form | {"history": [], "chat_template_kwargs": None})
    with pytest.raises(DataError, match=r"line 1: a column 'history' beside '\w+', which would .* belong into '\w+' i"):
        record_of(form | {"history": [["q", "a"]]})
    with pytest.raises(DataError, match=r"line 1: a column 'chat_template_kwargs' beside .*write one that has them"):
        record_of(form | {"chat_template_kwargs": {"enable_thinking": False}})


def test_lists_may_be_json_where_a_cell_can_only_hold_text() -> None:
    assert turns_of({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}) == [
        ("user", "q"), ("assistant", "a"),
    ]  # fmt: skip
    assert len(turns_of({"prompt": "p", "completion": "c", "history": '[["q", "a"]]'})) == 4
    assert turns_of({"prompt": "[1]", "completion": "[2]"}) == [("user", "[1]"), ("assistant", "[2]")]
    with pytest.raises(DataError, match=r"line 1, column 'messages': not valid JSON"):
        record_of({"messages": "[{"})
