"""The order of the samples: like lengths together, decided by seed and epoch alone."""

from __future__ import annotations

import pytest
import torch

from lorafa.errors import DataError
from lorafa.train.sampling import LengthSampler, lengths_of


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
    assert list(LengthSampler(sampler.lengths, 4, seed=1)) == list(sampler)


def test_fewer_samples_than_a_batch_are_all_there() -> None:
    assert sorted(LengthSampler([3, 1, 2], batch_size=8, seed=0)) == [0, 1, 2]


def test_samples_without_tokens_cannot_be_grouped() -> None:
    with pytest.raises(DataError, match=r"sample 1 is a dict without.*train_sampling_strategy='random'"):
        lengths_of([{"input_ids": [1]}, {"text": "?"}])
