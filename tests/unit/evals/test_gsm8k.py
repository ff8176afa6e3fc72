"""Reading answers, counting them, and generating them in batches."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
import torch

from lorafa.data.chat import encode_prompt
from lorafa.data.records import Message, Record
from lorafa.errors import ConfigError, DataError
from lorafa.evals import gsm8k
from lorafa.evals.entry import Source, Subject
from lorafa.evals.generation import generate_greedy
from lorafa.evals.gsm8k import GSM8K, Gsm8kSettings, evaluate, extract_answer, extract_upstream
from lorafa.evals.shares import wilson_interval
from lorafa.models.modes import evaluating
from toys.language_models import byte_tokenizer, conversation, greedy_by_hand, tiny_llama
from toys.places import ROOT


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 72", "72"),
        ("48/2 = 24\n#### 1,234", "1234"),
        ("#### 1,234,567.50", "1234567.5"),
        ("#### -5", "-5"),
        ("#### \N{MINUS SIGN}5", "-5"),
        ("#### -$5.25", "-5.25"),
        ("#### $-5", "-5"),
        ("#### .5", "0.5"),
        ("#### 50%", "50"),
        ("#### 12.", "12"),
        ("#### 12.0 apples", "12"),
        ("####72", "72"),
        ("#### x = 3 * 4 = 12", "12"),
        ("#### 10-3", "3"),
        ("####\n\n 7", "7"),
        ("#### **7**", "7"),
        ("#### 3\n#### 4", "4"),
        ("#### 4\nNext question: 99 apples", "4"),
        ("The answer is 8.", "8"),
        ("So the final answer is: $1,000", "1000"),
        ("the answer is 3, no: #### 4", "4"),
        ("#### 4\n####", "4"),
        ("#### 4\n#### \n", "4"),
    ],
)
def test_an_answer_is_the_last_number_after_the_last_mark(text, answer):
    assert extract_answer(text) == Decimal(answer)


@pytest.mark.parametrize("text", ["", "72", "so it is 72", "####", "#### none", "#### 1,23,4", "the answers are 3"])
def test_no_mark_or_no_number_is_no_answer(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize(("text", "answer"), [("#### 1,234", 1), ("#### -5", 0), ("no mark", 0), ("#### 3\n#### 4", 3)])
def test_the_upstream_rule_keeps_its_flaws(text, answer):
    assert extract_upstream(text) == answer


def test_every_gold_answer_of_gsm8k_is_read(gsm8k_rows):
    for row in gsm8k_rows:
        written = row["answer"].rsplit("#### ", 1)[1]
        assert extract_answer(row["answer"]) == Decimal(written.replace(",", ""))


@pytest.fixture
def gsm8k_rows():
    path = ROOT.parent / "shared" / "data" / "gsm8k_train.jsonl"
    if not path.is_file():
        pytest.skip("GSM8K's rows are not part of the repository")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_wilson_interval_is_the_textbook_one():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for (correct, total), bounds in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718)
    }.items():  # fmt: skip
        assert wilson_interval(correct, total) == pytest.approx(bounds, abs=5e-5)
    assert {(wilson_interval(0, n)[0], wilson_interval(n, n)[1]) for n in range(1, 500)} == {(0.0, 1.0)}
    assert all(0 < bound < 1 for bound in (*wilson_interval(1, 2), wilson_interval(0, 5)[1], wilson_interval(5, 5)[0]))


PROMPTS = [[5, 6, 7], [1], [200, 3, 9, 40, 17, 120], [88, 44], [9] * 11]


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_batched_answers_are_those_of_one_prompt_at_a_time(batch_size):
    tokenizer, model = byte_tokenizer(), tiny_llama().eval()
    expected = [greedy_by_hand(model, prompt, 12, [tokenizer.eos_token_id]) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)
    assert generate_greedy(model, tokenizer, PROMPTS, batch_size=batch_size, max_new_tokens=12) == expected


def test_an_answer_stops_at_any_end_token_of_model_or_tokenizer():
    tokenizer, model = byte_tokenizer(), tiny_llama().eval()
    free = [greedy_by_hand(model, prompt, 12, []) for prompt in PROMPTS]
    model.generation_config.eos_token_id = [free[0][3], free[2][5]]
    ends = {free[0][3], free[2][5], tokenizer.eos_token_id}
    expected = [answer[: next((i for i, t in enumerate(answer) if t in ends), None)] for answer in free]
    assert generate_greedy(model, tokenizer, PROMPTS, batch_size=3, max_new_tokens=12) == expected


def test_sampling_settings_and_penalties_of_the_model_do_not_apply():
    tokenizer, model = byte_tokenizer(), tiny_llama().eval()
    plain = generate_greedy(model, tokenizer, PROMPTS, batch_size=5, max_new_tokens=12)
    model.generation_config.update(
        do_sample=True, temperature=9.0, repetition_penalty=5.0, num_beams=3, no_repeat_ngram_size=1, min_new_tokens=12
    )
    assert generate_greedy(model, tokenizer, PROMPTS, batch_size=5, max_new_tokens=12) == plain


def test_the_cache_is_used_even_if_training_switched_it_off_and_the_switch_stays_off():
    tokenizer, model = byte_tokenizer(), tiny_llama()
    model.config.use_cache = False
    widths = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: widths.append(args[0].shape[1]))
    generate_greedy(model, tokenizer, PROMPTS[:1], batch_size=1, max_new_tokens=3)
    assert widths == [3, 1, 1]
    assert model.config.use_cache is False


def test_modes_are_restored_module_by_module_even_after_an_error():
    model = tiny_llama().train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    inside = []
    with pytest.raises(ZeroDivisionError), evaluating(model):
        inside.append((any(module.training for module in model.modules()), torch.is_grad_enabled(), 1 / 0))
    with evaluating(model):
        inside.append((any(module.training for module in model.modules()), torch.is_grad_enabled()))
    assert inside == [(False, False)]
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_a_model_that_peft_wrapped_is_evaluated_with_its_adapter():
    import peft

    tokenizer, model = byte_tokenizer(), tiny_llama()
    plain = generate_greedy(model, tokenizer, PROMPTS, batch_size=2, max_new_tokens=6)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    adapted = generate_greedy(wrapped, tokenizer, PROMPTS, batch_size=2, max_new_tokens=6)
    assert adapted == [greedy_by_hand(wrapped.eval(), prompt, 6, [tokenizer.eos_token_id]) for prompt in PROMPTS]
    assert adapted != plain


RECORDS = [conversation("1 + 1?", "#### 2", answer="2"), conversation("500 + 734?", "#### 1,234", answer="1,234")]
RECORDS += [conversation("0 - 5?", "#### -5", answer="-5"), conversation("colour?", "#### 7", answer="7")]


@pytest.fixture
def parrot(monkeypatch):
    """A stand-in for generation: answers with the given texts, whatever was asked."""

    def answers(outputs):
        def fake(model, tokenizer, prompts, **settings):
            return [tokenizer(text).input_ids for text in outputs]

        monkeypatch.setattr(gsm8k, "generate_ids", fake)

    return answers


def test_accuracy_counts_equal_numbers_and_unread_answers_as_wrong(parrot):
    parrot(["so #### 2.0", "#### 1234", "no idea", "blue"])
    result = evaluate(None, byte_tokenizer(), RECORDS)
    assert (result.correct, result.total, result.accuracy, result.unparsed) == (2, 4, 0.5, 2)
    assert result.interval == wilson_interval(2, 4)
    assert [sample.correct for sample in result.samples] == [True, True, False, False]
    first = result.samples[0]
    assert (first.question, first.gold, first.output, first.predicted) == ("1 + 1?", "2", "so #### 2.0", Decimal(2))


def test_the_upstream_rule_is_applied_to_the_gold_answer_too(parrot):
    parrot(["so #### 2.0", "#### 1", "no idea", "blue"])
    result = evaluate(None, byte_tokenizer(), RECORDS, extract="upstream")
    assert [sample.correct for sample in result.samples] == [True, True, True, False]
    assert result.unparsed == 2


def test_evaluation_asks_the_question_and_reports_progress():
    tokenizer, model, seen = byte_tokenizer(), tiny_llama(), []
    result = evaluate(model, tokenizer, RECORDS, batch_size=3, max_new_tokens=5, progress=lambda *at: seen.append(at))
    assert seen == [(3, 4), (4, 4)]
    for record, sample in zip(RECORDS, result.samples, strict=True):
        prompt = encode_prompt(record.question, tokenizer)
        ids = greedy_by_hand(model.eval(), prompt, 5, [tokenizer.eos_token_id])
        assert sample.output == tokenizer.decode(ids, skip_special_tokens=True)


def test_bad_requests_are_errors_before_anything_is_generated():
    tokenizer, model = byte_tokenizer(), tiny_llama()
    with pytest.raises(
        ConfigError, match=r"Unknown answer rule 'upstraem'\. Did you mean 'upstream'\? Known: number, "
    ):
        evaluate(model, tokenizer, RECORDS, extract="upstraem")
    with pytest.raises(DataError, match=r"No records to evaluate on\. Raise data\.eval_size"):
        evaluate(model, tokenizer, [])
    with pytest.raises(DataError, match=r"not one number as its gold answer \(found None\).*'hello'.*end in '#### N'"):
        evaluate(model, tokenizer, [conversation("hello", "hi")])
    unasked = Record((Message("assistant", "#### 3"),), "3")
    with pytest.raises(DataError, match=r"A record asks nothing before its answer '3', so there is nothing to gener"):
        evaluate(model, tokenizer, [unasked])
    with pytest.raises(
        DataError, match=r"longest prompt has 3 tokens; with max_new_tokens=510 .* context of 512\. Lower"
    ):
        generate_greedy(model, tokenizer, PROMPTS[:2], batch_size=1, max_new_tokens=510)
    with pytest.raises(DataError, match="Prompt 1 is empty"):
        generate_greedy(model, tokenizer, [[1], []], batch_size=1, max_new_tokens=5)


PUBLISHED = Gsm8kSettings(published=True, max_new_tokens=4)
ROW = {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}


def test_a_problem_is_put_into_the_published_words_once(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROW))
    (of_file,) = GSM8K.read(Source(str(file)), PUBLISHED)
    (of_set,) = GSM8K.read(Source("gsm8k", {"file": str(file)}), PUBLISHED)
    (held_out,) = GSM8K.asks([of_set], PUBLISHED)
    for record in (of_file, of_set, held_out):
        assert record.question[-1].content == "Q: 1 + 1?\nA: "


def test_published_prompts_are_bare_text_whatever_the_chat_template_is(monkeypatch):
    tokenizer, model = byte_tokenizer(), tiny_llama()
    tokenizer.chat_template = "{% for message in messages %}<{{ message['content'] }}>{% endfor %}"
    records = GSM8K.asks([conversation("1 + 1?", "#### 2", answer="2")], PUBLISHED)
    prompts = []

    def fake(model, tokenizer, asked, **settings):
        prompts.extend(tokenizer.decode(ids) for ids in asked)
        return [tokenizer("#### 2").input_ids]

    monkeypatch.setattr(gsm8k, "generate_ids", fake)
    scores = GSM8K.measure(Subject(model, tokenizer), records, PUBLISHED, 1, lambda *_: None)
    assert prompts == ["Q: 1 + 1?\nA: "]
    assert scores.numbers["correct"] == 1
    assert "asked in bare text as published" in scores.words
    assert tokenizer.chat_template.startswith("{% for")
    as_it_is = Gsm8kSettings(max_new_tokens=4)
    GSM8K.measure(Subject(model, tokenizer), records, as_it_is, 1, lambda *_: None)
    assert prompts[1].startswith("<Q: 1 + 1?\nA: >")
