"""Intruder dimensions as they are found in a layer, what the copy keeps of its adapter, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    mutate_base,
    reduce_intruder_dimension,
)
from lorafa.errors import AdapterError, BackendError, ConfigError, LoraError
from lorafa.surgery.intruders import intruders_of
from lorafa.surgery.lora_model import LoraModel
from lorafa.surgery.walk import lora_layers
from toys.adapters import train
from toys.compare import assert_unchanged, close, everything, refused
from toys.language_models import inference, llama
from toys.models import Attention, Lookup, Mixture, Tied, Two

EASY = {"threshold_epsilon": 0.95, "mitigation_lambda": 0.5, "logging_sink": None}
"""So many are found in small random matrices."""


def two(**settings: Any) -> PeftModel:
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 5, "target_modules": ["first", "second"]} | settings
    model = get_peft_model(Two().double(), LoraConfig(**config))
    train(model)
    return model.eval()


def weight_of(model: nn.Module, path: str, name: str) -> Tensor:
    return dict(lora_layers(model.get_base_model()))[path].merged_weight([name])


# ---- what is found


def spiked(size: float) -> tuple[Tensor, Tensor, Tensor]:
    """W (40, 30), and A (1, 30), B (40, 1) of a spike whose left vector is spread over all of W's."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    u = U @ torch.full((30, 1), 30**-0.5, dtype=torch.float64)
    return W, Vh[3:4], size * u


def test_a_planted_spike_is_the_one_intruder() -> None:
    W, A, B = spiked(1e4)
    top, found = intruders_of(W, A, B, 10, 0.5)
    assert [one.place for one in found] == [0]
    assert found[0].cosine == pytest.approx(30**-0.5, abs=1e-3)
    assert found[0].singular_value == pytest.approx(1e4, rel=1e-3)
    assert abs(float(top.U[:, 0] @ B[:, 0])) > 9999


def test_a_spike_that_is_no_larger_than_the_rest_is_none() -> None:
    W, A, B = spiked(0.1)
    assert intruders_of(W, A, B, 10, 0.5)[1] == []
    assert intruders_of(W, A, 0 * B, 10, 0.999)[1] == []


def test_only_the_leading_vectors_are_looked_at() -> None:
    W, A, B = spiked(6.0)
    places = [one.place for one in intruders_of(W, A, B, 30, 0.9)[1]]
    assert places
    assert [one.place for one in intruders_of(W, A, B, max(places), 0.9)[1]] == places[:-1]
    assert len(intruders_of(W, A, B, 1000, 1.0)[1]) == 30


def test_every_direction_is_new_to_a_weight_of_zeros() -> None:
    W, A, B = spiked(1.0)
    assert [one.cosine for one in intruders_of(0 * W, A, B, 10, 0.5)[1]] == [0.0]


# ---- the copy


@pytest.mark.parametrize("exact", [False, True])
def test_config_of_the_copy_is_its_own_and_says_its_ranks(exact: bool) -> None:
    model = two(rank_pattern={"second": 2}, alpha_pattern={"second": 7})
    done = reduce_intruder_dimension(model, exact=exact, **EASY)
    old, new = model.peft_config["default"], model.peft_config["intruder_reduced"]
    assert new is not old
    new.rank_pattern["first"] = 99
    assert old.rank_pattern == {"second": 2}
    ranks = {path: layer.adapters["intruder_reduced"].rank for path, layer in lora_layers(model.get_base_model())}
    assert ranks == {path: layer.rank for path, layer in done.layers.items()}
    more = {path: len(layer.intruders) if exact else 0 for path, layer in done.layers.items()}
    assert ranks == {"first": min(3 + more["first"], 10), "second": min(2 + more["second"], 10)}
    assert all(len(layer.intruders) for layer in done.layers.values())
    for _, layer in lora_layers(model.get_base_model()):
        close(torch.tensor(layer.scaling["intruder_reduced"]), torch.tensor(layer.scaling["default"]))


def test_exact_ranks_end_where_the_matrix_does() -> None:
    model = two(r=9)
    done = reduce_intruder_dimension(model, exact=True, top_k=50, **EASY | {"threshold_epsilon": 1.0})
    assert {path: layer.rank for path, layer in done.layers.items()} == {"first": 10, "second": 10}
    assert done.share == pytest.approx(0, abs=1e-20)


def test_copied_modules_rows_and_biases_of_B_come_along() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["proj"], lora_bias=True, modules_to_save=["head"],
                        trainable_token_indices={"embed": [3, 7]})  # fmt: skip
    model = get_peft_model(Tied(tied=False), config)
    train(model)
    x = torch.arange(10)
    reduce_intruder_dimension(model, **EASY | {"mitigation_lambda": 1.0})
    copy = model(x)
    model.set_adapter("default")
    assert torch.equal(copy, model(x))
    assert not torch.equal(copy, model.unload()(x))


