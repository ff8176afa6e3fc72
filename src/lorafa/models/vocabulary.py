"""New tokens: names for them in the tokenizer, and rows in the tables of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lorafa.errors import ConfigError, SourceError, shorten
from lorafa.models.sourced import as_source_error
from lorafa.settings.checks import repeated
from lorafa.storage.hub import locate
from lorafa.storage.paths import user_path


def add_tokens(model: Any, tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Make a token of each text, and give it a row in the embedding and in the head.

    A row starts at the mean of those of the tokens that the text was written with before. The tables grow where they
    have no rows to spare, which leaves all others as they are.

    Args:
        model: a causal language model of transformers; it and its tokenizer are changed.

    Returns:
        The ids of the texts, in their order.

    Raises:
        ConfigError: a text is empty, is given twice, is a token already, or cannot be written with the old tokens.
    """
    known = tokenizer.get_vocab()
    twice = sorted(repeated(texts))
    if taken := [text for text in texts if text in known] or twice:
        raise ConfigError(
            f"model.add_tokens: {shorten(map(repr, taken))} {'is' if len(taken) == 1 else 'are'} given twice or "
            "known to the tokenizer already. Leave it out."
        )
    before = [tokenizer(text, add_special_tokens=False).input_ids if text.strip() else [] for text in texts]
    if blank := [text for text, ids in zip(texts, before, strict=True) if not ids]:
        raise ConfigError(f"model.add_tokens: {blank[0]!r} is no text that could be a token. Leave it out.")
    tokenizer.add_tokens(list(texts))
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(texts))
    if max(ids) >= len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    with torch.no_grad():
        for table in _tables(model):
            for row, pieces in zip(ids, before, strict=True):
                mean = table.weight[pieces].to(torch.float32).mean(dim=0)
                table.weight[row] = mean.to(table.weight.dtype)
                if getattr(table, "bias", None) is not None:
                    table.bias[row] = table.bias[pieces].mean()
    return ids


def rows_to_train(model: Any, ids: Sequence[int]) -> dict[str, list[int]]:
    """The tables that have the rows of tokens, by their names in the model; of those that share a weight the first."""
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(table)]: list(ids) for table in _tables(model)}


def tokenizer_beside(adapter: str, model: Any, *, trust_remote_code: bool = False) -> Any | None:
    """The tokenizer that lies beside an adapter, where one does: it knows the tokens that were added for it. The tables
    of the model get the rows it lacks, for the adapter to fill.

    Args:
        adapter: folder or Hub id.
        trust_remote_code: run code that comes with it.

    Raises:
        SourceError: it is there and cannot be read, or needs code that is not trusted.
    """
    try:
        place = locate(adapter, ["tokenizer_config.json"]).parent
    except SourceError:
        return None
    from transformers import AutoTokenizer

    with as_source_error(f"Could not load the tokenizer in {str(place)!r}", "take its files away, or restore them."):
        tokenizer = AutoTokenizer.from_pretrained(
            place if user_path(adapter).is_dir() else adapter, trust_remote_code=trust_remote_code
        )
    if len(tokenizer) > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _tables(model: Any) -> Iterator[Any]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    yield embedding
    if head is not None and head.weight is not embedding.weight:
        yield head
