"""`lorafa train +init=loftq`: the base of the run is quantized, and so is that of whoever continues or reads it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from lorafa import PeftModel
from lorafa.backends.nf4 import NF4Linear
from lorafa.cli.main import main
from lorafa.runs.record import RunDirectory
from lorafa.train import measuring, recipe
from toys.workplace import make_workplace, metrics, read, settings

SHORT = ["+init=loftq", "init.loftq_iter=2", "train.steps=4", "train.checkpoint_every=2", "eval.size=2"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def finished(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["train", *settings(workplace, run), *SHORT]) == 0
    return run


def dense(workplace: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(workplace / "model")
    return model


def answer_loss(model: Any, run: Path) -> float:
    prepared = recipe.prepare(RunDirectory.open(run).config(), Console(quiet=True))
    return measuring.answer_loss(model, prepared.data.heldout.samples, prepared.collator, 4)


def test_it_is_evaluated_on_the_codes_before_and_after(finished: Path, workplace: Path) -> None:
    """Before training these are the codes alone: the dense weights are gone when the adapter is on."""
    result = read(finished / "result.json")
    assert result["status"] == "finished"
    assert result["steps"] == 4
    for scores in (result["before"], result["after"]):
        assert scores["total"] == 2
        assert math.isfinite(scores["loss"])
    loaded = PeftModel.from_pretrained(dense(workplace), str(finished / "adapter"))
    codes = [module for module in loaded.modules() if isinstance(module, NF4Linear)]
    assert len(codes) == len(loaded.base_model.lora_layers()) == 14
    assert answer_loss(loaded, finished) == pytest.approx(result["after"]["loss"], rel=1e-5)
    with loaded.disable_adapter():
        before = answer_loss(loaded, finished)
    assert before == pytest.approx(result["before"]["loss"], rel=1e-5)
    assert before != pytest.approx(answer_loss(dense(workplace), finished), rel=1e-5)


def test_cut_short_and_continued_it_ends_as_if_it_was_not(
    finished: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint holds A and B alone: the codes they were trained on are found again from the dense weights."""
    run, original = tmp_path / "cut", recipe.RunCallback.on_log

    def on_log(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        original(self, args, state, control, logs, **rest)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe.RunCallback, "on_log", on_log)
        assert main(["train", *settings(workplace, run), *SHORT]) == 130
    saved = load_file(run / "checkpoints" / "checkpoint-2" / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    assert main(["train", f"train.resume={run}"]) == 0
    assert [row["loss"] for row in metrics(run)] == [row["loss"] for row in metrics(finished)]
    assert read(run / "result.json")["after"] == read(finished / "result.json")["after"]
    whole, parts = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (finished, run))
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
