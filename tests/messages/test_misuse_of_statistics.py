"""What is asked of data wrongly is said before the model has run over any of it, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafa import (
    EvaConfig,
    RankRule,
    Statistics,
    choose_ranks,
    collect_statistics,
    estimate_gradients,
    get_eva_state_dict,
    get_peft_model,
    initialize,
    initialize_lora_eva_weights,
    preprocess_corda,
    start_from,
    with_ranks,
)
from lorafa.errors import AdapterError, CalibrationError, CheckpointError, ConfigError, LoraError, TargetError
from lorafa.starts.gamma import best_gamma
from lorafa.surgery.resolve import resolve
from toys.calibration import Toy, config, inputs, loss
from toys.compare import assert_unchanged, everything

AUTO = {"stable_gamma": "auto"}


class Unrun(Toy):
    """Counts how often it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().forward(*args, **kwargs)


def refused(error: type[LoraError], text: str, call: Callable[[Any], Any], ran: int = 0) -> None:
    model = Unrun()
    before = everything(model)
    with pytest.raises(error, match=text):
        call(model)
    assert_unchanged(before, model)
    assert model.calls == ran


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"x": inputs(1)[0]}, r"data= is 'dict', one batch and not several\. Pass a list of batches, such as \[data\]"),
        (inputs(1)[0], r"data= is 'Tensor', one batch and not several"),
        ((x for x in inputs()), r"data= is 'generator', an iterator, which can be gone over only once.*list\(data\)"),
        (None, r"data= is 'NoneType', which holds no batches\. Pass a DataLoader or a list of batches"),
        (5, r"data= is 'int', which holds no batches"),
        ("rows.jsonl", r"data= is 'str', which holds no batches"),
    ],
    ids=["mapping", "tensor", "generator", "None", "int", "str"],
)
def test_data_that_are_no_batches(data: Any, text: str) -> None:
    refused(CalibrationError, text, lambda model: initialize(model, config(), data, loss=loss))
    eva = text.replace("data", "dataloader", 1).replace("[data", "[dataloader").replace("(data", "(dataloader")
    refused(CalibrationError, eva, lambda m: get_eva_state_dict(m, data, config("eva"), show_progress_bar=False))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (lambda model, x: None, "NoneType"),
        (lambda model, x: loss(model, x).item(), "float"),
        (lambda model, x: model(x), r"a tensor of shape \(2, 6, 20\)"),
    ],
    ids=["None", "float", "not a scalar"],
)
def test_a_loss_that_is_none(value: Any, found: str) -> None:
    text = rf"The loss of a batch must be a tensor with one element, found {found}\. Return the mean over the batch"
    ran = 0 if found == "NoneType" else 1
    refused(CalibrationError, text, lambda model: initialize(model, config(), inputs(), loss=value), ran)


def test_what_is_no_config() -> None:
    text = r"The config must be a LoraConfig, found 'eva' \(str\)\. Pass LoraConfig\(init_lora_weights="
    step = object
    for ask in (
        lambda model: initialize(model, "eva", inputs()),
        lambda model: collect_statistics(model, "eva", inputs()),
        lambda model: start_from(model, "eva", {}),
        lambda model: get_eva_state_dict(model, inputs(), "eva"),
        lambda model: estimate_gradients(model, "eva", step),
        lambda model: preprocess_corda(model, "eva", step),
    ):
        refused(ConfigError, text, ask)


def test_held_out_rows_that_are_missing_unread_or_gone_after_one_look() -> None:
    auto, data = config(init_config=AUTO), inputs()
    missing = r"stable_gamma='auto' compares sizes of the step by their loss on held-out rows\. Pass heldout="
    refused(ConfigError, missing, lambda model: initialize(model, auto, data, loss=loss))
    unread = r"heldout= is read for stable_gamma='auto' only, and init_config has 128.*Drop heldout=, or set"
    given = config(init_config={"stable_gamma": 128})
    refused(ConfigError, unread, lambda model: initialize(model, given, data, heldout=data, loss=loss))
    refused(ConfigError, unread.replace("128", "None"), lambda m: start_from(m, config("eva"), {}, heldout=data))
    once = r"heldout= is 'generator', an iterator.*list\(heldout\)"
    refused(CalibrationError, once, lambda model: initialize(model, auto, data, heldout=(x for x in data), loss=loss))
    refused(CalibrationError, once, lambda model: best_gamma(resolve(model, auto), {}, (x for x in data), loss=loss))
    one = r"heldout= is 'dict', one batch and not several\. .* \[heldout\]"
    refused(CalibrationError, one, lambda model: initialize(model, auto, data, heldout={"x": data[0]}, loss=loss))


