"""Perplexity of texts: every token counted once, each item's sum the definition's, windows that read before they count.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorafa.data.chat import IGNORE, Sample
from lorafa.data.collate import Collator
from lorafa.data.records import Message, Record
from lorafa.errors import SourceError
from lorafa.evals.entry import Source, Subject
from lorafa.evals.loss import row_losses
from lorafa.evals.perplexity import PERPLEXITY, PerplexitySettings, pieces
from lorafa.models import head_loss
from toys.chats import chat_tokenizer
from toys.language_models import byte_tokenizer, conversation, tiny_llama


@given(st.integers(1, 60), st.integers(2, 20), st.data())
def test_windows_count_each_labelled_token_once_after_what_came_before(
    count: int, window: int, data: st.DataObject
) -> None:
    overlap = data.draw(st.integers(0, window - 1))
    labels = [IGNORE, *range(1, count)]
    found = pieces(Sample(list(range(count)), labels), window, overlap)
    counted = [label for piece in found for label in piece.labels[1:] if label != IGNORE]
    assert counted == labels[1:]
    for piece in found:
        assert len(piece.input_ids) <= window
        assert piece.input_ids == list(range(piece.input_ids[0], piece.input_ids[0] + len(piece.input_ids)))
    for piece in found[1:]:
        assert next(at for at, label in enumerate(piece.labels) if label != IGNORE) == max(1, overlap)


@pytest.mark.parametrize("chunked", [True, False])
def test_the_sum_of_each_row_is_that_of_its_log_probabilities(chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().double().eval()
    rows = [[3, 7, 9, 4, 11], [5, 6], [8, 2, 2, 10, 3, 9, 1]]
    samples = [Sample(ids, [IGNORE, *ids[1:]]) for ids in rows]
    samples.append(Sample([1, 2], [IGNORE, IGNORE]))
    if not chunked:
        monkeypatch.setattr("lorafa.evals.loss.supports_chunked_loss", lambda model: "not here")
    assert head_loss.supports_chunked_loss(model) is None
    found = row_losses(model, samples, Collator(0), 2, None)
    for ids, loss in zip(rows, found, strict=False):
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        wanted = -sum(float(log_probs[at, token]) for at, token in enumerate(ids[1:]))
        assert loss == pytest.approx(wanted, rel=1e-6)
    assert found[3] == 0.0


def test_bits_per_byte_are_those_of_the_written_text() -> None:
    model, tokenizer = tiny_llama().double().eval(), byte_tokenizer()
    text = "the cat sat"
    record = Record((Message("assistant", text),), plain=True)
    scores = PERPLEXITY.measure(Subject(model, tokenizer), [record], PerplexitySettings(), 2, lambda *_: None)
    numbers = scores.numbers
    assert numbers["perplexity"] == pytest.approx(math.exp(numbers["loss"]))
    size = scores.measured.weights[0]
    assert size <= len(text.encode())
    assert numbers["bits_per_byte"] * size * math.log(2) == pytest.approx(numbers["loss"] * numbers["tokens"])
    assert scores.measured.mean() == pytest.approx(numbers["bits_per_byte"])


def test_a_window_with_room_for_all_is_the_whole_text_at_once() -> None:
    model, tokenizer = tiny_llama().double().eval(), byte_tokenizer()
    record = Record((Message("assistant", "the cat sat on the mat and sat " * 3),), plain=True)

    def loss(**settings: int) -> float:
        own = PerplexitySettings(**settings)
        return PERPLEXITY.measure(Subject(model, tokenizer), [record], own, 4, lambda *_: None).numbers["loss"]

    whole, cut = loss(window=512), loss(window=8, overlap=0)
    assert loss(window=400, overlap=100) == pytest.approx(whole)
    assert abs(cut - whole) > 1e-6


def test_a_text_that_is_no_utf_8_is_an_error(tmp_path) -> None:
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(SourceError, match=r"is no text in UTF-8: .* at byte 0"):
        PERPLEXITY.read(Source(str(tmp_path / "latin.txt")), PerplexitySettings())


def test_half_a_window_is_half_of_what_the_model_reads() -> None:
    model = tiny_llama()
    context = model.config.max_position_embeddings
    assert PerplexitySettings(window=4 * context).reading(model) == (context, context // 2)
    assert PerplexitySettings(window=64).reading(model) == (64, 32)
    assert PerplexitySettings(window=4 * context, overlap=2 * context).reading(model) == (context, context - 1)


def test_conversations_that_are_cut_are_counted_and_said() -> None:
    subject = Subject(tiny_llama().eval(), byte_tokenizer())
    records = [Record((Message("user", "?"), Message("assistant", "a" * length))) for length in (4, 40, 60)]
    records.append(Record((Message("assistant", "b" * 80),), plain=True))  # read in pieces, all of it
    scores = PERPLEXITY.measure(subject, records, PerplexitySettings(window=32), 2, lambda *_: None)
    assert scores.numbers["cut"] == 2
    assert scores.words.endswith(", 2 conversations cut at 32 tokens")
    whole = PERPLEXITY.measure(subject, records[:1], PerplexitySettings(window=32), 2, lambda *_: None)
    assert (whole.numbers["cut"], "cut" in whole.words) == (0, False)


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "sentencepiece of Llama"])
@pytest.mark.parametrize("window", [2, 5, 8, 512])
def test_bytes_are_those_of_the_text_however_it_is_cut(kind: str, window: int) -> None:
    tokenizer = chat_tokenizer(kind, None)
    model = tiny_llama(len(tokenizer))
    text = "x a ré, \N{HIRAGANA LETTER A}\N{GRINNING FACE} an answer: Thé"
    record = Record((Message("assistant", text),), plain=True)
    own = PerplexitySettings(window=window, overlap=1)
    scores = PERPLEXITY.measure(Subject(model, tokenizer), [record], own, 4, lambda *_: None)
    first = decoded_first(tokenizer, text)
    assert scores.measured.weights == [len(text.encode()) - len(first.encode())]


def decoded_first(tokenizer: Any, text: str) -> str:
    """What the first token of a text writes, which nothing predicts."""
    written = tokenizer.decode(tokenizer(text).input_ids[:1])
    assert text.startswith(written)
    return str(written)


def test_bytes_of_an_answer_do_not_count_its_prompt() -> None:
    tokenizer = byte_tokenizer()
    record = conversation("é?", "né", "ö?", "ja")
    subject = Subject(tiny_llama(), tokenizer)
    scores = PERPLEXITY.measure(subject, [record], PerplexitySettings(), 1, lambda *_: None)
    assert scores.measured.weights == [len("né".encode()) + len("ja")]
