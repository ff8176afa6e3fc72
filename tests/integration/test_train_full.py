"""`peft=full_ft`: every weight of the model is trained, and the run is like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorafa.cli.main import main
from lorafa.conf.compose import compose
from lorafa.data.chat import encode_all
from lorafa.data.collate import Collator
from lorafa.data.sources import load_records
from lorafa.errors import ConfigError
from lorafa.evals.loss import answer_loss
from lorafa.train.full import precision, train_all
from toys.processes import free_ports, run_command, run_group
from toys.workplace import at_step, make_workplace, metrics, read, settings

FULL = ["peft=full_ft", "eval.size=0"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


def of_full(workplace: Path, run: Path, *more: str) -> list[str]:
    return [*[text for text in settings(workplace, run) if not text.startswith("peft.")], *FULL, *more]


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "model" / "model.safetensors")


def test_a_step_of_sgd_takes_the_gradient_of_the_mean_loss_from_every_weight(workplace: Path, tmp_path: Path) -> None:
    arguments = of_full(
        workplace, tmp_path / "run", "optim=sgd", "optim.schedule=constant", "optim.lr=0.5", "optim.max_grad_norm=0",
        "train.steps=1", "train.batch_size=8", "train.accumulation=2", "data.train_size=16",
    )  # fmt: skip
    assert main(["train", *arguments]) == 0
    model = AutoModelForCausalLM.from_pretrained(workplace / "model")
    tokenizer = AutoTokenizer.from_pretrained(workplace / "model")
    rows = load_records(str(workplace / "rows.jsonl"), train_size=16, eval_size=4, seed=0).train
    batch = Collator(0)(encode_all(rows, tokenizer, 256).samples)
    model(**batch).loss.backward()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    for name, weight in model.named_parameters():
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0, name
        torch.testing.assert_close(trained[name], weight.detach() - 0.5 * weight.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_what_is_measured_is_what_is_kept(workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert main(["train", *of_full(workplace, run, "model.dtype=bfloat16", "optim.lr=1e-3")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"Model: {run / 'model'}" in said
    result = read(run / "result.json")
    assert result["model"] == "model"
    assert "adapter" not in result
    assert not (run / "adapter").exists()
    assert result["parameters"]["trainable"] == result["parameters"]["all"]
    assert result["after"]["loss"] < result["before"]["loss"]
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype="auto")
    assert model.dtype == torch.bfloat16
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    heldout = load_records(str(workplace / "rows.jsonl"), train_size=None, eval_size=4, seed=0).heldout
    samples = encode_all(heldout, tokenizer, 256).samples
    assert answer_loss(model, samples, Collator(0), 32) == pytest.approx(result["after"]["loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_that_was_cut_short_goes_on_bit_for_bit(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", *of_full(workplace, whole, f"model.dtype={dtype}")]) == 0
    with monkeypatch.context() as patch:
        at_step(patch, 6)
        assert main(["train", *of_full(workplace, cut, f"model.dtype={dtype}")]) == 130
    assert main(["train", f"train.resume={cut}"]) == 0
    assert [row["loss"] for row in metrics(cut)] == [row["loss"] for row in metrics(whole)]
    expected, found = weights(whole), weights(cut)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    (cut / "result.json").write_text((cut / "result.json").read_text().replace('"finished"', '"failed"'))
    assert main(["train", f"train.resume={cut}"]) == 0  # from its last checkpoint, with nothing left to do
    found = weights(cut)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.slow
def test_two_processes_train_the_model_that_one_does(workplace: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    plain = ["optim=sgd", "optim.lr=0.5", "train.steps=6", "train.checkpoint_every=0", "eval.before=false"]
    assert main(["train", *of_full(workplace, one, *plain)]) == 0
    words = ["train", *of_full(workplace, two, *plain, "train.batch_size=2")]
    run_group(run_command, free_ports(1)[0], words)
    losses = [[row["loss"] for row in metrics(run)] for run in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    first, second = weights(one), weights(two)
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["peft.r=4"], "peft.r is a setting of an adapter, and peft.full=true trains the model itself, without one."),
        (["peft.adapter=somewhere"], "peft.adapter is a setting of an adapter"),
        (["init=pissa"], "init.mode is a setting of an adapter"),
        (["train.save_merged=true"], "train.save_merged=true saves the model an adapter was merged into"),
        (["optim=lora_fa"], "optim=lora_fa works on the factors A and B of adapters, and with peft.full=true there"),
    ],
)
def test_what_needs_an_adapter_is_refused(more: list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text.replace("(", r"\(")):
        compose(["peft=full_ft", *more])


def test_the_rate_is_one_for_whole_models_and_can_be_given() -> None:
    assert compose(["peft=full_ft"]).optim.lr == 2e-5
    assert compose(["peft=full_ft", "optim.lr=1e-4"]).optim.lr == 1e-4
    assert compose(["optim.lr=1e-4", "peft=full_ft"]).optim.lr == 1e-4
    assert compose(["peft=full_ft", "optim=adafactor"]).optim.lr == 2e-5


def test_codes_are_not_trained() -> None:
    model = torch.nn.Linear(2, 2)
    model.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="trains every weight, and 1 are no floating-point numbers: weight"):
        train_all(model)


def test_float16_is_trained_where_gradients_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision(torch.float16) ["fp16"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"float16 needs a GPU, where gradients are scaled\. Set model\.dtype"):
        precision(torch.float16)
