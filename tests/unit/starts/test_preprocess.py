"""PEFT's documented ways to a start from data: what they leave, what they make, what they refuse."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import (
    CordaConfig,
    EvaConfig,
    LoraConfig,
    LoraGAConfig,
    PeftModel,
    collect_statistics,
    estimate_gradients,
    get_eva_state_dict,
    get_peft_model,
    initialize,
    initialize_lora_eva_weights,
    preprocess_corda,
    preprocess_loraga,
)
from lorafa.errors import AdapterError, CalibrationError, CheckpointError, ConfigError, NotAvailableError
from toys.calibration import LAYERS, Toy, config, gradients, inputs, loss
from toys.compare import assert_unchanged, everything


def step(model: nn.Module, data: list[Tensor]) -> Any:
    def run() -> None:
        for x in data:
            loss(model, x).backward()  # type: ignore[no-untyped-call]

    return run


def factors(model: PeftModel, name: str, adapter: str = "default") -> tuple[Tensor, Tensor]:
    layer = model.get_base_model().get_submodule(name)
    return layer.factor_A(adapter), layer.factor_B(adapter)


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_the_compatibility_preset_of_lora_ga_is_that_of_peft(direction: str, scale: str) -> None:
    peft = pytest.importorskip("peft")
    data = [x[:1, :2] for x in inputs(2)]  # gradients of rank 4, which PEFT's approximate SVD finds exactly
    settings = {"direction": direction, "scale": scale, "stable_gamma": 16}
    mine, theirs = Toy().eval(), Toy().eval()
    preprocess_loraga(mine, config("lora_ga_peft", lora_ga_config=settings), step(mine, data))
    adapted = get_peft_model(mine, config("lora_ga_peft", lora_ga_config=settings))
    values = {"r": 2, "lora_alpha": 4, "target_modules": ["second", "last"], "init_lora_weights": "lora_ga"}
    other = peft.LoraConfig(**values, lora_ga_config=peft.LoraGAConfig(**settings))
    theirs.drop.p = 0.0
    peft.preprocess_loraga(theirs, other, step(theirs, data))
    reference = peft.get_peft_model(theirs, other, autocast_adapter_dtype=False).base_model.model
    for name in ("second", "last"):
        A, B = factors(adapted, name)
        layer = reference.get_submodule(name)
        for mine_, theirs_ in ((A, layer.lora_A["default"].weight), (B, layer.lora_B["default"].weight)):
            one, two = mine_.abs(), theirs_.abs()  # signs of singular vectors are free
            if scale == "weight_svd":  # PEFT's sigma_1(W) is far from exact on so flat a spectrum
                one, two = one / one.norm(), two / two.norm()
            assert (one - two).norm() / one.norm() < 1e-5


def test_preprocess_leaves_statistics_for_the_next_adapter_only() -> None:
    model, data = Toy(), inputs()
    expected = collect_statistics(Toy(), config("lora_ga"), data, loss=loss)
    preprocess_loraga(model, config("lora_ga"), step(model, data))
    adapted = get_peft_model(model, config("lora_ga"))
    passed = get_peft_model(Toy(), config("lora_ga"), stats=expected)
    for name in LAYERS:
        for one, other in zip(factors(adapted, name), factors(passed, name), strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(CalibrationError, match=r"'lora_ga' needs gradient of 'first'; none was given"):
        adapted.add_adapter("second", config("lora_ga"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin", ""])
def test_preprocess_keeps_its_file_whatever_it_is_called(tmp_path: Path, suffix: str) -> None:
    model, data, calls = Toy(), inputs(), []

    def run() -> None:
        calls.append(1)
        step(model, data)()

    cache = tmp_path / f"gradients{suffix}"
    for _ in range(2):
        preprocess_loraga(model, config("lora_ga", lora_ga_config=LoraGAConfig(scale="unit")), run, cache)
    assert len(calls) == 1


def test_a_pickle_in_the_place_of_its_file_is_refused_and_left(tmp_path: Path) -> None:
    """As PEFT leaves one there."""
    model, data, cache = Toy(), inputs(), tmp_path / "gradients.pt"
    torch.save({"first": torch.ones(2)}, cache)
    before = cache.read_bytes()
    with pytest.raises(CheckpointError, match=r"gradients\.pt is a pickle, as PEFT keeps .*Delete it, or name another"):
        preprocess_loraga(model, config("lora_ga"), step(model, data), cache)
    assert cache.read_bytes() == before


def test_estimated_gradients_are_those_of_autograd() -> None:
    model, data = Toy(), inputs()
    found, expected = estimate_gradients(model, config("lora_ga"), step(model, data)), gradients(model, data)
    for name in LAYERS:
        S = torch.linalg.svdvals(expected[name])
        torch.testing.assert_close(found[name]["gradient.S"], S[: len(found[name]["gradient.S"])])


def test_corda_takes_its_covariances_from_a_run_or_from_a_file(tmp_path: Path) -> None:
    model, data, file = Toy().eval(), inputs(), tmp_path / "covariance.safetensors"
    settings = config("corda", corda_config=CordaConfig(covariance_file=file))
    assert settings.corda_config.covariance_file == str(file)

    def run() -> None:
        for x in data:
            model(x)

    preprocess_corda(model, settings, run)
    first = get_peft_model(model, settings)
    again = Toy().eval()
    preprocess_corda(again, settings)
    second = get_peft_model(again, settings)
    for name in LAYERS:
        for one, other in zip(factors(first, name), factors(second, name), strict=True):
            assert torch.equal(one, other)
    x = data[0]
    torch.testing.assert_close(first(x), Toy().eval()(x), rtol=1e-10, atol=1e-12)
    with pytest.raises(ConfigError, match=r"CorDA needs covariances.* and none is named\. Pass run_model="):
        preprocess_corda(Toy(), config("corda"))
    with pytest.raises(NotAvailableError, match="hooked_model"):
        preprocess_corda(model, settings, run, hooked_model=nn.Linear(2, 2))


def test_covariances_in_a_file_serve_any_rank_and_method(tmp_path: Path) -> None:
    def settings(mode: str = "ipm", name: str = "covariance", half: bool = False, **own: Any) -> LoraConfig:
        file = str(tmp_path / f"{name}.safetensors")
        corda = CordaConfig(covariance_file=file, corda_method=mode, use_float16_for_covariance=half)
        return config("corda", corda_config=corda, **own)

    model, data = Toy().eval(), inputs()
    preprocess_corda(model, settings(), lambda: [model(x) for x in data])
    (tmp_path / "covariance.safetensors").rename(tmp_path / "moved.safetensors")
    other = settings("kpm", "moved", r=5, init_seed=7)
    preprocess_corda(model, other)
    from_file = get_peft_model(model, other)
    from_data = initialize(Toy().eval(), settings("kpm", "new", r=5, init_seed=7), data)
    for name in LAYERS:
        for one, another in zip(factors(from_file, name), factors(from_data, name), strict=True):
            torch.testing.assert_close(one, another)
    with pytest.raises(ConfigError, match=r"and '.*moved\.safetensors' does not hold them\. Pass run_model="):
        preprocess_corda(Toy(), settings("kpm", "moved", half=True))


def test_functions_for_another_start_say_so() -> None:
    model = Toy()
    with pytest.raises(ConfigError, match=r"a start that reads gradients, and init_lora_weights is 'corda'\. Set"):
        preprocess_loraga(model, config("corda"), step(model, inputs()))
    with pytest.raises(ConfigError, match=r"a start that is CorDA, and init_lora_weights is 'lora_ga'"):
        preprocess_corda(model, config("lora_ga"), lambda: None)


def eva_model(**settings: Any) -> PeftModel:
    with pytest.warns(UserWarning, match=r"'eva' has nothing to start from on 3 of 3.*not collected yet"):
        return get_peft_model(Toy(), config("eva", **settings))


@pytest.mark.filterwarnings("error")
def test_eva_on_the_meta_device_waits_without_a_word() -> None:
    model = get_peft_model(Toy(), config("eva"), low_cpu_mem_usage=True)
    initialize_lora_eva_weights(model, inputs(), show_progress_bar=False)
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_eva_starts_at_the_principal_directions_of_the_inputs() -> None:
    model = eva_model(eva_config=EvaConfig(rho=1.0))
    scale = torch.ones(40, dtype=torch.float64)
    scale[:2] = torch.tensor([30.0, 20.0])
    data = [x * scale for x in inputs(8)]
    x = data[0]
    initialize_lora_eva_weights(model, data, show_progress_bar=False)
    tokens = torch.cat([batch.reshape(-1, 40) for batch in data])
    principal = torch.linalg.svd(tokens - tokens.mean(0)).Vh[:2]
    A, B = factors(model, "second")
    cosines = torch.linalg.svdvals(A.double() @ principal.mT)
    assert cosines.min() > 0.99
    assert not B.any()
    torch.testing.assert_close(model.eval()(x), Toy().eval()(x))
    assert model.base_model.lora_layers()[0][1].fallbacks == {}
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_eva_shares_its_ranks_out_and_keeps_the_scaling() -> None:
    model = eva_model(eva_config=EvaConfig(rho=2.0))
    initialize_lora_eva_weights(model, inputs(), show_progress_bar=False)
    layers = {path: layer for path, layer in model.base_model.lora_layers() if "default" in layer.adapters}
    ranks = {path: layer.r["default"] for path, layer in layers.items()}
    assert sum(ranks.values()) == 6
    assert max(ranks.values()) <= 4
    assert all(layer.scaling["default"] == pytest.approx(2.0) for layer in layers.values())
    chosen = model.peft_config["default"]
    assert chosen.target_modules == set(ranks) or len(ranks) == 3
    fixed = eva_model(eva_config=EvaConfig(rho=2.0, adjust_scaling_factors=False))
    initialize_lora_eva_weights(fixed, inputs(), show_progress_bar=False)
    assert fixed.peft_config["default"].alpha_pattern == {}


def test_a_state_dict_of_eva_gives_the_same_adapter_and_its_file_loads(tmp_path: Path) -> None:
    data, settings = inputs(), EvaConfig(rho=2.0, whiten=True)
    state = get_eva_state_dict(Toy(), data, config("eva", eva_config=settings), show_progress_bar=False)
    one, two = eva_model(eva_config=settings), eva_model(eva_config=settings)
    initialize_lora_eva_weights(one, data, show_progress_bar=False)
    initialize_lora_eva_weights(two, eva_state_dict={f"base_model.model.{k}": v for k, v in state.items()})
    for name in state:
        torch.testing.assert_close(factors(one, name)[0], factors(two, name)[0])
        torch.testing.assert_close(factors(one, name)[0], state[name].to(factors(one, name)[0]))
    assert one.peft_config["default"].eva_config == settings
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    one.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Toy(), tmp_path)
    assert torch.equal(loaded(data[0]), one.eval()(data[0]))


def test_eva_looks_at_the_tokens_it_is_told_to() -> None:
    class Tokens(Toy):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
            return super().forward(x)

    x = inputs(1)[0]
    labels = torch.full(x.shape[:2], -100)
    labels[:, ::2] = 5
    batch = {"x": x, "attention_mask": torch.ones(x.shape[:2]), "labels": labels}
    settings = config("eva", eva_config=EvaConfig(rho=1.0), target_modules=["second"])
    masked = get_eva_state_dict(Tokens(), [batch], settings, show_progress_bar=False)["second"]
    alone = get_eva_state_dict(Tokens(), [{"x": x[:, ::2]}], settings, show_progress_bar=False)["second"]
    torch.testing.assert_close(masked, alone)
    everything_seen = get_eva_state_dict(
        Tokens(), [batch], settings, prepare_layer_inputs_fn=None, show_progress_bar=False
    )["second"]
    whole = get_eva_state_dict(Tokens(), [{"x": x}], settings, show_progress_bar=False)["second"]
    torch.testing.assert_close(everything_seen, whole)
    named = get_eva_state_dict(
        Tokens(), [batch], settings, show_progress_bar=False, prepare_model_inputs_fn=lambda given, _: given["labels"],
        prepare_layer_inputs_fn={"second": lambda rows, found, name: rows[found != -100]},
        forward_fn=lambda model, given: model(given["x"]),
    )["second"]  # fmt: skip
    torch.testing.assert_close(named, alone)


def test_eva_leaves_what_trains_as_it_is() -> None:
    model = eva_model()
    model.add_adapter("other", config(True))
    model.set_adapter("other")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".other." in name for name in trained)
    initialize_lora_eva_weights(model, inputs(), show_progress_bar=False)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


@pytest.mark.parametrize("whiten", [False, True])
def test_an_input_that_does_not_vary_starts_its_layer_as_by_default(whiten: bool) -> None:
    """Not with A = 0, which would leave it dead, nor divided by a singular value of zero."""
    model = eva_model(eva_config=EvaConfig(rho=1.0, whiten=whiten))
    zeros = [torch.zeros_like(x) for x in inputs()]
    with pytest.warns(UserWarning, match=r"'eva' has nothing to start from on \d of 3 layers.*first"):
        initialize_lora_eva_weights(model, zeros, show_progress_bar=False)
    first = model.get_base_model().first
    assert "singular values" in first.fallbacks["default"]
    A = first.factor_A("default")
    assert bool(A.any(dim=1).all())
    assert float(A.detach().abs().max()) < 10


def test_a_layer_whose_directions_are_zero_starts_as_by_default_and_says_so() -> None:
    model = eva_model()
    state = get_eva_state_dict(model, inputs(), show_progress_bar=False)
    state["first"] = torch.zeros_like(state["first"])
    with pytest.warns(UserWarning, match=r"'eva' has nothing to start from on 1 of 2 layers.*first"):
        initialize_lora_eva_weights(model, eva_state_dict=state)
    first = model.get_base_model().first
    assert first.factor_A("default").any()
    assert "default" in first.fallbacks


def test_eva_refuses_what_it_cannot_do_and_changes_nothing() -> None:
    model, plain = eva_model(), get_peft_model(Toy(), config(True))
    before = everything(model)
    for error, text, arguments in (
        (AdapterError, r"EVA needs data or a state dict\. Pass dataloader= or", {}),
        (CalibrationError, "There was no batch", {"dataloader": []}),
        (ConfigError, r"1 layers the adapter is not on: middle", {"eva_state_dict": {"middle": torch.eye(2)}}),
        (ConfigError, "The state dict is empty", {"eva_state_dict": {}}),
        (CalibrationError, "another shape", {"eva_state_dict": {"first": torch.eye(2)}}),
        (ConfigError, r"first: directions are a finite matrix", {"eva_state_dict": {"first": torch.eye(2) / 0}}),
        (ConfigError, r"first: directions are .* of shape \(2,\)", {"eva_state_dict": {"first": torch.ones(2)}}),
        (AdapterError, "no adapter 'nobody'", {"dataloader": inputs(), "adapter_name": "nobody"}),
        (CalibrationError, "are not finite", {"dataloader": [inputs()[0] * torch.nan]}),
    ):
        with pytest.raises(error, match=text):
            initialize_lora_eva_weights(model, show_progress_bar=False, **arguments)  # type: ignore[arg-type]
        assert_unchanged(before, model)
    with pytest.raises(ConfigError, match=r"settings of init_lora_weights='eva', and the config has True"):
        initialize_lora_eva_weights(plain, inputs())
    with pytest.raises(AdapterError, match=r"takes a PeftModel, found Toy\. Call get_peft_model first"):
        initialize_lora_eva_weights(Toy(), inputs())  # type: ignore[arg-type]
    with pytest.raises(AdapterError, match=r"A base model has no config\. Pass peft_config="):
        get_eva_state_dict(Toy(), inputs())


def test_eva_of_one_adapter_leaves_the_others_alone() -> None:
    model = eva_model()
    model.add_adapter("other", config(True))
    kept = copy.deepcopy({k: v for k, v in model.state_dict().items() if ".other." in k})
    initialize_lora_eva_weights(model, inputs(), show_progress_bar=False)
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in kept.items())
    assert model.active_adapters == ["default"]


def test_initialize_keeps_covariances_in_the_file_the_config_names(tmp_path: Path) -> None:
    model, data, file, calls = Toy(), inputs(), tmp_path / "covariance.safetensors", [0]
    settings = config("corda", corda_config=CordaConfig(covariance_file=str(file)))

    def counted(module: Any, args: Any) -> None:
        calls[0] += 1

    model.register_forward_pre_hook(counted)
    first = initialize(model, settings, data)
    passes = calls[0]
    assert file.is_file()
    initialize(first.unload(), settings, data)
    assert calls[0] == passes
