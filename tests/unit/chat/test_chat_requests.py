"""Requests of the OpenAI protocol: what is read, what is passed over, what is refused and how that is said."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorafa.chat.options import Options
from lorafa.chat.requests import RequestError, chat_request, completion_request, messages_of, parse_json
from lorafa.data.records import Message

DEFAULTS = Options(max_new_tokens=77, temperature=0.25, top_p=0.75, seed=9)
USER = [{"role": "user", "content": "Hi"}]


def read(**fields: Any) -> Any:
    return chat_request({"model": "m", "messages": USER, **fields}, DEFAULTS)


def test_what_a_request_does_not_say_is_as_the_command_says() -> None:
    found = read(temperature=None, stop=None, seed=None, n=None, stream=None)
    assert (found.options, found.choices, found.stream, found.usage) == (DEFAULTS, 1, False, False)
    assert found.messages == (Message("user", "Hi"),)


def test_what_a_request_says_is_read() -> None:
    found = read(
        temperature=0, top_p=0.5, seed=-3, n=4, stop=["a", "b"], max_tokens=5, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    assert found.options == Options(5, 0.0, 0.5, -3, ("a", "b"))
    assert (found.choices, found.stream, found.usage) == (4, True, True)
    assert read(max_completion_tokens=6, max_tokens=6, stop="x").options.stops == ("x",)
    assert read(max_completion_tokens=6).options.max_new_tokens == 6


def test_fields_that_change_no_answer_are_passed_over() -> None:
    assert read(user="me", metadata={"a": 1}, frequency_penalty=0, logit_bias={}, tools=[], logprobs=False) == read()
    assert read(response_format={"type": "text"}, parallel_tool_calls=True, service_tier="auto") == read()


@pytest.mark.parametrize(
    ("fields", "param", "text"),
    [
        ({"model": 3}, "model", "is the name of a model of /v1/models, found 3"),
        ({"messages": []}, "messages", "is a list of messages, at least one"),
        ({"messages": ["Hi"]}, "messages[0]", "is an object with role and content"),
        ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role", "is one of system, user"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is a text, or a list of parts"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]", "but text is"),
        ({"messages": [{"role": "user", "content": "", "mood": 1}]}, "messages[0].mood", "is not known here"),
        ({"messages": [*USER, {"role": "assistant", "content": "a"}]}, "messages[1].role", "waits for an answer"),
        ({"temperature": 2.5}, "temperature", "is a number from 0 to 2, found 2.5"),
        ({"temperature": "1"}, "temperature", "is a number from 0 to 2, found '1'"),
        ({"temperature": True}, "temperature", "is a number from 0 to 2, found True"),
        ({"top_p": 0}, "top_p", "is a number in (0, 1]"),
        ({"seed": 1.5}, "seed", "is an integer, found 1.5"),
        ({"seed": 2**70}, "seed", "is an integer"),
        ({"n": 0}, "n", "is an integer of at least 1"),
        ({"n": 1000}, "n", "is at most 16"),
        ({"max_tokens": 0}, "max_tokens", "is an integer of at least 1"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "differs from max_completion_tokens=2"),
        ({"stop": ["a"] * 5}, "stop", "is a text or at most 4"),
        ({"stop": ""}, "stop", "of 1 to 256 characters each"),
        ({"stop": [1]}, "stop", "is a text"),
        ({"stream": "yes"}, "stream", "is true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "is an object beside stream=true"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not available here"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "is not available here"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not available here"),
        ({"logprobs": True}, "logprobs", "is not available here"),
        ({"temprature": 1}, "temprature", "is not known here. Did you mean 'temperature'?"),
        ({"prompt": "a"}, "prompt", "is not known here"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, text: str) -> None:
    with pytest.raises(RequestError) as refused:
        read(**fields)
    body = refused.value.body()["error"]
    assert (refused.value.status, body["type"], body["param"]) == (400, "invalid_request_error", param)
    assert text in body["message"]


def test_messages_as_clients_write_them_and_send_answers_back() -> None:
    found = messages_of(
        [
            {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
            {"role": "user", "content": "Hi", "name": "Ann"},
            {"role": "assistant", "content": "Ho", "refusal": None, "annotations": [], "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ],
        "messages",
    )
    assert found == (
        Message("system", "Be brief."), Message("user", "Hi", {"name": "Ann"}), Message("assistant", "Ho"),
        Message("assistant", "", {"tool_calls": [{"id": "1"}]}), Message("tool", "4", {"tool_call_id": "1"}),
    )  # fmt: skip


def test_texts_to_be_continued() -> None:
    assert completion_request({"model": "m", "prompt": "a"}, DEFAULTS).texts == ("a",)
    found = completion_request({"model": "m", "prompt": ["a", "b"], "n": 2, "best_of": 1, "echo": False}, DEFAULTS)
    assert (found.texts, found.choices) == (("a", "b"), 2)
    for wrong in ("", [], [1, 2], None, ["a"] * 17):
        with pytest.raises(RequestError, match="prompt"):
            completion_request({"model": "m", "prompt": wrong}, DEFAULTS)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"a"', b"\xff\xfe", b'{"a": NaN}', b'{"a": "\\ud800"}', b"[" * 100_000, b"null",
     b'{"a": 1' + b"0" * 5000 + b"}"],
)  # fmt: skip
def test_a_body_that_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="The body is") as refused:
        parse_json(body)
    assert len(str(refused.value)) < 200
    assert parse_json(json.dumps({"a": "é"}).encode()) == {"a": "é"}
