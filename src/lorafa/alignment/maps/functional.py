"""The difference of states as far as the output feels it: in the Fisher metric of the teacher's distribution."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafa.alignment.entry import MapEntry
from lorafa.alignment.maps.base import ROWS, RepresentationMap, States, mean_of_rows


@dataclass(frozen=True)
class Functional(RepresentationMap):
    """1/2 Var_p(z_S - z_T) in the mean, z the logits that the teacher's head makes of the states, p = softmax(z_T).

    To second order that is KL(p || q), whatever the states have in directions that the head does not read: the metric
    is that of the output's gradient, W' (diag p - p p') W.
    """

    name = "functional"
    reads_lens = True
    any_width = False

    def between(self, student: States, teacher: States) -> Tensor:
        look = teacher.lens
        assert look is not None

        def of_rows(H: Tensor, T: Tensor) -> Tensor:
            z = look(T)
            p, difference = z.softmax(dim=-1), look(H) - z
            mean = (p * difference).sum(dim=-1, keepdim=True)
            return 0.5 * (p * (difference - mean).square()).sum(dim=-1)

        return mean_of_rows(of_rows, student.hidden, teacher.hidden, ROWS)


FUNCTIONAL = MapEntry(settings=Functional)
