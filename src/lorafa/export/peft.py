"""PEFT, and all that loads adapters through it: a plain LoRA file without anything beside it that is lorafa's own.

Ranks and alphas of single layers are its ``rank_pattern`` and ``alpha_pattern``, so factors are written as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from lorafa.config import LoraConfig
from lorafa.errors import CheckpointError
from lorafa.export.base import BaseFacts
from lorafa.export.entry import Exporter, in_order
from lorafa.export.update import PlainAdapter, Update
from lorafa.io.convert import with_numbers, write_plain
from lorafa.io.factors import around
from lorafa.io.find import WEIGHTS_NAME
from lorafa.io.peft_format import without_prefix
from lorafa.storage.tensors import read_tensors
from lorafa.surgery.patterns import numbers_of


class _PEFT(Exporter):
    words = "PEFT"

    def refusals(self, adapter: PlainAdapter, base: BaseFacts | None) -> Iterator[str]:
        return iter(())

    def write(self, adapter: PlainAdapter, folder: Path, base: BaseFacts | None) -> list[str]:
        numbers = {u.name: (u.rank, u.scaling * u.rank) for u in adapter.updates if u.name is not None}
        write_plain(folder, with_numbers(adapter.config, numbers), tensors_of(adapter), adapter.base)
        return []

    def read(self, folder: Path, adapter: PlainAdapter, base: BaseFacts | None) -> list[Update]:
        """The stored factors of each layer, with the rank and the scaling that the config gives it."""
        config = LoraConfig.from_pretrained(folder)
        tensors = without_prefix(read_tensors(folder / WEIGHTS_NAME)[0])
        read = []
        for update in adapter.updates:
            name = update.name or around(update.path) or update.path
            rank, alpha = numbers_of(config, name)
            if rank != update.rank:
                raise CheckpointError(f"The config written gives {name!r} rank {rank} in place of {update.rank}.")
            A, B = (tensors[f"{update.path}.{key}"] for key in update.keys)
            read.append(update.with_factors(A, B, config.scaling(rank, alpha)))
        return in_order(read, adapter)


def tensors_of(adapter: PlainAdapter) -> dict[str, Tensor]:
    """The tensors of a file, by their names in the user's model."""
    found = dict(adapter.beside)
    for update in adapter.updates:
        for key, tensor in zip(update.keys, (update.A, update.B), strict=True):
            found[f"{update.path}.{key}"] = tensor.contiguous()
        if update.bias is not None:
            found[f"{update.path}.{update.keys[1].removesuffix('.weight')}.bias"] = update.bias
    return found


PEFT = _PEFT()