def test_tied_ends_follow_their_owner() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["embed", "head"], ensure_weight_tying=True)
    model = get_peft_model(Tied(), config)
    train(model)
    done = reduce_intruder_dimension(model, exact=True, **EASY)
    assert list(done.layers) == ["embed"]
    close(weight_of(model, "head", "intruder_reduced"), weight_of(model, "embed", "intruder_reduced").T)
    assert done.intruders


def test_ends_of_attention_have_one_rank_and_a_repair_each() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Attention().double(), LoraConfig(r=2, target_modules=["attention"]))
    train(model)
    done = reduce_intruder_dimension(model, exact=True, **EASY)
    assert set(done.layers) == {"attention", "attention.base_layer.out_proj"}
    counts = [len(layer.intruders) for layer in done.layers.values()]
    layers = dict(lora_layers(model.get_base_model()))
    assert {layers[path].adapters["intruder_reduced"].rank for path in layers} == {2 + max(counts)}


def test_a_scaling_that_was_set_is_that_of_the_copy_and_of_its_file(tmp_path: Path) -> None:
    model = two(use_rslora=True)
    for _, layer in lora_layers(model.get_base_model()):
        layer.set_scale("default", 0.4)
    before = weight_of(model, "first", "default")
    reduce_intruder_dimension(model, **EASY | {"threshold_epsilon": 0.0})
    close(weight_of(model, "first", "intruder_reduced"), before)
    model.save_pretrained(tmp_path, selected_adapters=["intruder_reduced"])
    again = PeftModel.from_pretrained(two().unload(), tmp_path / "intruder_reduced")
    close(weight_of(again, "first", "default"), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_keep_their_dtype_and_the_copy_trains_where_the_old_one_did(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["first", "second"])
    model = get_peft_model(Two().to(dtype), config, autocast_adapter_dtype=False)
    train(model)
    reduce_intruder_dimension(model, **EASY)
    for _, layer in lora_layers(model.get_base_model()):
        assert layer.adapters["intruder_reduced"].A.dtype is layer.adapters["intruder_reduced"].B.dtype is dtype
    trained = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"intruder_reduced"}


def test_a_frozen_adapter_has_a_frozen_copy(tmp_path: Path) -> None:
    two().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(two().unload(), tmp_path)
    reduce_intruder_dimension(model, **EASY)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_every_layer_is_said_and_the_last_word_is_what_counts_now() -> None:
    model, words = two(), []
    reduce_intruder_dimension(model, threshold_epsilon=0.95, logging_sink=words.append)
    assert [word.partition(":")[0] for word in words[:-1]] == ["first", "second"]
    assert words[-1] == "Enabling new adapter intruder_reduced"
    assert all("Intruders: " in word and "% of the update's energy discarded" in word for word in words[:-1])
    words.clear()
    reduce_intruder_dimension(model, "default", "other", threshold_epsilon=0.0, logging_sink=words.append)
    assert words == ["first: No intruders", "second: No intruders", "Enabling new adapter other"]


def test_a_language_model_computes_with_the_copy(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    train(model, 0.1)
    before = inference(model)
    done = reduce_intruder_dimension(model, **EASY, exact=True)
    after = inference(model)
    assert done.intruders > 10
    assert float((after - before).abs().max()) > 1e-3
    model.save_pretrained(tmp_path, selected_adapters=["intruder_reduced"])
    close(inference(PeftModel.from_pretrained(llama(), tmp_path / "intruder_reduced")), after, 1e-5)


# ---- what is refused


def with_intruder_name(model: PeftModel) -> None:
    model.add_adapter("intruder_reduced", LoraConfig(r=2, target_modules=["first"]))


def merged(model: PeftModel) -> None:
    model.merge_adapter()


REFUSED: dict[str, tuple[Any, dict[str, Any], type[LoraError], str]] = {
    "old name": (None, {"old_adapter_name": "defualt"}, AdapterError, "no adapter 'defualt'. Did you mean 'default'"),
    "new name": (with_intruder_name, {}, AdapterError, "already has an adapter 'intruder_reduced'. Choose another"),
    "bad name": (None, {"new_adapter_name": "a.b"}, AdapterError, "non-empty string without a dot"),
    "merged": (merged, {}, AdapterError, r"'default' is merged into the base weights. Call unmerge_adapter\(\)"),
    "top_k": (None, {"top_k": 0}, ConfigError, "top_k must be an integer >= 1, found 0"),
    "epsilon": (None, {"threshold_epsilon": 1.5}, ConfigError, r"threshold_epsilon must be a cosine in \[0, 1\]"),
    "lambda": (None, {"mitigation_lambda": float("nan")}, ConfigError, "mitigation_lambda must be the share that is"),
    "exact": (None, {"exact": "yes"}, ConfigError, r"exact must be True or False, found 'yes' \(str\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_and_changes_nothing(case: str) -> None:
    prepare, settings, error, text = REFUSED[case]
    model = two()
    if prepare is not None:
        prepare(model)
    configs = dict(model.peft_config)
    with refused(model, error, text):
        reduce_intruder_dimension(model, **{"logging_sink": None} | settings)
    assert model.peft_config == configs


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["base", "adapter"])
def test_values_that_are_not_finite_are_refused(place: str, value: float) -> None:
    model = two()
    layer = dict(lora_layers(model.get_base_model()))["second"]
    with torch.no_grad():
        (layer.base_layer.weight if place == "base" else layer.lora_B["default"].weight)[1, 1] = value
    with pytest.raises(AdapterError, match="second: the weight or the update of adapter 'default' holds inf or nan"):
        reduce_intruder_dimension(model, logging_sink=None)
    assert list(model.peft_config) == ["default"]


def test_a_router_is_refused() -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["first"], init_lora_weights="goat", init_config={"experts": 2})
    model = get_peft_model(Two(), config)
    with refused(model, BackendError, "intruder dimensions out of adapter 'default': .* changes with the input"):
        reduce_intruder_dimension(model, logging_sink=None)


def test_grouped_convolutions_have_no_such_weight() -> None:
    model = get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3, groups=2)), LoraConfig(r=2, target_modules=["0"]))
    with refused(model, BackendError, r"0: A Conv1d with groups=2 has no weight that could hold this update"):
        reduce_intruder_dimension(model, logging_sink=None)


