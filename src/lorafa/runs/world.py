"""How many processes work on one run, and which this is: what `accelerate launch` and `torchrun` tell each of them."""

from __future__ import annotations

import os


def processes() -> int:
    """Processes of this training together; 1 where it was started alone."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first() -> bool:
    """Whether this one writes what belongs to all of them."""
    return int(os.environ.get("RANK") or 0) == 0
