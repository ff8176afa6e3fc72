"""What this machine, its versions and its packages allow: one subject a file, each checked by a small function.

Nothing here imports torch or another package into this process: one whose import fails, prints, hangs or ends the
interpreter is tried in a process of its own (:mod:`lorafa.diagnosis.trial`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafa.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lorafa.diagnosis.finding import Bench, Finding

ORDER = (
    *("machine", "python", "packages", "accelerators", "formats", "threads", "places", "names"),
    *("training", "features"),
)
"""The checks as they are made and shown: what costs nothing first."""

CHECKS: Registry[Callable[[Bench], Iterator[Finding]]] = Registry(
    "check",
    {
        "machine": "lorafa.diagnosis.machine:machine",
        "python": "lorafa.diagnosis.machine:python",
        "packages": "lorafa.diagnosis.packages:packages",
        "accelerators": "lorafa.diagnosis.devices:accelerators",
        "formats": "lorafa.diagnosis.devices:formats",
        "threads": "lorafa.diagnosis.devices:threads",
        "places": "lorafa.diagnosis.places:places",
        "names": "lorafa.diagnosis.names:names",
        "training": "lorafa.diagnosis.features:training",
        "features": "lorafa.diagnosis.features:features",
    },
)
"""A check yields its findings as they come."""
