"""What torch computes on here: accelerators, which number formats are fast, and how many threads there are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafa.costs.processor import quota_cpus, usable_cpus
from lorafa.costs.sizes import size
from lorafa.diagnosis.finding import Bench, Finding, State
from lorafa.errors import shorten

DRIVERS: Mapping[str, tuple[str, str, str]] = {
    "cuda": ("dev/nvidia[0-9]*", "NVIDIA", "CUDA"),
    "hip": ("dev/kfd", "AMD", "ROCm"),
}
"""A build of torch -> the files of the driver it is for, whose devices those are, and what the build is called."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that set how many threads a product takes."""
FAST = 1.2
"""How many times as fast as float32 a format must be to be called fast: times of small products vary by a tenth."""


def accelerators(bench: Bench, root: Path = Path("/")) -> Iterator[Finding]:
    """Each accelerator with its memory, and devices that this torch was not built for."""
    made = bench.outcome("devices")
    if made is None or not made.well:
        return
    found, build = made.value["found"], made.value["build"]
    for one in found:
        memory = f", {size(one['bytes'])}" if one["bytes"] else ""
        yield Finding(subject=one["device"], state="ok", said=f"{one['name']}{memory}", facts=one)
    if found:
        return
    unused = [kind for kind, (files, _, _) in DRIVERS.items() if any(root.glob(files))]
    for kind in unused:
        _, maker, platform = DRIVERS[kind]
        said = f"this torch is built for {platform} and cannot use it" if build[kind] else "this torch is not for it"
        yield Finding(
            subject="accelerator", state="note", said=f"there is a device of {maker}, and {said}",
            remedy=f"install a torch for {platform} that fits the driver: https://pytorch.org/get-started/locally",
            facts={"build": build},
        )  # fmt: skip
    if not unused:
        yield Finding(
            subject="accelerator", state="ok", said="none: the processor computes", facts={"build": build, "found": []}
        )


def formats(bench: Bench) -> Iterator[Finding]:
    """Which number formats are fast here, measured on a product of two matrices."""
    made = bench.outcome("speeds")
    if made is None or not made.well:
        return
    device, products = made.value["device"], made.value["products"]
    ratio = {name: each / products["float32"] for name, each in products.items() if each and products["float32"]}
    ratio.pop("float32", None)
    facts = {"device": device, "products_a_second": products}
    if not ratio:
        yield Finding(subject="formats", state="ok", said=f"float32 alone can be multiplied on {device}", facts=facts)
        return
    times = ", ".join(f"{name} {each:.2g}" for name, each in ratio.items())
    fast = ", ".join(name for name, each in ratio.items() if each >= FAST) or "float32 alone"
    yield Finding(
        subject="formats", state="ok",
        said=f"fast on {device}: {fast} (products a second, as a multiple of float32's: {times})",
        facts=facts | {"fast": [name for name, each in ratio.items() if each >= FAST]},
    )  # fmt: skip


def threads(bench: Bench) -> Iterator[Finding]:
    """Whether torch takes as many threads as there are processors for it."""
    made = bench.outcome("threads")
    if made is None or not made.well:
        return
    taken, cores, quota = made.value["threads"], usable_cpus(), quota_cpus()
    room = min((each for each in (cores, quota) if each), default=None)
    set_by = {name: os.environ[name] for name in THREADS if name in os.environ}
    named = f" ({shorten(f'{name}={value}' for name, value in set_by.items())})" if set_by else ""
    facts: dict[str, Any] = {**made.value, "cores": cores, "quota": quota, "set_by": set_by}

    def finding(state: State, said: str, remedy: str = "") -> Finding:
        return Finding(subject="threads", state=state, said=said, remedy=remedy, facts=facts)

    whole = max(1, round(room)) if room else None
    if room is not None and whole is not None and taken > max(1, room):
        yield finding(
            "note", f"torch takes {taken}{named}, and there is room for {room:g}: they wait for each other",
            f"OMP_NUM_THREADS={whole}, or threads={whole} of `lorafa train`",
        )  # fmt: skip
    elif set_by and whole is not None and 2 * taken <= whole:
        yield finding(
            "note", f"torch takes {taken}{named}, and there is room for {room:g}",
            f"unset {' and '.join(set_by)}, unless several processes share this machine",
        )  # fmt: skip
    else:
        yield finding("ok", f"torch takes {taken}{named}")
