"""The machine, and the Python that runs here: nothing is tried."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from lorafa.costs.processor import cpu_name, quota_cpus, usable_cpus
from lorafa.costs.room import available_bytes, total_bytes
from lorafa.costs.sizes import size
from lorafa.diagnosis.finding import Bench, Finding
from lorafa.version import VERSION

OLDEST, NEWEST = (3, 10), (3, 13)
"""The versions of Python that lorafa is tested with, from and to."""
LITTLE = 2 * 2**30
"""Bytes of memory below which even the smallest model known by name is a squeeze."""


def machine(bench: Bench) -> Iterator[Finding]:
    """Processor and memory."""
    usable, quota = usable_cpus(), quota_cpus()
    of = f"{usable or 'an unknown number of'} {'core' if usable == 1 else 'cores'} for this process"
    if quota is not None and usable is not None and quota < usable:
        of += f", and the time of {quota:g} of them"
    yield Finding(
        subject="processor", state="ok", said=f"{cpu_name()}, {of}",
        facts={"name": cpu_name(), "cores": usable, "quota": quota, "system": platform.system()},
    )  # fmt: skip
    whole, free = total_bytes(), available_bytes()
    facts = {"bytes": whole, "free": free}
    if whole is None or free is None:
        yield Finding(subject="memory", state="ok", said="the system does not tell", facts=facts)
        return
    little = free < LITTLE
    yield Finding(
        subject="memory", state="note" if little else "ok", said=f"{size(whole)}, {size(free)} of it can be had",
        remedy="`lorafa plan` says what a run takes; end other programs, or take a smaller model" if little else "",
        facts=facts,
    )  # fmt: skip


def python(bench: Bench) -> Iterator[Finding]:
    """The interpreter, and where lorafa itself comes from."""
    version = platform.python_version()
    tested = OLDEST <= sys.version_info[:2] <= NEWEST
    range_ = f"{'.'.join(map(str, OLDEST))} to {'.'.join(map(str, NEWEST))}"
    yield Finding(
        subject="Python", state="ok" if tested else "note",
        said=f"{version}, {platform.system()} {platform.machine()}, {sys.executable}",
        remedy="" if tested else f"lorafa is tested with Python {range_}",
        facts={"version": version, "tested": tested, "executable": sys.executable, "platform": platform.platform()},
    )  # fmt: skip
    place = str(Path(__file__).parents[1])
    yield Finding(subject="lorafa", state="ok", said=f"{VERSION}, {place}", facts={"version": VERSION, "place": place})
