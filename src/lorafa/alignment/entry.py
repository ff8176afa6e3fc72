"""The lines of the tables of the dual objective: what is made, and the class of its own settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafa.alignment.divergences.base import Divergence
    from lorafa.alignment.maps.base import RepresentationMap
    from lorafa.alignment.teachers.base import Teacher


@dataclass(frozen=True, kw_only=True)
class DivergenceEntry:
    """A divergence, which is its own settings."""

    settings: type[Divergence]

    def __call__(self, **own: Any) -> Divergence:
        return self.settings(**own)


@dataclass(frozen=True, kw_only=True)
class MapEntry:
    """A distance of inner states, which is its own settings."""

    settings: type[RepresentationMap]

    def __call__(self, **own: Any) -> RepresentationMap:
        return self.settings(**own)


@dataclass(frozen=True, kw_only=True)
class TeacherEntry:
    """A teacher that is made of the student."""

    make: Callable[..., Teacher]
    settings: type[Any] | None = None
    """The class of its own settings, whose fields ``make`` takes by name."""

    def __call__(self, **own: Any) -> Teacher:
        return self.make(**own)
