"""A DataLoader of torch in the place of a list of batches: in order, shuffled, over several passes, with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lorafa import RankRule, collect_statistics, initialize
from lorafa.errors import CalibrationError
from lorafa.starts.statistics import Statistics
from toys.calibration import LAYERS, Toy, config, gradient_matrix, gradients, inputs, loss

ROWS = list(torch.cat(inputs(4)))
"""Eight rows of six tokens, in batches of two."""
BATCHES = [torch.stack(ROWS[at : at + 2]) for at in range(0, len(ROWS), 2)]
WANTED: dict[str, dict[str, Any]] = {
    "dense": {"start": "lora_one", "dense": True},
    "sketched": {"start": "lora_one", "dense": False},
    "two passes": {"start": "lora_one", "dense": False, "passes": 2},
    "two passes, halves": {"start": "lora_one", "dense": False, "passes": 2, "halves": True},
    "functional": {"start": "functional", "dense": False, "passes": 2},
    "gora": {"start": "gora"},
    "eva": {"start": "eva"},
    "corda": {"start": "corda"},
}


def loader(*, shuffle: bool = False, seed: int | None = None) -> DataLoader[Tensor]:
    """One that is shuffled by a generator of its own where it has a seed, by torch's random state otherwise."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(ROWS, batch_size=2, shuffle=shuffle, generator=generator)  # type: ignore[arg-type]


def collected(wanted: str, data: Any, model: nn.Module | None = None, **settings: Any) -> Statistics:
    chosen = WANTED[wanted] | settings
    return collect_statistics(model or Toy(), config(chosen.pop("start")), data, **{"loss": loss} | chosen)


def assert_same(one: Statistics, other: Statistics, tolerance: float = 0.0) -> None:
    """Triplets are compared by their products: those that hold next to nothing turn with rounding."""
    for name in LAYERS:
        mine, theirs = one[name], other[name]
        assert mine.keys() == theirs.keys()
        turning = {key for key in mine if key.endswith((".U", ".Vh"))} if tolerance else set()
        compared = {key: (mine[key], theirs[key]) for key in mine.keys() - turning}
        for key in {key.rpartition(".")[0] for key in turning}:
            compared[key] = (gradient_matrix(mine, key), gradient_matrix(theirs, key))
        for key, (found, expected) in compared.items():
            size = float(expected.double().abs().max())
            torch.testing.assert_close(
                found.double(), expected.double(), rtol=0, atol=tolerance * size, msg=f"{name} {key}"
            )


class Seen:
    """A loss that notes the batches it sees."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        self.batches.append(x)
        return loss(model, x)


@pytest.mark.filterwarnings("ignore:The principal directions of the inputs still turn")
@pytest.mark.parametrize("wanted", WANTED)
def test_one_in_order_gives_what_the_list_gives_and_is_served_by_its_cache(wanted: str, tmp_path: Path) -> None:
    cache, seen = tmp_path / "stats.safetensors", Seen()
    listed = collected(wanted, BATCHES)
    assert_same(collected(wanted, loader()), listed, 1e-8)
    first = collected(wanted, loader(), loss=seen, cache=cache)
    assert_same(first, listed, 1e-8)
    count = len(seen.batches)
    assert count > 0
    written = cache.stat().st_mtime_ns
    for data in (loader(), BATCHES):  # the list is the same data
        assert_same(collected(wanted, data, loss=seen, cache=cache), first)
    assert len(seen.batches) == count
    assert cache.stat().st_mtime_ns == written


def test_initialize_takes_one_with_all_that_is_chosen_by_it(tmp_path: Path) -> None:
    rule, settings = RankRule("budget"), {"loss": loss, "dense": False, "passes": 2}
    made = [
        initialize(Toy(), config(), data, ranks=rule, **settings, **more)
        for data, more in ((BATCHES, {}), (loader(), {}), (loader(), {"cache": tmp_path / "stats.safetensors"}))
    ]
    for model in made[1:]:
        for (name, one), (_, other) in zip(model.named_parameters(), made[0].named_parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize("options", [{"dense": True}, {"dense": False}, {"dense": False, "passes": 2}], ids=str)
def test_a_shuffled_one_has_the_same_mean_gradient(options: dict[str, Any]) -> None:
    """Sums do not depend on the order, and batches of one size weigh their rows alike, whatever each of them holds."""
    seen, listed = Seen(), collected("dense", BATCHES, **options)
    found = collected("dense", loader(shuffle=True), loss=seen, **options)
    passes = [torch.cat(seen.batches[at : at + 4]) for at in range(0, len(seen.batches), 4)]
    assert len(passes) == options.get("passes", 1)
    assert not any(torch.equal(one, torch.cat(BATCHES)) for one in passes)
    assert len({str(one[:, 0, 0].tolist()) for one in passes}) == len(passes)  # each pass in an order of its own
    expected = gradients(Toy(), BATCHES)
    for name in LAYERS:
        G = gradient_matrix(listed[name])
        torch.testing.assert_close(gradient_matrix(found[name]), G, rtol=1e-9, atol=1e-12)
        if options == {"dense": True}:
            torch.testing.assert_close(G, expected[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("start", ["lora_one", "functional", "lora_ga", "lora_null"])
def test_a_start_from_a_shuffled_one_is_that_from_the_list(start: str) -> None:
    given: dict[str, Any] = {} if start == "lora_null" else {"dense": False, "passes": 4}
    listed, shuffled = (
        initialize(Toy(), config(start), data, loss=loss, **given) for data in (BATCHES, loader(shuffle=True))
    )
    for name in LAYERS:
        one, other = (model.get_base_model().get_submodule(name) for model in (listed, shuffled))
        products = [(layer.factor_B("default") @ layer.factor_A("default")).detach() for layer in (one, other)]  # type: ignore[operator]
        torch.testing.assert_close(products[1], products[0], rtol=0, atol=1e-6 * float(products[0].abs().max()))


def test_a_cache_serves_a_shuffled_one_in_the_same_order_only(tmp_path: Path) -> None:
    """The data are looked at in one order for the cache and in the next one for the statistics, as the loader gives
    them: with a generator that begins alike that is the same question again, otherwise it is asked anew."""
    cache, seen, model = tmp_path / "stats.safetensors", Seen(), Toy()

    def asked(data: DataLoader[Tensor]) -> tuple[Statistics, int]:
        before = len(seen.batches)
        return collected("two passes", data, model, loss=seen, cache=cache), len(seen.batches) - before

    first, count = asked(loader(shuffle=True, seed=1))
    assert count == 8
    again, count = asked(loader(shuffle=True, seed=1))
    assert count == 0
    assert_same(again, first)
    one = loader(shuffle=True, seed=2)
    for data in (one, one, loader(shuffle=True), loader(shuffle=True)):  # the second time it goes on where it was
        other, count = asked(data)
        assert count == 8
        for name in LAYERS:
            G = gradient_matrix(first[name])
            torch.testing.assert_close(gradient_matrix(other[name]), G, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The principal directions of the inputs still turn")
def test_directions_of_inputs_from_a_shuffled_one_hold_as_much_as_those_from_the_list() -> None:
    """EVA's depend on the order of the batches: they keep four of forty directions from each to the next."""
    x = torch.cat(BATCHES).flatten(0, 1)
    x = x - x.mean(0)
    best = torch.linalg.svdvals(x)[:4].square().sum()
    for data in (BATCHES, loader(shuffle=True)):
        V = collected("eva", data)["second"]["principal.components"]
        torch.testing.assert_close(V @ V.mT, torch.eye(4, dtype=V.dtype), rtol=0, atol=1e-6)
        assert float((x @ V.mT).square().sum() / best) > 0.85


