"""Conversations as a chat template writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from lorafa.data.records import Message
from lorafa.data.templates import PLAIN
from lorafa.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE, HOLE = "\ufdd0", "\ufdd1", "\ufdd2"
"""Noncharacters of Unicode, which no text has: around what spells a special token, and in the place of an answer."""


def render(
    messages: Iterable[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool,
    tools: Sequence[Any] = (),
) -> str:
    """The conversation as the text the model reads, special tokens written out.

    Raises:
        DataError: the template refuses the conversation, or there is neither a template nor an end-of-sequence token.
    """
    from jinja2.exceptions import TemplateError  # the command line knows this module before a command runs

    turns = [{**message.extra, "role": message.role, "content": message.content} for message in messages]
    template = tokenizer.chat_template or PLAIN.text
    if template == PLAIN.text and tokenizer.eos_token is None:
        raise DataError(
            "The tokenizer has neither a chat template nor an end-of-sequence token, so the model could not learn to "
            "stop. Set tokenizer.eos_token or tokenizer.chat_template."
        )
    own = isinstance(template, str) and template.startswith("{{ start }}")
    try:
        text: str = tokenizer.apply_chat_template(
            turns,
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **({"chat_template": template, "start": start_token(tokenizer)} if own else {}),
        )
    except (
        TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError, MemoryError
    ) as error:  # fmt: skip
        roles = ", ".join(str(turn["role"]) for turn in turns)
        raise DataError(
            f"The tokenizer's chat template refuses a conversation with the roles {roles}: {first_line(error)}. "
            "Change the rows, or set another template (data.template, tokenizer.chat_template)."
        ) from error
    return text


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The texts of the tokenizer's special tokens."""
    added = tokenizer.added_tokens_decoder.values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Any token that was added to the vocabulary, special or not, but where a text only spells it."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return any_of(added | special_tokens(tokenizer), f"(?<!{OPEN})")


def start_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning-of-sequence token, if this tokenizer puts one before plain text."""
    bos: str | None = tokenizer.bos_token
    return bos if bos is not None and tokenizer("a").input_ids[0] == tokenizer.bos_token_id else ""


def any_of(texts: Iterable[str], before: str = "") -> re.Pattern[str]:
    """Any of the texts, the longest where one is the beginning of another."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    return re.compile(f"{before}(?:{'|'.join(map(re.escape, longest_first))})" if longest_first else "(?!)")


def unmarked(text: str) -> str:
    """The text itself, without marks around what spells a token."""
    return text.replace(OPEN, "").replace(CLOSE, "")


def dense(text: str) -> str:
    """The text without blanks."""
    return "".join(text.split())
