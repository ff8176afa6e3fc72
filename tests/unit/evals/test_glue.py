"""GLUE as text to text: all words of the classes are compared, with all their tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorafa.data import DATASETS
from lorafa.data.chat import IGNORE, encode_all
from lorafa.data.records import Message
from lorafa.errors import ConfigError, DataError, SourceError
from lorafa.evals.entry import Source, Subject
from lorafa.evals.glue import GLUE, TASKS, GlueSettings, scored
from toys.kinds import make_t5
from toys.language_models import byte_tokenizer, tiny_llama

ROWS = [{"premise": f"It is {n}.", "hypothesis": "It is 1.", "label": n} for n in range(3)]


def read(folder: Path, rows: list[dict[str, Any]] = ROWS, **own: Any) -> list[Any]:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return GLUE.read(Source(str(folder / "rows.jsonl")), GlueSettings(**({"task": "mnli"} | own)))


def test_every_task_has_the_words_of_its_classes() -> None:
    assert all(len(DATASETS.get(task).labels) > 1 for task in TASKS)
    assert DATASETS.get("mnli").labels == ("entailment", "neutral", "contradiction")


def test_the_likeliest_word_of_all_classes_is_chosen(tmp_path: Path) -> None:
    scores = scored(read(tmp_path), [[1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [3.0, 2.0, 1.0]], "mnli")
    assert [one["output"] for one in scores.answers] == ["entailment", "contradiction", "contradiction"]
    assert scores.measured.values == [1.0, 0.0, 1.0]
    assert scores.numbers["classes"]["contradiction"] == {"rows": 1, "chosen": 2, "right": 1}
    assert scores.numbers["eval_task"] == "mnli"


def test_a_word_counts_with_all_its_tokens_and_its_end(tmp_path: Path) -> None:
    records, model, tokenizer = read(tmp_path), tiny_llama().double().eval(), byte_tokenizer()
    subject = Subject(model, tokenizer)
    GLUE.check(subject, records, GlueSettings(task="mnli"))
    scores = GLUE.measure(subject, records, GlueSettings(task="mnli"), 2, lambda *_: None)
    for record, one in zip(records, scores.answers, strict=True):
        losses = {}
        for word in DATASETS.get("mnli").labels:
            answered = replace(record, messages=(*record.question, Message("assistant", word)))
            (sample,) = encode_all([answered], tokenizer, 2**31).samples
            assert sample.trained == len(word) + 1
            with torch.no_grad():
                rows = model(input_ids=torch.tensor([sample.input_ids])).logits[0].log_softmax(-1)
            losses[word] = -sum(
                float(rows[at, label]) for at, label in enumerate(sample.labels[1:]) if label != IGNORE
            )
        assert one["output"] == min(losses, key=losses.__getitem__)


def test_an_encoder_with_a_decoder_chooses_the_word_that_it_finds_likeliest(tmp_path: Path) -> None:
    folder = make_t5(tmp_path) / "model"
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).double().eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [{"sentence": f"the film is {word}", "label": n % 2} for n, word in enumerate(("good", "bad", "dull"))]
    records = read(tmp_path, rows, task="sst2")
    settings, subject = GlueSettings(task="sst2"), Subject(model, tokenizer)
    assert GLUE.needs <= subject.kind.offers
    GLUE.check(subject, records, settings)
    scores = GLUE.measure(subject, records, settings, 2, lambda *_: None)
    for record, one in zip(records, scores.answers, strict=True):
        (prompt,) = subject.prompts([record])
        losses = {}
        for word in DATASETS.get("sst2").labels:
            labels = torch.tensor([tokenizer(text_target=word).input_ids])
            assert labels.shape == (1, 2)  # the word and its end
            with torch.no_grad():
                losses[word] = float(model(input_ids=torch.tensor([prompt]), labels=labels).loss)
        assert one["output"] == min(losses, key=losses.__getitem__)


def test_what_cannot_be_asked_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"is several tasks\. Name one: eval\.task=<sst2\|cola"):
        read(tmp_path, task=None)
    with pytest.raises(DataError, match="has not the columns of cola"):
        read(tmp_path, task="cola")
    with pytest.raises(DataError, match="holds -1"):
        read(tmp_path, [ROWS[0] | {"label": -1}])
    with pytest.raises(ConfigError, match="asks nothing of a run's held-out rows"):
        GLUE.check(Subject(None, None), GLUE.asks([], None), GlueSettings(task="cola"))
    model = tiny_llama().eval()
    model.config.max_position_embeddings = 40
    with pytest.raises(DataError, match=r"rows\.jsonl, line 1: the row has \d+ tokens, which exceeds .* of 40"):
        GLUE.measure(Subject(model, byte_tokenizer()), read(tmp_path), GlueSettings(task="mnli"), 2, lambda *_: None)

    def unreachable(*_: Any, **__: Any) -> Any:
        raise SourceError("it cannot be reached")

    monkeypatch.setattr("lorafa.data.sets.published.hub_rows", unreachable)
    with pytest.raises(SourceError, match=r"Could not load nyu-mll/glue \(sst2\) from the Hub.*data=sst2\.jsonl"):
        GLUE.read(Source(None), GlueSettings(task="sst2"))


def test_the_first_so_many_rows_are_asked(tmp_path: Path) -> None:
    assert len(read(tmp_path, size=2)) == 2
