"""Linear centred kernel alignment (Kornblith et al. 2019, arXiv:1905.00414)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafa.alignment.entry import MapEntry
from lorafa.alignment.maps.base import RepresentationMap, States, square


@dataclass(frozen=True)
class LinearCKA(RepresentationMap):
    """1 - ||H_T' H_S||^2 / (||H_S' H_S|| ||H_T' H_T||) with centred columns.

    A metric more than a loss: it can be 0 with the wrong geometry (arXiv:2509.25253), and is biased low unless there
    are several times as many positions as a state has numbers. It knows no rotation and no scale.
    """

    name = "cka"

    def between(self, student: States, teacher: States) -> Tensor:
        S = student.hidden - student.hidden.mean(dim=0)
        T = teacher.hidden - teacher.hidden.mean(dim=0)
        return 1 - square(T.mT @ S) / (square(S.mT @ S) * square(T.mT @ T)).sqrt()


CKA = MapEntry(settings=LinearCKA)
