"""Where A and B start, what dropout does, and files of starts that move the base: as in PEFT, or provably better."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import lorafa
from toys.language_models import Transposed
from toys.models import Attention, Convolution, Linears, Lookup, Mixture
from toys.parity import CASES, Case, on, output, quiet, stored, stored_config, trained


class Wide(nn.Module):
    """Big enough for the spread of random numbers to be known to a percent."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(300, 200)
        self.table = nn.Embedding(300, 200)
        self.conv = nn.Conv2d(40, 60, 3)


def factors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize(
    ("start", "target"),
    [
        *((start, target) for start in (True, False, "gaussian") for target in ("linear", "table", "conv")),
        ("orthogonal", "linear"),  # PEFT has it for linear layers only
    ],
)
def test_random_starts_have_the_mean_and_spread_of_those_of_peft(target: str, start: bool | str) -> None:
    settings: dict[str, Any] = {"target_modules": [target], "r": 64, "init_lora_weights": start}
    with quiet():
        ours = factors(lorafa.get_peft_model(Wide(), lorafa.LoraConfig(**settings)))
        theirs = factors(peft.get_peft_model(Wide(), peft.LoraConfig(**settings)))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert abs(values.mean()) <= 5 * theirs[name].std() / values.numel() ** 0.5 + 1e-12, name
        torch.testing.assert_close(values.std(), theirs[name].std(), rtol=0.05, atol=1e-12, msg=name)
        torch.testing.assert_close(values.abs().max() > 0, theirs[name].abs().max() > 0, msg=name)


def test_the_orthogonal_start_has_b_times_a_zero_and_each_of_half_rank_in_both_libraries() -> None:
    settings: dict[str, Any] = {"target_modules": ["linear"], "r": 16, "init_lora_weights": "orthogonal"}
    for library in (lorafa, peft):
        A, B = factors(library.get_peft_model(Wide().double(), library.LoraConfig(**settings))).values()
        assert torch.linalg.matrix_rank(A, tol=1e-5) == torch.linalg.matrix_rank(B, tol=1e-5) == 8
        assert (B @ A).abs().max() < 1e-5


def test_dropout_moves_outputs_as_much_as_in_peft() -> None:
    case = CASES["linear-dropout"]
    ours, theirs = case.lorafa(), trained(case.peft())
    lorafa.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    layers = [model.base_model.model.first.train() for model in (ours, theirs)]
    x = torch.randn(1, 12, dtype=torch.float64).expand(40_000, 12)
    with torch.no_grad():
        dropped = [layer(x) for layer in layers]
        whole = layers[0].eval()(x[:1])
    for result in dropped:
        assert ((result.mean(0) - whole).abs() < 6 * result.std(0) / 200).all()
    torch.testing.assert_close(dropped[0].std(0), dropped[1].std(0), rtol=0.05, atol=1e-3)


def moved_case(start: str, model: Callable[[], nn.Module] = Linears, **settings: Any) -> Case:
    settings = {"target_modules": ["first", "second"], "init_lora_weights": start, "r": 3} | settings
    return Case(model, on(5, 12), settings, dtype=torch.float32)  # PEFT refuses these starts in float64


PISSA = moved_case("pissa")
MOVED_CASES = {
    "pissa": PISSA,
    "pissa-rslora": moved_case("pissa", use_rslora=True, lora_alpha=5),
    "pissa-patterns": moved_case("pissa", rank_pattern={"first": 2}, alpha_pattern={"first": 3}),
    "pissa-transposed": moved_case("pissa", Transposed, target_modules=["first"], fan_in_fan_out=True),
    "olora": moved_case("olora"),
    "olora-rslora": moved_case("olora", use_rslora=True, lora_alpha=5),
    "olora-patterns": moved_case("olora", rank_pattern={"first": 2}, alpha_pattern={"first": 3}),
}
"""Starts that take something out of the base. PEFT's OLoRA fails on a transposed layer."""

OURS = MOVED_CASES | {
    "milora": moved_case("milora"),
    "olora-transposed": moved_case("olora", Transposed, target_modules=["first"], fan_in_fan_out=True),
}
"""With those that PEFT does not have."""


@pytest.fixture(params=list(OURS))
def any_start(request: pytest.FixtureRequest) -> Case:
    return OURS[request.param]


@pytest.fixture(params=list(MOVED_CASES))
def moved(request: pytest.FixtureRequest) -> Case:
    return MOVED_CASES[request.param]


def test_a_start_has_the_same_product_as_in_peft_and_changes_no_output(moved: Case) -> None:
    base = moved.base()
    before = output(moved, base)
    ours, theirs = moved.lorafa(base), moved.peft()
    torch.testing.assert_close(output(moved, ours), before, rtol=0, atol=0)
    torch.testing.assert_close(output(moved, theirs), before, rtol=1e-5, atol=1e-5)
    of_ours, of_theirs = factors(ours), factors(theirs)
    for name in (name for name in of_ours if "lora_A" in name):
        partner = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(
            of_ours[partner] @ of_ours[name], of_theirs[partner] @ of_theirs[name], rtol=1e-4, atol=1e-4
        )


