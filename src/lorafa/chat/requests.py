"""Requests of the OpenAI protocol, read strictly: what would change an answer and is not known is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from lorafa.chat.options import Options
from lorafa.data.records import ROLES, Message
from lorafa.errors import did_you_mean

MOST_CHOICES = 16
"""Answers to one request (``n``)."""
MOST_STOPS = 4
LONGEST_STOP = 256
_NOTHING_TO_ANSWERS = frozenset({
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier", "prompt_cache_key",
    "prompt_cache_retention", "stream_options", "stream",
})  # fmt: skip
"""Fields that change nothing of what is answered."""
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "logprobs": (False,), "top_logprobs": (0,),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "echo": (False,), "suffix": ("",),
    "best_of": (1,), "audio": (), "prediction": (), "reasoning_effort": (), "verbosity": (), "web_search_options": (),
}  # fmt: skip
"""Fields that would change an answer and are not available, with the values that change nothing; null never does."""
_SAMPLING = ("temperature", "top_p", "seed", "stop", "max_tokens", "max_completion_tokens")
_OF_TURN = ("name", "tool_calls", "tool_call_id", "reasoning_content")
"""Fields of a message that chat templates read beside its content."""
_FROM_ANSWERS = ("refusal", "annotations", "audio", "function_call")
"""Fields that answers of the protocol have and that say nothing where they are empty: clients send answers back."""


class RequestError(Exception):
    """A request is refused, in the shape in which the protocol has it."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """A request for answers, checked."""

    model: str
    options: Options
    choices: int
    stream: bool
    usage: bool
    """Whether a stream is to end with counts of tokens."""
    messages: tuple[Message, ...] = ()
    texts: tuple[str, ...] = ()
    """What is to be continued as it stands, in place of messages."""


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds; raises RequestError."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode("utf-8")  # halves of characters are no text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is no JSON in UTF-8: {type(error).__name__}. Send an object.") from error
    if not isinstance(found, dict):
        raise RequestError(f"The body is to be a JSON object, found {_kind(found)}.")
    return found


def chat_request(body: Mapping[str, Any], defaults: Options) -> Request:
    """The request of a body of ``/v1/chat/completions``; raises RequestError.

    Args:
        defaults: what is taken where it says nothing.
    """
    _refuse_others(body, ("messages",))
    return replace(_request(body, defaults), messages=messages_of(body.get("messages"), "messages"))


def completion_request(body: Mapping[str, Any], defaults: Options) -> Request:
    """The request of a body of ``/v1/completions``; raises RequestError."""
    _refuse_others(body, ("prompt",))
    prompt = body.get("prompt")
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        _refuse("prompt", "is a text or a list of texts, none of them empty", prompt)
    request = replace(_request(body, defaults), texts=tuple(texts))
    if len(texts) * request.choices > MOST_CHOICES:
        _refuse("prompt", f"asks with n for at most {MOST_CHOICES} answers", len(texts) * request.choices)
    return request


def options_of(body: Mapping[str, Any], defaults: Options) -> Options:
    """How answers are asked for in a body; raises RequestError."""
    temperature = _number(body, "temperature", 0.0, 2.0, defaults.temperature)
    top_p = _number(body, "top_p", 0.0, 1.0, defaults.top_p)
    if top_p == 0:
        _refuse("top_p", "is a number in (0, 1]", 0)
    lengths = {name: _integer(body, name, 1) for name in ("max_completion_tokens", "max_tokens")}
    said = {length for length in lengths.values() if length is not None}
    if len(said) > 1:
        _refuse("max_tokens", f"differs from max_completion_tokens={lengths['max_completion_tokens']}; send one", said)
    seed = _integer(body, "seed", None)
    return Options(
        next(iter(said), defaults.max_new_tokens), temperature, top_p, defaults.seed if seed is None else seed,
        _stops(body.get("stop")),
    )  # fmt: skip


def messages_of(value: Any, param: str) -> tuple[Message, ...]:
    """Messages that wait for an answer; raises RequestError."""
    if not isinstance(value, list) or not value:
        _refuse(param, "is a list of messages, at least one", value)
    found = tuple(_message(turn, f"{param}[{at}]") for at, turn in enumerate(value))
    if found[-1].role in ("assistant", "system", "developer"):
        _refuse(f"{param}[{len(found) - 1}].role", "ends the conversation with a turn that waits for an answer",
                found[-1].role)  # fmt: skip
    return found


def _message(turn: Any, param: str) -> Message:
    if not isinstance(turn, dict):
        _refuse(param, "is an object with role and content", turn)
    role, extra = turn.get("role"), {name: turn[name] for name in _OF_TURN if turn.get(name) not in (None, [])}
    if role not in ROLES:
        _refuse(f"{param}.role", f"is one of {', '.join(ROLES)}", role)
    for name in turn:
        known = name in ("role", "content", *_OF_TURN) or (name in _FROM_ANSWERS and not turn[name])
        if not known:
            raise RequestError(f"{param}.{name} is not known here. Leave it out.", param=f"{param}.{name}")
    content = turn.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, f"{param}.content[{at}]") for at, part in enumerate(content))
    if content is None and "tool_calls" in extra:
        content = ""
    if not isinstance(content, str):
        _refuse(f"{param}.content", "is a text, or a list of parts of the type text", content)
    return Message(role, content, extra)


def _part(part: Any, param: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        _refuse(param, 'is {"type": "text", "text": ...}; nothing but text is read', part)
    text: str = part["text"]
    return text


def _request(body: Mapping[str, Any], defaults: Options) -> Request:
    model = body.get("model")
    if not isinstance(model, str):
        _refuse("model", "is the name of a model of /v1/models", model)
    choices = _integer(body, "n", 1)
    if choices is not None and choices > MOST_CHOICES:
        _refuse("n", f"is at most {MOST_CHOICES}", choices)
    stream = _flag(body, "stream")
    said = body.get("stream_options") or {}
    if not isinstance(said, dict) or (said and not stream):
        _refuse("stream_options", "is an object beside stream=true", said)
    return Request(model, options_of(body, defaults), choices or 1, stream, _flag(said, "include_usage"))


def _refuse_others(body: Mapping[str, Any], own: Sequence[str]) -> None:
    """Raises RequestError for a field that nothing here reads, unless it says what holds anyway."""
    known = {"model", "n", *_SAMPLING, *own, *_NOTHING_TO_ANSWERS}
    for name, value in body.items():
        if name in known or value is None:
            continue
        if name in _NEUTRAL and any(value == neutral for neutral in _NEUTRAL[name]):
            continue
        why = "is not available here." if name in _NEUTRAL else f"is not known here.{did_you_mean(name, known)}"
        raise RequestError(f"{name[:60]} {why} Leave it out.", param=name[:60], code="unsupported_parameter")


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    fit = isinstance(stops, list) and all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in stops)
    if not fit or len(stops) > MOST_STOPS:
        what = f"is a text or at most {MOST_STOPS}, of 1 to {LONGEST_STOP} characters each"
        _refuse("stop", what, value)
    return tuple(stops)


def _number(body: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        _refuse(name, f"is a number from {low:g} to {high:g}", value)
    return float(value)


def _integer(body: Mapping[str, Any], name: str, least: int | None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if not whole or (least is not None and value < least):
        _refuse(name, "is an integer" if least is None else f"is an integer of at least {least}", value)
    return int(value)


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        _refuse(name, "is true or false", value)
    return bool(value)


def _refuse(param: str, what: str, value: Any) -> NoReturn:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    raise RequestError(f"{param} {what}, found {shown}.", param=param)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _kind(value: Any) -> str:
    return {list: "a list", str: "a text", type(None): "null"}.get(type(value), "a single value")
