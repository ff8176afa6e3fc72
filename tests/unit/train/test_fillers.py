"""Rows that accelerate repeats to fill a round are told apart, for every number of rows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from lorafa.train import fillers
from lorafa.train.fillers import Filler, Rounds


def accelerator(world: int, last: bool = True, **loader: Any) -> SimpleNamespace:
    dealt = {"split_batches": False, "dispatch_batches": None, "even_batches": True} | loader
    return SimpleNamespace(
        num_processes=world,
        dataloader_config=SimpleNamespace(**dealt),
        gradient_state=SimpleNamespace(end_of_dataloader=last),
    )


def batch(rows: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.tensor(rows)[:, None].repeat(1, 3)
    return {"input_ids": ids, "labels": ids.clone()}


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    monkeypatch.setattr(fillers, "rank", lambda: rank)
    monkeypatch.setattr(fillers, "world_size", lambda: world)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("rows", range(1, 20))
def test_every_row_counts_once(monkeypatch: pytest.MonkeyPatch, rows: int, size: int, world: int) -> None:
    counted: list[int] = []
    masked: list[int] = []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        own = list(BatchSamplerShard(BatchSampler(range(rows), size, drop_last=False), world, rank))
        for number, dealt in enumerate(own, 1):
            rounds = Rounds(accelerator(world, last=number == len(own)), rows, size)
            (left,) = rounds.trimmed(iter([batch(dealt)]))
            assert len(left["input_ids"]) >= 1  # every process calls its model
            assert isinstance(left, Filler) == bool((left["labels"] == -100).all())
            counted += left["labels"][:, 0][left["labels"][:, 0] != -100].tolist()
            whole = rounds.masked(batch(dealt))
            assert len(whole["input_ids"]) == len(dealt)
            masked += whole["labels"][:, 0][whole["labels"][:, 0] != -100].tolist()
    assert sorted(counted) == sorted(masked) == list(range(rows))


@pytest.mark.parametrize("case", ["no length", "one process", "not dealt out", "not the last", "other rows"])
def test_what_is_not_known_to_be_repeated_counts(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    as_process(monkeypatch, 1, 2)
    rounds = {
        "no length": Rounds(accelerator(2), None, 2),
        "one process": Rounds(accelerator(1), 5, 2),
        "not dealt out": Rounds(accelerator(2, dispatch_batches=True), 5, 2),
        "not the last": Rounds(accelerator(2, last=False), 5, 2),
        "other rows": Rounds(accelerator(2), 5, 4),
    }[case]
    given = batch([0, 1])
    (left,) = rounds.trimmed(iter([given]))
    assert left is given
    assert torch.equal(rounds.masked(given)["labels"], given["labels"])
