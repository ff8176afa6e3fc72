"""For every layer kind and config field: what PEFT's users and files see is what they see with PEFT 0.21.2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

import lorafa
from toys.parity import CASES, Case, output, quiet, said, stored, stored_config, trained


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    """Key -> shape, without the second copy PEFT writes of the biases of modules_to_save under bias="all"."""
    return {key: tensor.shape for key, tensor in tensors.items() if ".modules_to_save." not in key}


Saved = tuple[lorafa.PeftModel, Path, Path]
"""A trained model of ours, its folder, and that of a model of PEFT."""


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def saved(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    ours, folder = trained(case.lorafa()), tmp_path_factory.mktemp("saved")
    with quiet():
        ours.save_pretrained(folder / "ours")
        case.peft().save_pretrained(folder / "theirs")
    return ours, folder / "ours", folder / "theirs"


@pytest.mark.matrix(4)
def test_parameters_have_the_names_shapes_and_flags_they_have_in_peft(case: Case) -> None:
    ours, theirs = case.lorafa(), case.peft()

    def described(model: torch.nn.Module) -> dict[str, tuple[torch.Size, torch.dtype, bool]]:
        return {name: (p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}

    assert described(ours) == described(theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.matrix(4)
def test_the_targeted_modules_are_those_of_peft(case: Case) -> None:
    ours, theirs = case.lorafa(), case.peft()
    assert sorted(ours.targeted_module_names) == sorted(theirs.targeted_module_names)
    assert sorted(ours.targeted_parameter_names) == sorted(theirs.targeted_parameter_names)


@pytest.mark.matrix(4)
def test_our_file_has_peft_keys_and_gives_equal_outputs_in_peft(case: Case, saved: Saved) -> None:
    ours, our_folder, their_folder = saved
    with quiet():
        loaded = peft.PeftModel.from_pretrained(case.base(), our_folder).eval()
    assert shapes(stored(our_folder)) == shapes(stored(their_folder))
    torch.testing.assert_close(output(case, loaded), output(case, ours), rtol=1e-6, atol=1e-6)


@pytest.mark.matrix(4)
def test_peft_says_no_more_of_our_file_than_of_its_own(case: Case, saved: Saved) -> None:
    ours, theirs = (said(lambda at=at: peft.PeftModel.from_pretrained(case.base(), at)) for at in saved[1:])
    assert ours <= theirs


@pytest.mark.matrix(4)
def test_a_file_of_peft_gives_equal_outputs_here(case: Case, tmp_path) -> None:
    theirs = trained(case.peft())
    with quiet():
        theirs.save_pretrained(tmp_path)
        config = lorafa.LoraConfig.from_pretrained(tmp_path)
        for name, value in case.ours.items():
            setattr(config, name, value)
        ours = lorafa.PeftModel.from_pretrained(case.base(), tmp_path, config=config)
    torch.testing.assert_close(output(case, ours), output(case, theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.matrix(4)
def test_our_config_file_says_what_that_of_peft_says(case: Case, saved: Saved) -> None:
    ours, theirs = (stored_config(folder) for folder in saved[1:])
    assert ours.keys() - case.ours.keys() == theirs.keys()
    assert targeted(case, ours) == targeted(case, theirs)  # "all-linear" may be spelled out in several ways
    for values in (ours, theirs):
        values["exclude_modules"] = sorted(values["exclude_modules"] or [])
        values["target_parameters"] = sorted(values["target_parameters"] or [])
    different = {name for name in theirs if ours[name] != theirs[name]}
    assert different <= {"peft_version", "target_modules"}


def targeted(case: Case, config: dict[str, object]) -> list[str]:
    settings = {name: value for name, value in config.items() if name not in case.ours}
    with quiet():
        return sorted(peft.get_peft_model(case.base(), peft.LoraConfig(**settings)).targeted_module_names)


@pytest.mark.matrix(4)
def test_gradients_of_every_trained_tensor_are_those_of_peft(case: Case) -> None:
    check_gradients(case, 1e-6)


SINGLE = ("linear-plain", "linear-everything", "linear-dora", "embedding", "conv2d", "transposed", "parameter-nested")


@pytest.mark.parametrize("name", [*SINGLE, "llama-all_linear", "llama-dora", "gpt2-default", "mixtral-experts"])
def test_gradients_in_float32_are_those_of_peft(name: str) -> None:
    check_gradients(replace(CASES[name], dtype=torch.float32), 1e-5)


@pytest.mark.parametrize("name", ["linear-plain", "linear-dora", "embedding", "conv2d", "transposed", "attention"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_on_a_half_precision_base_are_those_of_peft_but_for_rounding(name: str, dtype: torch.dtype) -> None:
    case = replace(CASES[name], dtype=dtype)
    ours, theirs = case.lorafa(), trained(case.peft())
    with quiet():
        lorafa.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    exact = replace(case, dtype=torch.float32)
    reference = exact.lorafa(case.base().float())
    with quiet():
        state = {key: value.float() for key, value in peft.get_peft_model_state_dict(theirs).items()}
        lorafa.set_peft_model_state_dict(reference, state)
    wanted = output(exact, reference)
    errors = [(output(case, model).float() - wanted).abs().max() for model in (ours, theirs)]
    assert output(case, ours).dtype == dtype
    assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * wanted.abs().max()


def check_gradients(case: Case, tolerance: float) -> None:
    ours, theirs = case.lorafa(), trained(case.peft())
    with torch.no_grad():
        values = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            parameter.copy_(values[name])
    for model in (ours, theirs):
        result = case.run(model)
        (result - result.detach().roll(1, 0) - 1).square().sum().backward()
    compared = 0
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert (parameter.grad is None) == (wanted[name].grad is None), name
        if parameter.grad is not None:
            # PEFT applies the update of attention's out_proj twice and takes the gradient of one of the two.
            factor = 2 if ".out_proj.lora_" in name else 1
            torch.testing.assert_close(
                parameter.grad, factor * wanted[name].grad, rtol=tolerance, atol=tolerance, msg=name
            )
            compared += 1
    assert compared


@pytest.mark.matrix(4)
def test_state_dicts_of_one_adapter_go_both_ways(case: Case) -> None:
    ours, theirs = trained(case.lorafa()), case.peft()
    with quiet():
        of_ours = lorafa.get_peft_model_state_dict(ours)
        of_theirs = peft.get_peft_model_state_dict(theirs)
        assert shapes(of_ours) == shapes(of_theirs)
        peft.set_peft_model_state_dict(theirs, {key: value.clone() for key, value in of_ours.items()})
        torch.testing.assert_close(output(case, theirs), output(case, ours), rtol=1e-6, atol=1e-6)
        trained(theirs, seed=5)
        lorafa.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    torch.testing.assert_close(output(case, ours), output(case, theirs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("start", [True, "pissa"])
def test_files_of_attention_mean_the_same_to_both_libraries_though_peft_applies_out_proj_twice(tmp_path, start) -> None:
    case = replace(CASES["attention"], ours={}, dtype=torch.float32)
    ours, theirs = trained(replace(case, ours={"init_lora_weights": start}).lorafa()), trained(case.peft())
    with quiet():
        ours.save_pretrained(tmp_path / "ours")
        theirs.save_pretrained(tmp_path / "theirs")
        ours_there = peft.PeftModel.from_pretrained(case.base(), tmp_path / "ours").eval()
        ours_back = lorafa.PeftModel.from_pretrained(case.base(), tmp_path / "ours")
        theirs_here = lorafa.PeftModel.from_pretrained(case.base(), tmp_path / "theirs")
    torch.testing.assert_close(output(case, ours_there), output(case, ours), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(case, theirs_here), output(case, theirs), rtol=1e-5, atol=1e-5)
    assert torch.equal(output(case, ours_back), output(case, ours))
