"""Where a run happened: enough to tell two measurements apart, nothing about who ran it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch

from lorafa.costs.processor import cpu_name, usable_cpus
from lorafa.processes import world_size
from lorafa.version import VERSION

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "datasets", "numpy", "hydra-core")


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Versions, processor and threads as they are now; ``command`` is recorded as it was typed."""
    return {
        "lorafa": VERSION,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "threads": torch.get_num_threads(),
        "processes": world_size(),
        "accelerators": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": list(command),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
