"""Angle of states: 1 minus the mean cosine."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from lorafa.alignment.entry import MapEntry
from lorafa.alignment.maps.base import RepresentationMap, States


@dataclass(frozen=True)
class Cosine(RepresentationMap):
    """1 - mean cos(h_S, h_T) over the positions: blind to the length of a state."""

    name = "cos"
    any_width = False

    def between(self, student: States, teacher: States) -> Tensor:
        return 1 - nn.functional.cosine_similarity(student.hidden, teacher.hidden, dim=-1).mean()


COS = MapEntry(settings=Cosine)
