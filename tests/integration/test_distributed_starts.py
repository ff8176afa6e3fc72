"""Two processes take one decision: whether a cache is used, and how large a step is."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorafa import EvaConfig, LoraConfig, collect_statistics, get_eva_state_dict, initialize
from lorafa.errors import CheckpointError
from lorafa.initializers.lora_one import LoraOneConfig
from toys.calibration import Toy, config, inputs, loss
from toys.processes import leave_group, run_group

DATA = inputs(4)
WEIGHTS = (1.0, -2.0)
"""Of a step's size in the loss on held-out rows of each process: one wants it small, the other large, and more so."""


def counted_loss(calls: list[int]) -> Any:
    def one(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(1)
        return loss(model, x)

    return one


def by_size(model: nn.Module, batch: tuple[Tensor, float]) -> Tensor:
    x, weight = batch
    return loss(model, x) if torch.is_grad_enabled() else weight * (model(x) - Toy().eval()(x)).square().mean()


def through_a_cache(share: slice, folder: Path) -> dict[str, Any]:
    """What is found, and how often the model's loss was computed: first, again, when one has more, and damaged."""
    found: dict[str, Any] = {}
    more = [*DATA[share], *DATA[: share.start]]
    for time, data in (("first", DATA[share]), ("again", DATA[share]), ("one has more", more)):
        calls: list[int] = []
        stats = collect_statistics(Toy(), config(), data, loss=counted_loss(calls), cache=folder / "cache.safetensors")
        found[time] = {"calls": len(calls), "values": stats.values_by_layer}
    if dist.is_initialized():
        dist.barrier()
    cache = folder / "cache.safetensors"
    shutil.copy(cache, folder / "whole.safetensors")
    if dist.is_initialized():
        dist.barrier()
    cache.write_bytes(b"{")
    try:
        collect_statistics(Toy(), config(), DATA[share], loss=loss, cache=folder / "cache.safetensors")
    except CheckpointError as error:
        found["damaged"] = str(error)
    return found


def refusals(rank: int, folder: Path) -> dict[str, str]:
    """What each process says where one of them cannot go on."""

    def cache_of(name: str) -> Path:
        return folder / ("missing" if rank else "") / name

    def fails(model: nn.Module, x: Tensor) -> Tensor:
        if rank and not torch.is_grad_enabled():
            raise RuntimeError("no room\nfor this")
        return loss(model, x)

    auto = config(init_config=LoraOneConfig(stable_gamma="auto"))
    tried: dict[str, Any] = {
        "no folder": lambda: collect_statistics(Toy(), config(), DATA, loss=loss, cache=cache_of("x.safetensors")),
        "one cache": lambda: collect_statistics(
            Toy(), config(), DATA, loss=loss, cache=None if rank else folder / "y.safetensors"
        ),
        "held out": lambda: initialize(Toy(), auto, DATA, heldout=DATA[:1], loss=fails),
    }
    said = {}
    for name, call in tried.items():
        try:
            call()
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def gamma(heldout: list[tuple[Tensor, float]]) -> float:
    auto = config(init_config=LoraOneConfig(stable_gamma="auto"))
    with pytest.warns(UserWarning, match="gamma tried"):
        model = initialize(Toy(), auto, [(x, 1.0) for x in DATA], heldout=heldout, loss=by_size)
    return model.peft_config["default"].init_config.stable_gamma


def eva(data: list[Tensor], **settings: Any) -> dict[str, Tensor]:
    """EVA's directions; that of two processes by the data of each, or of the first alone."""
    torch.manual_seed(0)
    chosen = LoraConfig(r=2, target_modules=["0"], init_lora_weights="eva", eva_config=EvaConfig(rho=1))
    return get_eva_state_dict(nn.Sequential(nn.Linear(8, 6)), data, chosen, show_progress_bar=False, **settings)


LONG = torch.tensor([[40.0, 9, 1, 1, 1, 1, 1, 1], [1, 1, 20, 1, 1, 1, 1, 1]])
EVA_DATA = [LONG[n] * torch.randn(30, 8, generator=torch.Generator().manual_seed(n)) for n in (0, 1)]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = through_a_cache(slice(rank, None, 2), Path(folder))
    found["eva"] = {both: eva([EVA_DATA[rank]], gather_distributed_inputs=both) for both in (True, False)}
    found["refusals"] = refusals(rank, Path(folder))
    found["gamma"] = gamma([(DATA[0], WEIGHTS[rank])])
    found["gamma of one's rows"] = gamma([(DATA[0], WEIGHTS[0])] if rank else [])
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("starts")


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each of two processes finds."""
    run_group(work, str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_eva_goes_by_the_data_of_all_or_of_the_first_alone_and_starts_in_all_alike(
    found: list[dict[str, Any]],
) -> None:
    first, all_ = eva(EVA_DATA[:1])["0"], eva(EVA_DATA)["0"]
    for one in found:
        torch.testing.assert_close(one["eva"][False]["0"], first)
        torch.testing.assert_close(one["eva"][True]["0"].abs(), all_.abs(), rtol=0, atol=0.02)
    assert not torch.allclose(first.abs(), all_.abs(), atol=0.2)
    assert torch.equal(found[0]["eva"][False]["0"], found[1]["eva"][False]["0"])


def test_a_cache_serves_all_processes_or_none(found: list[dict[str, Any]]) -> None:
    for rank, one in enumerate(found):
        assert [one[time]["calls"] for time in ("first", "again", "one has more")] == [2, 0, 2 + rank]
        for layer, tensors in one["first"]["values"].items():
            for name, tensor in tensors.items():
                assert torch.equal(tensor, one["again"]["values"][layer][name]), (layer, name)


def test_the_cache_of_two_is_not_that_of_one_with_a_share(found: list[dict[str, Any]], folder: Path) -> None:
    calls: list[int] = []
    cache, share = folder / "whole.safetensors", DATA[slice(0, None, 2)]
    collect_statistics(Toy(), config(), share, loss=counted_loss(calls), cache=cache)
    assert len(calls) == len(share)


def test_what_one_process_cannot_do_all_refuse(found: list[dict[str, Any]]) -> None:
    first, second = (one["refusals"] for one in found)
    assert first["no folder"] == second["no folder"]
    assert "is in a folder that does not exist" in first["no folder"]
    assert first["one cache"] == second["one cache"]
    assert first["one cache"].startswith("ConfigError: cache= is given in some processes and not in others. Pass it in")
    assert first["held out"] == "CalibrationError: Process 1 raised RuntimeError: no room."
    assert second["held out"] == "RuntimeError: no room\nfor this"


def test_every_process_says_that_the_cache_is_damaged(found: list[dict[str, Any]]) -> None:
    assert all("cache.safetensors" in one["damaged"] for one in found)


def test_gamma_is_that_of_all_held_out_rows(found: list[dict[str, Any]]) -> None:
    alone = [gamma([(DATA[0], weight)]) for weight in WEIGHTS]
    assert alone == [2048.0, 64.0]
    assert [one["gamma"] for one in found] == [64.0, 64.0] == [gamma([(DATA[0], w) for w in WEIGHTS])] * 2
    assert [one["gamma of one's rows"] for one in found] == [2048.0, 2048.0]
