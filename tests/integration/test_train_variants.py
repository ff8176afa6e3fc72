"""Formulas of updates from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafa import LoraConfig
from lorafa.cli.main import main
from lorafa.io.adapter_files import read_adapter
from lorafa.variants import variant_types
from toys.records import write_rows
from toys.workplace import make_workplace, read, settings

ASSISTANT = 1
"""The token that begins an answer."""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workplace(tmp_path_factory.mktemp("work"))


def command(workplace: Path, run: Path, *more: str) -> list[str]:
    given = {text.partition("=")[0] for text in more} | {"train.steps", "train.checkpoint_every"}
    own = [text for text in settings(workplace, run) if text.partition("=")[0] not in given]
    return ["train", *own, "train.steps=4", "train.checkpoint_every=2", "optim.schedule=constant", *more]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out = capsys.readouterr()
    return " ".join((out.out + out.err).split())


def test_alora_trains_evaluates_and_goes_on_where_it_was(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    alora = [f"peft.alora_invocation_tokens=[{ASSISTANT}]", "train.gradient_checkpointing=true"]
    assert main(command(workplace, run, *alora)) == 0
    assert "The adapter counts in" not in said(capsys)  # it does in all
    result = read(run / "result.json")
    assert result["before"]["loss"] != result["after"]["loss"]
    assert read(run / "adapter" / "adapter_config.json")["alora_invocation_tokens"] == [ASSISTANT]
    assert main(["train", f"train.resume={run}", "train.steps=6"]) == 0
    assert main(command(workplace, whole, *alora, "train.steps=6")) == 0
    assert read(whole / "result.json")["after"] == read(run / "result.json")["after"]


def read_back(workplace: Path, run: Path, *more: str) -> dict[str, Any]:
    """The config of the adapter that a run with these settings has written, after it was loaded again."""
    assert main(command(workplace, run, *more)) == 0
    result = read(run / "result.json")
    assert result["before"]["loss"] != result["after"]["loss"]
    return vars(read_adapter(run / "adapter").config)


FACTORS = {
    "qalora": ["peft.use_qalora=true", "peft.qalora_group_size=4"],
    "bdlora": ["peft.use_bdlora={target_modules_bd_a:[o_proj,down],target_modules_bd_b:[q,k_,v_,gate,up],nblocks:2}"],
    "velora": ["peft.velora_config.num_groups=4", "peft.velora_config.init_type=batch_average_once"],
    "monteclora": ["peft.monteclora_config.num_samples=3", "peft.monteclora_config.use_entropy=true"],
}
"""What asks for each formula of B A."""


@pytest.mark.matrix(4, each_word=False)
@pytest.mark.parametrize("name", FACTORS)
def test_formulas_of_the_product_train_are_saved_and_go_on_where_they_were(
    workplace: Path, tmp_path: Path, name: str
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    found = read_back(workplace, run, *FACTORS[name], "train.gradient_checkpointing=true")
    assert [one.name for one in variant_types(LoraConfig(**found))] == [name]
    assert main(["train", f"train.resume={run}", "train.steps=6"]) == 0
    assert main(command(workplace, whole, *FACTORS[name], "train.gradient_checkpointing=true", "train.steps=6")) == 0
    assert read(whole / "result.json")["after"] == read(run / "result.json")["after"]


def test_alora_without_its_invocation_in_the_rows_is_refused_and_in_some_said(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(workplace, tmp_path / "a", "peft.alora_invocation_tokens=[5,5,5]")) != 0
    assert "peft.alora_invocation_tokens=[5, 5, 5] is in none of the 16 samples to train on" in said(capsys)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": f"A text of the number {n}."} for n in range(8)])
    mixed = f"[{workplace / 'rows.jsonl'},{texts}]"
    invoked = f"peft.alora_invocation_tokens=[{ASSISTANT}]"
    assert main(command(workplace, tmp_path / "b", invoked, f"data={mixed}")) == 0
    assert "samples; the others have no alora_invocation_tokens in them and train nothing." in said(capsys)
    assert main(command(workplace, tmp_path / "c", invoked, "train.packing=true")) != 0
    assert f"{invoked} goes by one place a row (layer"in said(capsys)


def test_replicated_layers_train_resume_and_are_measured_again(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, whole, replicated = tmp_path / "run", tmp_path / "whole", "peft.layer_replication=[[0,2],[1,2]]"
    assert main(command(workplace, run, replicated)) == 0
    assert read(run / "adapter" / "adapter_config.json")["layer_replication"] == [[0, 2], [1, 2]]
    assert main(["train", f"train.resume={run}", "train.steps=6"]) == 0
    assert main(command(workplace, whole, replicated, "train.steps=6")) == 0
    assert read(whole / "result.json")["after"] == read(run / "result.json")["after"]
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    assert f"{read(run / 'result.json')['after']['loss']:.4f}" in said(capsys)
    assert main(command(workplace, tmp_path / "merged", replicated, "train.save_merged=true")) != 0
    assert "share their weights, of which each would need one of its own" in said(capsys)
    assert not (tmp_path / "merged" / "metrics.jsonl").exists()
    assert main(command(workplace, tmp_path / "outside", "peft.layer_replication=[[0,3]]")) != 0
    assert "[0, 3] is no range of 'model.layers', which has 2 layers" in said(capsys)


def test_goat_trains_evaluates_and_goes_on_where_it_was(workplace: Path, tmp_path: Path) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    goat = ["init=goat", "init.experts=2", "init.top_k=1", "init.balance=0.5", "train.gradient_checkpointing=true"]
    assert main(command(workplace, run, *goat)) == 0
    result = read(run / "result.json")
    assert result["before"]["loss"] != result["after"]["loss"]
    written = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in written if "lora_router" in key} == {"lora_router"}
    assert any("lora_start" in key for key in written)
    assert main(["train", f"train.resume={run}", "train.steps=6"]) == 0
    assert main(command(workplace, whole, *goat, "train.steps=6")) == 0
    assert read(whole / "result.json")["after"] == read(run / "result.json")["after"]
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    for key, value in load_file(whole / "adapter" / "adapter_model.safetensors").items():
        assert torch.equal(value, again[key]), key
    router = next(key for key in written if "lora_router" in key)  # with one expert a token only the balance trains it
    assert not torch.equal(written[router], again[router])


def test_settings_of_goat_that_do_not_fit_are_refused_by_name(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(workplace, tmp_path / "a", "init=goat")) != 0
    assert "q_proj: GOAT gives each of 8 experts the rank r / 8, found r = 4. Set r" in said(capsys)
    assert main(command(workplace, tmp_path / "b", "init=goat", "init.experts=2", "init.scaling=alpha")) != 0
    assert "scaling" in said(capsys)
    assert main(command(workplace, tmp_path / "c", "init=goat", "init.experts=2", "init.top_k=3")) != 0
    assert "top_k=3 is more than there are experts, 2." in said(capsys)


def test_formulas_with_tensors_of_their_own_and_those_that_read_the_call_are_planned_and_counted(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for setting in (f"peft.alora_invocation_tokens=[{ASSISTANT}]", "peft.use_dora=true"):
        run = command(workplace, tmp_path / "a", setting)
        assert main(["plan", *run[1:]]) == 0
        assert main(["params", f"model={workplace / 'model'}", setting]) == 0
        assert "optimizer state" in said(capsys)


def test_a_router_without_adapters_to_route_to_is_refused(
    workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the model is loaded, and by every command that makes an adapter."""
    text = "peft.arrow_config asks for arrow, which routes to other adapters and has no update of its own, and a run"
    run = command(workplace, tmp_path / "a", "peft.arrow_config={}")
    for command_line in (run, ["plan", *run[1:]], ["params", f"model={workplace / 'model'}", "peft.arrow_config={}"]):
        assert main(command_line) == 2
        assert text in said(capsys)
    assert not (tmp_path / "a").exists()
