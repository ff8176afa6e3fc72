"""What PEFT does not refuse: warnings under its name that say what was done, with the numbers that belong to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from toys.by_name import found_by_name

SCRIPT = """
import copy, json, os, shutil, sys, warnings
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
import peft
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_lorafa_optimizer
from lorafa.errors import LoraError
from toys.models import Mlp

here = Path(sys.argv[1])
x = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

def base(shift=0.0):
    torch.manual_seed(0)
    model = Mlp().double()
    with torch.no_grad():
        model.first.weight.add_(shift)
    return model

def made(**settings):
    torch.manual_seed(1)
    given = {"r": 2, "lora_alpha": 6, "target_modules": ["first"], "init_lora_weights": False, **settings}
    return get_peft_model(base(), LoraConfig(**given), autocast_adapter_dtype=False).eval()

def update(model, name="default", layer="first"):
    found = getattr(model.base_model.model, layer)
    return found.scaling[name] * found.lora_B[name].weight @ found.lora_A[name].weight

def expected(change, shift=0.0):
    plain = base(shift)
    with torch.no_grad():
        plain.first.weight.add_(change)
    return plain(x)

def same(one, other):
    return bool(torch.allclose(one, other, rtol=1e-10, atol=1e-12))

reference = made()
change = update(reference)
saved = here / "saved"
reference.save_pretrained(saved)

def edited(name, *, tensors=None, **config):
    folder = here / name
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    if tensors:
        held = load_file(folder / "adapter_model.safetensors")
        save_file(held | tensors, folder / "adapter_model.safetensors")
    return folder

def pattern_of_a_list():
    model = made(target_modules=["first", "no_such_layer"])
    return same(model(x), expected(update(model)))

def key_of_a_rank_pattern():
    model = made(rank_pattern={"nowhere": 4}, alpha_pattern={"nowhere": 3})
    layer = model.base_model.model.first
    return layer.r["default"] == 2 and layer.scaling["default"] == 3 and same(model(x), expected(update(model)))

def module_to_save():
    model = made(modules_to_save=["nothing"])
    return same(model(x), expected(update(model)))

def extra_keys_of_another_layer():
    more = {f"base_model.model.norm.lora_{f}.weight": torch.zeros(2, 2) for f in "AB"}
    model = PeftModel.from_pretrained(base(), edited("extra", tensors=more), autocast_adapter_dtype=False)
    return same(model(x), expected(change))

def second_wrapping_of_one_name():
    torch.manual_seed(2)
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["first"], init_lora_weights=False)
    first = made()
    model = get_peft_model(first, config, autocast_adapter_dtype=False)
    return model is first and list(model.peft_config) == ["default"] and same(model(x), expected(update(model)))

def second_wrapping_of_another_name():
    torch.manual_seed(2)
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["first"], init_lora_weights=False)
    model = get_peft_model(made(), config, "other", autocast_adapter_dtype=False)
    return model.active_adapters == ["other"] and same(model(x), expected(update(model, "other")))

def wrapping_the_model_inside_again():
    torch.manual_seed(2)
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["first"], init_lora_weights=False)
    model = get_peft_model(made().get_base_model(), config, autocast_adapter_dtype=False)
    return same(model(x), expected(update(model)))

def another_base():
    model = PeftModel.from_pretrained(base(0.5), saved, autocast_adapter_dtype=False)
    return same(model(x), expected(change, 0.5))

def unknown_key_of_a_config():
    model = PeftModel.from_pretrained(base(), edited("key", brand_new="loud"), autocast_adapter_dtype=False)
    return same(model(x), expected(change))

def unknown_key_by_from_peft_type():
    return LoraConfig.from_peft_type(peft_type="LORA", r=3, brand_new="loud").r == 3

def unknown_argument_of_from_pretrained():
    model = PeftModel.from_pretrained(base(), saved, autocast_adapter_dtype=False, trust_me=True)
    return same(model(x), expected(change))

def unknown_argument_of_load_adapter():
    model = made()
    model.load_adapter(saved, "again", trust_me=True, autocast_adapter_dtype=False)
    model.set_adapter("again")
    return same(model(x), expected(change))

def unknown_argument_of_save_pretrained():
    made().save_pretrained(here / "options", trust_me=True)
    return load_file(here / "options" / "adapter_model.safetensors").keys() == load_file(
        saved / "adapter_model.safetensors").keys()

def unknown_argument_of_a_config():
    return LoraConfig.from_pretrained(saved, trust_me=True).r == 2

def rank_given_to_an_optimizer():
    def step(**given):
        model = made()
        optimizer = create_lorafa_optimizer(model, lr=0.1, lora_alpha=6, **given)
        model(x).square().sum().backward()
        optimizer.step()
        return model(x)
    return same(step(r=128), step())

