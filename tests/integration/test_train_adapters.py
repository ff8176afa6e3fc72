"""Runs that train an adapter on that is there already."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.runs.record import RunDirectory
from toys.workplace import make_workplace, read, settings

SHORT = ["eval.size=0", "train.steps=6", "train.checkpoint_every=3"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


def plain_settings(workplace: Path, run: Path) -> list[str]:
    return [text for text in settings(workplace, run) if not text.startswith("peft.")] + SHORT


@pytest.mark.matrix(3, each_word=False)
@pytest.mark.parametrize(
    "method",
    [
        ["peft.r=3", "peft.target_modules=[q_proj,v_proj]", "peft.lora_dropout=0.1"],
        ["peft=dora", "peft.r=2"],
        ["init=pissa", "peft.r=2"],
        ["init=lora_sb", "init.iters=2", "peft.r=2"],
        ["peft.freeze_A=true", "peft.r=2"],
    ],
    ids=" ".join,
)
def test_an_adapter_is_trained_on_from_where_it_stands(workplace: Path, tmp_path: Path, method: list[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", *plain_settings(workplace, first), *method]) == 0
    assert main(["train", *plain_settings(workplace, second), f"peft.adapter={first / 'adapter'}"]) == 0
    start, end = read(first / "result.json")["after"], read(second / "result.json")
    assert end["before"]["loss"] == pytest.approx(start["loss"], rel=1e-5)
    assert end["after"]["loss"] < end["before"]["loss"]
    made, continued = RunDirectory.open(first).config().peft, RunDirectory.open(second).config().peft
    assert (continued.r, continued.use_dora, continued.freeze_A) == (made.r, made.use_dora, made.freeze_A)
    shapes = [
        {name: tensor.shape for name, tensor in load_file(run / "adapter" / "adapter_model.safetensors").items()}
        for run in (first, second)
    ]
    assert shapes[0] == shapes[1]
    assert end["parameters"]["trainable"] == read(first / "result.json")["parameters"]["trainable"]


def test_settings_that_contradict_the_file_are_refused(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *plain_settings(workplace, run), "peft.r=3", "peft.target_modules=[q_proj,v_proj]"]) == 0
    adapter = f"peft.adapter={run / 'adapter'}"
    assert compose([adapter, "peft.r=3", "peft.target_modules=[v_proj,q_proj]"]) == compose([adapter])
    for more, text in {
        "peft.r=4": "peft.r=4 is not what the adapter in",
        "peft.target_modules=all-linear": "peft.target_modules=all-linear is not what the adapter in",
        "peft=dora": "peft=dora describes a new adapter, and peft.adapter goes on with one. Drop one of the two",
        "init=pissa": "init.mode=pissa would change nothing: peft.adapter=",
    }.items():
        assert main(["train", adapter, more]) == 2
        assert text in " ".join(capsys.readouterr().err.split())
    assert main(["train", f"peft.adapter={run}"]) == 1
    assert f"It is a run: give {run / 'adapter'}." in " ".join(capsys.readouterr().err.split())
