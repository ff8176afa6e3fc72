"""Plain texts: every token is trained, and no template has a say."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing

from lorafa.data.chat import Encoded, encode_all
from lorafa.data.collate import Collator
from lorafa.data.records import Message, Record
from lorafa.errors import DataError
from lorafa.evals.loss import answer_loss
from toys.language_models import byte_tokenizer, conversation, tiny_llama
from toys.records import load, write_rows


def text(content: str, place: str = "rows.jsonl, line 1") -> Record:
    return Record((Message("assistant", content),), plain=True, place=place)


def encoded(*texts: str, length: int = 500, **tokens: str) -> Encoded:
    return encode_all([text(one) for one in texts], byte_tokenizer(**tokens), length)


def test_a_text_is_trained_whole_with_an_end_and_without_a_template(recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = byte_tokenizer(None, eos_token="<|endoftext|>")
    found = encode_all([text(" Größe,\n2 + 2. ")], tokenizer, 500)
    sample = found.samples[0]
    assert tokenizer.decode(sample.input_ids) == " Größe,\n2 + 2. <|endoftext|>"
    assert sample.labels == sample.input_ids
    assert found.ends == {tokenizer.eos_token_id}
    assert sample.place == "rows.jsonl, line 1"
    assert [str(one.message) for one in recwarn] == []


def test_the_token_that_begins_a_sequence_stands_where_the_tokenizer_puts_it() -> None:
    tokenizer = byte_tokenizer()
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", start)])
    ids = encode_all([text("a")], tokenizer, 500).samples[0].input_ids
    assert tokenizer.decode(ids) == "<|im_start|>a<|im_end|>"
    with pytest.warns(UserWarning, match="spell a special token"):
        again = encode_all([text("<|im_start|>a<|im_end|>")], tokenizer, 500).samples[0].input_ids
    assert again == ids  # neither stands there twice


def test_special_tokens_in_a_text_are_these_tokens_and_said() -> None:
    tokenizer = byte_tokenizer()
    with pytest.warns(
        UserWarning, match=r"1 of 2 rows spell a special token in a column 'text', where it is .* first: d, row 7\."
    ):
        found = encode_all([text("plain"), text("a<|im_end|>b", "d, row 7")], tokenizer, 500)
    ids = found.samples[1].input_ids
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2


def test_a_long_text_loses_its_tail_and_is_counted() -> None:
    found = encoded("x" * 50, "y", length=20)
    assert (len(found.samples), found.dropped, found.truncated) == (2, 0, 1)
    assert [len(sample.input_ids) for sample in found.samples] == [20, 2]


def test_without_an_end_or_a_token_there_is_nothing_to_learn() -> None:
    with pytest.raises(
        DataError, match=r"The tokenizer has no end-of-sequence token, so the model could not learn whe"
    ):
        encoded("a", bos_token="<|im_start|>")
    tokenizer = byte_tokenizer()
    from tokenizers import normalizers

    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(DataError, match=r"line 1: the tokenizer makes no token of the text '.*'\. Delete the row"):
        encode_all([text("\u200b")], tokenizer, 500)


def test_texts_and_conversations_may_stand_in_one_training_and_have_one_loss(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": "Some text."}])
    write_rows(tmp_path / "b.jsonl", [{"prompt": "p", "completion": "c"}])
    records = load(tmp_path / "a.jsonl", tmp_path / "b.jsonl").train
    assert sorted(record.plain for record in records) == [False, True]
    tokenizer, model = byte_tokenizer(), tiny_llama()
    samples = encode_all(records, tokenizer, 500).samples
    assert answer_loss(model, samples, Collator(0), 2) > 0


def test_a_text_that_is_held_out_is_not_trained_on(tmp_path: Path) -> None:
    rows = [{"text": "same"}] * 6 + [{"text": f"other {i}"} for i in range(6)]
    found = load(write_rows(tmp_path / "d.jsonl", rows), eval_size=4)
    held = {record.messages for record in found.heldout}
    assert held.isdisjoint(record.messages for record in found.train)
    assert len(found.train) + found.repeated + 4 == 12


def test_a_template_is_said_to_be_missing_only_where_one_is_wanted(recwarn: pytest.WarningsRecorder) -> None:
    tokenizer = byte_tokenizer(None)
    encode_all([text("a")], tokenizer, 500)
    assert len(recwarn) == 0
    encode_all([text("a"), conversation("q", "a")], tokenizer, 500)
    assert "has no chat template" in str(recwarn.pop().message)
