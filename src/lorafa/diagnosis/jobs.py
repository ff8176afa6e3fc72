"""The trials themselves, in the process that is there for them.

A trial is a word: the name of a function here, and behind a colon what it is about. It returns what json holds.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

STEPS = 3
"""Steps of the training that is tried."""
MOST = 4000
"""Characters of an error that are said."""
SIZES = {"cpu": 512}
"""Rows of the square matrices that number formats are timed with; on accelerators :data:`LARGE`."""
LARGE = 4096


def main() -> None:
    """Make the trials that the command line names, and write what becomes of each."""
    results, written = os.fdopen(os.dup(1), "w", encoding="utf-8"), os.dup(2)
    os.dup2(2, 1)  # what packages write is no result
    for job in sys.argv[1:]:
        _say(results, begins=job)
        error, value = None, None
        try:
            name, _, subject = job.partition(":")
            value = JOBS[name](subject)
        except BaseException as raised:  # SystemExit and whatever else a package raises
            error = " ".join(f"{type(raised).__name__}: {raised}".split())[:MOST]
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):  # a package may have closed or replaced it
                continue
        _say(results, job=job, error=error, value=value, end=os.fstat(written).st_size)
    results.flush()
    os._exit(0)  # what packages do at the end is no trial


def _say(results: Any, **what: Any) -> None:
    results.write(json.dumps(what) + "\n")
    results.flush()


def _device() -> Any:
    """The accelerator, or the processor where there is none."""
    import torch

    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def use(subject: str) -> None:
    """Import a module, and ask it for a name where one stands behind: ``transformers=Trainer``."""
    module, _, name = subject.partition("=")
    found = importlib.import_module(module)
    if name:
        getattr(found, name)


def peft_is_there(_: str) -> bool:
    """Whether something has imported `peft` before any program could: `lorafa run` would be refused."""
    return "peft" in sys.modules


def served(_: str) -> str:
    """What ``import peft`` gives under lorafa's finder."""
    import lorafa.compat  # noqa: F401

    return str(importlib.import_module("peft").__spec__.origin)  # type: ignore[union-attr]


def devices(_: str) -> dict[str, Any]:
    """The build of torch, and the accelerators it can use."""
    import torch

    build = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return {"build": build, "found": [] if kind is None else list(_accelerators(kind.type))}


def _accelerators(kind: str) -> Iterator[dict[str, Any]]:
    import torch

    for number in range(torch.accelerator.device_count()):
        about = getattr(torch.get_device_module(kind), "get_device_properties", lambda _: None)(number)
        yield {
            "device": f"{kind}:{number}",
            "name": str(getattr(about, "name", kind)),
            "bytes": getattr(about, "total_memory", None),
        }


def speeds(_: str) -> dict[str, Any]:
    """How many products of square matrices a second each number format does, on the accelerator or the processor."""
    import torch

    device = _device()
    found: dict[str, float | None] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        try:
            found[str(dtype).removeprefix("torch.")] = _products(device, dtype)
        except (RuntimeError, TypeError):  # no product in this format here
            found[str(dtype).removeprefix("torch.")] = None
    return {"device": device.type, "products": found}


def _products(device: Any, dtype: Any) -> float:
    import torch

    size = SIZES.get(device.type, LARGE)
    x = torch.randn(size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(4):  # the first makes ready
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 1 / best


def threads(_: str) -> dict[str, int]:
    """Threads that torch takes."""
    import torch

    return {"threads": torch.get_num_threads(), "between_operations": torch.get_num_interop_threads()}


def step(_: str) -> float:
    """One step of an adapter on a tiny model: by how much the loss fell."""
    import torch

    from lorafa.config import LoraConfig
    from lorafa.peft_model import get_peft_model

    torch.manual_seed(0)
    device = _device()
    base = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).to(device)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    x = torch.randn(16, 8, device=device)
    losses: list[float] = []
    while len(losses) < STEPS:
        loss = model(x).square().mean()
        losses.append(float(loss))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if not losses[-1] < losses[0]:
        raise ArithmeticError(f"the loss of three steps does not fall: {losses}")
    return losses[0] - losses[-1]


def commands(_: str) -> None:
    """What `lorafa train` loads before it begins."""
    importlib.import_module("lorafa.train.recipe")


def quantize(way: str) -> None:
    """A small layer of codes, and a product with it; on the accelerator where there is one."""
    import torch

    from lorafa.models import QUANTIZERS

    device = _device()
    layer = QUANTIZERS.get(way)(torch.randn(64, 64, device=device), None)
    layer(torch.randn(4, 64, device=device)).sum().item()


def export(target: str) -> None:
    """The writer of an export target."""
    from lorafa.export import EXPORTERS

    EXPORTERS.get(target)


def track(tracker: str) -> None:
    """A tracker, and its package."""
    from lorafa.train.trackers import TRACKERS

    importlib.import_module(TRACKERS.get(tracker).package)


JOBS: Mapping[str, Callable[[str], Any]] = {
    "use": use, "peft_is_there": peft_is_there, "served": served, "devices": devices, "speeds": speeds,
    "threads": threads, "step": step, "commands": commands, "quantize": quantize, "export": export, "track": track,
}  # fmt: skip
