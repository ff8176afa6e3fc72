"""Adapters with one rank and one scaling for all layers, which is all that some programs read of a config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from lorafa.config import CONFIG_NAME
from lorafa.export.base import BaseFacts
from lorafa.export.entry import Exporter, in_order, plain_layers_only
from lorafa.export.peft import tensors_of
from lorafa.export.update import PlainAdapter, Update
from lorafa.io.convert import write_plain
from lorafa.io.find import WEIGHTS_NAME
from lorafa.io.peft_format import without_prefix
from lorafa.numerics.low_rank import padded
from lorafa.storage.tensors import read_tensors
from lorafa.storage.whole import read_json


def common_scaling(adapter: PlainAdapter) -> tuple[int, int]:
    """The largest rank r and the alpha for all layers: that of most of them if it is a whole number, else r."""
    rank = adapter.rank
    scalings = [update.scaling for update in adapter.updates]
    alpha = max(set(scalings), key=lambda s: (scalings.count(s), s)) * rank
    return rank, int(alpha) if alpha == int(alpha) else rank


def rescaled(B: Tensor, factor: float) -> Tensor:
    """factor B, exactly: in the dtype of B for a power of two, else in float32 at least."""
    if factor == 1.0:
        return B
    exact = abs(factor) > 0 and torch.frexp(torch.tensor(factor, dtype=torch.float64)).mantissa.abs() == 0.5
    wide = B if exact else B.to(torch.promote_types(B.dtype, torch.float32))
    return wide * factor


def at_one_scaling(update: Update, rank: int, scaling: float) -> Update:
    """The same update with zeros up to the rank, and what its scaling is more than the common one in B."""
    A, B = padded(update.A, rescaled(update.B, update.scaling / scaling), rank)
    return update.with_factors(A, B, scaling)


class Uniform(Exporter):
    """A server of linear layers that reads ``r`` and ``lora_alpha`` of the config, and no patterns."""

    largest_rank: ClassVar[int | None] = None
    """The largest rank it can be started with."""
    tables: ClassVar[bool] = True
    """Whether it adds updates to rows of embedding tables."""

    def refusals(self, adapter: PlainAdapter, base: BaseFacts | None) -> Iterator[str]:
        yield from plain_layers_only(adapter, self.words, tables=self.tables)
        if self.largest_rank is not None and adapter.rank > self.largest_rank:
            yield (
                f"rank {adapter.rank} is larger than {self.largest_rank}, the most it can be started with: give a "
                f"lower one (--rank {self.largest_rank})"
            )

    def write(self, adapter: PlainAdapter, folder: Path, base: BaseFacts | None) -> list[str]:
        rank, alpha = common_scaling(adapter)
        updates = tuple(at_one_scaling(update, rank, alpha / rank) for update in adapter.updates)
        config = replace(
            adapter.config, r=rank, lora_alpha=alpha, rank_pattern={}, alpha_pattern={},
            target_modules=sorted(update.path for update in updates),
            exclude_modules=None, layers_to_transform=None, layers_pattern=None,
        )  # fmt: skip
        write_plain(folder, config, tensors_of(replace(adapter, updates=updates)), adapter.base)
        return [*_padded(adapter, rank), self.start_with(rank)]

    def start_with(self, rank: int) -> str:
        """How the server is started so that it takes adapters of the rank."""
        return f"Start {self.words} with --max-lora-rank {rank} or more."

    def read(self, folder: Path, adapter: PlainAdapter, base: BaseFacts | None) -> list[Update]:
        """alpha / r of the config on every pair of factors, whatever else the config says."""
        config = read_json(folder / CONFIG_NAME)
        tensors = without_prefix(read_tensors(folder / WEIGHTS_NAME)[0])
        scaling = config["lora_alpha"] / config["r"]
        read = []
        for update in adapter.updates:
            A, B = (tensors[f"{update.path}.{key}"] for key in update.keys)
            read.append(update.with_factors(A, B, scaling))
        return in_order(read, adapter)


def _padded(adapter: PlainAdapter, rank: int) -> list[str]:
    lower = sum(update.rank < rank for update in adapter.updates)
    scalings = {update.scaling for update in adapter.updates}
    found = []
    if lower:
        found.append(f"{lower} of {len(adapter.updates)} layers have a lower rank: zeros fill them up to {rank}.")
    if len(scalings) > 1:
        found.append(f"Layers are scaled by {len(scalings)} factors; what differs is in B.")
    return found
