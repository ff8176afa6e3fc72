"""How likely each way to go on is: the definition, whatever the batches; what a tokenizer makes of words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorafa.errors import DataError
from lorafa.evals import choices as under_test
from lorafa.evals.choices import Choices, choices, log_probs, plain_ids
from toys.chats import chat_tokenizer
from toys.language_models import byte_tokenizer, tiny_llama

ASKED = [
    Choices([3, 7, 9], [[4], [11], [12]]),
    Choices([5], [[6], [7], [8]]),
    Choices([8, 2, 2, 10], [[3, 9, 1], [4], [5, 5]]),
    Choices([1, 2, 3, 4, 5, 6], [[9], [8], [7]]),
]


@torch.no_grad()
def by_definition(model: Any, one: Choices) -> list[float]:
    found = []
    for tail in one.tails:
        ids = torch.tensor([[*one.prompt, *tail]])
        rows = model(input_ids=ids).logits[0].log_softmax(-1)
        found.append(sum(float(rows[len(one.prompt) - 1 + at, token]) for at, token in enumerate(tail)))
    return found


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_log_probabilities_are_the_definition_whatever_the_batches(
    chunked: bool, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().double().eval()
    if not chunked:
        monkeypatch.setattr(under_test, "supports_chunked_loss", lambda model: "not here")
    steps: list[tuple[int, int]] = []
    found = log_probs(model, ASKED, 0, batch_size, lambda *step: steps.append(step))
    for row, one in zip(found, ASKED, strict=True):
        assert row == pytest.approx(by_definition(model, one), rel=1e-7)
    assert steps[-1][0] == steps[-1][1]


def test_words_are_cut_where_their_tokens_begin_to_differ() -> None:
    found = choices(plain_ids(byte_tokenizer()), "Answer:", [" A", " B"])
    assert byte_tokenizer().decode(found.prompt) == "Answer: "  # a token a byte: the blank is common
    assert found.single


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "sentencepiece of Llama"])
def test_whatever_the_tokenizer_the_whole_is_the_text_with_its_word(kind: str) -> None:
    tokenizer = chat_tokenizer(kind, None)
    ids, words = plain_ids(tokenizer), [" return", " run", " x"]
    found = choices(ids, "x = 1: a", words)
    assert [[*found.prompt, *tail] for tail in found.tails] == [ids("x = 1: a" + word) for word in words]


@pytest.mark.parametrize("words", [[" A", " A"], [" A", " AB"]])
def test_words_that_cannot_be_told_apart_are_refused(words: list[str]) -> None:
    with pytest.raises(DataError, match=r"does not tell ' A'.* apart after 'Answer:'"):
        choices(plain_ids(byte_tokenizer()), "Answer:", words)


def test_the_token_that_begins_a_sequence_stands_once_before_the_text() -> None:
    tokenizer = byte_tokenizer()
    assert plain_ids(tokenizer)("a") == tokenizer("a").input_ids
