"""Starting an adapter from data, and the statistics in between: collected and checked."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorafa import (
    CordaConfig,
    EvaConfig,
    PeftModel,
    RankRule,
    choose_ranks,
    collect_statistics,
    get_peft_model,
    initialize,
    inject_adapter_in_model,
)
from lorafa.errors import AdapterError, CalibrationError, CheckpointError, ConfigError
from lorafa.initializers.lora_one import LoraOneConfig
from lorafa.numerics.linalg import full_svd
from lorafa.starts.gamma import GAMMAS, best_gamma
from lorafa.surgery.activate import enable_adapters
from lorafa.surgery.resolve import resolve
from lorafa.surgery.walk import hosts
from toys.calibration import LAYERS, Toy, config, gradient_matrix, gradients, inputs, loss
from toys.compare import assert_unchanged, everything, refused


def train_step(model: nn.Module, data: list[Tensor]) -> Any:
    def step() -> None:
        for x in data:
            loss(model, x).backward()  # type: ignore[no-untyped-call]

    return step


def test_a_dataloader_and_a_training_step_give_the_gradient_of_autograd() -> None:
    model, data = Toy(), inputs()
    expected = gradients(model, data)
    for source, given in ((data, loss), (train_step(model, data), None)):
        stats = collect_statistics(model, config(), source, loss=given, dense=True)
        for name in LAYERS:
            torch.testing.assert_close(gradient_matrix(stats[name]), expected[name], rtol=1e-10, atol=1e-14)


def test_initialize_puts_the_start_of_the_data_on() -> None:
    model, data = Toy(), inputs()
    expected = gradients(model, data)
    adapted = initialize(model, config(), data, loss=loss)
    for name in LAYERS:
        layer = adapted.get_base_model().get_submodule(name)
        delta = 2 * layer.factor_B("default") @ layer.factor_A("default")
        G = full_svd(expected[name])
        step = -2 / (128 * G.S[0]) * G.at(slice(0, 2)).product()
        torch.testing.assert_close(delta, step, rtol=1e-8, atol=1e-10)
    assert loss(adapted.eval(), data[0]) < loss(Toy().eval(), data[0])


class WithLoss(Toy):
    """Returns its loss, as models of transformers do."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        y = super().forward(x)
        return {"loss": (y * y.sin()).mean() + (0 if labels is None else labels.float().mean() * y.mean())}


def test_batches_are_averaged_or_weighted_by_their_labels() -> None:
    model, data = WithLoss(), inputs(2)
    labels = [torch.tensor([[1, 2, 3], [1, -100, -100]]), torch.tensor([[1, 2, 3], [4, 4, 4]])]
    batches = [{"x": x, "labels": ids} for x, ids in zip(data, labels, strict=True)]
    single = [collect_statistics(model, config(), [batch], dense=True) for batch in batches]
    for weighting, (one, two) in {"batches": (0.5, 0.5), "tokens": (2 / 6, 4 / 6)}.items():
        both = collect_statistics(model, config(), batches, dense=True, weighting=weighting)
        for name in LAYERS:
            mean = one * gradient_matrix(single[0][name]) + two * gradient_matrix(single[1][name])
            torch.testing.assert_close(gradient_matrix(both[name]), mean, rtol=1e-10, atol=1e-14)


def test_statistics_are_those_of_the_base_under_adapters_too() -> None:
    data = inputs()
    plain = collect_statistics(Toy(), config(), data, loss=loss)
    adapted = get_peft_model(Toy(), config("kaiming", init_lora_weights=False))
    before = everything(adapted)
    under = collect_statistics(adapted, config(), data, loss=loss)
    assert_unchanged(before, adapted)
    for name in LAYERS:
        torch.testing.assert_close(under[name]["gradient.S"], plain[name]["gradient.S"], rtol=1e-10, atol=1e-14)
    adapted.add_adapter("second", config(), stats=under)
    assert torch.any(adapted.get_base_model().first.factor_B("second") != 0)


def test_statistics_of_another_model_are_refused() -> None:
    stats, other = collect_statistics(Toy(), config(), inputs(), loss=loss), Toy()
    with torch.no_grad():
        other.last.weight[0] += 1
    with refused(other, CalibrationError, "collected on another model: 1 of 3 layers .* other weights here: last"):
        get_peft_model(other, config(), stats=stats)
    smaller = Toy(hidden=16)
    with refused(smaller, CalibrationError, "collected on another model: 3 of 3"):
        get_peft_model(smaller, config(), stats=stats)