def test_a_weight_that_is_computed_anew_is_refused() -> None:
    model = two()
    model.get_base_model().second.base_layer.register_forward_hook(lambda *args: args[-1] + 1)
    with refused(model, BackendError, "second: intruders are found in the weight that the layer multiplies with"):
        reduce_intruder_dimension(model, logging_sink=None)


def test_a_part_of_a_weight_is_refused() -> None:
    model = two()
    model.get_base_model().second.base_layer.weight.ds_numel = 10**6  # as DeepSpeed leaves one
    with refused(model, BackendError, "second: only a part of its weight or of the adapter is in this process"):
        reduce_intruder_dimension(model, logging_sink=None)


def test_a_config_of_other_layers_is_refused() -> None:
    model = two()
    model.peft_config["default"].target_modules = {"first"}
    with refused(model, AdapterError, "layers that carry it do not agree: 1 that it does not name"):
        reduce_intruder_dimension(model, logging_sink=None)
    model = two()
    model.get_base_model().second = nn.Linear(10, 14).double()
    with refused(model, AdapterError, "layers that carry it do not agree: second. Another module has taken"):
        reduce_intruder_dimension(model, logging_sink=None)


def test_trained_biases_of_the_base_are_refused() -> None:
    model = two(bias="all")
    with refused(model, ConfigError, "adapter 'default' trains base biases already, and there is only one set"):
        reduce_intruder_dimension(model, logging_sink=None)


def test_a_base_without_its_start_is_refused() -> None:
    model = two(init_lora_weights="pissa")
    mutate_base(model)
    with refused(model, AdapterError, r"start of adapter 'default' is taken out of the base weights.*restore_base"):
        reduce_intruder_dimension(model, logging_sink=None)


def test_what_is_no_peft_model_is_refused() -> None:
    model = inject_adapter_in_model(LoraConfig(target_modules=["first"]), Two())
    with pytest.raises(AdapterError, match=r"takes a PeftModel, found a Two. Put the adapter on with get_peft_model"):
        reduce_intruder_dimension(model)  # type: ignore[arg-type]


def test_a_failure_at_the_end_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = two()
    before, configs = everything(model), dict(model.peft_config)

    def fails(*_: object) -> None:
        raise MemoryError("no memory left")

    with monkeypatch.context() as patch:
        patch.setattr(LoraModel, "set_adapter", fails)
        with pytest.raises(MemoryError):
            reduce_intruder_dimension(model, **EASY)
    assert_unchanged(before, model)
    assert model.peft_config == configs
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("model", [Lookup, Mixture])
def test_tables_and_stacks_are_repaired(model: type[nn.Module]) -> None:
    torch.manual_seed(0)
    targets = {"target_modules": ["table"]} if model is Lookup else {"target_modules": [], "target_parameters": ["up"]}
    adapted = get_peft_model(model().double(), LoraConfig(r=2, **targets))  # type: ignore[arg-type]
    train(adapted)
    (done,) = reduce_intruder_dimension(adapted, **EASY).layers.values()
    assert done.intruders
    assert {one.expert for one in done.intruders} <= ({None} if model is Lookup else {0, 1, 2})
