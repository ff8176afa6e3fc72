"""`lorafa train` and `lorafa eval` of classifiers, from the command line to the files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from lorafa import AutoPeftModelForSequenceClassification
from lorafa.cli.main import main
from toys.kinds import make_bert, settings
from toys.workplace import at_step, make_workplace, metrics, read

STEPS = 30
LONG = [f"train.steps={STEPS}", "train.batch_size=8", "optim.lr=1e-2"]
"""A random encoder takes a while to tell words apart."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    assert main(["train", *settings(place, place / "run"), *LONG, "train.save_merged=true"]) == 0
    return place / "run"


def rows(capsys: pytest.CaptureFixture[str], *words: Any) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["eval", *map(str, words), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def said(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str]:
    capsys.readouterr()
    status = main(list(map(str, words)))
    captured = capsys.readouterr()
    return status, " ".join((captured.out + captured.err).split())


def test_it_learns_and_says_what_it_is(finished: Path) -> None:
    result = read(finished / "result.json")
    assert (result["status"], result["kind"], result["steps"]) == ("finished", "classification", STEPS)
    assert result["classes"] == ["negative", "positive"]
    assert read(finished / "adapter" / "classes.json") == {"classes": ["negative", "positive"]}
    assert read(finished / "adapter" / "adapter_config.json")["task_type"] == "SEQ_CLS"
    assert result["after"]["loss"] < 0.95 * result["before"]["loss"]
    assert result["after"]["accuracy"] > result["before"]["accuracy"]
    assert result["after"]["cross_entropy"] == pytest.approx(result["after"]["loss"], rel=1e-5)
    assert {"interval", "matthews", "correct", "total"} <= result["after"].keys()
    assert {sample["after"]["output"] for sample in result["samples"]} <= {"negative", "positive"}


def test_run_adapter_and_merged_model_score_what_the_run_has_said(
    finished: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = read(finished / "result.json")["after"]
    (again,) = rows(capsys, finished)
    assert {name: again[name] for name in ("accuracy", "correct", "matthews")} == {
        name: after[name] for name in ("accuracy", "correct", "matthews")
    }
    assert again["cross_entropy"] == pytest.approx(after["cross_entropy"], rel=1e-6)
    subjects = (finished, finished / "adapter", finished / "merged")
    run, adapter, merged = rows(capsys, *subjects, "task=accuracy", f"data={place / 'rows.jsonl'}")
    assert adapter["cross_entropy"] == run["cross_entropy"]
    assert merged["cross_entropy"] == pytest.approx(run["cross_entropy"], rel=1e-5)
    assert (adapter["difference"], merged["difference"]) == (0.0, 0.0)


def test_texts_are_cut_at_data_max_length_and_counted(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = [{"prompt": f"that film is {word}{' a' * n}", "completion": name}
             for n in range(4) for word, name in (("good", "positive"), ("bad", "negative"))]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, table)))
    run = tmp_path / "run"
    words = [word for word in settings(place, run) if not word.startswith(("train.steps", "data.eval_size"))]
    more = [f"data.eval_file={file}", "data.max_length=7", "train.steps=1"]
    status, text = said(capsys, "train", *words, *more)
    assert status == 0
    after = read(run / "result.json")["after"]
    assert (after["cut"], after["max_length"]) == (4, 7)  # [CLS], four words, what follows, [SEP]
    assert "4 texts cut at 7 tokens" in text
    (again,) = rows(capsys, run)
    assert {name: again[name] for name in ("cut", "max_length", "cross_entropy")} == {
        name: after[name] for name in ("cut", "max_length", "cross_entropy")
    }
    own = ("task=accuracy", f"data={file}")
    found = rows(capsys, run, run / "adapter", *own)
    assert [(one["cut"], one["max_length"]) for one in found] == [(4, 7), (4, 7)]
    (alone,) = rows(capsys, run / "adapter", *own)
    assert (alone["cut"], alone["max_length"]) == (0, 32)  # the model's context
    found = rows(capsys, run, run / "adapter", *own, "data.max_length=8")
    assert [(one["cut"], one["max_length"]) for one in found] == [(2, 8), (2, 8)]
    status, text = said(capsys, "eval", run, *own, "data.max_length=6")
    assert (status, "6 texts cut at 6 tokens" in text) == (0, True)


def test_the_adapter_is_one_that_others_can_read(finished: Path) -> None:
    model = AutoPeftModelForSequenceClassification.from_pretrained(str(finished / "adapter"))
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(finished / "merged")
    ids = torch.tensor([[2, 9, 8, 3]])
    torch.testing.assert_close(model.eval()(input_ids=ids).logits, merged.eval()(input_ids=ids).logits)


