"""The dual objective: the task's loss and the discrepancy to a teacher, minimized together.

    J = E[task loss] + weight * E[D(teacher || student)]

D is a divergence of distributions over next tokens, one a file of :mod:`lorafa.alignment.divergences`, or a distance of
inner states, one a file of :mod:`lorafa.alignment.maps`.
"""

from lorafa.alignment.alignment import Alignment
from lorafa.alignment.registries import DIVERGENCES, MAPS, TEACHERS

__all__ = ["DIVERGENCES", "MAPS", "TEACHERS", "Alignment"]