def test_a_trained_adapter_of_such_a_start_is_plain_lora_of_twice_the_rank_to_peft(
    any_start: Case, tmp_path: Path
) -> None:
    ours = trained(any_start.lorafa())
    ours.save_pretrained(tmp_path)
    config = stored_config(tmp_path)
    assert config["init_lora_weights"] is True
    assert config["r"] == 2 * any_start.settings["r"]
    with quiet():
        loaded = peft.PeftModel.from_pretrained(any_start.base(), tmp_path).eval()
    torch.testing.assert_close(output(any_start, loaded), output(any_start, ours), rtol=1e-6, atol=1e-6)


def test_a_trained_adapter_of_such_a_start_comes_back_bit_for_bit_and_trains_on(
    any_start: Case, tmp_path: Path
) -> None:
    ours = trained(any_start.lorafa())
    ours.save_pretrained(tmp_path)
    loaded = lorafa.PeftModel.from_pretrained(any_start.base(), tmp_path, is_trainable=True).eval()
    assert torch.equal(output(any_start, loaded), output(any_start, ours))
    for (name, one), (other_name, other) in zip(ours.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other_name
        assert torch.equal(one, other), name
    assert loaded.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()
    assert loaded.peft_config["default"].init_lora_weights == any_start.settings["init_lora_weights"]


def test_a_file_of_peft_with_such_a_start_gives_equal_outputs_here(moved: Case, tmp_path: Path) -> None:
    theirs = trained(moved.peft())
    with quiet():
        theirs.save_pretrained(tmp_path)
        ours = lorafa.PeftModel.from_pretrained(moved.base(), tmp_path)
    torch.testing.assert_close(output(moved, ours), output(moved, theirs), rtol=1e-4, atol=1e-4)


def test_a_pissa_file_that_peft_has_converted_gives_equal_outputs_here(tmp_path: Path) -> None:
    theirs = PISSA.peft()
    with quiet():
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = "pissa"
        trained(theirs).save_pretrained(
            tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
        )
        ours = lorafa.PeftModel.from_pretrained(PISSA.base(), tmp_path / "converted")
    torch.testing.assert_close(output(PISSA, ours), output(PISSA, theirs), rtol=1e-4, atol=1e-4)


MICA = {
    "linear": moved_case("mica"),
    "transposed": moved_case("mica", Transposed, target_modules=["first", "head"], fan_in_fan_out=True),
    "embedding": Case(
        Lookup,
        lambda model: model(torch.arange(16)),
        {"target_modules": ["table", "head"], "init_lora_weights": "mica", "r": 3},
        dtype=torch.float32,
    ),
}


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("name", MICA)
def test_mica_starts_as_in_peft_trains_the_same_factor_and_its_files_go_both_ways(name: str, tmp_path: Path) -> None:
    case = MICA[name]
    ours, theirs = case.lorafa(), case.peft()
    assert trained_names(ours) == trained_names(theirs)
    for key, value in factors(theirs).items():  # the sign of a singular vector is free
        torch.testing.assert_close(factors(ours)[key].abs(), value.abs(), rtol=1e-4, atol=1e-5)
    for model, library in ((trained(ours), peft), (trained(theirs), lorafa)):
        folder = tmp_path / library.__name__
        with quiet():
            model.save_pretrained(folder)
            assert stored_config(folder)["init_lora_weights"] == "mica"
            read = library.PeftModel.from_pretrained(case.base(), folder, is_trainable=True).eval()
        torch.testing.assert_close(output(case, read), output(case, model), rtol=1e-5, atol=1e-5)
        assert trained_names(read) == trained_names(model)


LOFTQ: dict[str, Any] = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 8, "loftq_iter": 2}}


def edit_config(folder: Path, **values: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(stored_config(folder) | values))


def test_a_loftq_file_of_peft_is_plain_lora_on_the_base_that_peft_has_quantized(tmp_path: Path) -> None:
    """PEFT makes one with a GPU only; its base then is a dense model with dequantized values."""
    case = Case(Linears, on(5, 12), {"target_modules": ["first", "second"], "r": 3})
    theirs = trained(case.peft())
    theirs.save_pretrained(tmp_path)
    edit_config(tmp_path, **LOFTQ)
    ours = lorafa.PeftModel.from_pretrained(case.base(), tmp_path)
    assert isinstance(ours.base_model.model.first.base_layer, nn.Linear)
    torch.testing.assert_close(output(case, ours), output(case, theirs), rtol=1e-10, atol=1e-10)


