"""`lorafa train model.quantize=...`: QLoRA from the command line, and whoever reads, continues or merges such a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM

from lorafa import PeftModel
from lorafa.backends import backend_of
from lorafa.cli.main import main
from lorafa.models import QUANTIZERS
from lorafa.runs.record import RunDirectory
from lorafa.runs.trained import trained_model
from lorafa.train import measuring, recipe
from toys.workplace import at_step, make_workplace, metrics, read, settings

SHORT = ["train.steps=6", "train.checkpoint_every=2", "eval.size=2"]
MOVED = ["train.save_merged=true", *SHORT]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"), hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def finished(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "nf4"
    assert main(["train", *settings(workplace, run), "model.quantize=nf4", *MOVED]) == 0
    return run


def quantized(model: nn.Module) -> int:
    backends = map(backend_of, model.modules())
    return sum(backend is not None and backend.quantized for backend in backends)


def loss_of(model: Any, run: Path) -> float:
    prepared = recipe.prepare(RunDirectory.open(run).config(), Console(quiet=True))
    return measuring.answer_loss(model.eval(), prepared.data.heldout.samples, prepared.collator, 4)


@pytest.mark.matrix(3, each_word=False)
@pytest.mark.parametrize("way", QUANTIZERS.names())
def test_every_way_trains_evaluates_and_merges(way: str, workplace: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert main(["train", *settings(workplace, run), f"model.quantize={way}", *MOVED]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"Quantized as {way}: 14 linear layers with" in out
    result = read(run / "result.json")
    assert (result["quantized"]["way"], result["quantized"]["layers"]) == (way, 14)
    assert 0 < result["quantized"]["off"] < 0.12
    assert result["after"]["loss"] < result["before"]["loss"]
    assert "Merged into dense weights (float32): the update is" in out
    merging = result["merging"]
    assert merging["rounded"] < 1e-6 < merging["requantized"]
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    assert quantized(merged) == 0
    rounds = 0.02 if way == "bnb8" else 1e-4
    assert loss_of(merged, run) == pytest.approx(result["after"]["loss"], rel=rounds)


def test_a_run_is_read_on_the_codes_it_was_trained_on(finished: Path, workplace: Path, capsys: Any) -> None:
    model, _ = trained_model(RunDirectory.open(finished))
    result = read(finished / "result.json")
    assert quantized(model) == 14
    assert loss_of(model, finished) == pytest.approx(result["after"]["loss"], rel=1e-5)
    dense = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(workplace / "model"), str(finished / "adapter")
    )
    assert abs(loss_of(dense, finished) - result["after"]["loss"]) > 1e-5 * result["after"]["loss"]
    capsys.readouterr()
    assert main(["eval", str(finished)]) == 0
    task = ["task=gsm8k", f"data={workplace / 'rows.jsonl'}"]
    assert main(["eval", str(finished / "adapter"), "model.quantize=nf4", "eval.size=2", *task]) == 0


def test_an_interrupted_run_goes_on_bit_for_bit(finished: Path, workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_step(patch, 4)
        assert main(["train", *settings(workplace, run), "model.quantize=nf4", *MOVED]) != 0
    assert main(["train", f"train.resume={run}"]) == 0
    for name in ("loss", "step"):
        assert [row.get(name) for row in metrics(run)] == [row.get(name) for row in metrics(finished)]
    one, other = (trained_model(RunDirectory.open(path))[0].state_dict() for path in (run, finished))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_modules_that_are_trained_whole_are_not_quantized_neither_then_nor_when_the_run_is_read(
    workplace: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    whole = ["peft.modules_to_save=[layers.1.mlp.up_proj]", "peft.target_modules=[q_proj]"]
    assert main(["train", *settings(workplace, run), "model.quantize=nf4", *SHORT, *whole]) == 0
    model, _ = trained_model(RunDirectory.open(run))
    assert quantized(model) == 13
    result = read(run / "result.json")
    assert result["quantized"]["layers"] == 13
    assert loss_of(model, run) == pytest.approx(result["after"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["model.quantize=nf5"], "model.quantize has no value 'nf5'. Did you mean 'nf4'?"),
        (["model.quantize=nf4", "peft.full=true"], "peft.full=true trains every weight, and codes (model."),
        (["model.quantize=nf4", "+init=loftq"], "init.mode=loftq quantizes the dense base as it needs it, and model."),
    ],
)
def test_what_does_not_go_together_is_said(
    given: list[str], text: str, workplace: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["train", *settings(workplace, tmp_path / "run"), *given]) == 2
    assert text in " ".join(capsys.readouterr().err.split())
