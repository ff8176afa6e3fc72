"""Two processes with a share of the batches each collect the statistics of one process with all of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorafa import EvaConfig, LoraConfig, collect_statistics
from lorafa.errors import CalibrationError
from toys.calibration import gradient_matrix
from toys.processes import leave_group, run_group

IN = 8
Batch = dict[str, Tensor]


class Routed(nn.Module):
    """Two layers with one input, and one with the same that only some batches reach; returns a loss."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.gate, self.down = (nn.Linear(IN, IN) for _ in range(4))
        self.to(dtype)

    def forward(self, x: Tensor, rare: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.q(x).tanh() * self.k(x)
        if bool(rare):
            hidden = hidden + self.gate(x).sigmoid()
        y = self.down(hidden)
        return {"loss": (y * y.sin()).mean()}


LAYERS = ("q", "k", "gate", "down")


def batches(rare: str, dtype: torch.dtype) -> list[Batch]:
    """One for each letter, in which the rare layer is reached where it is "R"."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index, letter in enumerate(rare):
        x = torch.randn(2, 6 + index, IN, generator=generator, dtype=torch.float64).to(dtype)
        labels = torch.full((2, 6 + index), -100).fill_diagonal_(3)
        labels[:, : index + 1] = 7
        found.append({"x": x, "rare": torch.tensor(letter == "R"), "labels": labels})
    return found


NOTHING, EACH, ONE = "all have none", "a batch on each rank", "one in all"
SPLITS = {
    "one more on one rank": ("RRRRR", (slice(0, None, 2), slice(1, None, 2))),
    "one rank has none": ("RRRRR", (slice(0), slice(None))),
    "a layer one rank never reaches": ("-R-R-", (slice(0, None, 2), slice(1, None, 2))),
    "a layer one rank reaches later": ("-RRRR", (slice(0, None, 2), slice(1, None, 2))),
    NOTHING: ("", (slice(0), slice(0))),
    EACH: ("RR", (slice(0, 1), slice(1, 2))),
    ONE: ("R", (slice(0), slice(1))),
}
"""What each batch reaches, and which of them a rank has."""
WANTED: dict[str, dict[str, Any]] = {
    "dense": {"init_lora_weights": "lora_one", "dense": True},
    "dense, by tokens": {"init_lora_weights": "lora_one", "dense": True, "weighting": "tokens"},
    "sketched": {"init_lora_weights": "lora_one", "dense": False},
    "sketched, by tokens": {"init_lora_weights": "lora_one", "dense": False, "weighting": "tokens"},
    "four passes": {"init_lora_weights": "lora_one", "dense": False, "passes": 4},
    "functional": {"init_lora_weights": "functional", "dense": False},
    "corda": {"init_lora_weights": "corda"},
    "moment sketch": {"init_lora_weights": "corda", "also": ["moment_sketch"]},
    "principal": {"init_lora_weights": "eva"},
}
HALVES: dict[str, dict[str, Any]] = {
    "dense halves": {"init_lora_weights": "lora_one", "dense": True, "halves": True},
    "sketched halves, by tokens": {
        "init_lora_weights": "lora_one", "dense": False, "halves": True, "weighting": "tokens",
    },
    "four passes, halves": {"init_lora_weights": "lora_one", "dense": False, "halves": True, "passes": 4},
}  # fmt: skip
"""Each with ranks of 4: sketches and principal directions are exact in 8 dimensions. EVA follows those of a process
until they settle, so with tau = 1, at which they never do, all have gone over all of their tokens as often."""
FEWER: dict[str, dict[str, Any]] = {
    "two directions of eight": {"init_lora_weights": "eva", "r": 1, "scale": [2.0**-i for i in range(IN)]},
    "the two directions there are": {"init_lora_weights": "eva", "r": 1, "scale": [1.0, 0.5] + [0.0] * (IN - 2)},
}
"""EVA with rho = 2, on inputs whose columns are scaled."""
TURNING = "halves, in another order in each pass on one rank"
ALL = WANTED | HALVES | FEWER | {TURNING: HALVES["four passes, halves"]}
Case = tuple[str, str, torch.dtype]
CASES: list[Case] = [
    *((split, wanted, torch.float64) for split in SPLITS if split not in (NOTHING, EACH, ONE) for wanted in WANTED),
    *((EACH, wanted, torch.float64) for wanted in HALVES),
    *(
        ("one rank has none", wanted, torch.bfloat16)
        for wanted in ("dense", "sketched", "functional", "corda", "principal")
    ),
]
FEWER_CASES: list[Case] = [
    (split, wanted, torch.float64)
    for split in ("one more on one rank", "one rank has none", "a layer one rank reaches later")
    for wanted in FEWER
]
EMPTY: list[Case] = [(NOTHING, wanted, torch.float64) for wanted in ("sketched", "principal")]
HALF_EMPTY: list[Case] = [(ONE, "dense halves", torch.float64)]
TURNED: list[Case] = [("one more on one rank", TURNING, torch.float64)]


class Turning:
    """Batches whose order is reversed with every pass."""

    def __init__(self, data: list[Batch]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        self.data = self.data[::-1]
        return iter(self.data)


def ask(wanted: str, data: list[Batch], dtype: torch.dtype) -> dict[str, dict[str, Tensor]] | str:
    settings = dict(ALL[wanted])
    start, r, scale = (settings.pop(name, other) for name, other in (("init_lora_weights", 0), ("r", 4), ("scale", 1)))
    data = [batch | {"x": batch["x"] * torch.tensor(scale, dtype=dtype)} for batch in data]
    turns = wanted == TURNING and dist.is_initialized() and dist.get_rank() == 1
    eva = EvaConfig(tau=1.0) if start == "eva" else None
    config = LoraConfig(r=r, target_modules=list(LAYERS), init_seed=0, init_lora_weights=start, eva_config=eva)
    try:
        return collect_statistics(Routed(dtype), config, Turning(data) if turns else data, **settings).values_by_layer
    except CalibrationError as error:
        return str(error)


def work(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    found = {}
    for split, wanted, dtype in CASES + FEWER_CASES + EMPTY + HALF_EMPTY + TURNED:
        rare, shares = SPLITS[split]
        data = batches(rare, dtype)
        found[split, wanted, dtype] = ask(wanted, data[shares[rank]] if world > 1 else data, dtype)
    torch.save(found, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        leave_group()


Found = dict[Case, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found, Found]:
    """What one process finds, and each of two."""
    folder: Path = tmp_path_factory.mktemp("statistics")
    work(0, 1, str(folder))
    run_group(work, 2, str(folder), within=600)
    whole, first, second = (torch.load(folder / name) for name in ("1-0.pt", "2-0.pt", "2-1.pt"))
    return whole, first, second


def matrices(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the tensors of a layer say, apart from the signs of singular vectors and how often data were gone over."""
    found = {name: tensors[name] for name in ("second_moment.C", "exact_moment.C", "corda_moment.C") if name in tensors}
    for name in ("gradient", "whitened_gradient"):
        if f"{name}.S" in tensors:
            found[name] = gradient_matrix(tensors, name)
            keys = ("S", "norm2", "largest", "S_half", "cross")
            found |= {key: tensors[key] for one in keys if (key := f"{name}.{one}") in tensors}
    if "moment_sketch.values" in tensors:
        V = tensors["moment_sketch.vectors"]
        found["moment_sketch"] = V * tensors["moment_sketch.values"] @ V.mT
        found["moment_sketch.trace"] = tensors["moment_sketch.trace"]
    if "principal.components" in tensors:
        V, total = tensors["principal.components"], tensors["principal.total_variance"]
        found["principal"] = V.mT * tensors["principal.singular_values"].square() / total @ V
    return found


@pytest.mark.matrix(11, each_word=False)
@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(map(str, case)))
def test_two_processes_find_what_one_does(found: tuple[Found, Found, Found], case: Case) -> None:
    whole, first, second = (one[case] for one in found)
    assert whole.keys() == first.keys() == second.keys() == set(LAYERS)
    for layer in LAYERS:
        for name, tensor in first[layer].items():
            assert torch.equal(tensor, second[layer][name]), (layer, name)
        values = matrices(first[layer])
        assert values
        for name, value in matrices(whole[layer]).items():
            tolerance = 1e-6 if case[-1] is torch.float64 else 2e-5  # sums are float32 there
            size = float(value.abs().max())
            torch.testing.assert_close(values[name], value, rtol=0, atol=tolerance * size, msg=f"{layer} {name}")


