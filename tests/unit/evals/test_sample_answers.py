"""Answers to look at where nothing grades them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lorafa.cli.main import main
from lorafa.data.chat import encode_prompts
from lorafa.data.records import Message, Record
from lorafa.evals.entry import Subject
from lorafa.evals.gsm8k import GSM8K, Gsm8kSettings
from lorafa.evals.sample_answers import SHOWN
from toys.language_models import byte_tokenizer, conversation, greedy_by_hand, tiny_llama
from toys.workplace import make_workplace, read, settings

CHATS = [conversation(f"Hi {n}", f"Hello {n}", "How are you?", "Well.") for n in range(9)]
UNASKED = Record((Message("assistant", "I begin."),))


def test_the_first_conversations_are_answered_greedily_where_none_can_be_graded() -> None:
    tokenizer, model = byte_tokenizer(), tiny_llama().eval()
    model.config.max_position_embeddings = 400
    long = conversation("x" * 500, "no room")
    asked = GSM8K.asks([UNASKED, CHATS[0], long, *CHATS[1:]], Gsm8kSettings(max_new_tokens=9))
    assert asked == [CHATS[0], long, *CHATS[1 : SHOWN - 1]]
    GSM8K.check(Subject(model, tokenizer), asked, Gsm8kSettings())
    scores = GSM8K.measure(Subject(model, tokenizer), asked, Gsm8kSettings(max_new_tokens=9), 4, lambda *_: None)
    assert scores.words == f"{SHOWN - 1} answers to look at"
    assert scores.numbers == {}
    shown = [record for record in asked if record is not long]
    ids = [greedy_by_hand(model, prompt, 9, [tokenizer.eos_token_id]) for prompt in encode_prompts(shown, tokenizer)]
    assert [answer["output"] for answer in scores.answers] == [tokenizer.decode(one) for one in ids]
    assert {(answer["question"], answer["gold"], answer["correct"]) for answer in scores.answers} == {
        ("How are you?", "Well.", None)
    }


def test_none_are_answered_where_some_can_be_graded_or_none_are_wanted() -> None:
    graded = conversation("2 + 2?", "#### 4", answer="4")
    assert GSM8K.asks([*CHATS, graded], Gsm8kSettings()) == [graded]
    assert GSM8K.asks(CHATS, Gsm8kSettings(size=0)) == []


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    make_workplace(tmp_path)
    rows = [
        {
            "messages": [
                {"role": role, "content": f"{text} {n}"} for role, text in (("user", "<b>"), ("assistant", "Yes"))
            ]
        }
        for n in range(20)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_the_report_of_a_chat_has_answers_from_before_and_after(chats: Path) -> None:
    assert main(["train", *settings(chats, chats / "run"), "train.steps=2"]) == 0
    result = read(chats / "run" / "result.json")
    assert len(result["samples"]) == 4  # that many are held out
    assert "accuracy" not in result["after"]
    page = (chats / "run" / "report.html").read_text()
    for sample in result["samples"]:
        assert f"<h3>{sample['question']}</h3>".replace("<b>", "&lt;b&gt;") in page
        assert f"Answer of the record: {sample['gold']}" in page
    assert 'class="wrong"' not in page.partition("Answers to held-out questions")[2]
