"""Statistics in files: whole, and used again for the same question only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafa import collect_statistics, get_peft_model
from lorafa.errors import CheckpointError
from lorafa.starts.statistics import Statistics
from toys.calibration import LAYERS, Toy, config, inputs, loss


def test_a_file_of_statistics_comes_back_bit_for_bit(tmp_path: Path) -> None:
    stats = collect_statistics(Toy(), config(), inputs(), loss=loss)
    stats.save(tmp_path / "stats.safetensors")
    loaded = Statistics.load(tmp_path / "stats.safetensors")
    assert loaded.about == stats.about
    assert list(loaded) == list(stats)
    for name in stats:
        assert loaded[name].keys() == stats[name].keys()
        assert all(torch.equal(loaded[name][key], value) for key, value in stats[name].items())
    assert loaded.nbytes == stats.nbytes


def test_the_cache_serves_the_same_question_and_no_other(tmp_path: Path) -> None:
    calls = []

    def counted(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(1)
        return loss(model, x)

    cache, data = tmp_path / "stats.safetensors", inputs()

    def ask(model: nn.Module, **settings: Any) -> Statistics:
        calls.clear()
        chosen = {"config": config(), "data": data} | settings
        return collect_statistics(model, chosen.pop("config"), chosen.pop("data"), loss=counted, cache=cache, **chosen)

    first = ask(Toy())
    assert len(calls) == len(data)
    again = ask(Toy())
    assert not calls
    assert all(torch.equal(again[name]["gradient.U"], first[name]["gradient.U"]) for name in LAYERS)
    other = Toy()
    with torch.no_grad():
        other.last.weight[0] += 1
    for change in (
        {"data": inputs(3)},
        {"config": config(r=3)},
        {"passes": 2},
        {"weighting": "batches", "halves": True},
    ):
        ask(Toy(), **change)
        assert calls
    ask(other)
    assert calls


def test_the_cache_of_one_model_does_not_serve_another(tmp_path: Path) -> None:
    """Other weights anywhere are another model, an adapter that is off is not."""
    settings, calls, file = config(target_modules=["first"]), [0], tmp_path / "statistics.safetensors"

    def counted(model: nn.Module, x: Tensor) -> Tensor:
        calls[0] += 1
        return loss(model, x)

    def collects(model: nn.Module) -> bool:
        before = calls[0]
        collect_statistics(model, settings, inputs(1), loss=counted, cache=file)
        return calls[0] > before

    changed = Toy()
    with torch.no_grad():
        changed.last.weight[1, 1] += 0.1
    adapted = get_peft_model(Toy(), config("gaussian", target_modules=["second"]))
    assert [collects(model) for model in (Toy(), Toy(), adapted, changed, changed)] == [True, False, False, True, False]


@pytest.mark.parametrize("by_step", [False, True], ids=["loss", "train_step"])
def test_the_cache_of_one_loss_does_not_serve_another(by_step: bool, tmp_path: Path) -> None:
    """Two lambdas have one name, and a callable object has a type's."""

    class Scaled:
        def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
            return 3 * loss(model, x)

    cache, model, x = tmp_path / "stats.safetensors", Toy(), inputs(1)[0]
    losses = [loss, lambda m, b: m(b).square().mean(), lambda m, b: m(b).pow(4).mean(), Scaled()]
    steps = [
        lambda: loss(model, x).backward(),
        lambda: model(x).square().mean().backward(),
        lambda: model(x).pow(4).mean().backward(),
    ]
    for one in steps if by_step else losses:
        given = {"data": one} if by_step else {"data": [x], "loss": one}
        found, again, alone = (collect_statistics(model, config(), **given, cache=c) for c in (cache, cache, None))
        for name in LAYERS:
            torch.testing.assert_close(found[name]["gradient.S"], alone[name]["gradient.S"])
        assert found.about["data"] == again.about["data"] != alone.about["data"]


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    get_peft_model(Toy(), config(True)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no statistics of lorafa\. Delete it, or give"):
        collect_statistics(Toy(), config(), inputs(), loss=loss, cache=tmp_path / "adapter_model.safetensors")