def test_statistics_for_another_config_are_refused() -> None:
    model = Toy()
    stats = collect_statistics(model, config(), inputs(), loss=loss, dense=False)
    with refused(model, CalibrationError, r"first: the statistics hold 8 directions of gradient, and r = 9 takes 9"):
        get_peft_model(model, config(r=9), stats=stats)
    with refused(model, CalibrationError, r"needs second_moment, whitened_gradient of 'first'; none was given"):
        get_peft_model(model, config("functional"), stats=stats)
    fewer = collect_statistics(model, config(target_modules=["last"]), inputs(), loss=loss)
    with refused(model, CalibrationError, r"'lora_one' needs gradient of 'first'; none was given\. Collect"):
        get_peft_model(model, config(), stats=fewer)
    swapped = dict.fromkeys(LAYERS, stats["last"])
    with refused(model, CalibrationError, r"first: its statistics are those of a layer of another shape"):
        get_peft_model(model, config(), stats=swapped)


def test_loss_runs_the_model_where_no_gradients_are_read() -> None:
    """Its batches need not be what the model takes."""
    data, plain = [{"question": x, "answer": 2} for x in inputs()], inputs()
    stats = collect_statistics(Toy(), config("eva"), data, loss=lambda model, batch: loss(model, batch["question"]))
    expected = collect_statistics(Toy(), config("eva"), plain)
    for layer in LAYERS:
        for name, value in expected[layer].items():
            assert torch.equal(stats[layer][name], value), (layer, name)


def test_what_a_statistic_needs_is_collected_with_it() -> None:
    stats = collect_statistics(Toy(), config(), inputs(), loss=loss, also=["whitened_gradient"])
    expected = collect_statistics(Toy(), config("functional"), inputs(), loss=loss)
    for layer in LAYERS:
        assert {"second_moment.C", "whitened_gradient.S", "gradient.S"} <= set(stats[layer])
        torch.testing.assert_close(stats[layer]["whitened_gradient.S"], expected[layer]["whitened_gradient.S"])


def test_statistics_by_other_settings_are_refused() -> None:
    """Those that change what is collected; rho and r only say how much."""
    model, data = Toy(), inputs()
    stats = collect_statistics(model, config("eva", eva_config=EvaConfig(use_label_mask=False)), data)
    said = (
        r"collected with use_label_mask=False, and the config has use_label_mask=True\. Collect them with this config, "
        r"or set it as it was\."
    )
    with refused(model, CalibrationError, said):
        get_peft_model(model, config("eva"), stats=stats)
    with refused(model, CalibrationError, said):
        choose_ranks(model, config("eva"), stats, RankRule("explained_variance"))
    with refused(model, CalibrationError, said):
        choose_ranks(model, config("lora_one"), stats, RankRule("explained_variance"))
    get_peft_model(model, config("eva", eva_config=EvaConfig(use_label_mask=False, rho=1)), stats=stats)
    in_half = CordaConfig(use_float16_for_covariance=True)
    stats = collect_statistics(Toy(), config("lora_one"), data, loss=loss, also=["corda_moment"])
    with refused(Toy(), CalibrationError, r"use_float16_for_covariance=False, and the config has .*=True\. Collect"):
        get_peft_model(Toy(), config("corda", corda_config=in_half), stats=stats)


def test_data_that_cannot_be_used() -> None:
    model, data = Toy(), inputs()
    with refused(model, CalibrationError, "There was no batch to calibrate with: the data is empty"):
        initialize(model, config(), [], loss=loss)
    with refused(model, CalibrationError, r"data= is 'list_iterator', an iterator.*list\(data\)"):
        initialize(model, config(), iter(data), loss=loss)
    with refused(model, CalibrationError, "No gradient arrived at first, second, last"):
        initialize(model, config(), lambda: model(data[0]))
    with refused(model, CalibrationError, r"The model's output \(Tensor\) has no loss\. Put labels"):
        initialize(model, config(), data)
    with refused(model, CalibrationError, r"weighting='tokens' counts the labels of a batch, and there are none"):
        initialize(model, config(), data, loss=loss, weighting="tokens")
    with refused(model, ConfigError, r"weighting"):
        initialize(model, config(), data, loss=loss, weighting="rows")
    with refused(model, CalibrationError, r"'gaussian' reads no statistics, so there is nothing to collect"):
        initialize(model, config("gaussian"), data, loss=loss)
    with refused(model, ConfigError, r"rank 31 is larger than min\(out, in\) = 30"):
        initialize(model, config(r=31, target_modules=["first"]), data, loss=loss)


def test_a_model_that_is_wrapped_already_is_refused_before_anything_runs() -> None:
    adapted = get_peft_model(Toy(), config(True))
    with pytest.raises(AdapterError, match=r"PeftModel already\. Call collect_statistics on it, then its add_adapter"):
        initialize(adapted, config(), inputs(), loss=loss)


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x).mean()
        return y