def test_a_run_cut_short_and_continued_ends_as_one_that_was_not(
    finished: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place / "cut"
    with monkeypatch.context() as patch:
        at_step(patch, 8)
        assert main(["train", *settings(place, run), *LONG]) == 130
    assert main(["train", f"train.resume={run}"]) == 0
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(finished)]
    assert read(run / "result.json")["after"] == read(finished / "result.json")["after"]
    whole, parts = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (finished, run))
    assert whole.keys() == parts.keys()
    assert any("classifier" in name for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_two_batches_of_a_step_are_one_batch_of_both(tmp_path: Path) -> None:
    make_bert(tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    both = []
    for name, size, passes in (("one", 4, 1), ("two", 2, 2)):
        more = ["eval=loss", "peft.lora_dropout=0", "train.steps=3", "eval.before=false", f"train.batch_size={size}",
                f"train.accumulation={passes}", "train.group_by_length=false", "train.checkpoint_every=0",
                "optim.lr=1e-3"]  # fmt: skip
        assert main(["train", *settings(tmp_path, tmp_path / name), *more]) == 0
        both.append([row["loss"] for row in metrics(tmp_path / name)])
    assert both[0] == pytest.approx(both[1], rel=1e-5)


def test_training_goes_on_with_an_adapter_and_its_classes(
    finished: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "more"
    words = [word for word in settings(place, run) if not word.startswith("peft.")]
    status, text = said(capsys, "train", *words, f"peft.adapter={finished / 'adapter'}", "train.checkpoint_every=0")
    assert status == 0
    assert "start at random" not in text
    result = read(run / "result.json")
    assert result["classes"] == ["negative", "positive"]
    assert result["before"]["loss"] == pytest.approx(read(finished / "result.json")["after"]["loss"], rel=1e-5)


def test_columns_can_be_named_and_classes_be_whole_numbers(place: Path, tmp_path: Path) -> None:
    table = [{"sentence": f"{word} film", "label": int(word in "good fine")} for word in ("good", "bad", "fine")] * 4
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, table)))
    words = [f"data={tmp_path / 't.jsonl'}", "data.prompt_column=sentence", "data.completion_column=label",
             "data.eval_size=0", "train.steps=1", "train.checkpoint_every=0"]  # fmt: skip
    assert main(["train", *settings(place, tmp_path / "run"), *words]) == 0
    assert read(tmp_path / "run" / "result.json")["classes"] == ["0", "1"]


def test_a_published_data_set_works_as_it_is(place: Path, tmp_path: Path) -> None:
    words = ("good", "bad", "fine", "dull")
    table = [{"sentence": f"a {word} film", "label": int(word in "good fine")} for word in words]
    (tmp_path / "sst2.jsonl").write_text("\n".join(map(json.dumps, table * 5)))
    usual = [word for word in settings(place, tmp_path / "run") if not word.startswith("data=")]
    more = ["data=sst2", f"data.file={tmp_path / 'sst2.jsonl'}", "data.eval_size=2", "train.steps=1",
            "train.checkpoint_every=0", "data.max_length=30"]  # fmt: skip
    assert main(["train", *usual, *more]) == 0
    assert read(tmp_path / "run" / "result.json")["classes"] == ["negative", "positive"]


def test_a_start_from_gradients_reads_the_loss_of_the_classes(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["init=gradient", "init.bsz=4", "init.iters=2", "train.steps=2", "train.checkpoint_every=0", "peft.r=2"]
    assert main(["train", *settings(place, run), *more]) == 0
    start = read(run / "result.json")["start"]
    assert len(start["fallbacks"]) < len(start["ranks"])


def test_all_weights_are_trained_and_the_model_is_read_again(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [word for word in settings(place, run) if not word.startswith("peft.")]
    assert main(["train", *words, "peft=full_ft", "train.checkpoint_every=0", "optim.lr=1e-3"]) == 0
    after = read(run / "result.json")["after"]
    assert rows(capsys, run)[0]["cross_entropy"] == pytest.approx(after["cross_entropy"], rel=1e-5)


def test_the_default_evaluation_gives_way_and_one_that_is_named_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = said(capsys, "train", *settings(place, tmp_path / "run"), "--dry-run")
    assert status == 0
    assert "Measured by eval=accuracy: eval=gsm8k, the default, asks what a sequence classifier has no answer" in text
    assert "New in a sequence classifier, since its files lack them: classifier. They start at random" in text
    for words in (["eval=perplexity"], ["eval.max_new_tokens=8"]):
        status, text = said(capsys, "train", *settings(place, tmp_path / "run"), *words)
        assert status == 2
        assert "asks what a sequence classifier (model.kind=classification) has no answer to. Give one of: acc" in text


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["train.packing=true"], 2, "in a batch of a sequence classifier (model.kind=classification) each has its own"),
        (["model.add_tokens=[wonderful]"], 2, "which a sequence classifier (model.kind=classification) is not given"),
        (["model.kind=seq2seq"], 1, "Could not load a sequence-to-sequence model"),
        (["model.kind=causal"], 1, "would be random numbers"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, text: str
) -> None:
    found, heard = said(capsys, "train", *settings(place, tmp_path / "run"), *words)
    assert (found, text in heard) == (status, True), heard
    assert not (tmp_path / "run").exists()


def test_a_held_out_answer_that_is_no_class_is_named(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "the film is", "completion": "maybe"}))
    words = [word for word in settings(place, tmp_path / "run") if not word.startswith("data.eval_size")]
    status, text = said(capsys, "train", *words, f"data.eval_file={tmp_path / 'held.jsonl'}")
    assert status == 1
    assert "held.jsonl, line 1: the answer 'maybe' is none of the 2 classes that are trained" in text


