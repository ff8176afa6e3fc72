"""New tokens: the rows they start from, and what stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafa.errors import ConfigError
from lorafa.models.vocabulary import add_tokens, rows_to_train
from toys.workplace import make_workplace


@pytest.fixture(params=[True, False], ids=["tied", "apart"])
def loaded(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Any, Any]:
    make_workplace(tmp_path, tie_word_embeddings=request.param)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    return model, AutoTokenizer.from_pretrained(tmp_path / "model")


def test_a_row_starts_at_the_mean_of_what_the_text_was_written_with(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    pieces = tokenizer("<tool>", add_special_tokens=False).input_ids
    tables = {"embed": model.get_input_embeddings, "head": model.get_output_embeddings}
    before = {name: table().weight.detach().clone() for name, table in tables.items()}
    rows = len(before["embed"])
    ids = add_tokens(model, tokenizer, ["<tool>", "</tool>"])
    assert ids == [len(tokenizer) - 2, len(tokenizer) - 1]
    assert tokenizer("a<tool>b", add_special_tokens=False).input_ids.count(ids[0]) == 1
    for name, table in tables.items():
        torch.testing.assert_close(table().weight[ids[0]], before[name][pieces].mean(0))
        assert torch.equal(table().weight[: min(rows, ids[0])], before[name][: min(rows, ids[0])])
    assert model.config.vocab_size == len(model.get_input_embeddings().weight)


def test_the_tables_to_train_are_named_once_where_they_share_a_weight(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    named = rows_to_train(model, [3, 5])
    tied = model.config.tie_word_embeddings
    assert named == {"model.embed_tokens": [3, 5]} | ({} if tied else {"lm_head": [3, 5]})


def test_rows_to_spare_are_used(tmp_path: Path) -> None:
    make_workplace(tmp_path)
    model, tokenizer = (kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    model.resize_token_embeddings(len(tokenizer) + 8)
    add_tokens(model, tokenizer, ["<tool>"])
    assert len(model.get_input_embeddings().weight) == len(tokenizer) + 7


@pytest.mark.parametrize(
    ("texts", "text"),
    [
        (["<|end|>"], "model.add_tokens: '<|end|>' is given twice or known to the tokenizer already"),
        (["<a>", "<a>"], "'<a>' is given twice or known"),
        ([" "], "' ' is no text that could be a token"),
    ],
)
def test_texts_that_make_no_token(loaded: tuple[Any, Any], texts: list[str], text: str) -> None:
    model, tokenizer = loaded
    size = len(tokenizer)
    with pytest.raises(ConfigError) as error:
        add_tokens(model, tokenizer, texts)
    assert text in str(error.value)
    assert len(tokenizer) == size
