"""The student as it was at the last refresh."""

from __future__ import annotations

from torch import nn

from lorafa.alignment.entry import TeacherEntry
from lorafa.alignment.teachers.base import OfTheAdapters, Refreshed, copied


class Snapshot(OfTheAdapters):
    """Adapters, and whatever else is trained, as they were; frozen in between (CGTR, arXiv:2606.03532)."""

    name = "snapshot"

    def refresh(self, model: nn.Module) -> Refreshed:
        self.require_same(model)
        self.values = copied(model)
        return Refreshed()


SNAPSHOT = TeacherEntry(make=Snapshot)