def test_statistics_are_those_of_linear_layers() -> None:
    model = Convolution()
    with refused(model, CalibrationError, "conv: statistics are collected of linear layers, and this is conv"):
        initialize(model, config(target_modules=["conv"]), [torch.randn(1, 4, 9)], loss=lambda m, x: m(x))
    with refused(model, ConfigError, "conv: init_lora_weights='lora_one' reads statistics of linear layers"):
        get_peft_model(model, config(target_modules=["conv"]), stats={"conv": {}})


def test_a_layer_without_a_gradient_falls_back_and_the_others_do_not() -> None:
    class Unused(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(6, 5).double()

    with pytest.warns(UserWarning, match=r"1 of 2 layers.*unused \(its gradient has 0 singular values"):
        adapted = initialize(Unused(), config(target_modules=["first", "unused"]), inputs(), loss=loss)
    model = adapted.get_base_model()
    assert torch.any(model.first.factor_B("default") != 0)
    assert torch.all(model.unused.factor_B("default") == 0)


def quadratic(model: nn.Module, x: Tensor) -> Tensor:
    """Lowest where the outputs of ``last`` have moved by a certain amount."""
    y: Tensor = model(x)
    return (y - y.detach().sign() * 0.5).square().mean()


@pytest.mark.filterwarnings("ignore:stable_gamma='auto'")
@pytest.mark.parametrize("start", ["lora_one", "functional"])
def test_gamma_auto_takes_the_smallest_loss_on_held_out_rows(start: str) -> None:
    data, heldout = inputs(4), inputs(6)[4:]
    auto = config(start, init_config=LoraOneConfig(stable_gamma="auto"))
    chosen = initialize(Toy(), auto, data, heldout=heldout, loss=loss)
    gamma = chosen.peft_config["default"].init_config.stable_gamma
    losses = {}
    for trial in GAMMAS:
        settings = config(start, init_config=LoraOneConfig(stable_gamma=trial))
        adapted = initialize(Toy(), settings, data, loss=loss).eval()
        losses[trial] = sum(loss(adapted, x).item() for x in heldout)
    assert gamma == min(losses, key=losses.__getitem__)
    assert len(chosen.base_model.lora_layers()) == 3
    model = Toy()
    with refused(model, ConfigError, r"stable_gamma='auto' compares sizes of the step .* Pass heldout="):
        initialize(model, auto, data, loss=loss)
    with refused(model, CalibrationError, r"heldout is empty"):
        initialize(model, auto, data, heldout=[], loss=loss)


@pytest.mark.filterwarnings("ignore")
def test_gamma_auto_says_when_the_best_is_an_end_of_its_range_and_when_none_works() -> None:
    data = inputs(4)
    auto = config(init_config=LoraOneConfig(stable_gamma="auto"))

    def rising(model: nn.Module, x: Tensor) -> Tensor:
        """Falls against the gradient's direction, where no step helps."""
        return loss(model, x) if torch.is_grad_enabled() else -loss(model, x)

    with pytest.warns(UserWarning, match=r"the loss falls up to the largest gamma tried, 2048"):
        initialize(Toy(), auto, data, heldout=data, loss=rising)

    def steep(model: nn.Module, x: Tensor) -> Tensor:
        """Falls with the size of the step, however large."""
        return loss(model, x) if torch.is_grad_enabled() else -(model(x) - Toy().eval()(x)).square().mean()

    text = r"falls down to the smallest gamma tried, 64: a larger step than any may be better\. .* stable_gamma=32\."
    with pytest.warns(UserWarning, match=text):
        initialize(Toy(), auto, data, heldout=data, loss=steep)
    model = Toy()
    with refused(model, CalibrationError, r"not finite for any gamma from 64 to 2048"):
        initialize(model, auto, data, heldout=[data[0] * torch.inf], loss=loss)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["lora_one", "functional"])
def test_gamma_auto_beside_an_injected_adapter_is_that_of_the_model_alone_and_leaves_it_as_it_was(start: str) -> None:
    data, heldout = inputs(4), inputs(6)[4:]
    auto = config(start, init_config=LoraOneConfig(stable_gamma="auto"))
    alone = initialize(Toy(), auto, data, heldout=heldout, loss=loss).peft_config["default"].init_config.stable_gamma
    model = Toy()
    inject_adapter_in_model(config(True), model, "trial_0")
    enable_adapters(model, False)
    before = [(host, host.active_adapters, host.disable_adapters) for _, host in hosts(model)]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    found = best_gamma(resolve(model, auto), collect_statistics(model, auto, data, loss=loss), heldout, loss=loss)
    assert found.config.init_config.stable_gamma == alone
    assert [(host, host.active_adapters, host.disable_adapters) for _, host in hosts(model)] == before
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


