"""`lorafa combine`: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorafa import LoraConfig, PeftModel
from lorafa.cli import combine as command
from lorafa.cli import main as cli
from lorafa.surgery.combining import COMBINATIONS
from toys.combined import deltas, distance, several, weighted
from toys.language_models import llama


def combine(*arguments: object) -> int:
    try:
        return cli.main(["combine", *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, adapters a and b on it, and c with DoRA."""
    folder = tmp_path_factory.mktemp("combine")
    torch.manual_seed(0)
    llama().save_pretrained(folder / "base")
    model = several(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        a=LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], use_rslora=True, task_type="CAUSAL_LM"),
        b=LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
        c=LoraConfig(r=3, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    def read() -> tuple[str, str]:
        out, err = capsys.readouterr()
        return " ".join(out.split()), " ".join(err.split())

    return read


def loaded(place: Path, *names: str) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    model = PeftModel.from_pretrained(base, place / names[0], names[0])
    for name in names[1:]:
        model.load_adapter(place / name, name)
    return model


def test_types_are_those_there_are() -> None:
    assert set(command.TYPES) == set(COMBINATIONS)


def test_the_weighted_sum_without_the_base(
    place: Path, tmp_path: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("lorafa.auto.load_base", never)
    assert combine(place / "a", place / "b", "--weights", 0.7, -0.3, "--type", "cat", "--out", place / "cat") == 0
    out, _ = said()
    assert "cat on 4 layers, rank 8; nothing of what was asked for is lost" in out
    model = loaded(place, "a", "b", "cat")
    assert distance(deltas(model, "cat"), weighted(model, {"a": 0.7, "b": -0.3})) < 1e-6
    assert sorted(p.name for p in (place / "cat").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip


def test_the_layers_that_lose_most_are_printed(place: Path, tmp_path: Path, said: Any) -> None:
    arguments = (place / "a", place / "b", "--weights", 1, 1, "--rank", 2)
    assert combine(*arguments, "--out", tmp_path / "table") == 0
    out, _ = said()
    assert "svd on 4 layers, rank 2; error" in out
    assert combine(*arguments, "--out", tmp_path / "json", "--json") == 0
    found = json.loads(said()[0])
    assert len(found["layers"]) == 4
    worst = max(layer["relative"] for layer in found["layers"].values())
    assert f"{found['relative']:.2%} of the norm over all layers, at most {worst:.2%}" in out
    assert (tmp_path / "json" / "adapter_model.safetensors").is_file()


def test_every_type_with_default_weights(place: Path, tmp_path: Path, said: Any) -> None:
    for kind in command.TYPES:
        density = ["--density", 0.5] if COMBINATIONS[kind].prunes else []
        assert combine(place / "a", place / "b", "--type", kind, *density, "--out", tmp_path / kind) == 0
    _, err = said()
    assert err.count("warning: combination_type='linear' sums A with A") == 1
    assert {path.name for path in tmp_path.iterdir()} == set(command.TYPES)


@pytest.mark.parametrize("given", [True, False])
def test_dora_is_combined_on_the_base_that_is_given_or_named(place: Path, tmp_path: Path, given: bool) -> None:
    base = ["--base", place / "base"] if given else []
    out = place / f"dora-{given}"
    assert combine(place / "a", place / "c", "--weights", 0.7, -0.3, "--rank", 16, *base, "--out", out) == 0
    model = loaded(place, "a", "c", out.name)
    assert distance(deltas(model, out.name), weighted(model, {"a": 0.7, "c": -0.3})) < 1e-5


REFUSED: dict[str, tuple[list[Any], int, str]] = {
    "a type": (["--type", "tie"], 2, "invalid choice: 'tie'"),
    "weights": (["--weights", 1], 1, "2 adapters and 1 weights were given"),
    "a weight": (["--weights", 1, "nan"], 2, "must be a number, found nan"),
    "no density": (["--type", "ties"], 2, "'ties' needs density"),
    "a density": (["--type", "ties", "--density", 1.5], 2, r"found 1.5"),
    "a rank": (["--rank", 100], 2, "svd_rank=100 is more than its matrix of"),
    "majority": (["--type", "ties", "--density", 0.5, "--majority", "most"], 2, "majority_sign_method has no value"),
}


@pytest.mark.parametrize(("arguments", "status", "text"), REFUSED.values(), ids=REFUSED)
def test_wrong_arguments(place: Path, tmp_path: Path, said: Any, arguments: list[Any], status: int, text: str) -> None:
    assert combine(place / "a", place / "b", *arguments, "--out", tmp_path / "out") == status
    _, err = said()
    assert text in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_overwritten(place: Path, said: Any) -> None:
    before = (place / "b" / "adapter_model.safetensors").read_bytes()
    assert combine(place / "a", place / "b", "--out", place / "b") == 2
    assert "exists and is not empty, and nothing is overwritten" in said()[1]
    assert (place / "b" / "adapter_model.safetensors").read_bytes() == before


def test_another_base_is_refused(place: Path, tmp_path: Path, said: Any) -> None:
    other = llama()
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.add_(0.1)
    other.save_pretrained(tmp_path / "other")
    arguments = (place / "a", place / "b", "--base", tmp_path / "other", "--out", tmp_path / "out")
    assert combine(*arguments) == 1
    assert "was made for another base model" in said()[1]
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_not_there(place: Path, tmp_path: Path, said: Any) -> None:
    assert combine(place / "a", place / "nowhere", "--out", tmp_path / "out") == 1
    assert "There is no folder" in said()[1]


def test_help_has_examples(said: Any) -> None:
    assert combine("--help") == 0
    assert "lorafa combine sql poems --weights 0.7 0.3 --out both" in said()[0]