def test_options_that_would_change_nothing() -> None:
    data = inputs()
    for options, said in (
        ({"passes": 2}, "passes=2"),
        ({"dense": True, "halves": True}, "dense=True, halves=True"),
        ({"weighting": "tokens"}, "weighting=tokens"),
    ):
        text = rf"{said} would change nothing: init_lora_weights='eva' reads principal, and no gradients\. Drop it, or"
        refused(ConfigError, text, lambda model, options=options: initialize(model, config("eva"), data, **options))
    assert collect_statistics(Toy(), config("eva"), data, loss=loss, passes=2, also=["gradient"])
    text = (
        r"weighting='tokens' counts the labels of batches, and a function as data shows none.*Drop weighting='tokens'"
    )
    refused(ConfigError, text, lambda model: initialize(model, config(), lambda: None, weighting="tokens"))


def test_gradients_where_there_can_be_none() -> None:
    data = inputs()
    with torch.inference_mode():
        text = r"Gradients are read, and under torch\.inference_mode\(\) there are none\. Collect outside of it"
        refused(CalibrationError, text, lambda model: collect_statistics(model, config(), data, loss=loss))
    with torch.no_grad():
        assert collect_statistics(Toy(), config(), data, loss=loss)["first"]["gradient.S"].any()
    other = Toy()
    text = r"the function that was given for the data never called the model"
    refused(CalibrationError, text, lambda m: estimate_gradients(m, config(), lambda: loss(other, data[0]).backward()))


def test_further_statistics_are_a_list_of_names() -> None:
    text = r"also must be a list of names, found 'principal' \(str\)\. Pass also=\['principal'\]"
    refused(ConfigError, text, lambda model: initialize(model, config(), inputs(), loss=loss, also="principal"))
    for rule in (None, RankRule("importance")):
        text = r"Unknown statistic 'principle'\. Did you mean 'principal'\?"
        refused(ConfigError, text, lambda m, r=rule: initialize(m, config(), inputs(), also=["principle"], ranks=r))


def test_ranks_add_what_they_read_to_what_else_is_asked_for() -> None:
    """RankRule reads gradients; the caller wants second moments as well."""
    adapted = initialize(
        Toy(), config("functional"), inputs(), loss=loss, ranks=RankRule("importance"), also=("corda_moment",)
    )
    assert adapted.base_model.lora_layers()
    text = r"RankRule\('cross_validation'\) compares two half samples of the gradients, and halves=False keeps none"
    rule = RankRule("cross_validation")
    refused(ConfigError, text, lambda m: initialize(m, config(), inputs(), loss=loss, ranks=rule, halves=False))
    initialize(Toy(), config(), inputs(1), loss=loss, ranks=RankRule("budget"), halves=False)


def test_a_file_to_write_to_in_a_folder_that_is_missing(tmp_path: Path) -> None:
    text = r"cache='.*missing/stats\.safetensors' is in a folder that does not exist.*Make the folder"
    cache = tmp_path / "missing" / "stats.safetensors"
    refused(CheckpointError, text, lambda model: initialize(model, config(), inputs(), loss=loss, cache=cache))


def test_statistics_that_are_none() -> None:
    text = r"stats= must be what collect_statistics has returned.*found 'stats\.safetensors' \(str\).*Statistics\.load"
    for call in (start_from, lambda model, config, stats: get_peft_model(model, config, stats=stats)):
        refused(CalibrationError, text, lambda model, call=call: call(model, config(), "stats.safetensors"))


