"""A plan counts what a run does for classifiers and for encoders with a decoder: what is trained, kept and answered."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from lorafa import get_peft_model
from lorafa.cli import main as cli
from lorafa.conf.compose import compose
from lorafa.costs.batches import bounds, of_rows
from lorafa.costs.memory import Counted, Shape, adapter_of, count, shape_of
from lorafa.models.batch_loss import BatchLoss
from lorafa.train.base_model import load_base
from lorafa.train.records import answers_of, find_records
from lorafa.train.settings.run import RunConfig
from toys.kinds import make_bert, make_t5, settings
from toys.watch import Kept
from toys.workplace import make_workplace, read


def make_decoder(folder: Path) -> Path:
    """A causal decoder, and rows of two classes for it."""
    rows = [{"prompt": f"{word} day" * at, "completion": word} for at in range(1, 13) for word in ("good", "bad")]
    place = make_workplace(folder)
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def make_graded(folder: Path) -> Path:
    """A causal decoder, and rows whose answers are numbers."""
    rows = [{"prompt": f"{at} and 1", "completion": f"{at} + 1 = {at + 1}\n#### {at + 1}"} for at in range(40)]
    place = make_workplace(folder)
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


MAKERS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "encoder": (make_bert, []),
    "encoder with a head of its own": (
        lambda folder: make_bert(
            folder,
            transformers.BertForSequenceClassification,
            id2label={0: "negative", 1: "positive"},
            label2id={"negative": 0, "positive": 1},
        ),
        [],
    ),
    "encoder with a head for others": (
        lambda folder: make_bert(folder, transformers.BertForSequenceClassification, num_labels=3), [],
    ),
    "decoder": (make_decoder, ["model.kind=classification"]),
    "encoder and decoder": (make_t5, ["eval=match", "eval.max_new_tokens=4"]),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(MAKERS))
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    make, more = MAKERS[request.param]
    return make(tmp_path_factory.mktemp("place")), more


def words_of(place: tuple[Path, list[str]], name: str = "run") -> list[str]:
    folder, more = place
    return [*settings(folder, folder / name), *more, "train.steps=1", "train.checkpoint_every=0", "train.batch_size=3"]


def counted(words: list[str]) -> tuple[RunConfig, Shape, Counted, Any]:
    config = compose(words)
    found = find_records(config.data)
    shape = shape_of(config.model, None, lambda: answers_of(found))
    batches = of_rows(config, found, shape.model, shape.kind, Console(quiet=True))
    return config, shape, count(shape, config, batches), batches


@pytest.mark.matrix(3, each_word=False)
def test_what_is_trained_is_what_the_run_trains(
    place: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(place)
    assert cli.main(["plan", "--json", *words]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert cli.main(["train", *words]) == 0
    result = read(place[0] / "run" / "result.json")
    assert planned["trained"] == result["parameters"]["trainable"]
    assert planned["coverage"] == result["coverage"]
    assert not any("not counted: its code" in note or "not known" in note for note in planned["notes"])
    assert "shapes" not in planned["stored"]


def test_activations_are_what_autograd_keeps(place: tuple[Path, list[str]]) -> None:
    config, shape, found, batches = counted(words_of(place))
    assert found.uncounted is None
    base = load_base(config.model, 0, lambda: answers_of(find_records(config.data)))
    assert base.new_modules == shape.outline.new
    torch.manual_seed(0)
    model = get_peft_model(base.model, adapter_of(shape, config)).train()
    inputs = {name: torch.ones(size, dtype=torch.int64) for name, size in batches.training.shapes.items()}
    own = base.kind.row_losses()
    assert own is not None
    with Kept(*model.parameters(), *model.buffers()) as kept:
        loss = BatchLoss(model, own)(inputs, 1)
    assert loss.requires_grad
    assert found.course is not None
    size = sum(tensor.nbytes for tensor in inputs.values())
    assert kept.bytes <= found.course.kept() + size
    assert found.course.kept() <= 1.05 * kept.bytes + 3 * size


def test_the_bounds_are_those_of_the_kind(place: tuple[Path, list[str]]) -> None:
    config, shape, found, batches = counted([*words_of(place), "data.max_length=16"])
    widest = bounds(config, shape.model, "a test", shape.kind)
    assert widest.training.shapes["input_ids"] == (3, 16)
    assert len(widest.training.shapes["labels"]) == len(batches.training.shapes["labels"])
    assert widest.training.tokens >= batches.training.tokens
    most = count(shape, config, widest)
    assert most.uncounted is None
    assert most.course is not None
    assert found.course is not None
    assert most.course.kept() >= found.course.kept()
    assert (widest.asked is None) == (batches.asked is None)


@pytest.mark.matrix(3, each_word=False)
@pytest.mark.parametrize("longest", [[], ["eval.max_new_tokens=3"]])
@pytest.mark.parametrize(
    ("make", "more"),
    [(make_t5, ["eval=match"]), (make_decoder, ["eval=match"]), (make_graded, [])],
    ids=["T5", "match", "gsm8k"],
)
def test_answers_are_as_long_as_those_of_the_run(
    make: Callable[[Path], Path], more: list[str], longest: list[str], tmp_path: Path
) -> None:
    words = words_of((make(tmp_path), [*more, *longest]))
    asked = counted(words)[3].asked
    assert cli.main(["train", *words]) == 0
    assert asked.new_tokens == read(tmp_path / "run" / "result.json")["after"]["max_new_tokens"]


def test_params_counts_a_new_head_as_trained_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_bert(tmp_path)
    words = [f"model={folder / 'model'}", "peft.r=4"]
    assert cli.main(["params", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    cost = found["costs"][0]
    assert cost["other"] == 2 * 16 + 2  # the head of two classes
    assert "classifier" not in {kind["name"] for kind in cost["kinds"]}
    notes = " ".join(found["notes"])
    assert "New in a sequence classifier, and trained whole: classifier." in notes
    assert "Nothing says which classes a sequence classifier is to tell apart: 2 are counted." in notes


def test_rows_of_one_class_are_refused_as_by_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_bert(tmp_path)
    rows = (folder / "rows.jsonl").read_text().splitlines()
    (folder / "rows.jsonl").write_text("\n".join(row for row in rows if "negative" in row))
    assert cli.main(["plan", *settings(folder, folder / "run")]) == 1
    assert "have 1 different answers, and a classifier chooses among two or more" in " ".join(
        capsys.readouterr().err.split()
    )
