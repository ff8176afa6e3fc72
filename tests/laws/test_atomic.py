"""The law of atomicity: a call that fails leaves the model as it was, in every bit, object, flag and mode."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorafa import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from lorafa.errors import (
    AdapterError,
    BackendError,
    CheckpointError,
    ConfigError,
    LoraError,
    NotAvailableError,
    TargetError,
)
from lorafa.layers.base import LoraLayer
from lorafa.surgery import auxiliary
from lorafa.surgery.merge import merge_adapter
from toys.adapters import train
from toys.compare import assert_unchanged, everything
from toys.layers import Experts


class Everything(nn.Module):
    """One layer of every kind, some parameters frozen, one module in eval mode: a state that can be spoilt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.experts = Experts(torch.randn(2, 8, 8))
        self.experts.dropout = nn.Dropout(0.1).eval()
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 10)
        self.attention.out_proj.eval()
        self.v_proj.weight.requires_grad_(False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, x: Tensor) -> Tensor:
        h = self.v_proj(torch.tanh(self.q_proj(self.embed(x))))
        h = self.conv(h.mT).mT
        h = self.attention(h, h, h)[0]
        y: Tensor = self.head(self.norm(self.experts(h)))
        return y


X = torch.arange(10).view(2, 5)
TARGETS = ["embed", "q_proj", "v_proj", "conv", "attention"]
ALL = {"target_modules": TARGETS, "target_parameters": ["experts.weight"], "r": 2}


def all_of_it(**settings: object) -> LoraConfig:
    return LoraConfig(**(ALL | settings))  # type: ignore[arg-type]


PLANS_THAT_FAIL: dict[str, tuple[dict[str, object], type[LoraError], str]] = {
    "pattern": ({"target_modules": ["q_proj", "v_prj"]}, TargetError, r"'v_prj' matches nothing .*mean 'v_proj'"),
    "parameter": ({"target_parameters": ["experts.wieght"]}, TargetError, "'experts.wieght' matches nothing"),
    "rank pattern": ({"rank_pattern": {"k_proj": 4}}, TargetError, "'k_proj' matches nothing"),
    "alpha pattern": ({"alpha_pattern": {"k_proj": 4}}, TargetError, "'k_proj' matches nothing"),
    "no carrier": ({"target_modules": ["q_proj", "norm"]}, TargetError, "'norm' is a LayerNorm, which cannot carry"),
    "rank": ({"init_lora_weights": "pissa", "r": 9}, ConfigError, r"rank 9 is larger than min\(out, in\) = 8"),
    "rank of the last": (
        {"init_lora_weights": "pissa", "rank_pattern": {"experts.weight": 9}}, ConfigError, r"experts.weight: rank 9 is"
    ),
    "odd rank": ({"init_lora_weights": "orthogonal", "r": 3}, ConfigError, "even rank, found r=3"),
    "variant": ({"use_dora": True}, ConfigError, "attention: dora is not defined on attention layers"),
    "bias of B": ({"lora_bias": True}, ConfigError, "embed: lora_bias is not defined on embedding layers"),
    "dropout": ({"lora_dropout": 0.1, "target_modules": []}, ConfigError, "lora_dropout=0.1 cannot act on a bare"),
    "saved module": ({"modules_to_save": ["haed"]}, TargetError, "'haed' matches no module. Did you mean 'head'"),
    "token": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 10]}, ConfigError, "10 is outside the"),
    "two trainers": ({"trainable_token_indices": [3]}, TargetError, "'embed' is also trained by an"),
    "later feature": ({"megatron_config": {"a": 1}}, NotAvailableError, "Megatron.* not available yet .* nothing was"),
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS_THAT_FAIL)
def test_plan_that_fails_leaves_the_model_as_it_was(case: str) -> None:
    settings, error, text = PLANS_THAT_FAIL[case]
    model = Everything()
    before = everything(model)
    for call in (lambda: get_peft_model(model, all_of_it(**settings)), lambda: inject(model, settings)):
        with pytest.raises(error, match=text):
            call()
        assert_unchanged(before, model)
    assert not hasattr(model, "peft_config")


def inject(model: nn.Module, settings: dict[str, object]) -> nn.Module:
    return inject_adapter_in_model(all_of_it(**settings), model)


@pytest.mark.parametrize("name", ["", "a.b", 3])
def test_name_that_cannot_be_part_of_a_parameter_name_is_refused(name: str) -> None:
    model = Everything()
    before = everything(model)
    with pytest.raises(AdapterError, match="non-empty string without a dot, found "):
        get_peft_model(model, all_of_it(), adapter_name=name)
    assert_unchanged(before, model)


