"""Similarities between positions: the geometry of the states, whatever the axes (as in arXiv:1907.09682)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafa.alignment.entry import MapEntry
from lorafa.alignment.maps.base import RepresentationMap, States, square


@dataclass(frozen=True)
class Gram(RepresentationMap):
    """||K_S - K_T||^2 / ||K_T||^2 with K = H H' / ||H||^2, the inner products of all positions, (n, n).

    0 if and only if the states are equal up to a rotation and a scale. No (n, n) matrix is formed:
    <H H', G G'> = ||H' G||^2.
    """

    name = "gram"

    def between(self, student: States, teacher: States) -> Tensor:
        S = student.hidden / square(student.hidden).sqrt()
        T = teacher.hidden / square(teacher.hidden).sqrt()
        of_teacher = square(T.mT @ T)
        return (square(S.mT @ S) - 2 * square(S.mT @ T) + of_teacher) / of_teacher


GRAM = MapEntry(settings=Gram)
