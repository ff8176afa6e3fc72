"""Layers that are given the same inputs: what depends on these alone is computed once, and not where that was wrong.

Who shares with whom is found in the first call of the model in a statistic's first pass: of the layers that are given
one tensor, the first (with as large a rank) becomes the owner and counts for all. Where a later call, or another
process, shows other inputs, the layer starts again, in passes of its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lorafa.backends.offload import device_of
from lorafa.calibration.base import Statistic
from lorafa.processes import distributed, gathered


class Entry:
    """One statistic of one layer, on its way through the passes."""

    def __init__(self, layer: str, name: str, statistic: Statistic) -> None:
        self.layer, self.name, self.statistic = layer, name, statistic
        self.passes = 0
        self.done = False
        self.dtype: torch.dtype | None = None
        """The dtype of the inputs; None until there was one."""
        self.owner: Entry | None = None
        """The same statistic of another layer with the same inputs, which does the work."""
        self.parted = False
        """Whether the owner has had other inputs in this pass: then nothing of it counts."""
        self.alone = False
        """Whether it is to have no owner."""

    @property
    def value(self) -> Statistic:
        """What serves the layer."""
        return self.statistic if self.owner is None else self.owner.statistic

    def start_again(self) -> None:
        """Go back to before the first pass, without an owner."""
        self.statistic = type(self.statistic)(self.statistic.layer)
        self.owner, self.parted, self.alone, self.passes = None, False, True, 0


class Sharing:
    """The inputs of one pass: which entries were given the same."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.calls = 0
        """Calls of the model so far."""
        self.inputs: dict[Entry, list[weakref.ref[Tensor]]] = {}
        """The inputs each entry was given in this call, in order, for statistics that share inputs."""
        self.first: dict[tuple[str, int], Entry] = {}
        """(statistic, identity of an input) -> who had it first in this call."""

    def next_call(self) -> None:
        """Called before each call of the model, and after the last."""
        for entry in self.entries:
            if entry.owner is not None and len(self.inputs.get(entry, ())) != len(self.inputs.get(entry.owner, ())):
                entry.parted = True
        self.inputs.clear()
        self.first.clear()
        self.calls += 1

    def counts(self, entry: Entry, x: Tensor) -> bool:
        """Whether the entry is to count this input itself: no other that was given it does."""
        if not entry.statistic.shares_input or entry.alone:
            return True
        number = len(self.inputs.setdefault(entry, []))
        self.inputs[entry].append(weakref.ref(x))
        if self.calls <= 1 and not entry.passes and not number:
            owner = self.first.get((entry.name, id(x)), entry)
            if owner is entry or self.inputs[owner][0]() is not x:  # an identity is used again
                self.first[entry.name, id(x)] = entry
            elif owner.statistic.layer.rank >= entry.statistic.layer.rank:
                entry.owner = owner
        if entry.owner is None:
            return True
        theirs = self.inputs.get(entry.owner, [])
        entry.parted |= number >= len(theirs) or theirs[number]() is not x
        return False


def agree(entries: list[Entry], layers: Mapping[str, nn.Module]) -> list[Entry]:
    """After a pass: the entries for which it counts, with an owner on all ranks or on none; the others start again.

    An owner may do the work of another only if on every rank both had the same inputs, or none. A rank that saw
    nothing of a layer adds no rows, of the dtype the others saw: what is added up must be the same tensors on all.
    """
    places = {entry: place for place, entry in enumerate(entries)}
    ranks = gathered([(e.dtype, None if e.owner is None else places[e.owner], e.parted) for e in entries])
    again: set[Entry] = set()
    for entry, said in zip(entries, zip(*ranks, strict=True), strict=True):
        seen = [one for one in said if one[0] is not None]
        owners = {owner for _, owner, _ in seen}
        owner = next(iter(owners), None)
        apart = owner is not None and [rank[owner][0] for rank in ranks] != [dtype for dtype, _, _ in said]
        if len(owners) > 1 or apart or any(parted for _, _, parted in said):
            again.add(entry)
            continue
        entry.owner = None if owner is None else entries[owner]
        entry.dtype = entry.dtype or (seen[0][0] if seen else None)
        if distributed() and entry.owner is None and entry.dtype is not None:
            _count_nothing(entry.statistic, entry.dtype, layers[entry.layer])
    again |= {entry for entry in entries if entry.owner in again}
    for entry in again:
        entry.start_again()
    return [entry for entry in entries if entry not in again]


def _count_nothing(statistic: Statistic, dtype: torch.dtype, layer: nn.Module) -> None:
    x = torch.empty(0, statistic.layer.in_, dtype=dtype, device=device_of(layer))
    statistic.update(x, x.new_empty(0, statistic.layer.out) if statistic.reads_gradient else None)