def failing_after(calls: int, function: Callable[..., object]) -> Callable[..., object]:
    """``function``, but the call after ``calls`` of them raises, as memory running out would."""
    made = 0

    def guarded(*args: object, **kwargs: object) -> object:
        nonlocal made
        made += 1
        if made > calls:
            raise MemoryError("no memory left")
        return function(*args, **kwargs)

    return guarded


@pytest.mark.parametrize("calls", range(7))
def test_failure_while_adapters_are_attached_is_undone(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    model = Everything()
    before = everything(model)
    attach = failing_after(calls, LoraLayer.attach)
    monkeypatch.setattr(LoraLayer, "attach", lambda self, name, parts: attach(self, name, parts))
    with pytest.raises(MemoryError):
        get_peft_model(model, all_of_it(bias="all"))
    assert_unchanged(before, model)


@pytest.mark.parametrize("wrapper", ["ModulesToSaveWrapper", "TrainableTokensWrapper"])
def test_failure_while_modules_are_copied_is_undone(monkeypatch: pytest.MonkeyPatch, wrapper: str) -> None:
    model = Everything()
    before = everything(model)
    kind = getattr(auxiliary, wrapper)
    attach = failing_after(0, kind.attach)
    monkeypatch.setattr(kind, "attach", lambda self, *args: attach(self, *args))
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["head"], "trainable_token_indices": [1]}
    with pytest.raises(MemoryError):
        get_peft_model(model, all_of_it(**settings))
    assert_unchanged(before, model)


def adapted() -> PeftModel:
    model = get_peft_model(Everything(), all_of_it())
    train(model)
    return model


def state(model: PeftModel) -> tuple[object, ...]:
    inner = model.base_model
    return (
        dict(model.peft_config), model.active_adapters, model.targeted_module_names,
        list(inner.targeted_parameter_names), [layer.merged_adapters for _, layer in inner.lora_layers()],
    )  # fmt: skip


def assert_fails_and_changes_nothing(
    model: PeftModel, error: type[BaseException], text: str, call: Callable[[], object]
) -> None:
    before, settings = everything(model), state(model)
    expected = model.eval()(X)
    for name, mode in before["modes"].items():
        model.get_submodule(name).training = mode
    with pytest.raises(error, match=text):
        call()
    assert_unchanged(before, model)
    assert state(model) == settings
    assert torch.equal(model.eval()(X), expected)


@pytest.mark.parametrize("case", PLANS_THAT_FAIL)
def test_second_adapter_that_fails_leaves_the_first_as_it_was(case: str) -> None:
    settings, error, text = PLANS_THAT_FAIL[case]
    model = adapted()
    assert_fails_and_changes_nothing(model, error, text, lambda: model.add_adapter("second", all_of_it(**settings)))