CASES = [
    pattern_of_a_list, key_of_a_rank_pattern, module_to_save, extra_keys_of_another_layer, second_wrapping_of_one_name,
    second_wrapping_of_another_name, wrapping_the_model_inside_again, another_base, unknown_key_of_a_config,
    unknown_key_by_from_peft_type, unknown_argument_of_from_pretrained, unknown_argument_of_load_adapter,
    unknown_argument_of_save_pretrained, unknown_argument_of_a_config, rank_given_to_an_optimizer]

found = {}
for case in CASES:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            right = case()
        except LoraError as error:
            found[case.__name__] = {"error": str(error), "kind": type(error).__name__}
            continue
    texts = [str(w.message) for w in caught if "PEFT does not refuse it" in str(w.message)]
    found[case.__name__] = {"right": bool(right), "said": texts}

def still(case):
    try:
        case()
    except LoraError as error:
        return str(error)
    return "nothing"

lacking = edited("lacking")
held = load_file(lacking / "adapter_model.safetensors")
save_file({k: v for k, v in held.items() if "lora_B" not in k}, lacking / "adapter_model.safetensors")
misshapen = edited("misshapen", tensors={k: v[:, :1].clone() for k, v in held.items() if "lora_B" in k})
magnitude = edited("magnitude", tensors={"base_model.model.first.lora_magnitude_vector": torch.ones(10)})
found["still"] = {
    "missing": still(lambda: PeftModel.from_pretrained(base(), lacking)),
    "misshapen": still(lambda: PeftModel.from_pretrained(base(), misshapen)),
    "another formula": still(lambda: PeftModel.from_pretrained(base(), magnitude)),
    "nothing matches": still(lambda: made(target_modules=["no_such_layer"])),
}
say(found)
"""

SAID = {
    "pattern_of_a_list": ("'no_such_layer' matches nothing", "The adapter is on what the other names mean."),
    "key_of_a_rank_pattern": ("rank_pattern: 'nowhere' matches nothing", "have the ranks that the config says"),
    "module_to_save": ("'nothing' matches no module", "no such module is trained"),
    "extra_keys_of_another_layer": ("not in the model", "were passed over; all others were loaded"),
    "second_wrapping_of_one_name": ("is a PeftModel already", "in the place of one of its name"),
    "second_wrapping_of_another_name": ("is a PeftModel already", "counts alone"),
    "wrapping_the_model_inside_again": ("already has an adapter 'default'", "the new one is in its place"),
    "another_base": ("was made for another base model", "added to the weights that are here"),
    "unknown_key_of_a_config": ("brand_new", "Passed over: brand_new."),
    "unknown_key_by_from_peft_type": ("brand_new", "Passed over: brand_new."),
    "unknown_argument_of_from_pretrained": ("from_pretrained has no argument 'trust_me'", "It was passed over."),
    "unknown_argument_of_load_adapter": ("load_adapter has no argument 'trust_me'", "It was passed over."),
    "unknown_argument_of_save_pretrained": ("save_pretrained has no argument 'trust_me'", "It was passed over."),
    "unknown_argument_of_a_config": ("from_pretrained has no argument 'trust_me'", "It was passed over."),
    "rank_given_to_an_optimizer": ("r=128 was given, but the adapters have r=2", "goes by r=2"),
}
STILL = {
    "missing": "missing in the file",
    "misshapen": "of another shape",
    "another formula": "not in the model",
    "nothing matches": "'no_such_layer' matches nothing",
}


@pytest.fixture(scope="module")
def lenient(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return found_by_name(SCRIPT, str(tmp_path_factory.mktemp("lenient")))


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return found_by_name(SCRIPT, str(tmp_path_factory.mktemp("strict")), strict=True)


@pytest.mark.parametrize("case", SAID)
def test_a_refusal_that_peft_lacks_is_a_warning_with_right_numbers(case: str, lenient: Any) -> None:
    found = lenient[case]
    assert found.get("right"), found
    what, instead = SAID[case]
    first = next((text for text in found["said"] if what in text), None)
    assert first is not None, found["said"]
    assert instead in first
    assert "LORAFA_STRICT=1 makes it an error" in first
    assert "Nothing was" not in first


@pytest.mark.slow
@pytest.mark.parametrize("case", SAID)
def test_one_setting_makes_it_an_error_again(case: str, strict: Any) -> None:
    assert SAID[case][0] in strict[case]["error"]


@pytest.mark.parametrize("case", STILL)
def test_what_would_be_wrong_numbers_stays_an_error(case: str, lenient: Any) -> None:
    assert STILL[case] in lenient["still"][case]


def test_scripts_keep_their_paths(tmp_path: Path) -> None:
    assert found_by_name("import sys; say(sys.argv[1:])", str(tmp_path)) == [str(tmp_path)]
