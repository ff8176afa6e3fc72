"""The second moment of a token's output gradient, in the units in which the weight's gradient is a mean over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import collect_statistics, initialize
from lorafa.errors import CalibrationError, ConfigError
from toys.calibration import Toy, config, inputs
from toys.compare import close


class Linear(nn.Module):
    """One layer, whose output's gradient is known."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 4, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(x)
        return y


def labelled(tokens: list[int]) -> list[dict[str, Tensor]]:
    """Batches of two rows with six tokens, of which so many count in all."""
    generator, made = torch.Generator().manual_seed(2), []
    for count in tokens:
        labels = torch.full((12,), -100)
        labels[torch.randperm(12, generator=generator)[:count]] = 1
        made.append({
            "x": torch.randn(2, 6, 6, generator=generator, dtype=torch.float64), "shift_labels": labels.reshape(2, 6),
        })  # fmt: skip
    return made


def mean_of_squares(model: nn.Module, batch: Any) -> Tensor:
    """Over the tokens that count; of each the gradient is y."""
    y, counted = model(batch["x"]), batch["shift_labels"] != -100
    squares: Tensor = y[counted].square().sum(-1) / 2
    return squares.mean()


def stats_of(batches: list[dict[str, Tensor]], **how: Any) -> Any:
    own = config("lora_da", target_modules=["layer"])
    return collect_statistics(Linear(), own, batches, loss=mean_of_squares, **how)["layer"]


@pytest.mark.parametrize("weighting", ["batches", "tokens"])
def test_it_is_that_of_the_terms_whose_mean_is_the_gradient(weighting: str) -> None:
    batches = labelled([3, 3]) if weighting == "batches" else labelled([3, 5])
    stats, weight = stats_of(batches, weighting=weighting), Linear().layer.weight
    rows = torch.cat([batch["x"][batch["shift_labels"] != -100] for batch in batches])
    g = rows @ weight.mT
    close(stats["gradient.dense"], g.mT @ rows / len(rows), 1e-12)
    close(stats["output_moment.Y"], g.square().mean(0), 1e-12)
    assert int(stats["output_moment.tokens"]) == len(rows)
    assert int(stats["output_moment.rows"]) == 4


def test_rows_are_counted_once_where_a_layer_is_called_again() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().mean()  # type: ignore[no-any-return]

    stats = collect_statistics(Toy(), config("lora_da"), inputs(4), loss=loss)
    assert {int(stats[layer]["output_moment.rows"]) for layer in stats} == {8}  # of which "first" sees each twice


def test_it_is_not_in_the_units_of_the_loss_that_the_start_depends_on() -> None:
    """A mean over four times as many equal rows is the same sample as far as directions go, but for N."""
    batches = labelled([3, 3])
    four = [{key: torch.cat([value] * 4) for key, value in batch.items()} for batch in batches]
    one, other = stats_of(batches), stats_of(four)
    close(one["output_moment.Y"], other["output_moment.Y"], 1e-12)
    assert int(other["output_moment.rows"]) == 4 * int(one["output_moment.rows"])


def test_a_layer_no_gradient_reaches_is_refused() -> None:
    class Unused(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.Linear(6, 4, dtype=torch.float64)

    own = config("lora_da", target_modules=["layer", "other"])
    with pytest.raises(CalibrationError, match="reached 'other' in calibration"):
        collect_statistics(Unused(), own, labelled([3, 3]), loss=mean_of_squares)


@pytest.mark.filterwarnings("ignore:stable_gamma='auto'")
def test_lora_da_starts_a_model_and_picks_gamma_on_held_out_rows() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) - 1).square().mean()  # type: ignore[no-any-return]

    model, data = Toy(), inputs(4)
    before = loss(model.eval(), data[0])
    own = config("lora_da", init_config={"stable_gamma": "auto"})
    started = initialize(model, own, data[:3], loss=loss, heldout=data[3:])
    assert started.peft_config["default"].init_config.stable_gamma != "auto"
    assert not any(layer.fallbacks for _, layer in started.base_model.lora_layers())
    assert loss(started.eval(), data[0]) < before
    with pytest.raises(ConfigError, match="samples='train' is the number of rows that are trained on"):
        initialize(Toy(), config("lora_da", init_config={"samples": "train"}), data, loss=loss)
