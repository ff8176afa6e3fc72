"""Distance after the best rotation (orthogonal Procrustes; Schonemann 1966)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafa.alignment.entry import MapEntry
from lorafa.alignment.maps.base import RepresentationMap, States, square


@dataclass(frozen=True)
class Procrustes(RepresentationMap):
    """1 - ||H_S' H_T||_* / (||H_S|| ||H_T||), in [0, 1]: 0 if and only if a rotation and a scale make them equal."""

    name = "procrustes"

    def between(self, student: States, teacher: States) -> Tensor:
        S, T = student.hidden, teacher.hidden
        cross = S.mT @ T
        with torch.no_grad():  # the gradient of the nuclear norm of M = U diag(s) V' is U V'
            usable = bool(cross.isfinite().all())  # a decomposition of inf or nan is an error of its own
            U, _, Vh = torch.linalg.svd(cross if usable else torch.zeros_like(cross), full_matrices=False)
            rotation: Tensor = U @ Vh
        shared: Tensor = (cross * rotation).sum()
        return 1 - shared / (square(S) * square(T)).sqrt()


PROCRUSTES = MapEntry(settings=Procrustes)