@pytest.mark.parametrize("calls", range(7))
def test_second_adapter_that_fails_halfway_is_undone(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    model, attach = adapted(), failing_after(calls, LoraLayer.attach)
    monkeypatch.setattr(LoraLayer, "attach", lambda self, name, parts: attach(self, name, parts))
    config = all_of_it(target_modules=[*TARGETS, "head"])
    assert_fails_and_changes_nothing(model, MemoryError, "no memory left", lambda: model.add_adapter("second", config))


CALLS_THAT_FAIL: dict[str, tuple[type[LoraError], str, Callable[[PeftModel], object]]] = {
    "add twice": (AdapterError, "already has an adapter 'default'", lambda m: m.add_adapter("default", all_of_it())),
    "add with a dot": (AdapterError, "without a dot, found 'a.b'", lambda m: m.add_adapter("a.b", all_of_it())),
    "set unknown": (AdapterError, "no adapter 'defualt'. Did you mean 'default'", lambda m: m.set_adapter("defualt")),
    "set a list": (AdapterError, r"takes one name, found \['default'\]", lambda m: m.set_adapter(["default"])),
    "delete unknown": (AdapterError, "no adapter 'other'", lambda m: m.delete_adapter("other")),
    "merge unknown": (AdapterError, "no adapter 'other'", lambda m: m.merge_adapter(["default", "other"])),
    "merge and unload unknown": (AdapterError, "no adapter 'o'", lambda m: m.merge_and_unload(adapter_names=["o"])),
    "wrap twice": (AdapterError, "is a PeftModel already", lambda m: get_peft_model(m, all_of_it())),
    "mixed batch": (AdapterError, "adapter_names: .* no adapter 'o'", lambda m: m(X, adapter_names=["default", "o"])),
    "add base": (AdapterError, "'__base__' cannot be an", lambda m: m.add_adapter("__base__", all_of_it())),
}


@pytest.mark.parametrize("case", CALLS_THAT_FAIL)
def test_call_that_fails_changes_nothing(case: str) -> None:
    error, text, call = CALLS_THAT_FAIL[case]
    model = adapted()
    assert_fails_and_changes_nothing(model, error, text, lambda: call(model))


def test_adapters_cannot_be_switched_or_deleted_while_one_is_merged() -> None:
    model = adapted()
    model.add_adapter("second", all_of_it())
    model.merge_adapter()
    for text, call in (
        ("'default' is merged into the base weights. Call unmerge_adapter", lambda: model.set_adapter("second")),
        ("'default' is merged into '.*'. Call unmerge_adapter", lambda: model.delete_adapter("default")),
    ):
        assert_fails_and_changes_nothing(model, AdapterError, text, call)


def test_active_adapter_is_not_deleted_where_a_merged_one_keeps_its_successor_from_being_activated() -> None:
    model = adapted()
    model.add_adapter("second", all_of_it())
    model.merge_adapter(["second"])
    text = "'second' is merged into the base weights. Call unmerge_adapter"
    assert_fails_and_changes_nothing(model, AdapterError, text, lambda: model.delete_adapter("default"))
    assert list(model.peft_config) == ["default", "second"]


@pytest.mark.parametrize("add", [get_peft_model, lambda model, *settings: inject_adapter_in_model(settings[0], model)])
def test_adapter_is_not_added_as_the_active_one_while_another_is_merged(add: Callable[..., object]) -> None:
    model = inject_adapter_in_model(all_of_it(), Everything(), "first")
    merge_adapter(model)
    text = "'first' is merged into the base weights. Call unmerge_adapter"
    before = everything(model)
    with pytest.raises(AdapterError, match=text):
        add(model, all_of_it(), "second")
    assert_unchanged(before, model)
    assert list(model.peft_config) == ["first"]  # type: ignore[arg-type]


def test_merge_that_fails_at_the_last_layer_merges_nothing() -> None:
    user_model = Everything()
    user_model.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
    model = get_peft_model(user_model, all_of_it())
    train(model)
    assert_fails_and_changes_nothing(model, BackendError, "groups=2", model.merge_adapter)
    assert_fails_and_changes_nothing(model, BackendError, "groups=2", model.merge_and_unload)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    model = get_peft_model(Everything(), all_of_it())
    model.save_pretrained(tmp_path)
    return tmp_path


def the_same_base() -> Everything:
    torch.manual_seed(3)
    return Everything()


def test_file_that_does_not_fit_leaves_base_and_adapted_model_as_they_were(saved: Path) -> None:
    class Other(Everything):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(8, 4)  # of another shape

    other = Other()
    before = everything(other)
    with pytest.raises(CheckpointError, match="q_proj"):
        PeftModel.from_pretrained(other, saved, ignore_base_mismatch=True)
    assert_unchanged(before, other)
    model = get_peft_model(the_same_base(), all_of_it(r=3))
    text = r"does not fit adapter 'default'.\n  of another shape \(14\)"
    assert_fails_and_changes_nothing(model, CheckpointError, text, lambda: model.load_adapter(saved, "default"))


@pytest.mark.parametrize("name", ["default", "second"])
def test_failure_while_values_are_copied_in_is_undone(saved: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise MemoryError("no memory left")

    monkeypatch.setattr("lorafa.io.load.load_tensors", broken)
    model = get_peft_model(the_same_base(), all_of_it())
    assert_fails_and_changes_nothing(model, MemoryError, "no memory left", lambda: model.load_adapter(saved, name))
    base = the_same_base()
    before = everything(base)
    with pytest.raises(MemoryError):
        PeftModel.from_pretrained(base, saved)
    assert_unchanged(before, base)


def test_config_that_is_handed_in_is_never_changed() -> None:
    config = all_of_it(target_modules="all-linear")
    before = config.to_dict()
    get_peft_model(Everything(), config).add_adapter("second", config)
    assert config.to_dict() == before


def test_adapting_does_not_change_the_mode_of_any_module_of_the_model() -> None:
    model = Everything()
    before = {id(module): module.training for module in model.modules()}
    get_peft_model(model, all_of_it())
    assert {id(m): m.training for m in model.modules() if id(m) in before} == before


def test_wrappers_take_the_mode_of_what_they_wrap() -> None:
    config = all_of_it(target_modules=["q_proj", "conv", "attention"], modules_to_save=["head"], lora_dropout=0)
    model = Everything().eval()
    inject_adapter_in_model(config, model)
    assert not any(module.training for module in model.modules())