def test_a_bare_encoder_cannot_be_evaluated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = said(capsys, "eval", place / "model", "task=accuracy", f"data={place / 'rows.jsonl'}")
    assert status == 1
    assert "has no head of a classifier, and nothing says which classes it is to tell apart. Give the run" in text
    assert said(capsys, "eval", place / "model", "task=accuracy")[0] != 0


def test_a_decoder_that_chooses_is_known_by_its_run_and_its_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, table = make_workplace(tmp_path), tmp_path / "t.jsonl"
    questions = [{"prompt": f"Ann has {a} apples", "completion": "few" if a < 5 else "many"} for a in range(10)]
    table.write_text("\n".join(map(json.dumps, questions)))
    run = tmp_path / "run"
    more = [f"data={table}", "data.eval_size=2", "train.steps=4", "train.checkpoint_every=0", "train.eval_every=4"]
    assert main(["train", *settings(place, run), *more, "model.kind=classification"]) == 0
    after = read(run / "result.json")["after"]
    measured = [row["eval_loss"] for row in metrics(run) if "eval_loss" in row]
    assert measured[-1] == pytest.approx(after["loss"], rel=1e-5)
    assert rows(capsys, run)[0]["cross_entropy"] == pytest.approx(after["cross_entropy"], rel=1e-6)
    of_run, of_adapter = rows(capsys, run, run / "adapter", "task=accuracy", f"data={table}")
    assert of_adapter["cross_entropy"] == of_run["cross_entropy"]
    words = [word for word in settings(place, tmp_path / "more") if not word.startswith("peft.")]
    assert main(["train", *words, *more, f"peft.adapter={run / 'adapter'}"]) == 0
    assert read(tmp_path / "more" / "result.json")["kind"] == "classification"


def test_a_loss_that_is_not_finite_stops_with_the_rows_of_its_batch(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["optim.lr=1e30", "optim.max_grad_norm=1e9", "eval.before=false", "train.checkpoint_every=0"]
    status, text = said(capsys, "train", *settings(place, tmp_path / "run"), *more)
    assert status == 1
    assert "rows.jsonl, line" in text
    assert "the first begins '[CLS]" in text


def test_a_head_for_other_classes_begins_anew_even_where_they_are_as_many(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, other = finished.parent, tmp_path / "other.jsonl"
    rows_ = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    names = {"negative": "aaa", "positive": "zzz"}
    other.write_text("\n".join(json.dumps(row | {"completion": names[row["completion"]]}) for row in rows_))
    losses = {}
    for name, data in (("same", place / "rows.jsonl"), ("other", other)):
        words = [w for w in settings(place, tmp_path / name) if not w.startswith(("data=", "model="))]
        status, text = said(capsys, "train", *words, f"model={finished / 'merged'}", f"data={data}", "train.steps=1")
        assert status == 0
        assert ("They start at random" in text) == (name == "other")
        losses[name] = read(tmp_path / name / "result.json")["before"]["loss"]
    assert losses["same"] != pytest.approx(losses["other"], rel=1e-3)


def test_texts_may_be_as_long_as_the_context(place: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    texts = [" ".join(["good" if n % 2 else "bad"] * (40 + n)) for n in range(12)]
    lines = [json.dumps({"prompt": text, "completion": f"c{n % 2}"}) for n, text in enumerate(texts)]
    long.write_text("\n".join(lines))
    words = [w for w in settings(place, tmp_path / "run") if not w.startswith("data")]
    words += [f"data={long}", "data.eval_size=2", "train.steps=1", "train.checkpoint_every=0"]
    assert main(["train", *words, "data.max_length=32"]) == 0
    assert main(["train", *words, "data.max_length=33", f"run_dir={tmp_path / 'longer'}"]) == 1


def test_a_classifier_writes_no_text(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("the film is good\n")
    status, text = said(capsys, "generate", finished, tmp_path / "prompts.txt")
    assert status == 2
    assert "is a sequence classifier (model.kind=classification), which writes no text." in text
