"""The dual objective: the task's loss and the discrepancy to a teacher, minimized together.

    J = E[task loss] + weight * E[D(teacher || student)]

D is a divergence of distributions over next tokens, one a file of :mod:`lorafa.alignment.divergences`, or a distance of
inner states, one a file of :mod:`lorafa.alignment.maps`.
"""

from typing import TYPE_CHECKING, Any

from lorafa.alignment.registries import DIVERGENCES, MAPS, TEACHERS

if TYPE_CHECKING:
    from lorafa.alignment.alignment import Alignment
    from lorafa.alignment.teachers.cached import Cached

__all__ = ["DIVERGENCES", "MAPS", "TEACHERS", "Alignment", "Cached"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Bring in what needs torch when it is first asked for: settings are read without."""
        if name == "Alignment":
            from lorafa.alignment.alignment import Alignment

            return Alignment
        if name == "Cached":
            from lorafa.alignment.teachers.cached import Cached

            return Cached
        raise AttributeError(f"module 'lorafa.alignment' has no attribute {name!r}")
