"""Texts that a model writes by itself, drawn once from a fixed seed and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lorafa.data.chat import IGNORE, Sample, encode_prompt
from lorafa.data.records import Message
from lorafa.data.source import digest_of
from lorafa.data.token_cache import digest_of_tokenizer
from lorafa.errors import CheckpointError, DataError, warn
from lorafa.evals.by_length import Progress
from lorafa.evals.generation import Sampling, check_prompts, generate_ids
from lorafa.layers.host import Host
from lorafa.models.wrapped import inner_model
from lorafa.processes import from_main, is_main
from lorafa.storage.fingerprint import fingerprint
from lorafa.storage.parsed import from_json
from lorafa.storage.tensors import whole
from lorafa.storage.wheels import default_cache_dir
from lorafa.storage.whole import make_folder, written_whole

AT_ONCE = 16
"""Texts drawn together. It decides which random numbers a text gets, so it is no setting."""
SEEDED = "by seed and place"
"""How batches are seeded; texts that were kept before there was this way are other ones."""
OPENINGS = (
    "Hello! How are you?",
    "What is the capital of France?",
    "Tell me a short story.",
    "Explain how rain forms.",
    "Write a Python function that reverses a list.",
    "List three healthy foods.",
    "What is 12 times 7?",
    "Give me advice on learning a language.",
)
"""What is asked in the short conversations that begin every other text."""


@dataclass(frozen=True)
class Opening:
    """What a text begins with."""

    asked: str | None
    """A user's turn, written by the chat template; None: the token with which texts begin, and nothing else."""


@dataclass(frozen=True)
class Drawing:
    """How texts are drawn, at temperature 1 from the whole vocabulary."""

    max_new_tokens: int
    """Longest text, in tokens."""
    seed: int


def openings(texts: int) -> list[Opening]:
    """That many: the empty prompt and the short questions by turns."""
    asked = [None if at % 2 == 0 else OPENINGS[at // 2 % len(OPENINGS)] for at in range(texts)]
    return [Opening(text) for text in asked]


def prompts_of(begun: Sequence[Opening], tokenizer: Any) -> list[list[int]]:
    """The ids that each text begins with.

    Raises:
        DataError: the tokenizer has no token to begin a text with, or its chat template refuses a user's turn.
    """
    start = next((token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None), None)
    if start is None:
        raise DataError(
            "The tokenizer has no token that begins or ends a text, so nothing can be drawn from an empty prompt. Set "
            "tokenizer.bos_token or tokenizer.eos_token, or give texts: data=<file>."
        )
    written = {text: encode_prompt([Message("user", text)], tokenizer) for one in begun if (text := one.asked)}
    return [[start] if one.asked is None else written[one.asked] for one in begun]


def check_drawing(model: Any, tokenizer: Any, begun: Sequence[Opening], how: Drawing) -> None:
    """Raises DataError where the texts cannot be begun, or do not fit the model's context."""
    check_prompts(model, prompts_of(begun, tokenizer), how.max_new_tokens)


def drawn_texts(
    model: Any,
    tokenizer: Any,
    begun: Sequence[Opening],
    how: Drawing,
    progress: Progress | None,
) -> list[Sample]:
    """What the model writes, its adapters switched off by the caller; labelled are the tokens it has written, the end
    of a text included.

    Drawn once: the texts are kept in the user's cache, by the fingerprint of the weights that are no adapter's, the
    tokenizer and ``how``.

    Raises:
        DataError: as :func:`check_drawing`.
    """
    prompts = prompts_of(begun, tokenizer)
    path = _place(model, tokenizer, prompts, how)
    written = None if path is None else from_main(lambda: _read(path, len(prompts)))
    if written is None:
        written = generate_ids(
            model,
            tokenizer,
            prompts,
            batch_size=AT_ONCE,
            max_new_tokens=how.max_new_tokens,
            progress=progress,
            sampling=Sampling(seed=how.seed),
            keep_end=True,
        )
        if path is not None and is_main():
            _write(path, written)
    return [
        Sample([*prompt, *ids], [IGNORE] * len(prompt) + ids) for prompt, ids in zip(prompts, written, strict=True)
    ]


def _place(model: Any, tokenizer: Any, prompts: Sequence[list[int]], how: Drawing) -> Path | None:
    """The file for these texts, there or not; None, with a warning, where nothing would say whose they are."""
    described = fingerprint(_base_tensors(model))
    try:
        unread = [name for name, found in described.items() if found is None]
        if unread:
            raise CheckpointError(f"the weight {unread[0]} cannot be read, so that nothing would tell bases apart.")
        names = digest_of_tokenizer(tokenizer)
    except CheckpointError as error:
        warn(f"The texts that the base writes are not kept: {error}")
        return None
    what = json.dumps([described, names, [*map(list, prompts)], how.max_new_tokens, how.seed, AT_ONCE, SEEDED])
    return default_cache_dir() / "drawn" / f"{digest_of(iter((what,)))[:40]}.json"


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    """The weights of the model without its adapters, under the names they had before any layer was wrapped."""
    stack: list[tuple[str, nn.Module]] = [("", inner_model(model))]
    while stack:
        path, module = stack.pop()
        if isinstance(module, Host):
            stack.append((path, module.get_submodule(module.wrapped_path)))
            continue
        for key, tensor in module._parameters.items():
            if tensor is not None:
                yield f"{path}.{key}", None if tensor.is_meta else whole(tensor)
        stack.extend((f"{path}.{key}", child) for key, child in module._modules.items() if child is not None)


def _read(path: Path, texts: int) -> list[list[int]] | None:
    """The texts of a file; None where there is none, or, with a warning, a damaged one."""
    try:
        found = from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        warn(f"The drawn texts in {path} cannot be read: {error}. They are drawn anew.")
        return None
    right = isinstance(found, list) and len(found) == texts
    if not right or not all(isinstance(ids, list) and ids and all(type(i) is int for i in ids) for ids in found):
        warn(f"The drawn texts in {path} are damaged, and are drawn anew.")
        return None
    return [list(ids) for ids in found]


def _write(path: Path, written: Sequence[Sequence[int]]) -> None:
    """Keep the texts; a cache that cannot be written to is said, and stops nothing."""
    try:
        make_folder(path.parent)
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps([list(ids) for ids in written]), encoding="utf-8")
    except CheckpointError as error:
        warn(f"The texts that the base writes are not kept: {error}")