def labelled(split: str, scale: list[float]) -> Tensor:
    """The tokens (T, IN) of all batches that EVA reads, around their mean."""
    data = batches(SPLITS[split][0], torch.float64)
    x = torch.cat([batch["x"][batch["labels"] != -100] for batch in data]) * torch.tensor(scale, dtype=torch.float64)
    return x - x.mean(0)


@pytest.mark.parametrize("case", FEWER_CASES, ids=lambda case: ", ".join(case[:2]))
def test_with_fewer_directions_than_inputs_processes_agree_and_hold_as_much_as_one(
    found: tuple[Found, Found, Found], case: Case
) -> None:
    """As docs/starts.md says: bit for bit the same on all of them, but what is kept depends on the order of the data,
    so that it is that of one process where nothing is left out only."""
    split, wanted, _ = case
    whole, first, second = (one[case] for one in found)
    exact = "there are" in wanted
    for layer in LAYERS:
        assert all(torch.equal(tensor, second[layer][name]) for name, tensor in first[layer].items()), layer
    for layer in ("q", "k"):  # the others have other inputs
        x = labelled(split, FEWER[wanted]["scale"])
        best = torch.linalg.svd(x).Vh[:2]
        V, alone = (one[layer]["principal.components"] for one in (first, whole))
        assert V.shape == (2, IN)
        torch.testing.assert_close(V @ V.mT, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-10)
        if exact:
            torch.testing.assert_close(V, alone, rtol=0, atol=1e-6)
            torch.testing.assert_close(V.mT @ V, best.mT @ best, rtol=0, atol=1e-6)
        elif split == "one more on one rank":
            assert (V - alone).abs().max() > 1e-6
        for directions in (V, alone):
            held = (x @ directions.mT).square().sum() / (x @ best.mT).square().sum()
            assert 0.97 < held < 1 + 1e-9


@pytest.mark.parametrize("case", EMPTY, ids=lambda case: case[1])
def test_every_process_says_that_there_is_no_data(found: tuple[Found, Found, Found], case: Case) -> None:
    for one in found:
        assert "There was no batch to calibrate with: the data is empty" in one[case]


@pytest.mark.parametrize("case", HALF_EMPTY, ids=lambda case: case[1])
def test_every_process_says_that_half_of_the_data_is_missing(found: tuple[Found, Found, Found], case: Case) -> None:
    for one in found:
        assert "one of the two half samples is empty: their batches weigh" in one[case]


@pytest.mark.parametrize("case", TURNED, ids=lambda case: case[1])
def test_every_process_says_that_the_halves_of_one_were_mixed(found: tuple[Found, Found, Found], case: Case) -> None:
    whole, first, second = (one[case] for one in found)
    assert whole.keys() == set(LAYERS)
    for one in (first, second):
        assert "The batches came in another order, or were others, than in the pass before" in one
