"""The order of the samples, decided by the seed and the epoch alone: any, or batches of like length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from lorafa.errors import DataError

WINDOW_BATCHES = 50
"""Most batches that are sorted together; fewer on small data sets, so that batches differ between epochs."""


class OrderSampler(Sampler[int]):
    """Indices in an order that depends on ``seed`` and the epoch only, never on the global generator.

    A resumed epoch sees the samples in the order of the original one. No two pairs of seed and epoch share a generator,
    so that the runs of a comparison with other seeds are independent.

    Args:
        rules: 1 seeds by ``seed + epoch``, as before there was another way: the second epoch of a seed is then the
            first one of the next seed.
    """

    def __init__(self, count: int, seed: int, rules: int = 2) -> None:
        self.count = count
        self.seed = seed
        self.rules = rules
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch the next iteration orders; the training loop calls it."""
        self.epoch = epoch

    def generator(self) -> torch.Generator:
        """The random numbers of the epoch."""
        if self.rules == 1:
            return torch.Generator().manual_seed(self.seed + self.epoch)
        digest = hashlib.sha256(f"order of rows, seed {self.seed}, epoch {self.epoch}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.count, generator=self.generator()).tolist())


class LengthSampler(OrderSampler):
    """Indices in an order whose every ``batch_size`` neighbours have like lengths, so that little is padded.

    Samples are shuffled, sorted by length within windows, cut into batches, and the batches shuffled. The longest full
    batch comes first: a run that does not fit into memory fails in its first step.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, rules: int = 2) -> None:
        super().__init__(len(lengths), seed, rules)
        self.lengths = lengths
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        generator = self.generator()
        count, size = len(self.lengths), self.batch_size
        order = torch.randperm(count, generator=generator).tolist()
        window = size * max(1, min(WINDOW_BATCHES, count // (4 * size)))
        for start in range(0, count, window):
            order[start : start + window] = sorted(order[start : start + window], key=self._length, reverse=True)
        batches = [order[start : start + size] for start in range(0, count, size)]
        short = [batches.pop()] if count % size else []  # stays last: the loader cuts every batch_size indices
        batches = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
        if batches:
            longest = max(range(len(batches)), key=lambda i: self._length(batches[i][0]))
            batches.insert(0, batches.pop(longest))
        return iter([index for batch in batches + short for index in batch])

    def _length(self, index: int) -> int:
        return self.lengths[index]


def lengths_of(samples: Iterable[Any]) -> Sequence[int]:
    """Tokens of every sample, each a mapping with ``input_ids`` or an object that has them; a sequence may know their
    ``lengths``.

    Raises:
        DataError: a sample has no ``input_ids``.
    """
    known: Sequence[int] | None = getattr(samples, "lengths", None)
    if known is not None:
        return known
    return [_length(sample, index) for index, sample in enumerate(samples)]


def tokens_of(sample: Any) -> Sequence[int] | None:
    """The token ids of a sample, a mapping with ``input_ids`` or an object that has them; None of another one."""
    return sample.get("input_ids") if isinstance(sample, Mapping) else getattr(sample, "input_ids", None)


def _length(sample: Any, index: int) -> int:
    tokens = tokens_of(sample)
    if tokens is None:
        raise DataError(
            f"Batches can only be grouped by length where samples have input_ids; sample {index} is a "
            f"{type(sample).__name__} without. Encode the data first, or set train_sampling_strategy='random'."
        )
    return len(tokens)
