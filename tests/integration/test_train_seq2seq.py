"""`lorafa train` and `lorafa eval` of encoders with a decoder, from the command line to the files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafa.cli.main import main
from lorafa.evals import EVALS
from lorafa.models.kinds.entry import NEXT_TOKEN
from toys.kinds import STEPS, make_t5, settings
from toys.workplace import at_step, metrics, read


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_t5(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    assert main(["train", *settings(place, place / "run"), "eval=match"]) == 0
    return place / "run"


def rows(capsys: pytest.CaptureFixture[str], *words: Any) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["eval", *map(str, words), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_it_learns_and_says_what_it_is(finished: Path) -> None:
    result = read(finished / "result.json")
    assert (result["status"], result["kind"], result["steps"]) == ("finished", "seq2seq", STEPS)
    assert result["after"]["loss"] < 0.6 * result["before"]["loss"]
    assert result["after"]["total"] == result["before"]["total"] == 8
    assert read(finished / "adapter" / "adapter_config.json")["task_type"] == "SEQ_2_SEQ_LM"
    assert {sample["gold"] for sample in result["samples"]} <= {"positive", "negative"}


def test_evaluating_the_run_and_its_adapter_says_what_the_run_has_said(
    finished: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = read(finished / "result.json")["after"]
    loss, accuracy = rows(capsys, finished)
    assert loss["loss"] == pytest.approx(after["loss"], rel=1e-5)
    assert {name: accuracy[name] for name in ("correct", "total", "cut")} == {
        name: after[name] for name in ("correct", "total", "cut")
    }
    of_run, of_adapter = rows(capsys, finished, finished / "adapter", "task=match", f"data={place / 'rows.jsonl'}")
    assert of_adapter["accuracy"] == of_run["accuracy"]
    assert of_adapter["difference"] == 0.0


def test_a_run_cut_short_and_continued_ends_as_one_that_was_not(
    finished: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place / "cut"
    with monkeypatch.context() as patch:
        at_step(patch, 8)
        assert main(["train", *settings(place, run), "eval=match"]) == 130
    assert main(["train", f"train.resume={run}"]) == 0
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(finished)]
    assert read(run / "result.json")["after"] == read(finished / "result.json")["after"]
    whole, parts = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (finished, run))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


def test_two_batches_of_a_step_are_one_batch_of_both(tmp_path: Path) -> None:
    """Answers of unequal length; without dropout, which draws anew for each batch, and in the same order of rows."""
    uneven = [
        {"prompt": f"{first} film is {word}", "completion": "positive" if word == "good" else "negative is the film"}
        for word in ("good", "bad")
        for first in ("the", "a", "this", "one", "that")
    ]
    both = []
    make_t5(tmp_path, dropout_rate=0.0)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, uneven)))
    for name, size, passes in (("one", 4, 1), ("two", 2, 2)):
        more = ["data.eval_size=2", "eval=loss", "peft.lora_dropout=0", "train.steps=3", "eval.before=false",
                f"train.batch_size={size}", f"train.accumulation={passes}", "train.group_by_length=false",
                "train.checkpoint_every=0", "optim.lr=1e-3"]  # fmt: skip
        assert main(["train", *settings(tmp_path, tmp_path / name), *more]) == 0
        both.append([row["loss"] for row in metrics(tmp_path / name)])
    assert both[0] == pytest.approx(both[1], rel=1e-5)


def test_a_start_from_gradients_reads_the_loss_of_the_answers(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", *settings(place, run), "init=gradient", "init.bsz=4", "init.iters=2", "eval=loss"]) == 0
    result = read(run / "result.json")
    assert result["after"]["loss"] < result["before"]["loss"]
    assert result["start"]["rows"] == 8
    assert len(result["start"]["fallbacks"]) < len(result["start"]["ranks"]) / 2


def test_all_weights_are_trained_and_the_model_is_read_again(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = [word for word in settings(place, run) if not word.startswith("peft.")]
    assert main(["train", *words, "peft=full_ft", "eval=match", "train.checkpoint_every=0"]) == 0
    after = read(run / "result.json")["after"]
    assert rows(capsys, run)[0]["loss"] == pytest.approx(after["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["train.packing=true"], 2, "each has its own. Leave it out; train.group_by_length"),
        (["model.add_tokens=[wonderful]"], 2, "which a sequence-to-sequence model (model.kind=seq2seq) is not"),
        (["model.kind=causal"], 1, "Could not load a causal language model"),
        (["model.kind=t5"], 2, "model.kind has no value 't5'. Pass one of: 'auto', 'causal'"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], status: int, text: str
) -> None:
    assert main(["train", *settings(place, tmp_path / "run"), "eval=loss", *words]) == status
    captured = capsys.readouterr()
    assert text in " ".join((captured.out + captured.err).split())
    assert not (tmp_path / "run").exists()


def test_what_asks_for_a_decoder_alone_is_refused_by_name(
    place: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = replace(EVALS.get("match"), needs=frozenset({NEXT_TOKEN}))
    with EVALS.added("next", entry):
        capsys.readouterr()
        assert main(["eval", str(finished), "task=next", f"data={place / 'rows.jsonl'}"]) == 2
        text = " ".join(capsys.readouterr().err.split())
    assert "task=next asks what a sequence-to-sequence model (model.kind=seq2seq) has no answer to. Give one" in text
