"""Chat templates by name, for tokenizers without one of their own; one line each in ``TEMPLATES``.

``start`` is the beginning-of-sequence token where the tokenizer puts one before plain text. A template that closes an
assistant turn with no token of the tokenizer's is given the end-of-sequence token there (:mod:`lorafa.data.rendering`).
"""

from __future__ import annotations

import os

from lorafa.data import TEMPLATES
from lorafa.data.entry import ChatTemplate
from lorafa.errors import ConfigError, did_you_mean
from lorafa.storage.paths import user_path

PLAIN = ChatTemplate(
    "{{ start }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)
"""Prompt, newline, completion, end-of-sequence token; no word of who speaks."""

SPACED = ChatTemplate(
    "{{ start }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}"
    "{% if loop.previtem and loop.previtem['role'] != 'assistant' %}{{ '\\n' }}{% endif %}{{ message['content'] }}"
    "{% endif %}{% endfor %}"
)
"""Prompt, space, completion, end-of-sequence token, as LoRA-GA's scripts write all data; the space is trained."""

CHATML = ChatTemplate(
    "{{ start }}{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""``<|im_start|>role``, newline, text, ``<|im_end|>``: for tokenizers that have these two tokens."""

ALPACA = ChatTemplate(
    "{{ start }}{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '### Response:\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' }}{% endif %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
"""``### Instruction:`` and ``### Response:``, each with its text on the next line; a system text stands by itself."""

VICUNA = ChatTemplate(
    "{{ start }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'ASSISTANT: ' + message['content'] + eos_token }}{% elif message['role'] == 'user' %}"
    "{{ 'USER: ' + message['content'] + ' ' }}{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""``USER:`` and ``ASSISTANT:`` on one line."""


def find_template(name: str) -> str:
    """The template called ``name``, or the one in the file of that name.

    Raises:
        ConfigError: it is neither, or the file cannot be read.
    """
    if name in TEMPLATES:
        return TEMPLATES.get(name).text
    path = user_path(name)
    if not os.path.isfile(path):
        raise ConfigError(
            f"data.template={name!r} is neither a template's name nor a file.{did_you_mean(name, TEMPLATES.names())} "
            f"Give {', '.join(TEMPLATES.names())}, or a file with a Jinja template."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.template: the file {name!r} cannot be read: {error}. Give a text file.") from error
    if not text.strip():
        raise ConfigError(f"data.template: the file {name!r} is empty. Write a template into it, or name one.")
    return text
