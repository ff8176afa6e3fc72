"""The law: what is trained is what was given, over all shapes of chat templates and kinds of tokenizers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafa.data.chat import Encoded, encode_all, encode_prompt
from lorafa.data.records import Message, Record
from toys.chats import KINDS, SHAPES, SPECIAL, TEXTS, WORDS, chat_tokenizer, decoded, trained_parts

ALL = [(shape, kind) for shape in SHAPES for kind in KINDS]
TOKENIZERS = cache(lambda shape, kind: chat_tokenizer(kind, SHAPES[shape].template))

pieces = st.sampled_from(
    [*TEXTS, *SPECIAL, *WORDS, " ", "\n", "\n\n", "é", "🙂", "[INST]", "assistant: ", "<think>", "{{"]
)
texts = st.one_of(st.lists(pieces, min_size=1, max_size=4).map("".join), st.text(max_size=8)).filter(
    lambda text: text.strip() and not set(text) & {"\ufdd0", "\ufdd1", "\ufdd2", "▁", "\0"}
)
quick = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@st.composite
def conversations(draw: st.DrawFn) -> tuple[Message, ...]:
    """A system turn or none, then turns of user and assistant by turns, either first, with a trained one among them."""
    messages = [Message("system", draw(texts))] if draw(st.booleans()) else []
    role = draw(st.sampled_from(["user", "user", "assistant"]))
    for _ in range(draw(st.integers(2, 5))):
        messages.append(Message(role, draw(texts), trained=draw(st.sampled_from([True, True, False]))))
        role = "assistant" if role == "user" else "user"
    if not any(message.role == "assistant" and message.trained for message in messages):
        messages.append(Message("assistant", draw(texts)))
    return tuple(messages)


def encoded(messages: tuple[Message, ...], tokenizer: object) -> Encoded:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return encode_all([Record(messages)], tokenizer, 100_000)


def dense(text: str) -> str:
    """Without blanks: some tokenizers put one after each special token of a template."""
    return "".join(text.split())


def answers(messages: tuple[Message, ...]) -> Iterator[tuple[int, Message]]:
    return ((i, message) for i, message in enumerate(messages) if message.role == "assistant")


@pytest.mark.parametrize("shape", SHAPES)
@given(kind=st.sampled_from(list(KINDS)), messages=conversations())
@quick
def test_the_trained_tokens_are_the_texts_of_the_trained_turns_and_their_ends(
    shape: str, kind: str, messages: tuple[Message, ...]
) -> None:
    tokenizer, written = TOKENIZERS(shape, kind), SHAPES[shape]
    sample = encoded(messages, tokenizer).samples[0]
    found = [decoded(tokenizer, sample.input_ids[a:b]) for a, b in trained_parts(sample)]
    expected = [written.before + m.content + written.end for _, m in answers(messages) if m.trained]
    assert "".join(found) == "".join(expected)
    assert all(label in (-100, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@given(kind=st.sampled_from(list(KINDS)), messages=conversations())
@quick
def test_what_is_asked_is_what_preceded_the_answer_id_by_id(
    shape: str, kind: str, messages: tuple[Message, ...]
) -> None:
    tokenizer = TOKENIZERS(shape, kind)
    number, last = list(answers(messages))[-1]
    if not number:
        return  # nothing is asked
    whole = encoded((*messages[:number], Message("assistant", last.content)), tokenizer).samples[0]
    start, _ = trained_parts(whole)[-1]
    assert encode_prompt(messages[:number], tokenizer) == whole.input_ids[:start]


@pytest.mark.parametrize("shape", SHAPES)
@given(kind=st.sampled_from(list(KINDS)), messages=conversations())
@quick
def test_special_tokens_come_from_the_template_alone(shape: str, kind: str, messages: tuple[Message, ...]) -> None:
    tokenizer = TOKENIZERS(shape, kind)
    special = set(tokenizer.convert_tokens_to_ids(SPECIAL))
    plain = tuple(Message(m.role, "word", trained=m.trained) for m in messages)
    own = [[i for i in encoded(given, tokenizer).samples[0].input_ids if i in special] for given in (messages, plain)]
    assert own[0] == own[1]


@pytest.mark.parametrize("shape", SHAPES)
@given(kind=st.sampled_from(list(KINDS)), messages=conversations())
@quick
def test_every_text_is_read(shape: str, kind: str, messages: tuple[Message, ...]) -> None:
    tokenizer = TOKENIZERS(shape, kind)
    text, at = dense(decoded(tokenizer, encoded(messages, tokenizer).samples[0].input_ids)), 0
    for message in messages:
        at = text.index(dense(message.content), at) + len(dense(message.content))


@pytest.mark.parametrize(("shape", "kind"), ALL)
def test_the_ends_are_the_tokens_at_which_trained_turns_end(shape: str, kind: str) -> None:
    tokenizer = TOKENIZERS(shape, kind)
    messages = tuple(Message(role, text) for role in ("user", "assistant") for text in ["hi"]) * 2
    found = encoded(messages, tokenizer)
    last = {found.samples[0].input_ids[stop - 1] for _, stop in trained_parts(found.samples[0])}
    assert found.ends == last
    assert [tokenizer.decode([end]) for end in found.ends] == [SHAPES[shape].end.strip()]


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
@quick
def test_a_text_of_its_own_is_trained_whole_and_then_its_end(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS(next(iter(SHAPES)), kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record = Record((Message("assistant", text),), plain=True)
        sample = encode_all([record], tokenizer, 100_000).samples[0]
    assert sample.labels == sample.input_ids
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    assert sample.input_ids == (ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id])
    written = decoded(tokenizer, sample.input_ids).removesuffix(tokenizer.eos_token)
    assert dense(written) == dense(text.removesuffix(tokenizer.eos_token))
