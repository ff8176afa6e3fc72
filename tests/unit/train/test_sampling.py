"""The order of the samples: any, or like lengths together, decided by seed and epoch alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorafa.errors import DataError
from lorafa.train.sampling import LengthSampler, OrderSampler, lengths_of


def test_grouped_batches_have_like_lengths_and_the_longest_comes_first() -> None:
    lengths = torch.randint(1, 500, (203,), generator=torch.Generator().manual_seed(0)).tolist()
    order = list(LengthSampler(lengths, batch_size=4, seed=0))
    assert sorted(order) == list(range(203))
    batches = [[lengths[i] for i in order[start : start + 4]] for start in range(0, 203, 4)]
    assert max(batches[0]) == max(lengths)
    padded, real = sum(len(batch) * max(batch) for batch in batches), sum(lengths)
    assert padded < 1.1 * real < sum(4 * max(lengths[i : i + 4]) for i in range(0, 203, 4)) / 1.3


def test_order_depends_on_seed_and_epoch_alone() -> None:
    sampler = LengthSampler(list(range(1, 41)), batch_size=4, seed=0)
    first = list(sampler)
    torch.manual_seed(99)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


@pytest.mark.parametrize("make", [OrderSampler, lambda count, *rest: LengthSampler(list(range(count)), 1, *rest)])
def test_no_two_seeds_have_an_epoch_in_common(make: Any) -> None:
    orders = set()
    for seed in range(5):
        sampler = make(40, seed)
        for epoch in range(5):
            sampler.set_epoch(epoch)
            order = tuple(sampler)
            assert sorted(order) == list(range(40))
            orders.add(order)
    assert len(orders) == 25


def test_runs_that_were_begun_before_keep_their_order() -> None:
    lengths = list(range(1, 41))
    sampler = LengthSampler(lengths, 4, 0, rules=1)
    sampler.set_epoch(1)
    assert list(sampler) == list(LengthSampler(lengths, 4, 1, rules=1))


def test_fewer_samples_than_a_batch_are_all_there() -> None:
    assert sorted(LengthSampler([3, 1, 2], batch_size=8, seed=0)) == [0, 1, 2]


def test_samples_without_tokens_cannot_be_grouped() -> None:
    with pytest.raises(DataError, match=r"sample 1 is a dict without.*train_sampling_strategy='random'"):
        lengths_of([{"input_ids": [1]}, {"text": "?"}])
