"""load_adapter under a name that is there: the adapter becomes the one in the file, or nothing is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model
from lorafa.errors import CheckpointError, ConfigError, LoraError
from lorafa.storage.tensors import read_tensors
from lorafa.storage.whole import read_json, write_json
from toys.adapters import train
from toys.compare import assert_same_tensors, close, everything, refused
from toys.models import AlikeMixture, Tied

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
IDS = torch.tensor([[1, 4, 7], [2, 2, 0]])


def base(kind: type[nn.Module] = AlikeMixture) -> nn.Module:
    torch.manual_seed(0)
    return kind().double().eval()


def on(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"target_modules": ["gate", "head"], "r": 2, "lora_alpha": 3} | settings))


def adapted(config: LoraConfig, kind: type[nn.Module] = AlikeMixture) -> PeftModel:
    model = get_peft_model(base(kind), config).eval()
    train(model)
    return model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        tokens = isinstance(model.get_base_model(), Tied)  # type: ignore[operator]
        return model(IDS if tokens else X)


def files(model: PeftModel, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model.save_pretrained(folder)
    return read_tensors(folder / "adapter_model.safetensors")[0], read_json(folder / "adapter_config.json")


NUMBERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpha": ({}, {"lora_alpha": 7}),
    "rsLoRA": ({}, {"use_rslora": True}),
    "no rsLoRA": ({"use_rslora": True}, {}),
    "alpha of one layer": ({}, {"alpha_pattern": {"head": 9}}),
    "no alpha of its own": ({"alpha_pattern": {"head": 9}}, {}),
    "ranks by other patterns": ({"r": 4, "rank_pattern": {"head": 2}}, {"rank_pattern": {"gate": 4}}),
    "names by an expression": ({}, {"target_modules": r".*\.gate|head", "lora_alpha": 1}),
    "dropout and what is trained": ({"lora_dropout": 0.5}, {"freeze_A": True, "lora_alpha": 4}),
    "DoRA": ({"use_dora": True}, {"use_dora": True, "lora_alpha": 7}),
    "start": ({"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa", "lora_alpha": 7}),
    "start of DoRA": (
        {"init_lora_weights": "pissa", "use_dora": True},
        {"init_lora_weights": "pissa", "use_dora": True, "lora_alpha": 7},
    ),
    "experts": (
        {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]},
        {"target_modules": [], "target_parameters": ["experts.down", "up"], "alpha_pattern": {"experts.up": 8}},
    ),
    "copies": ({"modules_to_save": ["head"], "target_modules": ["gate"]},) * 2,
}
"""Settings of the adapter that is there, and of the one in the file."""


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("scaled", [False, True])
def test_the_adapter_becomes_that_of_the_file(case: str, scaled: bool, tmp_path: Path) -> None:
    there, new = NUMBERS[case]
    source, model = adapted(on(**new)), adapted(on(**there))
    tensors, config = files(source, tmp_path / "source")
    if scaled:
        for _, layer in model.base_model.lora_layers():
            layer.set_scale("default", 5)
    before = everything(model)
    model.load_adapter(tmp_path / "source", "default")
    close(output(model), output(source))
    after = everything(model)
    assert all(before[aspect] == after[aspect] for aspect in ("objects", "modules", "trains", "modes"))
    again, written = files(model, tmp_path / "again")
    assert_same_tensors(again, tensors)
    for field in ("use_rslora", "use_dora", "init_lora_weights"):
        assert written[field] == config[field]
    close(output(PeftModel.from_pretrained(base(), tmp_path / "again")), output(source))


ROWS = {"target_modules": ["proj"], "trainable_token_indices": [1, 4]}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[LoraError], str]] = {
    "rank": ({}, {"r": 3}, CheckpointError, "of another shape"),
    "layers": ({}, {"target_modules": ["head"]}, CheckpointError, "missing in the file"),
    "rows": (ROWS, ROWS | {"trainable_token_indices": [4, 2]}, ConfigError, "the rows of 4, 2, and .* those of 1, 4"),
    "order of rows": (ROWS, ROWS | {"trainable_token_indices": [4, 1]}, ConfigError, "under a name of its own"),
    "aLoRA": ({}, {"alora_invocation_tokens": [1]}, ConfigError, "the new adapter computes alora, and 'default' lora"),
    "no aLoRA": ({"alora_invocation_tokens": [1]}, {}, ConfigError, "computes lora, and 'default' alora"),
    "another invocation": (
        {"alora_invocation_tokens": [1]}, {"alora_invocation_tokens": [1, 2]}, ConfigError, "alora has other settings"
    ),
    "start that is not subtracted": (
        {"init_lora_weights": "pissa"}, {}, CheckpointError, "subtracts a frozen start .*pissa.* has none"
    ),
    "start and twice the rank": ({"r": 4}, {"init_lora_weights": "pissa"}, ConfigError, "has rank 4, .* says 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_tensor_shows_is_refused(case: str, tmp_path: Path) -> None:
    there, new, error, text = REFUSED[case]
    kind = Tied if "trainable_token_indices" in there else AlikeMixture
    adapted(on(**new), kind).save_pretrained(tmp_path)
    model = adapted(on(**there), kind)
    expected = None if "alora_invocation_tokens" in there else output(model)
    config = model.peft_config["default"]
    with refused(model, error, text):
        model.load_adapter(tmp_path, "default")
    assert model.peft_config["default"] is config
    if expected is not None:
        assert torch.equal(output(model), expected)


def test_a_config_that_does_not_mean_a_layer_of_the_file_is_refused(tmp_path: Path) -> None:
    adapted(on()).save_pretrained(tmp_path)
    values = read_json(tmp_path / "adapter_config.json")
    write_json(tmp_path / "adapter_config.json", values | {"target_modules": ["head"]})
    model = adapted(on())
    with refused(model, ConfigError, "config does not mean experts.gate, which adapter 'default' is on"):
        model.load_adapter(tmp_path, "default")


def test_layers_of_other_ranks_keep_their_numbers_where_sizes_may_differ(tmp_path: Path) -> None:
    source = adapted(on(r=3))
    source.save_pretrained(tmp_path / "same")
    model = adapted(on(rank_pattern={"head": 3}, lora_alpha=3, alpha_pattern={}))
    with pytest.warns(UserWarning, match="have another shape"):
        model.load_adapter(tmp_path / "same", "default", ignore_mismatched_sizes=True)
    layers = dict(model.base_model.lora_layers())
    assert [layers[name].scaling["default"] for name in ("experts.gate", "head")] == [1.5, 1.0]
    adapted(on(r=3, lora_alpha=5)).save_pretrained(tmp_path / "other")
    with refused(model, ConfigError, "other ranks .* on 1 layers, .* other scalings on 1 of the rest"):
        model.load_adapter(tmp_path / "other", "default", ignore_mismatched_sizes=True)
