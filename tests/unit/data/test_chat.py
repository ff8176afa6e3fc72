"""Which tokens are trained, and how conversations become samples and batches."""

from __future__ import annotations

import pytest
import torch

from lorafa.data.chat import IGNORE, Sample, encode_all, encode_prompt, render_sample
from lorafa.data.collate import Collator
from lorafa.data.records import Message, Record
from lorafa.errors import DataError
from toys.language_models import CHATML, byte_tokenizer, conversation


def encode(record, tokenizer, max_length):
    return encode_all([record], tokenizer, max_length).samples[0]


def trained_text(sample, tokenizer):
    return tokenizer.decode([label for label in sample.labels if label != IGNORE])


def test_every_assistant_turn_is_trained_through_its_end_token_and_nothing_else_is():
    tokenizer = byte_tokenizer()
    sample = encode(conversation("hi", "hello", "and?", "bye"), tokenizer, 500)
    assert trained_text(sample, tokenizer) == "hello<|im_end|>bye<|im_end|>"
    assert all(label in (IGNORE, token) for label, token in zip(sample.labels, sample.input_ids, strict=True))


def test_a_sample_reads_as_the_template_writes_it():
    tokenizer = byte_tokenizer()
    record = conversation("Größe? 🙂", "naïve 5")
    sample = encode(record, tokenizer, 500)
    turns = [{"role": m.role, "content": m.content} for m in record.messages]
    assert tokenizer.decode(sample.input_ids) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert trained_text(sample, tokenizer) == "naïve 5<|im_end|>"


@pytest.mark.parametrize("template", [CHATML, None])
def test_the_prompt_of_an_evaluation_is_what_precedes_the_labels(template):
    tokenizer = byte_tokenizer(template)
    record = conversation("2 + 2?", "4")
    sample = encode(record, tokenizer, 500)
    first = next(i for i, label in enumerate(sample.labels) if label != IGNORE)
    assert encode_prompt(record.question, tokenizer) == sample.input_ids[:first]


def test_without_a_template_a_sample_is_prompt_newline_completion_end():
    tokenizer = byte_tokenizer(None, eos_token="<|endoftext|>")
    sample = encode(conversation("2 + 2?", "4"), tokenizer, 500)
    assert tokenizer.decode(sample.input_ids) == "2 + 2?\n4<|endoftext|>"
    assert trained_text(sample, tokenizer) == "4<|endoftext|>"


def test_without_a_template_the_start_token_is_put_where_the_tokenizer_puts_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(None, bos_token="<|im_start|>", eos_token="<|endoftext|>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", None, [("<|im_start|>", bos)])
    sample = encode(conversation("2 + 2?", "4"), tokenizer, 500)
    assert tokenizer.decode(sample.input_ids) == "<|im_start|>2 + 2?\n4<|endoftext|>"


def test_a_template_that_does_not_close_turns_gets_the_end_token_after_each():
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = byte_tokenizer(bare, eos_token="<|endoftext|>")
    sample = encode(conversation("a", "b", "c", "d"), tokenizer, 500)
    assert trained_text(sample, tokenizer) == "b<|endoftext|>d<|endoftext|>"
    assert tokenizer.decode(sample.input_ids).endswith(
        "assistant: b<|endoftext|>\nuser: c\nassistant: d<|endoftext|>\n"
    )
    assert sample.input_ids.count(tokenizer.eos_token_id) == 2


def test_truncation_is_counted_and_lost_answers_are_dropped_and_counted():
    tokenizer = byte_tokenizer(None)
    records = [conversation("p" * 5, "c"), conversation("p" * 5, "c" * 50), conversation("p" * 50, "c")]
    encoded = encode_all(records, tokenizer, 20)
    assert (len(encoded.samples), encoded.dropped, encoded.truncated) == (2, 1, 1)
    assert [sample.truncated for sample in encoded.samples] == [False, True]
    assert max(len(sample.input_ids) for sample in encoded.samples) == 20


def test_trained_tokens_are_shown_green():
    tokenizer = byte_tokenizer(None, eos_token="<|endoftext|>")
    text = render_sample(encode(conversation("prompt", "naïve"), tokenizer, 500), tokenizer)
    assert text.plain == "prompt\nnaïve<|endoftext|>"
    green = [text.plain[span.start : span.end] for span in text.spans if span.style == "green"]
    assert green == ["naïve<|endoftext|>"]


def test_padding_is_masked_by_position_even_if_the_pad_token_occurs_in_the_text():
    batch = Collator(pad_id=9)([Sample([9, 2, 9], [IGNORE, 2, 9]), Sample([4], [4])])
    assert batch["input_ids"].tolist() == [[9, 2, 9], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 2, 9], [4, IGNORE, IGNORE]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_samples_whose_labels_are_all_cut_off_are_an_error_that_says_where_the_first_answer_starts():
    records = [conversation("p" * n, "c") for n in (30, 10, 20)]
    with pytest.raises(
        DataError, match=r"None of the 3 samples .* max_length=8: .* at token 12\. Raise data\.max_length"
    ):
        encode_all(records, byte_tokenizer(None), 8)


def test_no_records_are_an_error():
    with pytest.raises(DataError, match=r"There are no records to tokenize\. Give some"):
        encode_all([], byte_tokenizer(), 8)


def test_a_template_that_leaves_the_answer_out_is_an_error():
    deaf = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    with pytest.raises(DataError, match=r"^'question': the chat template leaves the assistant's text out. Use another"):
        encode_all([conversation("question", "answer")] * 2, byte_tokenizer(deaf), 100)


def test_a_conversation_without_an_assistant_turn_is_an_error():
    with pytest.raises(DataError, match=r"no assistant turn: 'just a question'\. There is nothing to train on"):
        encode(Record((Message("user", "just a question"),)), byte_tokenizer(), 100)


def test_a_template_that_rewrites_earlier_turns_is_an_error():
    shown = "{% if loop.last or m['role'] == 'user' %}{{ m['content'] }}{% endif %}{{ '|' }}"
    forgetful = "{% for m in messages %}" + shown + "{% endfor %}"
    with pytest.raises(
        DataError, match=r"up to message 2 differently once later turns follow.*Split such conversations"
    ):
        encode(conversation("a", "b", "c", "d"), byte_tokenizer(forgetful), 100)


def test_a_template_that_refuses_a_conversation_is_an_error_with_its_reason():
    strict = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError, match=r"refuses a conversation with the roles user, assistant: System role not supp"):
        encode(conversation("a", "b"), byte_tokenizer(strict), 100)


def test_a_tokenizer_without_any_end_token_is_an_error():
    with pytest.raises(
        DataError, match=r"neither a chat template nor an end-of-sequence token.*Set tokenizer.eos_token"
    ):
        encode(conversation("a", "b"), byte_tokenizer(None, unk_token="<|endoftext|>"), 100)
    bare = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(DataError, match=r"closes an assistant turn with no special token.*Set tokenizer.eos_token"):
        encode(conversation("a", "b"), byte_tokenizer(bare, unk_token="<|endoftext|>"), 100)
