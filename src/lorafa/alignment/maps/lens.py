"""Logit lenses: what each model would say from its inner states, compared as distributions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lorafa.alignment.entry import MapEntry
from lorafa.alignment.maps.base import ROWS, RepresentationMap, States, mean_of_rows, on_shared


@dataclass(frozen=True)
class Lens(RepresentationMap):
    """(KL(p || q) + KL(q || p)) / 2 of the distributions that the heads make of the states, in the mean.

    It has no parameters, and student and teacher may be of any width if they have one vocabulary.
    """

    name = "lens"
    reads_lens = True
    one_vocabulary = True

    def between(self, student: States, teacher: States) -> Tensor:
        look, other = student.lens, teacher.lens
        assert look is not None
        assert other is not None

        def of_rows(H: Tensor, T: Tensor) -> Tensor:
            own, theirs = on_shared(look(H), other(T))
            log_q, log_p = own.log_softmax(dim=-1), theirs.log_softmax(dim=-1)
            return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(dim=-1)

        return mean_of_rows(of_rows, student.hidden, teacher.hidden, ROWS)


LENS = MapEntry(settings=Lens)
