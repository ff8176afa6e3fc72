"""What the layers of one expert are called, and which stacked parameter holds them."""

from __future__ import annotations

import re

from lorafa.errors import CheckpointError
from lorafa.io.layouts.base import A, B
from lorafa.io.layouts.names import BaseNames

STACKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")),
    "down_proj": (("w2",), ("down_proj",)),
    "up_proj": (("up_proj",),),
    "gate_proj": (("gate_proj",),),
}
"""A stacked parameter -> names of an expert's layers whose rows it holds one after the other."""
ONE_EXPERT = re.compile(r"^(.*experts)\.(\d+)\.(\w+)$")
EXPERTS = re.compile(r"(^|\.|_)experts$")
KNOWN = frozenset({A, B})
_BLOCKS = (("block_sparse_moe.", "mlp."), ("mlp.", "block_sparse_moe."), ("feed_forward.", "mlp."))
"""What transformers 4 and 5 call the block that experts are in."""


def experts_at(owner: str, base: BaseNames) -> str | None:
    """The module of the model that ``owner``, the experts of a file, stands for."""
    home = base.home(owner)
    if home is not None:
        return home
    head, dot, last = owner.rpartition("experts")
    others = (head.removesuffix(old) + new + dot + last for old, new in _BLOCKS if head.endswith(old))
    return next((other for other in others if other in base.modules), None)


def require_in_order(path: object, owner: str, base: BaseNames) -> None:
    """Raises CheckpointError where the rows of gate and up are not one after the other in the stack."""
    if getattr(base.modules[owner], "is_concatenated", True) is False:
        raise CheckpointError(
            f"{path}: {owner} of this model holds the rows of gate and up in turns, so an adapter of single experts "
            "has no place in it that is known. Nothing was loaded."
        )