def test_a_file_of_statistics_with_a_layer_it_does_not_list(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    collect_statistics(Toy(), config(), inputs(), loss=loss).save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(tensors | {"middle::gradient.S": torch.ones(2)}, path, header)
    with pytest.raises(CheckpointError, match=r"'middle::gradient\.S' of a layer that its header does not list"):
        Statistics.load(path)


def test_rows_of_a_layer_that_are_not_its_rows() -> None:
    text = r"first: prepare_layer_inputs_fn returned {} for an input of shape \(2, 6, 40\)\. Return .* \(T, 40\)"
    settings = config("eva", target_modules=["first"])
    for choose, given in (
        (lambda x, mask, name: x[..., :3], r"a tensor of shape \(2, 6, 3\)"),
        (lambda x, mask, name: None, "NoneType"),
    ):
        refused(
            CalibrationError, text.format(given),
            lambda model, choose=choose: get_eva_state_dict(
                model, inputs(), settings, prepare_layer_inputs_fn=choose, show_progress_bar=False
            ),
            ran=1,
        )  # fmt: skip
    chosen = {"base_model.model.frist": lambda x, mask, name: x}
    text = r"prepare_layer_inputs_fn has 1 layers the adapter is not on: frist\. Drop them; it is on first"
    refused(ConfigError, text, lambda m: get_eva_state_dict(m, inputs(), settings, prepare_layer_inputs_fn=chosen))


def test_data_beside_a_state_dict_are_not_looked_at_which_is_said() -> None:
    settings = config("eva", eva_config=EvaConfig(rho=1.0))
    state = get_eva_state_dict(Toy(), inputs(), settings, show_progress_bar=False)
    model = get_peft_model(Toy(), settings, low_cpu_mem_usage=True)
    text = r"given eva_state_dict= and dataloader=: .* the data are not looked at\. Leave one of them out"
    with pytest.warns(UserWarning, match=text):
        initialize_lora_eva_weights(model, inputs(), state)


@pytest.mark.parametrize("start", ["lora_ga", "lora_ga_peft", "lora_one", "functional", "gora", "lora_sb"])
def test_gradients_are_estimated_for_every_start_that_reads_them(start: str) -> None:
    model, x = Toy(), inputs(1)[0]
    found = estimate_gradients(model, config(start), lambda: loss(model, x).backward())
    assert any("gradient.S" in key for tensors in found.values() for key in tensors)


def test_inputs_that_are_not_finite_are_the_recorded_fallback() -> None:
    data: list[Tensor] = inputs(in_=16)  # eigenvalues of 16 x 16 matrices with nan are an error of LAPACK's
    data[1][0, 0, 0] = torch.nan
    for start in ("functional", "lora_one", "corda", "lora_null"):
        for options in ({"passes": 1}, {"passes": 2}) if start == "functional" else ({},):
            stats = collect_statistics(Toy(in_=16), config(start), data, loss=loss, **options)
            with pytest.warns(UserWarning, match=rf"'{start}' has nothing to start from on 3 of 3 layers"):
                adapted = get_peft_model(Toy(in_=16), config(start), stats=stats)
            assert torch.equal(adapted.eval()(data[0]), Toy(in_=16).eval()(data[0]))
            for _, layer in adapted.base_model.lora_layers():
                assert "is not finite" in layer.fallbacks["default"]


def test_what_no_data_could_mend_is_said_before_any_is_read() -> None:
    refused(AdapterError, r"without a dot, found 'a\.b'", lambda m: initialize(m, config(), inputs(), "a.b", loss=loss))
    text = r"modules_to_save.*'heads'"
    typo = config(modules_to_save=["heads"])
    refused(TargetError, text, lambda model: initialize(model, typo, inputs(), loss=loss))


def test_a_loss_that_would_not_be_called() -> None:
    text = r"loss= is of batches, and a function as data runs forward and backward by itself\. Drop loss="
    refused(ConfigError, text, lambda model: collect_statistics(model, config(), lambda: None, loss=loss))
    stats = collect_statistics(Toy(), config(), inputs(), loss=loss)
    text = r"loss= is that of held-out rows here, and there are none\. Drop loss=, or pass heldout="
    refused(ConfigError, text, lambda model: start_from(model, config(), stats, loss=loss))


def test_statistics_that_would_not_be_read_or_are_of_other_weights() -> None:
    stats = collect_statistics(Toy(), config(), inputs(), loss=loss)
    text = r"stats= was given, and init_lora_weights='pissa' reads none"
    refused(ConfigError, text, lambda model: start_from(model, config("pissa"), stats))
    other = Toy()
    with torch.no_grad():
        other.first.weight.add_(1)
    with pytest.raises(CalibrationError, match=r"The statistics were collected on another model: 1 of 3 layers"):
        start_from(other, config("gaussian"), stats, ranks=RankRule("energy"))


def test_ranks_from_statistics_that_are_none_or_of_another_model() -> None:
    stats = collect_statistics(Toy(), config(), inputs(), loss=loss)
    refused(
        CalibrationError,
        r"Ranks are chosen by statistics, and stats is None",
        lambda m: choose_ranks(m, config(), None),
    )
    refused(
        ConfigError,
        r"ranks must be a mapping of full names to ranks, as choose_ranks returns, found \[4, 4\] \(list\)\.",
        lambda m: with_ranks(m, config(), [4, 4]),
    )
    other = Toy()
    with torch.no_grad():
        other.second.weight.mul_(2)
    with pytest.raises(CalibrationError, match=r"The statistics were collected on another model"):
        choose_ranks(other, config(), stats)
    adapted = get_peft_model(Toy(), config("gaussian"))
    assert choose_ranks(adapted, config(), stats) == choose_ranks(Toy(), config(), stats)


def test_rho_of_a_rule_beyond_what_is_collected() -> None:
    text = r"with rho=4 chooses among more directions than are collected, those of rho=2: of EvaConfig with EVA, 2"
    rule = RankRule("explained_variance", rho=4)
    refused(ConfigError, text, lambda model: initialize(model, config(), inputs(), loss=loss, ranks=rule))


def test_fewer_directions_than_ranks_make_a_smaller_adapter_and_it_is_said() -> None:
    few = [torch.randn(1, 3, 40, dtype=torch.float64)]
    with pytest.warns(UserWarning, match=r"The data has \d+ principal directions for the 36 ranks of the config"):
        initialize(Toy(), config("eva", r=12), few)


def test_inputs_that_are_not_finite_leave_a_layer_its_rank() -> None:
    data = inputs(in_=16)
    model = Toy(in_=16)
    with torch.no_grad():
        model.first.weight[0, 0] = torch.inf  # what follows sees inputs that are not finite
    with pytest.warns(UserWarning, match=r"The input of 1 of 3 layers is not finite, and their ranks stay"):
        adapted = initialize(model, config("eva"), data)
    ranks = {path: layer.r["default"] for path, layer in adapted.base_model.lora_layers()}
    assert ranks["last"] == 2
