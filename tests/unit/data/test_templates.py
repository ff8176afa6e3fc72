"""Chat templates by name and from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafa.data import TEMPLATES
from lorafa.data.chat import render
from lorafa.data.templates import find_template
from lorafa.errors import ConfigError
from toys.chats import chat_tokenizer, turns

CONVERSATION = turns(("system", "s"), ("user", "q"), ("assistant", "a"))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("plain", "s\nq\na<|endoftext|>"),
        ("spaced", "s\nq a<|endoftext|>"),
        ("chatml", "".join(f"<|im_start|>{m.role}\n{m.content}<|im_end|>\n" for m in CONVERSATION)),
        ("alpaca", "s\n\n### Instruction:\nq\n\n### Response:\na<|endoftext|>\n\n"),
        ("vicuna", "s USER: q ASSISTANT: a<|endoftext|>"),
    ],
)  # fmt: skip
def test_a_template_by_name_writes_a_conversation(name: str, text: str) -> None:
    tokenizer = chat_tokenizer("bytes", find_template(name))
    assert render(CONVERSATION, tokenizer, add_generation_prompt=False) == text
    assert find_template(name) == TEMPLATES.get(name).text  # the second time, too


def test_a_template_comes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    tokenizer = chat_tokenizer("bytes", find_template(str(path)))
    assert render(CONVERSATION, tokenizer, add_generation_prompt=False) == "sqa"


def test_what_is_neither_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'chatmll' is neither .* Did you mean 'chatml'\? Give alpaca, chatml, pl"):
        find_template("chatmll")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match=r"data\.template: the file '.*bytes\.jinja' cannot be read"):
        find_template(str(tmp_path / "bytes.jinja"))
    (tmp_path / "empty.jinja").write_text("\n")
    with pytest.raises(ConfigError, match=r"data\.template: the file '.*empty\.jinja' is empty"):
        find_template(str(tmp_path / "empty.jinja"))
