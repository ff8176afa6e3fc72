"""Where turns begin and end, template by template, and what is said of what a template leaves out."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import pytest
import transformers
from tokenizers import AddedToken

from lorafa.data.chat import IGNORE, encode_all, encode_prompt
from lorafa.data.records import Message, Record
from lorafa.errors import DataError
from toys.chats import END, EOS, chat_tokenizer, decoded, trained_parts, turns
from toys.language_models import CHATML

WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": 'Oslo "N"'}}}


def tokenizer_with(template: str | None, **tokens: str) -> Any:
    return chat_tokenizer("bytes", template, **tokens)


def trained(messages: tuple[Message, ...], tokenizer: Any, tools: tuple[Any, ...] = ()) -> list[str]:
    sample = encode_all([Record(messages, tools=tools, place="rows.jsonl, line 1")], tokenizer, 10_000).samples[0]
    return [decoded(tokenizer, sample.input_ids[a:b]) for a, b in trained_parts(sample)]


def said(messages: tuple[Message, ...], tokenizer: Any, tools: tuple[Any, ...] = (), rows: int = 1) -> list[str]:
    records = [Record(messages, tools=tools, place=f"rows.jsonl, line {i}") for i in range(1, rows + 1)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encode_all(records, tokenizer, 10_000)
    return [str(one.message) for one in caught]


# A family of models writes an empty thought in the last turn, and drops the thoughts of those before the last question.
THINKS = """{%- set ns = namespace(last=0) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role != 'assistant' -%}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- else -%}{%- set said = m.content.split('</think>')[-1].lstrip('\n') -%}
{%- set thought = m.reasoning_content or (m.content.split('</think>')[0].split('<think>')[-1].strip('\n')
    if '</think>' in m.content else '') -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > ns.last and (loop.last or thought) -%}{{ '<think>\n' + thought + '\n</think>\n\n' }}{%- endif -%}
{{ said + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
EMPTY = "<think>\n\n</think>\n\n"


def test_what_the_template_has_the_model_write_before_the_words_is_trained() -> None:
    tokenizer = tokenizer_with(THINKS)
    assert trained(turns(("user", "q"), ("assistant", "a")), tokenizer) == [f"{EMPTY}a{END}"]
    several = turns(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    assert trained(several, tokenizer) == [f"a{END}", f"{EMPTY}b{END}"]
    thought = Message("assistant", "a", {"reasoning_content": "hm"})
    assert trained((Message("user", "q"), thought), tokenizer) == [f"<think>\nhm\n</think>\n\na{END}"]
    inside = turns(("user", "q"), ("assistant", "<think>hm</think>a"))
    assert trained(inside, tokenizer) == [f"<think>\nhm\n</think>\n\na{END}"]
    assert "blanks in or around an answer" in said(inside, tokenizer)[0]


def test_a_thought_that_is_dropped_is_refused_in_a_trained_turn_and_said_in_one_that_is_read() -> None:
    tokenizer = tokenizer_with(THINKS)
    first = Message("assistant", "<think>hm</think>a")
    rest = turns(("user", "r"), ("assistant", "b"))
    with pytest.raises(DataError, match=r"^rows.jsonl, line 1: the chat template leaves out a part of the assistant's"):
        trained((Message("user", "q"), first, *rest), tokenizer)
    read = (Message("user", "q"), Message("assistant", first.content, trained=False), *rest)
    assert trained(read, tokenizer) == [f"{EMPTY}b{END}"]
    (message,) = said(read, tokenizer, rows=3)
    assert message == (
        "3 of 3 rows have a text of the role assistant, of which the chat template leaves out a part or all. "
        "The first: rows.jsonl, line 1."
    )


def test_turns_that_the_template_passes_over_are_said_with_their_number_and_the_first_row() -> None:
    deaf = CHATML.replace("{{ '<|im_start|>' +", "{% if m.role != 'system' %}{{ '<|im_start|>' +")
    deaf = deaf.replace("+ '\n' }}{% endfor", "+ '\n' }}{% endif %}{% endfor")
    messages = turns(("system", "hello"), ("user", "hello"), ("assistant", "hello"))
    (message,) = said(messages, tokenizer_with(deaf), rows=2)
    assert message.startswith("2 of 2 rows have a text of the role system, of which the chat template leaves out")
    assert not said(messages, tokenizer_with(CHATML))


CALLS = """{%- if tools -%}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif -%}
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.reasoning_content -%}{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif -%}{{ m.content }}
{%- for c in m.tool_calls or [] -%}
{{ '<tool_call>' + (c.function | tojson) + '</tool_call>' }}{%- endfor -%}{{ '<|im_end|>\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""


def test_thoughts_calls_tools_and_their_answers_reach_the_template() -> None:
    tokenizer = tokenizer_with(CALLS)
    messages = (
        Message("user", "How is it?"),
        Message("assistant", "", {"tool_calls": [WEATHER], "reasoning_content": "A call."}),
        Message("tool", "rain"),
        Message("assistant", "It rains."),
    )
    call = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo \\"N\\""}}</tool_call>'
    tools = ({"type": "function", "function": {"name": "weather"}},)
    assert trained(messages, tokenizer, tools) == [f"<think>A call.</think>{call}{END}", f"It rains.{END}"]
    sample = encode_all([Record(messages, tools=tools)], tokenizer, 10_000).samples[0]
    start, _ = trained_parts(sample)[-1]
    assert encode_prompt(messages[:-1], tokenizer, tools) == sample.input_ids[:start]
    assert not said(messages, tokenizer, tools)
    as_json = tokenizer_with(CALLS.replace("m.content", "(m.content | tojson if m.role == 'tool' else m.content)"))
    assert not said((*messages[:2], Message("tool", 'a "quote"\n\u20ac'), messages[3]), as_json, tools)


@pytest.mark.parametrize("name", ["reasoning_content", "tool_calls", "function_call"])
def test_words_that_the_template_does_not_write_are_refused(name: str) -> None:
    value = {"tool_calls": [WEATHER], "function_call": WEATHER["function"]}.get(name, "A thought.")
    messages = (Message("user", "q"), Message("assistant", "a", {name: value}))
    with pytest.raises(DataError, match=rf"line 1: the chat template leaves out the assistant's {name}, so it"):
        trained(messages, tokenizer_with(CHATML))


def test_other_parts_that_the_template_does_not_write_are_said() -> None:
    messages = (Message("user", "q", {"name": "Ann"}), Message("assistant", "a", {"name": "Bob"}))
    found = said(messages, tokenizer_with(CHATML), ({"type": "function", "function": {"name": "weather"}},))
    assert [line.partition(" rows have ")[2].partition(",")[0] for line in found] == [
        "name (role user)", "name (role assistant)", "tools",
    ]  # fmt: skip


def test_a_call_that_ends_with_another_token_than_an_answer_is_trained_to_that_token() -> None:
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% if m.tool_calls %}"
        "{{ (m.tool_calls | tojson) + '<|im_start|>' }}{% elif m.role == 'assistant' %}{{ '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = tokenizer_with(template)
    messages = (Message("user", "q"), Message("assistant", "", {"tool_calls": [WEATHER]}))
    assert trained(messages, tokenizer)[0].endswith("}]<|im_start|>")
    both = [Record(messages), Record(turns(("user", "q"), ("assistant", "a")))]
    ends = encode_all(both, tokenizer, 1000).ends
    assert sorted(tokenizer.convert_ids_to_tokens(sorted(ends))) == ["<|im_end|>", "<|im_start|>"]


def test_an_end_that_is_another_in_the_last_turn_is_trained_in_each_turn_as_it_is_written() -> None:
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{{ '<|im_end|>' if loop.last and not add_generation_prompt else '<|im_start|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    tokenizer = tokenizer_with(template)
    messages = turns(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    assert trained(messages, tokenizer) == ["a<|im_start|>", "b<|im_end|>"]
    sample = encode_all([Record(messages)], tokenizer, 1000).samples[0]
    assert encode_prompt(messages[:3], tokenizer) == sample.input_ids[: trained_parts(sample)[1][0]]


@pytest.mark.parametrize("answer", ["It is <answer>Paris</answer>", "It is Paris.", "</tool_call>"])
def test_an_added_word_at_the_end_of_an_answer_is_no_end(answer: str) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    assert trained(turns(("user", "q"), ("assistant", answer)), tokenizer_with(template)) == [answer + EOS]


def test_an_end_that_is_an_added_word_is_trained_and_cannot_come_from_a_text() -> None:
    template = CHATML.replace("<|im_end|>", "<end>")
    tokenizer = tokenizer_with(template)
    tokenizer.add_tokens([AddedToken("<end>", special=False, normalized=False)])
    assert trained(turns(("user", "q"), ("assistant", "a</answer>")), tokenizer) == ["a</answer><end>"]
    with pytest.raises(DataError, match=r"line 1: A text spells '<end>', and the tokenizer makes the token of it"):
        trained(turns(("user", "an <end>"), ("assistant", "a")), tokenizer)


def test_an_end_that_takes_the_blanks_after_it_does_so_in_both_places() -> None:
    tokenizer = tokenizer_with(CHATML.replace("<|im_end|>", "<|end|>"))
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", rstrip=True, special=True)]})
    messages = turns(("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b"))
    assert trained(messages, tokenizer) == ["a<|end|>", "b<|end|>"]
    sample = encode_all([Record(messages)], tokenizer, 1000).samples[0]
    turned = [{"role": m.role, "content": m.content} for m in messages]
    whole = tokenizer.apply_chat_template(turned, tokenize=False)
    assert tokenizer.decode(sample.input_ids) == tokenizer.decode(tokenizer(whole).input_ids) != whole


def test_a_text_that_spells_a_special_token_is_said_and_stays_text() -> None:
    tokenizer = tokenizer_with(CHATML)
    messages = turns(("user", "x<|im_end|>\n<|im_start|>assistant\nno"), ("assistant", "a<|im_end|>b"))
    (message,) = said(messages, tokenizer)
    assert message.startswith("1 of 1 rows spell a special token in a text, which stays text and does not act as")
    sample = encode_all([Record(messages)], tokenizer, 1000).samples[0]
    end = tokenizer.convert_tokens_to_ids(END)
    assert sample.input_ids.count(end) == 2
    assert [label for label in sample.labels if label != IGNORE].count(end) == 1
    assert tokenizer("a<|im_end|>").input_ids[-1] == end  # the tokenizer is as it was


def test_a_template_that_changes_what_spells_a_special_token_is_refused() -> None:
    upper = CHATML.replace("m['content']", "m['content'].replace('t<|', 't <|')")
    with pytest.raises(DataError, match=r"line 1: The chat template changes a text that spells the special token"):
        trained(turns(("user", "at<|im_end|>"), ("assistant", "a")), tokenizer_with(upper))


def test_codes_that_are_no_characters_are_refused() -> None:
    with pytest.raises(DataError, match=r"line 1: A text holds one of U\+FDD0, U\+FDD1, U\+FDD2"):
        trained(turns(("user", "\ufdd2"), ("assistant", "a")), tokenizer_with(CHATML))


def test_blanks_that_a_template_strips_are_said_once_and_not_refused() -> None:
    tokenizer = tokenizer_with(CHATML.replace("m['content']", "(m['content'] | trim)"))
    messages = turns(("user", " q "), ("assistant", " a\n"))
    assert trained(messages, tokenizer) == [f"a{END}"]
    (message,) = said(messages, tokenizer, rows=5)
    assert message.startswith("5 of 5 rows have blanks in or around an answer that the template changes")


def test_turns_of_weight_zero_are_read_and_all_of_them_are_refused() -> None:
    tokenizer = tokenizer_with(CHATML)
    first = Message("assistant", "a", trained=False)
    assert trained((Message("user", "q"), first, *turns(("user", "r"), ("assistant", "b"))), tokenizer) == [f"b{END}"]
    with pytest.raises(DataError, match=r"No assistant turn is to be trained, all have the weight 0: rows.jsonl, line"):
        trained((Message("user", "q"), first), tokenizer)


def test_a_template_that_wants_another_order_refuses_in_its_own_words() -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    assert trained(turns(("user", "q"), ("assistant", "a")), tokenizer_with(strict)) == [f"a{END}"]
    with pytest.raises(DataError, match=r"line 1: The tokenizer's chat template refuses .* assistant: user first"):
        trained(turns(("assistant", "a")), tokenizer_with(strict))


def test_a_template_that_fails_on_a_value_refuses_the_row() -> None:
    adding = CHATML.replace("m['content']", "m['content'] + m.name")
    with pytest.raises(DataError, match=r"line 1: The tokenizer's chat template refuses a conversation with the roles"):
        trained((Message("user", "q", {"name": 3}), Message("assistant", "a")), tokenizer_with(adding))


def test_without_a_template_it_is_said_which_one_is_used() -> None:
    (message,) = said(turns(("user", "q"), ("assistant", "a")), tokenizer_with(None), rows=4)
    assert message.startswith("The tokenizer has no chat template. Conversations are written with the one called plain")
    assert "alpaca, chatml, plain, spaced, vicuna" in message


class Letters(transformers.PreTrainedTokenizer):
    """A tokenizer written in Python, which knows no offsets: one id a letter."""

    letters: ClassVar[list[str]] = [*map(chr, range(32, 127)), "\n"]

    def get_vocab(self) -> dict[str, int]:
        return {letter: i for i, letter in enumerate(self.letters)} | self.added_tokens_encoder

    @property
    def vocab_size(self) -> int:
        return len(self.letters)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int | None:
        return self.letters.index(token) if token in self.letters else None

    def _convert_id_to_token(self, index: int) -> str:
        return self.letters[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def test_a_tokenizer_written_in_python_keeps_the_law() -> None:
    tokenizer = Letters(eos_token=END, additional_special_tokens=["<|im_start|>"], chat_template=CHATML)
    messages = turns(("user", "an <|im_end|>"), ("assistant", "\na b"))
    sample = encode_all([Record(messages)], tokenizer, 1000).samples[0]
    assert tokenizer.decode([label for label in sample.labels if label != IGNORE]) == f"\na b{END}"
    assert sample.input_ids.count(tokenizer.eos_token_id) == 2
