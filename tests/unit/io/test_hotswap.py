"""Exchanging adapters in place: what goes, and what is refused with nothing changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import (
    ArrowConfig,
    LoraConfig,
    PeftModel,
    check_hotswap_configs_compatible,
    create_arrow_model,
    get_peft_model,
    get_peft_model_state_dict,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    inject_adapter_in_model,
    mutate_base,
    prepare_model_for_compiled_hotswap,
)
from lorafa.errors import AdapterError, CheckpointError, ConfigError, LoraError, TargetError
from toys.adapters import train
from toys.compare import assert_same_tensors, close, everything, refused
from toys.language_models import llama, logits
from toys.models import Linears, Lookup, Mixture, Tied
from toys.swaps import BOTH, X, adapted, base, loaded, numbers, saved


def language_model(seed: int, **settings: Any) -> PeftModel:
    model = get_peft_model(llama(), LoraConfig(**settings))
    torch.manual_seed(seed)
    train(model, 0.1)
    return model.eval()


FORMULAS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "velora": {"velora_config": {"num_groups": 2, "init_type": "random"}, "use_dora": True},
}


def swap_refused(model: PeftModel, new: Path, kind: type[LoraError], text: str) -> None:
    before, config = numbers(model), copy.copy(model.peft_config["default"])
    with refused(model, kind, text):
        hotswap_adapter(model, new, "default")
    assert numbers(model) == before
    assert model.peft_config["default"] == config


# ---- what goes


def test_layers_that_the_new_adapter_leaves_out_are_the_base_and_in_no_file(tmp_path: Path) -> None:
    for name, formula in FORMULAS.items():
        model = adapted(**formula)
        first = adapted(**formula)
        new = saved(tmp_path / name, **(formula | {"target_modules": ["second"], "lora_alpha": 9}))
        hotswap_adapter(model, new, "default")
        close(model(X), loaded(new)(X))
        assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(loaded(new)))
        model.save_pretrained(tmp_path / f"{name} again")
        close(loaded(tmp_path / f"{name} again")(X), model(X))
        first.save_pretrained(tmp_path / f"{name} first")
        hotswap_adapter(model, tmp_path / f"{name} first", "default")
        close(model(X), first(X))


def test_modules_rows_and_biases_are_exchanged_with_the_factors(tmp_path: Path) -> None:
    cases: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], Tensor]] = {
        "copies": (Linears, {"modules_to_save": ["head"]}, X),
        "biases": (Linears, {"bias": "lora_only"}, X),
        "rows": (Lookup, {"target_modules": ["head"], "trainable_token_indices": {"table": [3, 5]}}, torch.arange(16)),
        "tables": (Lookup, {"target_modules": ["table", "head"]}, torch.arange(16)),
        "experts": (Mixture, {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]}, X),
        "tied": (Tied, {"target_modules": ["embed", "head"], "ensure_weight_tying": True}, torch.arange(10)),
    }
    for name, (kind, settings, x) in cases.items():
        model = adapted(kind, **settings)
        prepare_model_for_compiled_hotswap(model, target_rank=6)
        new = saved(tmp_path / name, kind, **(settings | {"r": 3, "lora_alpha": 10}))
        hotswap_adapter(model, new, "default")
        close(model(x), loaded(new, kind)(x))
        assert_same_tensors(get_peft_model_state_dict(model), get_peft_model_state_dict(loaded(new, kind)))


def test_what_trains_and_what_counts_stays(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, **BOTH))
    model.set_adapter("other")
    before, objects = everything(model)["trains"], everything(model)["objects"]
    hotswap_adapter(model, saved(tmp_path, init_lora_weights="gaussian", freeze_A=True), "default")
    assert everything(model)["trains"] == before
    assert everything(model)["objects"] == objects
    assert model.active_adapters == ["other"]
    assert model.peft_config["default"].freeze_A
    model.set_adapter("default")
    assert [name for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name] == []


def test_a_new_dropout_acts_in_training_alone(tmp_path: Path) -> None:
    model = adapted()
    new = saved(tmp_path, lora_dropout=0.9)
    hotswap_adapter(model, new, "default")
    close(model(X), loaded(new)(X))
    assert not torch.equal(model.train()(X), model(X))


def test_a_state_dict_goes_by_the_names_of_a_file_or_of_the_model() -> None:
    new = adapted(seed=5, r=2, lora_alpha=3)
    tensors, config = get_peft_model_state_dict(new), new.peft_config["default"]
    for named in (tensors, {key: value for key, value in new.state_dict().items() if "lora_" in key}):
        model = adapted()
        prepare_model_for_compiled_hotswap(model, target_rank=4)
        hotswap_adapter_from_state_dict(model, named, "default", config)
        close(model(X), new(X))


def test_an_adapter_that_waits_for_its_invocation_is_exchanged(tmp_path: Path) -> None:
    gate = {"alora_invocation_tokens": [5, 7], "target_modules": "all-linear", "r": 4}

    def gated(seed: int, **settings: Any) -> PeftModel:
        return language_model(**(gate | settings), seed=seed)

    model = gated(1)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    gated(2, r=6, lora_alpha=3).save_pretrained(tmp_path / "new")
    hotswap_adapter(model, tmp_path / "new", "default")
    close(logits(model), logits(PeftModel.from_pretrained(llama(), tmp_path / "new").eval()), torch.float32)
    gated(2, alora_invocation_tokens=[5, 8]).save_pretrained(tmp_path / "other")
    with refused(model, ConfigError, r"alora_invocation_tokens is \[5, 7\] .* and \[5, 8\]"):
        hotswap_adapter(model, tmp_path / "other", "default")


def test_a_router_finds_its_prototypes_anew_when_an_expert_is_exchanged(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for seed, folder in enumerate(folders):
        language_model(seed, r=4 + 2 * seed, target_modules=["q_proj", "up_proj"]).save_pretrained(folder)
    router = ArrowConfig(top_k=1)
    model = create_arrow_model(llama(), folders[:2], router)
    before = logits(model)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    close(logits(model), before, torch.float32)
    hotswap_adapter(model, folders[2], "task_1")
    close(logits(model), logits(create_arrow_model(llama(), [folders[0], folders[2]], router)), torch.float32)


def test_injected_adapters_are_exchanged_too(tmp_path: Path) -> None:
    model = inject_adapter_in_model(LoraConfig(r=4, **BOTH), base())
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    new = saved(tmp_path, r=7)
    hotswap_adapter(model, new, "default")
    close(model.eval()(X), loaded(new)(X))
    assert model.peft_config["default"].r == 7  # type: ignore[union-attr, index]


@pytest.mark.parametrize("rslora", [False, True])
def test_the_whole_update_of_an_adapter_with_a_frozen_start_is_exchanged(rslora: bool, tmp_path: Path) -> None:
    new = saved(tmp_path / "new", init_lora_weights="pissa", use_rslora=rslora)
    plain = saved(tmp_path / "plain", r=3)
    into_plain = adapted()
    prepare_model_for_compiled_hotswap(into_plain, target_rank=8)
    hotswap_adapter(into_plain, new, "default")
    close(into_plain(X), loaded(new)(X))
    into_plain.save_pretrained(tmp_path / "again")
    close(loaded(tmp_path / "again")(X), loaded(new)(X))
    started = adapted(init_lora_weights="pissa", use_rslora=rslora)
    before = started(X)
    hotswap_adapter(started, new, "default")  # both have a start: each in its own place
    close(started(X), loaded(new)(X))
    started = adapted(init_lora_weights="pissa", use_rslora=rslora)
    prepare_model_for_compiled_hotswap(started, target_rank=8)
    close(started(X), before)
    assert started.peft_config["default"].r == 8
    hotswap_adapter(started, plain, "default")
    close(started(X), loaded(plain)(X))


# ---- what is refused


def test_another_rank_needs_slots_and_the_error_says_how_many(tmp_path: Path) -> None:
    higher, lower = saved(tmp_path / "higher", r=9), saved(tmp_path / "lower", r=2)
    model = adapted()
    swap_refused(model, higher, AdapterError, r"has rank 4, the new one has rank 9\. Call .*target_rank=9")
    swap_refused(model, lower, AdapterError, r"has rank 4, the new one has rank 2\. Call .*target_rank=4")
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    swap_refused(model, higher, AdapterError, r"has slots for 6 ranks, the new one has rank 9.*target_rank=9")
    hotswap_adapter(model, lower, "default")
    close(model(X), loaded(lower)(X))


def test_further_layers_are_refused(tmp_path: Path) -> None:
    text = r"also on 1 layers that adapter 'default' is not on: head\..*Nothing was changed"
    swap_refused(adapted(), saved(tmp_path, target_modules=["first", "head"]), TargetError, text)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"use_dora": True}, "there computes lora, the new one lora under dora"),
        ({"lora_bias": True}, "lora_bias is False .* and True"),
        ({"bias": "all"}, "bias is 'none' .* and 'all'"),
        ({"modules_to_save": ["head"]}, r"modules_to_save is None .* and \['head'\]"),
    ],
)
def test_configs_have_to_agree_on_what_there_is(settings: dict[str, Any], text: str, tmp_path: Path) -> None:
    swap_refused(adapted(), saved(tmp_path, **settings), ConfigError, text)


def test_settings_of_a_formula_have_to_agree(tmp_path: Path) -> None:
    qalora = {"use_qalora": True, "r": 2}
    new = saved(tmp_path / "groups", **qalora, qalora_group_size=4)
    text = "first: qalora has other settings in the new adapter"
    swap_refused(adapted(**qalora, qalora_group_size=2), new, ConfigError, text)
    left_out = saved(tmp_path / "left", **qalora, qalora_group_size=2, target_modules=["first"])
    model = adapted(**qalora, qalora_group_size=2)
    swap_refused(model, left_out, AdapterError, "leaves out second, and .* has qalora there, which zeros do not")
    kasa = {"init_lora_weights": "kasa"}
    swap_refused(
        adapted(**kasa),
        saved(tmp_path / "r", **kasa, r=2),
        AdapterError,
        "ranks that are left empty would count in kasa",
    )
    left_out = saved(tmp_path / "left out", **kasa, target_modules=["first"])
    swap_refused(adapted(**kasa), left_out, AdapterError, "leaves out second, and .* has a frozen start there")


def test_configs_that_differ_in_numbers_alone_are_compatible() -> None:
    one = LoraConfig(r=4, modules_to_save=["a", "b"], **BOTH)
    other = LoraConfig(
        r=8, use_rslora=True, lora_dropout=0.1, alpha_pattern={"first": 3}, modules_to_save=["b", "a"], **BOTH
    )
    check_hotswap_configs_compatible(one, other)
    with pytest.raises(ConfigError, match="must be a LoraConfig"):
        check_hotswap_configs_compatible(one, {"r": 8})  # type: ignore[arg-type]


def test_merged_adapters_and_changed_bases_are_refused(tmp_path: Path) -> None:
    new, model = saved(tmp_path / "new"), adapted()
    model.merge_adapter()
    before = model(X)
    swap_refused(model, new, AdapterError, r"is merged into 'first'\. Call unmerge_adapter\(\) before exchanging it")
    with refused(model, AdapterError, "merged into the base weights"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    close(model(X), before)
    model = adapted(init_lora_weights="pissa")
    mutate_base(model)
    started = saved(tmp_path / "started", init_lora_weights="pissa")
    swap_refused(model, started, AdapterError, "is taken out of the base weights.* before exchanging it")
    with refused(model, AdapterError, r"Call restore_base\(model\) first"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)


def test_an_unknown_adapter_or_option_is_refused(tmp_path: Path) -> None:
    model, new = adapted(), saved(tmp_path)
    with refused(model, AdapterError, "no adapter 'defalt'.* Did you mean 'default'"):
        hotswap_adapter(model, new, "defalt")
    with refused(model, ConfigError, "subfolders"):
        hotswap_adapter(model, new, "default", subfolders="x")  # type: ignore[call-arg]
    with refused(model, ConfigError, "parameter_prefix is 'lora_'"):
        hotswap_adapter_from_state_dict(model, {}, "default", LoraConfig(**BOTH), parameter_prefix="hada_")
    with pytest.raises(AdapterError, match="carries no adapter of lorafa"):
        hotswap_adapter(base(), new, "default")


def test_all_tensors_are_exchanged_or_none() -> None:
    new = adapted(seed=5)
    tensors, config = get_peft_model_state_dict(new), new.peft_config["default"]
    key = next(reversed(tensors))
    for wrong in (
        {name: value for name, value in tensors.items() if name != key},
        tensors | {key: tensors[key][:, :-1]},
        tensors | {"base_model.model.third.lora_A.weight": tensors[key]},
    ):
        model = adapted()
        before = numbers(model)
        with refused(model, CheckpointError, "Nothing was loaded"):
            hotswap_adapter_from_state_dict(model, wrong, "default", config)
        assert numbers(model) == before


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(7)
    other = get_peft_model(Linears().double(), LoraConfig(r=4, **BOTH))
    other.save_pretrained(tmp_path)
    model = adapted()
    swap_refused(model, tmp_path, CheckpointError, "other base weights|other weights|different")
    hotswap_adapter(model, tmp_path, "default", ignore_base_mismatch=True)


def test_starts_that_have_no_place_are_refused(tmp_path: Path) -> None:
    plain, started = saved(tmp_path / "plain"), saved(tmp_path / "started", init_lora_weights="pissa")
    text = r"subtracts a frozen start, and the new one brings none\. Call prepare_model_for_compiled_hotswap"
    swap_refused(adapted(init_lora_weights="pissa"), plain, AdapterError, text)
    swap_refused(adapted(), started, AdapterError, "has rank 4, the new one has rank 8")
    with refused(model := adapted(init_lora_weights="pissa"), AdapterError, r"rank 8, which target_rank=6.*rank=8"):
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    dora = saved(tmp_path / "dora", init_lora_weights="pissa", use_dora=True)
    swap_refused(adapted(use_dora=True), dora, CheckpointError, "holds a frozen start under dora")
    with refused(model := adapted(init_lora_weights="pissa", use_dora=True), AdapterError, "a frozen start under dora"):
        prepare_model_for_compiled_hotswap(model, target_rank=8)


def test_a_file_of_peft_with_a_start_that_moved_its_base_is_refused() -> None:
    new = adapted(seed=5)
    config = LoraConfig(r=4, init_lora_weights="pissa", **BOTH)
    model = adapted(init_lora_weights="pissa")
    with refused(model, CheckpointError, "missing|another shape"):
        hotswap_adapter_from_state_dict(model, get_peft_model_state_dict(new), "default", config)
