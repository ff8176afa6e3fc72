"""Squared error of states, relative to the teacher's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafa.alignment.entry import MapEntry
from lorafa.alignment.maps.base import RepresentationMap, States, square


@dataclass(frozen=True)
class RelativeMSE(RepresentationMap):
    """||H_S - H_T||^2 / ||H_T||^2: 1 for a student whose states are 0."""

    name = "mse"
    any_width = False

    def between(self, student: States, teacher: States) -> Tensor:
        return (student.hidden - teacher.hidden).square().sum() / square(teacher.hidden)


MSE = MapEntry(settings=RelativeMSE)
