"""Classifiers: their loss, their classes, what may be new in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lorafa.data.chat import IGNORE
from lorafa.data.classes import MOST, ClassCollator, ClassEncoder, classes_beside, classes_of, write_classes
from lorafa.data.records import Message, Record
from lorafa.errors import DataError, SourceError
from lorafa.evals.accuracy import matthews
from lorafa.models.batch_loss import BatchLoss
from lorafa.models.kinds.classification import CLASSIFICATION, class_losses
from lorafa.models.kinds.found import kind_for_task, kind_named, kind_of
from lorafa.models.load import load
from toys.kinds import make_bert, make_t5
from toys.language_models import bert, conversation, llama, t5
from toys.workplace import make_workplace

ANSWERS = ["negative", "positive", "negative"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("bert"))


def loaded(place: Path, **settings: Any) -> Any:
    return load(str(place / "model"), "auto", **({"kind": "auto", "answers": lambda: ANSWERS} | settings))


def test_the_loss_of_a_batch_is_the_model_s_own_and_unequal_batches_weigh_every_row_alike() -> None:
    model, labels = bert().double().eval(), torch.tensor([2, 0, 1])
    batch = {"input_ids": torch.tensor([[1, 5, 7], [4, 1, 0], [3, 3, 3]]), "labels": labels}
    batch["attention_mask"] = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1]])
    loss, whole = BatchLoss(model, class_losses), model(**batch).loss
    torch.testing.assert_close(loss(batch), whole, rtol=1e-12, atol=0)
    first, rest = ({name: value[part] for name, value in batch.items()} for part in (slice(1), slice(1, 3)))
    torch.testing.assert_close(loss(first, 3) + loss(rest, 3), whole, rtol=1e-12, atol=0)
    masked = {**batch, "labels": torch.tensor([2, IGNORE, IGNORE])}
    torch.testing.assert_close(loss(masked), loss(first), rtol=1e-12, atol=1e-9)


def test_an_encoder_is_taken_for_a_classifier_and_a_decoder_or_one_named_a_writer_is_not(tmp_path: Path) -> None:
    bare = make_bert(tmp_path)
    assert kind_named("auto", transformers.AutoConfig.from_pretrained(bare / "model")) is CLASSIFICATION
    for model, name in ((llama(), "causal"), (t5(), "seq2seq"), (bert(), "classification")):
        model.save_pretrained(tmp_path / name)
        assert kind_named("auto", transformers.AutoConfig.from_pretrained(tmp_path / name)).name == name
    writer = transformers.BertConfig(is_decoder=True, architectures=["BertLMHeadModel"])
    assert kind_named("auto", writer).name == "causal"
    assert kind_of(bert()) is CLASSIFICATION
    assert [kind_for_task(task) for task in ("SEQ_CLS", "SEQ_2_SEQ_LM", None)] == ["classification", "seq2seq", "auto"]


def test_a_new_head_is_named_and_depends_on_the_seed_alone(place: Path) -> None:
    one, same, other = (loaded(place, seed=seed) for seed in (1, 1, 2))
    assert one.new == ("classifier",)
    assert CLASSIFICATION.classes_in(one.model) == ("negative", "positive")
    assert torch.equal(one.model.classifier.weight, same.model.classifier.weight)
    assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)


def test_a_pooler_that_the_files_lack_is_new_too(tmp_path: Path) -> None:
    found = loaded(make_bert(tmp_path, transformers.BertForMaskedLM))
    assert found.new == ("bert.pooler.dense", "classifier")


def test_a_body_that_the_files_lack_is_refused(tmp_path: Path) -> None:
    place = make_bert(tmp_path)
    model = transformers.BertModel.from_pretrained(place / "model")
    state = {name: value for name, value in model.state_dict().items() if "layer.1.attention.self" not in name}
    model.save_pretrained(place / "model", state_dict=state)
    with pytest.raises(SourceError, match=r"lack 6 that the config asks for: bert\.encoder\.layer\.1"):
        loaded(place)


def test_a_head_for_the_answers_is_kept_with_its_order_and_another_one_is_made_anew(tmp_path: Path) -> None:
    names = {0: "positive", 1: "neutral", 2: "negative"}
    place = make_bert(tmp_path, transformers.BertForSequenceClassification, id2label=names)
    kept = loaded(place)
    assert (kept.new, CLASSIFICATION.classes_in(kept.model)) == ((), ("positive", "neutral", "negative"))
    stored = transformers.BertForSequenceClassification.from_pretrained(place / "model")
    assert torch.equal(kept.model.classifier.weight, stored.classifier.weight)
    assert CLASSIFICATION.classes_in(loaded(place, answers=None).model) == ("positive", "neutral", "negative")
    other = loaded(place, answers=lambda: ["a", "b"])
    assert (other.new, CLASSIFICATION.classes_in(other.model)) == (("classifier",), ("a", "b"))


def test_without_a_head_and_without_answers_there_are_no_classes(place: Path) -> None:
    with pytest.raises(SourceError, match=r"has no head of a classifier, and nothing says which classes"):
        loaded(place, answers=None)


def test_classes_are_in_order_as_numbers_or_as_texts() -> None:
    assert classes_of(["10", "2", "-1", "2"]) == ("-1", "2", "10")
    assert classes_of(["10", "2", "b"]) == ("10", "2", "b")
    assert classes_of(["01", "1", "0"]) == ("0", "01", "1")


@pytest.mark.parametrize(
    ("answers", "text"),
    [
        (["a", "a"], r"have 1 different answers, and a classifier chooses among two or more: 'a'\. Give"),
        ([str(n) for n in range(MOST + 1)], r"have 1,001 different answers, and a classifier has 1,000 classes at"),
    ],
)
def test_answers_that_are_no_classes_are_refused(answers: list[str], text: str) -> None:
    with pytest.raises(DataError, match=text):
        classes_of(answers)


def test_a_sample_is_the_text_with_its_special_tokens_and_the_number_of_its_class(place: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    encoder = ClassEncoder(["negative", "positive"], tokenizer, 5)
    sample = encoder.sample(conversation("the film is good", " positive "))
    assert sample.truncated
    assert tokenizer.decode(sample.input_ids[:-1]) == "[CLS] the film is [SEP]"
    assert sample.labels == [IGNORE] * 5 + [1]
    short = encoder.sample(conversation("good", "negative"))
    batch = ClassCollator(0)([sample, short])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (Record((Message("user", "a"), Message("assistant", "posative")), place="r.jsonl, line 3"),
         r"r\.jsonl, line 3: the answer 'posative' is none of the 2 classes that are trained \('negative', 'positive'\)"
         r"\. Did you mean 'positive'\?"),
        (Record((Message("user", "a"), Message("assistant", "x", trained=False)), place="line 4"),
         "line 4: the row does not end with an answer in words that is trained"),
        (Record((Message("system", "s"), Message("user", "a"), Message("assistant", "positive")), place="line 5"),
         "line 5: a model of this kind reads one text and answers it, found the turns system, user, assistant"),
    ],
)  # fmt: skip
def test_a_row_that_has_no_class_is_refused_by_its_place(place: Path, record: Record, text: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    with pytest.raises(DataError, match=text):
        ClassEncoder(["negative", "positive"], tokenizer, 16).sample(record)


def test_classes_lie_beside_an_adapter(tmp_path: Path) -> None:
    assert classes_beside(str(tmp_path)) is None
    write_classes(tmp_path, ["b", "a"])
    assert classes_beside(str(tmp_path)) == ("b", "a")
    (tmp_path / "classes.json").write_text('{"classes": ["a", 3]}')
    with pytest.raises(SourceError, match="does not name the classes of the adapter, found"):
        classes_beside(str(tmp_path))


def test_matthews_correlation_is_pearson_s_of_two_classes_and_that_of_gorodkin_of_more() -> None:
    """Of two classes it is the correlation of two 0-1 variables; of three that of the indicator variables together."""
    table = torch.tensor([[20, 5], [3, 9]])
    gold = torch.tensor([0] * 25 + [1] * 12, dtype=torch.float64)
    given = torch.tensor([0] * 20 + [1] * 5 + [0] * 3 + [1] * 9, dtype=torch.float64)
    assert matthews(table) == pytest.approx(float(torch.corrcoef(torch.stack([gold, given]))[0, 1]), rel=1e-12)
    three = torch.tensor([[8, 1, 2], [0, 7, 3], [4, 1, 6]])
    pairs = [(g, p) for g in range(3) for p in range(3) for _ in range(int(three[g, p]))]
    one = torch.nn.functional.one_hot(torch.tensor([g for g, _ in pairs]), 3).double()
    two = torch.nn.functional.one_hot(torch.tensor([p for _, p in pairs]), 3).double()
    one, two = one - one.mean(dim=0), two - two.mean(dim=0)
    expected = (one * two).sum() / ((one * one).sum() * (two * two).sum()).sqrt()
    assert matthews(three) == pytest.approx(float(expected), rel=1e-12)
    assert matthews(torch.tensor([[5, 0], [0, 7]])) == pytest.approx(1.0)
    assert matthews(torch.tensor([[5, 0], [7, 0]])) == 0.0


def test_a_model_with_a_decoder_is_no_classifier(tmp_path: Path) -> None:
    place = make_t5(tmp_path)
    assert load(str(place / "model"), "auto", kind="auto").kind is not CLASSIFICATION


def test_a_decoder_reads_the_last_token_of_each_text_whatever_stands_beside_it(tmp_path: Path) -> None:
    """Its config pads with another token than its tokenizer, which is the one that batches are filled up with."""
    place = make_workplace(tmp_path)
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps({**config, "pad_token_id": 7}))
    found = loaded(place, kind="classification")
    assert (type(found.model).__name__, found.new) == ("LlamaForSequenceClassification", ("score",))
    encoder = CLASSIFICATION.encoding(found.model).make(found.tokenizer, 64)
    samples = [encoder.sample(conversation(text, "negative")) for text in ("Ann has 2", "Ann has 2 apples and gets 3")]
    collate, model = CLASSIFICATION.collator(found.tokenizer.pad_token_id), found.model.eval()
    together = class_losses(model, collate(samples))[0]
    alone = torch.cat([class_losses(model, collate([sample]))[0] for sample in samples])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    last = model(input_ids=torch.tensor([samples[1].input_ids[:-1]])).logits
    torch.testing.assert_close(torch.nn.functional.cross_entropy(last, torch.tensor([0])), together[1])


def test_attention_of_an_encoder_is_left_as_it_is(place: Path) -> None:
    assert loaded(place).model.config._attn_implementation == "sdpa"