def test_a_loftq_file_of_ours_is_plain_lora_on_the_dequantized_base_to_peft(tmp_path: Path) -> None:
    """The file says "loftq": PEFT quantizes the dense base again where it can, and refuses where it cannot."""
    case = Case(Linears, on(5, 12), {"target_modules": ["first", "second"], "r": 3} | LOFTQ, dtype=torch.float32)
    ours, base = trained(case.lorafa()), case.base()
    ours.save_pretrained(tmp_path)
    assert stored_config(tmp_path)["init_lora_weights"] == "loftq"
    with quiet(), pytest.raises((ImportError, RuntimeError, ValueError, AssertionError)):
        peft.PeftModel.from_pretrained(case.base(), tmp_path)
    edit_config(tmp_path, init_lora_weights=True, loftq_config={})  # as PEFT's documentation has it
    for name in ("first", "second"):
        base.get_submodule(name).weight.data = ours.base_model.model.get_submodule(name).base_weight()
    with quiet():
        theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(output(case, theirs), output(case, ours), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        Case(lambda: Convolution(2), on(2, 4, 5, 5), {"target_modules": ["conv", "head"], "r": 2}),
        Case(Linears, on(5, 12), {"target_modules": ["first"], "use_dora": True}),
        Case(Mixture, on(5, 12), {"target_modules": [], "target_parameters": ["experts.up"], "r": 2}),
        Case(Attention, on(2, 5, 12), {"target_modules": ["attention"]}, {"attention_out_proj_twice": True}),
    ],
    ids=["conv", "dora", "experts", "attention"],
)
@pytest.mark.parametrize("start", ["mica", "orthogonal"])
def test_a_start_peft_cannot_make_on_a_layer_is_history_to_it_and_comes_back_here(
    case: Case, start: str, tmp_path: Path
) -> None:
    case = replace(case, settings=case.settings | {"init_lora_weights": start})
    ours = trained(case.lorafa())
    ours.save_pretrained(tmp_path)
    with quiet():
        theirs = peft.PeftModel.from_pretrained(case.base(), tmp_path).eval()
    torch.testing.assert_close(output(case, theirs), output(case, ours), rtol=1e-6, atol=1e-6)
    back = lorafa.PeftModel.from_pretrained(case.base(), tmp_path, is_trainable=True).eval()
    assert torch.equal(output(case, back), output(case, ours))
    assert trained_names(back) == trained_names(ours)
    assert back.peft_config["default"].init_lora_weights == start


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_have_the_dtype_they_have_in_peft(dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
    config = {"target_modules": ["first", "second"], "modules_to_save": ["head"]}
    ours = lorafa.get_peft_model(Linears().to(dtype), lorafa.LoraConfig(**config), autocast_adapter_dtype=autocast)
    theirs = peft.get_peft_model(Linears().to(dtype), peft.LoraConfig(**config), autocast_adapter_dtype=autocast)
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [stored(tmp_path / side) for side in ("ours", "theirs")]
    assert {k: v.dtype for k, v in files[0].items()} == {k: v.dtype for k, v in files[1].items()}


def test_float32_adapters_on_a_half_base_are_loaded_without_rounding(tmp_path: Path) -> None:
    """PEFT rounds them to bfloat16 on the way with low_cpu_mem_usage."""
    config = lorafa.LoraConfig(target_modules=["first"])
    model = trained(lorafa.get_peft_model(Linears().to(torch.bfloat16), config))
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        base = model.unload() if low_memory else None
        loaded = lorafa.PeftModel.from_pretrained(
            base or Linears().to(torch.bfloat16), tmp_path, low_cpu_mem_usage=low_memory, ignore_base_mismatch=True
        )
        for key, value in stored(tmp_path).items():
            assert torch.equal(lorafa.get_peft_model_state_dict(loaded)[key], value)


def test_starts_from_the_weight_that_peft_takes_for_true_on_embeddings_are_done_here() -> None:
    base = Lookup().double()
    before = base(torch.arange(16)).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lorafa.get_peft_model(base, lorafa.LoraConfig(target_modules=["table"], init_lora_weights="pissa"))
    A, B = (factors(model)[f"base_model.model.table.lora_embedding_{one}.default"] for one in "AB")
    U, S, Vh = torch.linalg.svd(base.table.weight.detach().T)
    torch.testing.assert_close(B @ A, U[:, :8] * S[:8] @ Vh[:8], rtol=0, atol=1e-6)
    torch.testing.assert_close(model(torch.arange(16)), before, rtol=0, atol=1e-12)


def test_dilated_and_padded_convolutions_work_where_they_fail_in_peft() -> None:
    """PEFT's A forgets dilation and padding_mode; the kernel of A has both here, and merging agrees with the layer."""
    torch.manual_seed(0)
    base = Convolution(2, dilation=2, padding=2, padding_mode="reflect").double()
    model = trained(lorafa.get_peft_model(base, lorafa.LoraConfig(target_modules=["conv"], r=3))).eval()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    adapted = model(x).detach()
    model.merge_adapter()
    torch.testing.assert_close(model(x), adapted, rtol=1e-12, atol=1e-12)