def test_gamma_auto_of_a_loss_that_no_step_changes_keeps_the_usual_one_and_says_so() -> None:
    def deaf(model: nn.Module, x: Tensor) -> Tensor:
        return loss(model, x) if torch.is_grad_enabled() else x.new_ones(())

    data, auto = inputs(4), config(init_config=LoraOneConfig(stable_gamma="auto"))
    with pytest.warns(UserWarning, match=r"the same for every gamma.* stable_gamma=128 is kept"):
        chosen = initialize(Toy(), auto, data, heldout=data, loss=deaf)
    assert chosen.peft_config["default"].init_config.stable_gamma == 128


@pytest.mark.filterwarnings("ignore")
def test_gamma_auto_under_dora_compares_models_as_they_would_start() -> None:
    data, heldout = inputs(4), inputs(6)[4:]
    auto = config(init_config=LoraOneConfig(stable_gamma="auto"), use_dora=True)
    chosen = initialize(Toy(), auto, data, heldout=heldout, loss=loss)
    losses = {}
    for trial in GAMMAS:
        settings = config(init_config=LoraOneConfig(stable_gamma=trial), use_dora=True)
        adapted = initialize(Toy(), settings, data, loss=loss).eval()
        losses[trial] = sum(loss(adapted, x).item() for x in heldout)
    assert chosen.peft_config["default"].init_config.stable_gamma == min(losses, key=losses.__getitem__)


def test_saved_starts_from_data_load_with_equal_outputs(tmp_path: Path) -> None:
    data, x = inputs(), inputs()[0]
    for start in ("lora_ga", "lora_one", "functional", "gora"):
        adapted = initialize(Toy(), config(start), data, loss=loss).eval()
        adapted.save_pretrained(tmp_path / start)
        assert torch.equal(PeftModel.from_pretrained(Toy(), tmp_path / start)(x), adapted(x))


def test_ranks_can_come_from_the_data() -> None:
    data = inputs(8)
    uniform = get_peft_model(Toy(), config(True)).get_nb_trainable_parameters()[0]
    adapted = initialize(Toy(), config("lora_one", r=3), data, loss=loss, ranks=RankRule("budget", r_max=8))
    layers = {path: layer.r["default"] for path, layer in adapted.base_model.lora_layers()}
    assert len(set(layers.values())) > 1
    budget = get_peft_model(Toy(), config(True, r=3)).get_nb_trainable_parameters()[0]
    assert uniform < adapted.get_nb_trainable_parameters()[0] <= budget
    scalings = [layer.scaling["default"] for _, layer in adapted.base_model.lora_layers()]
    assert scalings == pytest.approx([4 / 3] * 3)


def test_eva_shares_its_ranks_out_by_itself() -> None:
    data = inputs(4)
    shared = initialize(Toy(), config("eva", eva_config=EvaConfig(rho=2.0)), data)
    ranks = [layer.r["default"] for _, layer in shared.base_model.lora_layers()]
    assert sum(ranks) == 6
    fixed = initialize(Toy(), config("eva", eva_config=EvaConfig(rho=1.0)), data)
    assert [layer.r["default"] for _, layer in fixed.base_model.lora_layers()] == [2, 2, 2]


def test_eva_says_on_how_many_layers_its_directions_did_not_settle(tmp_path: Path) -> None:
    """White inputs have no principal directions: every batch turns them."""
    data, cached = [torch.randn(2, 6, 40, dtype=torch.float64) for _ in range(4)], tmp_path / "stats.safetensors"
    said = (
        r"The principal directions of the inputs still turn after 10 passes over the data on 2 of 2 layers: first, "
        r"second\. They start from the last ones\. Use more or larger batches, or lower tau or rho of EvaConfig\."
    )
    settings = config("eva", target_modules=["first", "second"], eva_config=EvaConfig(tau=0.9999999))
    for _ in range(2):  # from the data, then from the file
        with pytest.warns(UserWarning, match=said):
            collect_statistics(Toy(), settings, data, cache=cached)


def test_eva_says_nothing_where_its_directions_have_settled() -> None:
    steep = torch.logspace(0, -6, 40, dtype=torch.float64)
    data = [torch.randn(2, 60, 40, dtype=torch.float64) * steep for _ in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stats = collect_statistics(Toy(), config("eva", eva_config=EvaConfig(tau=0.5), target_modules=["first"]), data)
    assert stats["first"]["principal.settled"]


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_a_file_of_peft_without_its_start_says_how_to_save_it(start: str, tmp_path: Path) -> None:
    """PEFT has changed the base, and the file does not say by what."""
    get_peft_model(Toy(), config(True)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(load_file(path), path)  # without what lorafa says of its config
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"init_lora_weights": start}))
    model = Toy()
    said = (
        rf"does not hold what init_lora_weights='{start}' took from the base, and data decided that: it cannot be "
        r"computed again\. Save it again in PEFT, with save_pretrained\(\.\.\., "
        r"path_initial_model_for_weight_conversion=\) and the folder of the adapter as it was before training"
    )
    with refused(model, CheckpointError, said):
        PeftModel.from_pretrained(model, tmp_path)
