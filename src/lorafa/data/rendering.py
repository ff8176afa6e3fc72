"""Conversations as a chat template writes them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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

    from lorafa.data.bounded import render_within_bounds

    turns = [{**message.extra, "role": message.role, "content": message.content} for message in messages]
    template = tokenizer.chat_template or PLAIN.text
    if template == PLAIN.text and tokenizer.eos_token is None:
        raise DataError(
            "The tokenizer has neither a chat template nor an end-of-sequence token, so the model could not learn to "
            "stop. Set tokenizer.eos_token or tokenizer.chat_template."
        )
    own = isinstance(template, str) and template.startswith("{{ start }}")
    try:
        if _writes_by_itself(tokenizer):
            return str(
                tokenizer.apply_chat_template(
                    turns, tools=list(tools) or None, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )
        chosen = template if own else tokenizer.get_chat_template(tools=list(tools) or None)
        given = {"messages": list(map(_seen, turns)), "tools": [_plain(tool) for tool in tools] or None}
        known = {"documents": None, "add_generation_prompt": add_generation_prompt, **tokenizer.special_tokens_map}
        start = {"start": start_token(tokenizer)} if own else {}
        return render_within_bounds(str(chosen), {**known, **start, **given})
    except (
        TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError, MemoryError
    ) as error:  # fmt: skip
        roles = ", ".join(str(turn["role"]) for turn in turns)
        raise DataError(
            f"The tokenizer's chat template refuses a conversation with the roles {roles}: {first_line(error)}. "
            "Change the rows, or set another template (data.template, tokenizer.chat_template)."
        ) from error


def _writes_by_itself(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer writes conversations by its own program, not by a template (those of mistral-common)."""
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


_REASONING = ("reasoning_content", "thinking", "reasoning")


def _seen(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn as transformers shows it to a template: without what is None, and what an assistant thinks by both names
    that templates read."""
    seen = {name: _plain(value) for name, value in turn.items() if value is not None}
    thought = next((seen[name] for name in _REASONING if seen.get(name) is not None), None)
    return seen if thought is None else {"thinking": thought, **seen, "reasoning_content": thought}


def _plain(value: Any) -> Any:
    """A value of json; of another the name of its type, for a template may do nothing with it."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if value is None or type(value) in (str, int, float, bool) else f"<{type(value).__name__}>"


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
