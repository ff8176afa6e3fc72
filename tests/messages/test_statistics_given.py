"""Statistics handed to an adapter: what its start does not read, or does not find in them, is said at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lorafa import get_peft_model, initialize, preprocess_loraga
from lorafa.errors import CalibrationError, ConfigError
from lorafa.starts.ranks import RankRule
from toys.adapters import STARTS, initializer_of, only_layer, stats_for
from toys.calibration import LAYERS, Toy, config, inputs, loss
from toys.compare import assert_unchanged, everything

FROM_DATA = [start for start in STARTS if initializer_of(start).needs]
WITHOUT = [start for start in STARTS if not initializer_of(start).needs]


def stats_of(model: Toy) -> dict[str, dict[str, Tensor]]:
    return {name: stats_for(model.get_submodule(name).weight) for name in LAYERS}  # type: ignore[arg-type]


@pytest.mark.parametrize("start", WITHOUT)
def test_statistics_for_a_start_that_reads_none_are_refused(start: bool | str) -> None:
    model = Toy()
    before, stats, text = (
        everything(model),
        stats_of(model),
        r"stats= was given, and init_lora_weights=.* reads none\. ",
    )
    with pytest.raises(ConfigError, match=text + r"Drop stats=, or set a start that reads them: .*'lora_ga'"):
        get_peft_model(model, config(start), stats=stats)
    assert_unchanged(before, model)
    adapted = get_peft_model(model, config(True))
    before = everything(adapted)
    with pytest.raises(ConfigError, match=text):
        adapted.add_adapter("second", config(start), stats=stats)
    assert_unchanged(before, adapted)


def test_ranks_may_be_chosen_from_data_for_a_start_that_reads_none() -> None:
    rule, uniform = RankRule("budget", r_min=1), get_peft_model(Toy(), config("kaiming"))
    adapted = initialize(Toy(), config("kaiming"), inputs(), loss=loss, ranks=rule, also=["gradient"])
    assert len({layer.r["default"] for _, layer in adapted.base_model.lora_layers()}) > 1
    spent, budget = (model.get_nb_trainable_parameters()[0] for model in (adapted, uniform))
    assert budget - 50 < spent <= budget  # a rank of the smallest layer, 20 x 30, costs 50


@pytest.mark.parametrize("start", FROM_DATA)
def test_statistics_that_lack_a_target_are_refused_by_its_name(start: str) -> None:
    model = Toy()
    before, stats = everything(model), stats_of(model)
    del stats["last"]
    with pytest.raises(CalibrationError, match=rf"init_lora_weights='{start}' needs .* of 'last'; none was given\."):
        get_peft_model(model, config(start), stats=stats)
    assert_unchanged(before, model)


@pytest.mark.parametrize("start", FROM_DATA)
def test_a_statistic_without_its_parts_is_refused_by_the_name_of_layer_and_part(start: str) -> None:
    model = Toy()
    before, stats = everything(model), stats_of(model)
    stats["last"] = {name: torch.ones(()) for name in initializer_of(start).needs}
    needs = initializer_of(start).needs[-1]
    text = rf"last: its statistics have no '\w+\.\w+', which init_lora_weights='{start}' reads; they have .*{needs}"
    with pytest.raises(CalibrationError, match=text):
        get_peft_model(model, config(start), stats=stats)
    assert_unchanged(before, model)


@pytest.mark.parametrize("start", FROM_DATA)
def test_statistics_for_factors_without_values_are_refused(start: str) -> None:
    model = Toy()
    before = everything(model)
    text = rf"init_lora_weights='{start}' computes its start from the \w+, but low_cpu_mem_usage=True computes none\."
    with pytest.raises(ConfigError, match=text):
        get_peft_model(model, config(start), low_cpu_mem_usage=True, stats=stats_of(model))
    assert_unchanged(before, model)


@pytest.mark.parametrize(("stats", "found"), [("file.safetensors", "str"), ([1], "list"), ({"first": 1}, "int")])
def test_what_is_no_table_of_statistics_is_refused(stats: Any, found: str) -> None:
    model = Toy()
    before = everything(model)
    text = rf"must be what collect_statistics has returned.*found .*\({found}\) in the place of a table\. Of a file"
    with pytest.raises(CalibrationError, match=text):
        get_peft_model(model, config("lora_ga"), stats=stats)
    assert_unchanged(before, model)


def test_what_a_preprocess_function_left_stays_until_an_adapter_takes_it() -> None:
    def run(model: Toy) -> None:
        for x in inputs():
            loss(model, x).backward()  # type: ignore[no-untyped-call]

    model, other = Toy(), Toy()
    preprocess_loraga(model, config("lora_ga"), lambda: run(model))
    preprocess_loraga(other, config("lora_ga"), lambda: run(other))
    adapted = get_peft_model(model, config("pissa"))
    adapted.add_adapter("second", config("lora_ga"))
    expected = only_layer(get_peft_model(other, config("lora_ga")))
    torch.testing.assert_close(only_layer(adapted).factor_A("second"), expected.factor_A("default"))
    with pytest.raises(CalibrationError, match="'lora_ga' needs gradient of 'first'; none was given"):
        adapted.add_adapter("third", config("lora_ga"))