ORDER = (
    r"The batches came in another order, or were others, than in the pass before, so that the two half samples of the "
    r"gradients are not kept apart.*shuffle=False or list\(loader\), or passes=1\."
)


def test_halves_of_a_shuffled_one_are_refused_where_a_later_pass_would_mix_them() -> None:
    """What was found in one half would be confirmed by its own rows."""
    halves: dict[str, Any] = {"halves": True, "dense": False}
    with pytest.raises(CalibrationError, match=ORDER):
        collected("dense", loader(shuffle=True), passes=2, **halves)
    with pytest.raises(CalibrationError, match=ORDER):
        initialize(Toy(), config(), loader(shuffle=True), loss=loss, ranks=RankRule("budget"), passes=2, dense=False)
    for data, options in (
        (list(loader(shuffle=True)), {"passes": 2}),
        (loader(shuffle=True), {"passes": 1}),
        (loader(shuffle=True), {"passes": 2, "dense": True}),  # which takes one
    ):
        assert "gradient.cross" in collected("dense", data, **halves | options)["first"]
    assert "gradient.cross" not in collected("dense", loader(shuffle=True), passes=2, dense=False)["first"]


class Opaque:
    """A batch of a class of its own, whose text says where it is in memory."""

    def __init__(self, rows: list[Tensor]) -> None:
        self.x = torch.stack(rows)


def test_batches_that_cannot_be_looked_into_are_taken_to_stay_as_they_are() -> None:
    """They are made anew in every pass, and nothing tells a new one from another one."""
    options: dict[str, Any] = {"halves": True, "dense": False, "passes": 2}
    data = DataLoader(ROWS, batch_size=2, collate_fn=Opaque)  # type: ignore[arg-type, var-annotated]
    found = collected("dense", data, loss=lambda model, batch: loss(model, batch.x), **options)
    assert_same(found, collected("dense", BATCHES, **options), 1e-8)


def test_halves_of_a_training_step_are_followed_by_its_calls() -> None:
    model = Toy()

    def step(batches: Any) -> Any:
        def run() -> None:
            for x in batches:
                loss(model, x).backward()  # type: ignore[no-untyped-call]

        return run

    options: dict[str, Any] = {"halves": True, "dense": False, "passes": 2}
    found = collect_statistics(model, config(), step(loader()), **options)
    assert_same(found, collected("dense", BATCHES, **options), 1e-8)
    with pytest.raises(CalibrationError, match=ORDER):
        collect_statistics(model, config(), step(loader(shuffle=True)), **options)
