"""`lorafa params`: the numbers on the terminal and as JSON, from names, folders and settings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, LlamaConfig, MixtralConfig

from lorafa.cli import main as cli
from lorafa.models import MODELS
from toys.places import ROOT

PAGE = ROOT / "docs" / "params.md"
OPT = ["model=opt-125m", "peft.lora_r=16", "peft.target_modules=[q_proj,k_proj,v_proj,out_proj]"]


def params(*arguments: str) -> int:
    try:
        return cli.main(["params", *arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> Any:
    def read() -> tuple[str, str]:
        out, err = capsys.readouterr()
        return out, " ".join(err.split())

    return read


def cells(text: str, row: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"│ {row} "))
    return [cell.strip() for cell in line.strip("│").split("│")][1:]


def test_tables_tell_what_is_added_and_what_it_costs(output: Any) -> None:
    assert params(*OPT) == 0
    text, _ = output()
    assert "What it costs on 125,239,296 parameters, 238.88 MiB" in text
    assert cells(text, "q_proj") == ["12", "16", "7,087,104", "147,456", "147,456", "-"]
    assert cells(text, "sum") == ["48", "", "28,348,416", "589,824", "589,824", "-"]
    assert cells(text, "trained parameters") == ["1,179,648", "589,824"]
    assert cells(text, "share of the base") == ["0.94%", "0.47%"]
    assert cells(text, "trained numbers, 16 bit") == ["2.25 MiB", "1.12 MiB"]
    assert cells(text, "adapter file, 16 bit") == ["2.25 MiB", "2.25 MiB"]
    assert cells(text, "gradients") == ["4.50 MiB", "2.25 MiB"]
    assert cells(text, "optimizer state") == ["9.00 MiB", "4.50 MiB"]


def test_json_holds_the_same_numbers(output: Any) -> None:
    assert params(*OPT, "--json") == 0
    found = json.loads(output()[0])
    trained, frozen = found["costs"]
    assert (trained["optimizer"], trained["trained"]) == ("adamw", "A and B")
    assert (frozen["optimizer"], frozen["trained"]) == ("lora_fa", "B")
    assert (trained["trainable"], frozen["trainable"]) == (1_179_648, 589_824)
    assert trained["state_bytes"] == 2 * 4 * 1_179_648
    assert found["notes"] == []


def test_default_run_is_counted_without_fetching_its_model(output: Any, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert params(f"model.cache_dir={cache}", "--json") == 0
    assert json.loads(output()[0])["costs"][0]["trainable"] == 4_884_480
    assert not cache.exists()


def test_a_folder_needs_a_config_only(output: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    LlamaConfig(**sizes, num_attention_heads=2).save_pretrained(tmp_path)
    assert params(f"model={tmp_path}", "peft=qv", "peft.r=3", "model.dtype=bfloat16", "--json") == 0
    cost = json.loads(output()[0])["costs"][0]
    assert cost["trainable"] == 2 * 2 * 3 * 16
    assert cost["base_bytes"] == 2 * cost["base"]


@pytest.mark.parametrize(("setting", "optimizer"), [("optim=lora_fa", "lora_fa"), ("peft.freeze_A=true", "adamw")])
def test_where_A_is_frozen_anyway_there_is_one_column(output: Any, setting: str, optimizer: str) -> None:
    assert params(*OPT, setting, "--json") == 0
    (cost,) = json.loads(output()[0])["costs"]
    assert (cost["optimizer"], cost["trained"], cost["trainable"]) == (optimizer, "B", 589_824)


def test_headings_name_the_form_of_an_optimizer(output: Any) -> None:
    assert params(*OPT, "optim=lora_pro", "optim.form=full") == 0
    assert "A and B trained, lora_pro optim.form=full" in " ".join(re.sub("[┃━]", " ", output()[0]).split())
    assert params(*OPT, "peft.freeze_A=true") == 0
    assert "A frozen, adamw" in output()[0]


def test_what_is_trained_in_full_has_a_row(output: Any) -> None:
    assert params(*OPT, "peft.modules_to_save=[final_layer_norm]") == 0
    text, _ = output()
    assert cells(text, "trained in full")[-1] == cells(text, "sum")[-1] == f"{13 * 2 * 768:,}"


def test_a_start_from_the_weights_is_noted(output: Any) -> None:
    assert params(*OPT, "init=pissa") == 0
    assert "init=pissa is computed from the weights, which are not there." in " ".join(output()[0].split())


def test_a_start_that_takes_nothing_out_of_the_base_is_not(output: Any) -> None:
    for start in ("mica", "gora", "default"):
        assert params(*OPT, f"init={start}", "--json") == 0
        assert json.loads(output()[0])["notes"] == []


def test_a_start_that_quantizes_the_base_is_noted(output: Any) -> None:
    assert params(*OPT, "init=loftq", "--json") == 0
    assert json.loads(output()[0])["notes"] == ["init=loftq quantizes the base; it is counted as if it did not."]


def test_a_start_that_trains_A_alone_has_one_column(output: Any) -> None:
    assert params(*OPT, "init=mica", "--json") == 0
    (cost,) = json.loads(output()[0])["costs"]
    assert (cost["optimizer"], cost["trained"]) == ("adamw", "A")
    assert (cost["trainable"], cost["gradient_bytes"], cost["state_bytes"]) == (589_824, 4 * 589_824, 8 * 589_824)


def test_a_start_that_lora_fa_does_not_take_has_no_column_of_it(output: Any) -> None:
    assert params(*OPT, "init=orthogonal", "--json") == 0
    assert [cost["trained"] for cost in json.loads(output()[0])["costs"]] == ["A and B"]


@pytest.mark.parametrize("formula", ["peft.use_qalora=true", "peft.velora_config={}", "peft.monteclora_config={}"])
def test_a_formula_that_lora_fa_does_not_take_has_no_column_of_it(output: Any, formula: str) -> None:
    assert params(*OPT, formula, "--json") == 0
    (cost,) = json.loads(output()[0])["costs"]
    assert cost["trained"] == "A and B"
    assert cost["trainable"] > 0


def test_a_quantized_base_is_noted(output: Any, tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    quantized = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    LlamaConfig(**sizes, num_attention_heads=2, quantization_config=quantized).save_pretrained(tmp_path)
    assert params(f"model={tmp_path}") == 0
    assert "The model is stored quantized; the base is counted as if it were not." in " ".join(output()[0].split())
    assert params(*OPT, "model.quantize=nf4") == 0
    said = " ".join(output()[0].split())
    assert "model.quantize=nf4 is not counted: the base is counted as if it were dense." in said


def test_dropout_that_was_not_set_is_none_where_experts_are_adapted(output: Any, tmp_path: Path) -> None:
    """By default 0.05, which cannot act on their stacked weights."""
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2).save_pretrained(tmp_path)
    assert params(f"model={tmp_path}", "peft.r=2") == 0
    text, _ = output()
    assert all(name in text for name in ("experts.down_proj", "experts.gate_up_proj", "gate.weight"))
    assert params(f"model={tmp_path}", "peft.r=2", "peft.lora_dropout=0.1") != 0
    assert "lora_dropout=0.1 cannot act on a bare parameter" in output()[1]


def test_settings_that_change_nothing_counted_are_refused(output: Any) -> None:
    assert params("++train.steps=4") == 2
    expected = "reads the settings of model, peft, init, optim, found '++train.steps=4', which changes nothing that is"
    assert expected in output()[1]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["peft.r=0"], 2, "r must be an integer >= 1, found 0"),
        (["peff.r=4"], 2, "There is no setting 'peff.r'. Did you mean 'peft.r'?"),
        (["peft.target_modules=[q_prj]"], 2, "'q_prj' matches nothing in the model. Did you mean 'q_proj'?"),
        (
            ["optim=riemannian", "peft.freeze_A=true"],
            2,
            "A is frozen, but Riemannian preconditioning moves A and B",
        ),
        (["optim=lora_fa", "init=mica"], 2, "B is frozen and A is trained, and LoRA-FA trains B alone"),
        (["model=opt-12m"], 1, f"No model 'opt-12m': there is no such folder. .*by name: {', '.join(MODELS.names())}."),
        (["model=opt-125m", "model.revision=main"], 1, "No model 'opt-125m': there is no such folder"),
    ],
)
def test_errors_say_what_is_wrong(output: Any, arguments: list[str], status: int, message: str) -> None:
    assert params(*arguments) == status
    out, err = output()
    assert out == ""
    assert re.search(message.replace("?", r"\?"), err)


def test_a_model_that_is_no_language_model_is_refused(output: Any, tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "vit"}))
    assert params(f"model={tmp_path}") == 1
    assert f"Could not make a causal language model from the config of '{tmp_path}': " in output()[1]


def test_help_has_examples_the_known_shapes_and_the_exit_status(output: Any) -> None:
    assert params("--help") == 0
    text, _ = output()
    assert "examples:\n  lorafa params " in text
    assert "'peft.rank_pattern={down_proj:32}'" in text
    assert all(name in text for name in MODELS.names())
    assert "exit status: 0 done, 1" in text


def test_the_page_shows_what_is_printed(output: Any) -> None:
    assert params(*OPT) == 0
    printed = "\n".join(line.rstrip() for line in output()[0].splitlines())
    assert f"```\n{printed}\n```" in PAGE.read_text()
